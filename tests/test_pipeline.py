"""The five commands of the README, as they stand, on mixed files; and again on top of what they left."""

import json
import os

import numpy as np
import pytest
from conftest import ROOT, SMALL, run_script
from PIL import Image

from demo import draw_face


@pytest.fixture
def raw(tmp_path):
    """Sources as their publishers have them: sizes, formats and folders differ, and some files are broken."""
    rng = np.random.default_rng(3)
    for folder, generator, count, size, name in (
        ("real/Photographs/a", None, 20, (320, 400), "{}.jpg"),
        ("real/Photographs/b", None, 20, 300, "{}.JPEG"),
        ("fake/Painter", "OffAxisMouth", 15, 256, "{}.png"),
        ("fake/Dreamer", "BlurredRegion", 15, (256, 224), "img {}.webp"),
    ):
        (tmp_path / "datasets" / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_face(rng, generator, size)).save(tmp_path / "datasets" / folder / name.format(i), quality=90)
    (tmp_path / "datasets/fake/Painter/notes.jpg").write_text("not an image")
    return tmp_path


def test_the_five_commands(raw):
    def run(*command: object):
        return run_script(*command, cwd=raw)

    for folder in ("real/Photographs", "fake/Painter", "fake/Dreamer"):
        run("preprocess.py", "--directory", f"datasets/{folder}")
    run("feature_extraction.py", "--data_root", "datasets", "--output_dir", "features")
    run("train.py", *SMALL, "--epochs", 1)  # of the full size it would take minutes
    table = run("inference.py").stdout
    results = json.loads((raw / "prediction_results.json").read_text())
    assert set(results) == {"Painter", "Dreamer", "Mean"} and all(name in table for name in results)
    assert {"accuracy", "ap"} <= results["Mean"].keys()
    assert (raw / "datasets/fake/Painter_rejected/notes.jpg").read_text() == "not an image"

    before = {path: path.read_bytes() for path in (raw / "datasets").rglob("*.png")} | {
        path: path.read_bytes() for path in (raw / "features").rglob("*.h5")
    }
    run("preprocess.py", "--directory", "datasets/fake/Painter")
    assert "up to date" in run("feature_extraction.py", "--data_root", "datasets", "--output_dir", "features").stdout
    assert {path: path.read_bytes() for path in before} == before
    run("inference.py")
    assert json.loads((raw / "prediction_results.json").read_text()) == results


@pytest.mark.parametrize("script", ["preprocess", "feature_extraction", "train", "inference", "demo"])
def test_help_names_every_option_and_its_default(script):
    module = __import__(script)
    for action in module.get_args_parser()._actions:
        assert action.help, action.option_strings
    assert f"{script}.py" in module.__doc__


def test_no_photograph_and_no_predictor_in_the_repository():
    listed = os.popen(f"git -C '{ROOT}' ls-files").read().splitlines()
    assert not [name for name in listed if name.endswith((".jpg", ".jpeg", ".dat", ".pth"))]
