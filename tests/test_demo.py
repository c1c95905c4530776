"""demo.py: the same bytes from the same seed, faces that dlib finds, generators that break one relation each."""

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

from drawing.coordinates import true_points
from drawing.face import GENERATORS, sample_face
from drawing.render import draw_face, render


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_layout_and_repeatability(tmp_path):
    run_script("demo.py", "--output_dir", "one", "--real", 5, "--fake", 2, "--workers", 1, cwd=tmp_path)
    first = contents(tmp_path / "one")
    assert len(first) == 5 + 2 * len(GENERATORS) and len(GENERATORS) >= 3
    assert {name.rsplit("/", 1)[0] for name in first} == {"real/Consistent", *(f"fake/{name}" for name in GENERATORS)}
    assert len(set(first.values())) == len(first), "no two pictures are alike"
    for path in (tmp_path / "one").rglob("*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224))

    (tmp_path / "one/real/Consistent/00003.png").unlink()
    stamp = (tmp_path / "one/real/Consistent/00002.png").stat().st_mtime_ns
    run_script("demo.py", "--output_dir", "one", "--real", 5, "--fake", 2, "--workers", 2, cwd=tmp_path)
    assert contents(tmp_path / "one") == first
    assert (tmp_path / "one/real/Consistent/00002.png").stat().st_mtime_ns == stamp, "what was there is kept"


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_generator_changes_the_face_and_not_the_rest(generator):
    """Redrawn from the same parameters, a fake differs from its real twin within the face and nowhere else."""
    changed = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        face = sample_face(rng)
        face.noise = 0.0
        real = render(face).astype(int)
        GENERATORS[generator](face, rng)
        difference = np.abs(render(face).astype(int) - real).max(axis=2)
        left, right, chin = (np.array(true_points(face)[name]) for name in ("left_eye", "right_eye", "chin"))
        centre, reach = (left + right + 2 * chin) / 4, 1.15 * np.linalg.norm(chin - (left + right) / 2)
        rows, columns = np.indices(difference.shape)
        outside = np.hypot(columns - centre[0], rows - centre[1]) > reach
        assert difference[outside].max() <= 2
        changed += difference.max() > 30
    assert changed == 5


def test_other_sizes_show_the_same_face():
    face = sample_face(np.random.default_rng(1))
    small, large = render(face, 224), render(face, 448)
    shrunk = np.asarray(Image.fromarray(large).resize((224, 224), Image.Resampling.BOX)).astype(int)
    assert large.shape == (448, 448, 3) and np.abs(shrunk - small).mean() < 4
    assert draw_face(np.random.default_rng(0), size=(640, 480)).shape == (480, 640, 3)
