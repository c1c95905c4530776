"""The five commands of the README, as they stand, on mixed files; and again on top of what they left."""

import json

import numpy as np
import pytest
from conftest import ROOT, SMALL, run_script
from PIL import Image

from drawing.render import draw_face
from faces.finder import PREDICTOR_FILE


@pytest.fixture
def raw(tmp_path):
    """Sources as their publishers have them: sizes, formats and folders differ, and some files are broken."""
    rng = np.random.default_rng(3)
    for folder, generator, count, size, name in (
        ("real/Photographs/a", None, 20, (320, 400), "{}.jpg"),
        ("real/Photographs/b", None, 20, 300, "{}.JPEG"),
        ("fake/Painter", "OffAxisMouth", 15, 256, "{}.png"),
        ("fake/Dreamer", "IrisMismatch", 15, (256, 224), "img {}.webp"),
    ):
        (tmp_path / "datasets" / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_face(rng, generator, size)).save(
                tmp_path / "datasets" / folder / name.format(i), quality=90
            )
    (tmp_path / "datasets/fake/Painter/notes.jpg").write_text("not an image")
    return tmp_path


@pytest.mark.slow
def test_the_five_commands(raw):
    def run(*command: object, processes: int | None = 0):
        return run_script(*command, cwd=raw, processes=processes)

    for folder in sorted(path.relative_to(raw / "datasets") for path in (raw / "datasets").glob("*/*")):
        run("preprocess.py", "--directory", f"datasets/{folder}")
    run("feature_extraction.py", "--data_root", "datasets", "--output_dir", "features")
    run("train.py", *SMALL, "--epochs", 1)  # of the full size it would take minutes
    table = run("inference.py").stdout
    results = json.loads((raw / "prediction_results.json").read_text())
    assert {"Painter", "Dreamer", "Mean"} < set(results) and all(
        name in table for name in ("Painter", "Dreamer", "Mean")
    )
    assert results["Run"]["sources"]["fake/Painter"].keys() == {"PNG 256x256"}
    assert {"accuracy", "ap"} <= results["Mean"].keys()
    assert (raw / "datasets/fake/Painter_rejected/notes.jpg").read_text() == "not an image"

    before = {path: path.read_bytes() for path in (raw / "datasets").rglob("*.png")} | {
        path: path.read_bytes() for path in (raw / "features").rglob("*.h5")
    }
    for folder in sorted((raw / "datasets").glob("*/*")):
        run("preprocess.py", "--directory", folder, processes=None)
    again = run("feature_extraction.py", "--data_root", "datasets", "--output_dir", "features", processes=None)
    assert "up to date" in again.stdout
    assert {path: path.read_bytes() for path in before} == before
    run("inference.py", processes=None)
    assert json.loads((raw / "prediction_results.json").read_text()) == results


@pytest.mark.parametrize("script", ["preprocess", "feature_extraction", "train", "inference", "demo"])
def test_help_names_every_option_and_its_default(script):
    module = __import__(script)
    for action in module.get_args_parser()._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, "==SUPPRESS=="):
            assert "default" in action.help, action.option_strings
    assert f"{script}.py" in module.__doc__


def test_no_photograph_and_no_predictor_in_the_repository():
    listed = [
        path for folder in (ROOT, ROOT / "docs", ROOT / "tests", ROOT / "tests/data") for path in folder.iterdir()
    ]
    listed = [path for path in listed if path.name != PREDICTOR_FILE]  # git ignores it, where a user put it
    assert ROOT / "model.py" in listed
    assert not [path for path in listed if path.suffix in (".jpg", ".jpeg", ".dat", ".pth")]
