"""evaluation/detector.py: pictures on disk and in memory get what inference.py --images gives them."""

import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import hostile_files, picture, run_script
from PIL import Image, ImageChops, ImageOps
from test_loose_images import aligned, drawn  # noqa: F401, a fixture
from test_videos import film

from evaluation.detector import Detector, Judged
from faces.finder import FaceFinder
from faces.images import LANDMARKS, load_rgb, rgb_of


@pytest.fixture(scope="module")
def detector(trained) -> Detector:
    return Detector(trained / "best_model.pth", without_cnn=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A face, three of them, nobody, a turned one, one behind glass; a video."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn(1, 300).save(folder / "one.png")
    group = Image.new("RGB", (1500, 400), "white")
    for i in range(3):
        group.paste(drawn(i, 400), (50 + 480 * i, 0))
    group.save(folder / "three.jpg", quality=95)
    picture(300, 200).save(folder / "nobody.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn(2, 320).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    glass = drawn(3, 320)
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(folder / "glass.png")
    film(folder / "clip.mp4", 10)
    (folder / "text.jpg").write_text("not an image")
    return folder


def by_inference(folder: Path, *arguments: object, expect: int | None = 3) -> dict[str, list[dict]]:
    """{file: its rows} of inference.py --images."""
    command = ("inference.py", "--format", "jsonl", "--output", "rows.jsonl", "--workers", 1, *arguments)
    run_script(*command, cwd=folder, expect=expect)
    rows: dict[str, list[dict]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(Path(row["path"]).name, []).append(row)
    return rows


def assert_same(judged: Judged, expected: list[dict]) -> None:
    rows = [row.as_dict() for row in [*judged.faces, *judged.followed]]
    rows = rows or [{"reason": judged.reason, "probability": None, "verdict": None}]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected):
        for name in row.keys() - {"path", "probability", "spread", "explanation"}:
            assert row[name] == wanted[name], name
        for name in {"probability", "spread"} & row.keys():
            assert row[name] == pytest.approx(wanted[name], abs=1e-6, rel=0) if wanted[name] else not row[name], name


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_the_rows_are_those_of_inference(detector, pictures, trained, tmp_path):
    """One picture at a time, all at once, as paths, bytes, and Pillow's; each twice in a row, too."""
    given = ("--checkpoint", trained / "best_model.pth", "--images", pictures, "--without_cnn")
    expected = by_inference(tmp_path, *given)
    names = sorted(expected)
    paths = [pictures / name for name in names for _ in range(2)]
    for path, judged in zip(paths, detector(paths)):
        assert_same(judged, expected[path.name])
        assert judged.path == path and all(row.path == path for row in judged.faces)
    assert len(expected["three.jpg"]) == 3 and expected["one.png"][0]["verdict"] and len(detector(paths[:1])) == 1
    assert len(detector(pictures / "clip.mp4").followed) == 2
    for name in names:
        assert_same(detector(str(pictures / name)), expected[name])
        if name.endswith(".mp4"):
            continue
        in_memory = [(pictures / name).read_bytes()]
        if name != "text.jpg":
            in_memory += [opened := Image.open(pictures / name), opened.copy()]
            if name == "turned.jpg":
                in_memory.append(ImageOps.exif_transpose(opened))
        for given in in_memory:
            if isinstance(given, Image.Image):
                info, mode = dict(given.info), given.mode
                before = given.tobytes()
            judged = detector(given)
            assert judged.path is None and all(row.as_dict()["path"] is None for row in judged.faces)
            if name != "text.jpg":
                assert_same(judged, expected[name])
            else:
                assert (
                    judged.reason == "cannot be read as an image (UnidentifiedImageError: cannot identify image file)"
                )
            if isinstance(given, Image.Image):
                assert (dict(given.info), given.mode, given.tobytes()) == (info, mode, before), "it was changed"


@pytest.mark.slow
def test_of_aligned_images(aligned, detector, tmp_path):  # noqa: F811
    """Bytes are a file, down to the quality of the JPEG that is drawn from them. Aligned copies have landmarks."""
    folder, checkpoint = tmp_path / "given", aligned / "model/best_model.pth"
    folder.mkdir()
    for path in [aligned / "raw/real/Photos/00.jpg", aligned / "data/real/Photos/01.png"]:
        (folder / path.name).write_bytes(path.read_bytes())
    expected = by_inference(tmp_path, "--checkpoint", checkpoint, "--images", folder, expect=0)
    detector, detector_of_others = Detector(checkpoint), detector
    for name, rows in expected.items():
        assert_same(detector((folder / name).read_bytes()), rows)
    copy = Image.open(folder / "01.png")
    assert LANDMARKS in rgb_of(copy).info
    assert_same(detector(copy), expected["01.png"])
    original = detector(Image.open(folder / "00.jpg")).faces[0]  # another quality is drawn
    assert original.face.framing == "aligned"
    assert original.probability == pytest.approx(expected["00.jpg"][0]["probability"], abs=0.02)
    refused = detector_of_others(copy)
    assert not refused.faces and refused.reason.startswith(
        "is aligned 0.6 on grey, JPEG 60-90, 160x160, and the training"
    )


def test_verdicts_by_one_rate_alone_and_pictures_without_a_face(trained, pictures, detector):
    strict = Detector(trained / "best_model.pth", fpr=0.01, whole_image=True, without_cnn=True)
    assert list(strict.thresholds) == ["0.01"]
    (row,) = strict(pictures / "nobody.png").faces
    assert row.face.box is None and row.face.found_by == "mean" and row.verdict in ("real", "fake")
    nobody = detector(pictures / "nobody.png")
    assert nobody.reason.startswith("no face found") and not nobody.faces and not nobody.followed


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"fpr": 0.02}, ValueError, "fpr 0.02: .*best_model.pth has thresholds for 0.01 and 0.05; take one of these"),
        ({"fpr": "0.01"}, TypeError, "fpr is '0.01', but has to be a number such as 0.01, or None"),
        ({"fpr": [0.01]}, TypeError, r"fpr is \[0.01\], but has to be a number such as 0.01, or None"),
        ({"frames": 0}, ValueError, "frames is 0, but has to be a whole number from 1 on"),
        ({"frames": 2.5}, ValueError, "frames is 2.5, but has to be a whole number from 1 on"),
        ({"frames": "3"}, ValueError, "frames is '3', but has to be a whole number from 1 on"),
        ({"device": "abacus"}, ValueError, "device abacus: no such device; cpu or cuda"),
        ({"predictor": "nowhere.dat"}, FileNotFoundError, "nowhere.dat: no such .*, or give the file with predictor"),
        ({"checkpoint": "nowhere.pth"}, ValueError, "nowhere.pth: no such checkpoint"),
        ({"checkpoint": 3}, TypeError, "checkpoint is 3, but has to be a path, or None"),
    ],
)
def test_an_argument_that_is_none_is_named(trained, given, error, sentence):
    """As an argument: whoever calls it has given no option of a script."""
    with pytest.raises(error, match=f"^{sentence}"):
        Detector(**{"checkpoint": trained / "best_model.pth", **given})


# ------------------------------------------------------------------------------------------------- what is no picture


@pytest.mark.slow
def test_what_cannot_be_read_has_a_reason(detector, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    reasons = {name: reason for name, reason in hostile_files(folder).items() if not name.endswith((".gif", ".txt"))}
    names = [*reasons, "nowhere.jpg", "."]
    for name, judged in zip(names, detector([folder / name for name in names])):
        reason = (reasons | {"nowhere.jpg": "no such file", ".": "is not a file"})[name]
        assert not judged.faces and ("no face found" if "x" in reason.split()[0] else reason.split(":")[0]) in (
            judged.reason
        ), name
    for content in (b"", b"text", (folder / "same.jpg").read_bytes()[:3000]):
        judged = detector(content)
        assert not judged.faces and judged.reason.startswith("cannot be read as an image") and "0x" not in judged.reason
    closed = Image.open(folder / "same.bmp")
    closed.close()
    assert "cannot be read as an image" in detector(closed).reason
    assert detector([]) == []


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_picture_without_pixels_has_a_reason(detector, size, mode):
    assert detector(Image.new(mode, size)).reason == f"has no pixels: {size[0]}x{size[1]}"


ARRAY = np.zeros((9, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        *(([3], "int"), ([ARRAY], "ndarray"), ([None], "NoneType")),
        *((3, "int"), (None, "NoneType"), (ARRAY, "ndarray"), (np.array(3), "ndarray")),
        *((bytearray(b"x"), "bytearray"), (memoryview(b"x"), "memoryview"), (io.BytesIO(b"x\ny\n"), "BytesIO")),
    ],
)
def test_what_is_no_picture_at_all_is_an_error(detector, given, kind):
    sentence = f"^a picture is a path, the bytes of a file or an image of Pillow's, not {kind}"
    with pytest.raises(TypeError, match=sentence + (r".*Image.fromarray\(array\)" if kind == "ndarray" else "$")):
        detector(given)


def test_many_pictures_may_come_one_by_one(detector, pictures):
    names = ("one.png", "nobody.png", "nowhere.png")
    judged = detector(pictures / name for name in names)
    assert [len(one.faces) for one in judged] == [1, 0, 0] and judged[2].reason == "no such file"
    assert detector(iter(())) == []


def test_what_is_no_face_cannot_be_explained(detector, pictures):
    judged = detector(pictures / "one.png")
    for given in (judged, judged.faces, None, "one.png"):
        with pytest.raises(TypeError, match=f"^a face is one of Judged.faces, or its face, not {type(given).__name__}"):
            detector.explain(given)
    with pytest.raises(ValueError, match="has no face"):
        detector.explain(judged.faces[0]._replace(face=None))


# -------------------------------------------------------------------------------------------------------------- threads


def test_threads_take_turns_and_the_finder_is_made_once(detector, pictures, monkeypatch):
    monkeypatch.setattr(FaceFinder, "__init__", lambda *_: pytest.fail("made again"))
    alone = {name: detector(pictures / name) for name in ("one.png", "three.jpg")}
    results: list[tuple[str, Judged]] = []

    def judge(name: str) -> None:
        for _ in range(3):
            results.append((name, detector(pictures / name)))
            detector.explain(results[-1][1].faces[0].face)

    threads = [threading.Thread(target=judge, args=(name,)) for name in (*alone, *alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for name, judged in results:
        assert [row.probability for row in judged.faces] == [row.probability for row in alone[name].faces]


# -------------------------------------------------------------------------------------------------------- explanations


@pytest.mark.slow
def test_the_explanation_is_that_of_inference(detector, pictures, trained, tmp_path):
    given = ("--checkpoint", trained / "best_model.pth", "--images", pictures / "one.png", "--without_cnn")
    (row,) = by_inference(tmp_path, *given, "--explain", "why", expect=0)["one.png"]
    judged = detector(pictures / "one.png")
    drawn_here = detector.explain(judged.faces[0], tmp_path / "here.png")
    expected = Image.open(tmp_path / row["explanation"]).convert("RGB")
    assert drawn_here.size == expected.size and not ImageChops.difference(drawn_here, expected).getbbox()
    assert not ImageChops.difference(Image.open(tmp_path / "here.png").convert("RGB"), expected).getbbox()
    of_face = detector.explain(judged.faces[0].face)  # without the name of the file in its title
    assert of_face.size == expected.size and ImageChops.difference(of_face, expected).getbbox()[3] < 100
    followed = detector(pictures / "clip.mp4").followed
    with pytest.raises(ValueError, match="has no face"):
        detector.explain(followed[0])


def test_a_picture_in_memory_is_read_as_a_file_is(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    cannot = hostile_files(folder)
    for path in sorted(folder.glob("*.*")):
        if path.name in cannot:
            continue
        expected = load_rgb(path)
        for given in (path.read_bytes(), Image.open(io.BytesIO(path.read_bytes()))):
            one = rgb_of(given)
            assert np.array_equal(np.asarray(one), np.asarray(expected)) and one.info == expected.info, path
