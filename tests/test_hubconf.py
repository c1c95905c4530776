"""hubconf.py: the model and the detector by torch.hub, in programs that have modules of the same names as ours."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from test_house import python_files
from test_loose_images import drawn

import hubconf
from evaluation.detector import Detector
from model import LAMMViT, LAMMViTConfig
from runtime import weights_file
from runtime.checkpoint import load_checkpoint

NAMES = ("model", "dataset", "attention", "faces", "evaluation", "runtime")  # of the program's own modules
PROGRAM = """
import json, sys, torch
import model  # its own, before ours
sys.path.append("lib")
repo, checkpoint, *pictures = sys.argv[1:]
before = list(sys.path)
detector = torch.hub.load(repo, "detector", source="local", checkpoint=checkpoint, without_cnn=True)
assert sys.path == before and model is sys.modules["model"] and model.MINE == "model"
import attention, dataset, evaluation, faces, runtime
for module in (attention, dataset, evaluation, faces, runtime):
    assert module.MINE == module.__name__, module
scores = [[row.probability for row in judged.faces] for judged in detector(pictures)]
detector.explain(detector(pictures[0]).faces[0], "why.png")
again = torch.hub.load(repo, "detector", source="local", checkpoint=checkpoint, without_cnn=True)
assert type(again) is type(detector), "loaded once"
whole = torch.hub.load(repo, "lamm_vit", source="local", checkpoint=checkpoint)
assert type(whole) is type(detector.model) and not whole.training
fresh = torch.hub.load(repo, "lamm_vit", source="local", pretrained=False, embed_dim=24, depth=1, patch_size=56)
loss = fresh.train()(torch.rand(2, 3, 224, 224), torch.rand(2, 8, 4, 4))["logits"].sum()
loss.backward()
strange = [name for name in sys.modules if name.split(".")[0] in ("samples", "drawing", "training", "inference")]
assert not strange, strange
print(json.dumps(scores))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder with a program and six modules that have the names of ours."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    for i in range(2):
        drawn(i, 300).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_a_program_with_modules_of_the_same_names(program, trained):
    """From another folder, in a process of its own: inference.py's scores, and its own modules stay its own."""
    checkpoint, pictures = trained / "best_model.pth", [program / "0.png", program / "1.png"]
    command = [sys.executable, "program.py", ROOT, checkpoint, *pictures]
    done = subprocess.run(list(map(str, command)), cwd=program, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    given = ("--images", *pictures, "--checkpoint", checkpoint, "--without_cnn", "--format", "jsonl", "--workers", 1)
    rows = [json.loads(line) for line in run_script("inference.py", *given, cwd=program).stdout.splitlines()]
    scores = json.loads(done.stdout.splitlines()[-1])
    assert len(scores) == len(rows) == 2
    for (score,), row in zip(scores, rows):
        assert score == pytest.approx(row["probability"], abs=1e-6, rel=0)
    assert (program / "why.png").is_file()


def load(entry: str, **options: object) -> object:
    return torch.hub.load(str(ROOT), entry, source="local", **options)


def test_where_ours_are_there_already_they_are_taken(trained, monkeypatch):
    checkpoint = trained / "best_model.pth"
    model = load("lamm_vit", checkpoint=str(checkpoint))
    assert type(model) is LAMMViT and not model.training
    for name, values in load_checkpoint(checkpoint)[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], values)
    assert isinstance(load("detector", checkpoint=checkpoint, without_cnn=True), Detector)
    fresh = load("lamm_vit", pretrained=False, embed_dim=24, depth=1)
    assert fresh.config == LAMMViTConfig(embed_dim=24, depth=1)
    monkeypatch.setattr(weights_file, "SHIPPED", checkpoint)
    assert torch.equal(load("lamm_vit").cls_token, model.cls_token)


def test_refusals_are_one_line(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_file, "SHIPPED", tmp_path / "weights/lamm_vit.safetensors")
    for entry in ("lamm_vit", "detector"):
        with pytest.raises(ValueError, match="no such checkpoint, and no weights/lamm_vit.safetensors; run train.py"):
            load(entry)
    with pytest.raises(ValueError, match="nowhere.pth: no such checkpoint"):
        load("lamm_vit", checkpoint="nowhere.pth")
    with pytest.raises(ValueError, match="is not for pretrained=False"):
        load("lamm_vit", pretrained=False, checkpoint="a.pth")
    with pytest.raises(ValueError, match="depth: only for pretrained=False"):
        load("lamm_vit", depth=3)


def test_nothing_else_is_offered():
    offered = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert offered == ["detector", "lamm_vit"], "torch.hub.list shows these"


def test_ours_import_each_other_by_from_alone():
    """The form that hubconf.py knows how to read."""
    ours = {path.parts[0].removesuffix(".py") for path in python_files()}
    for path in python_files():
        if path.parts[0] == "benchmarks":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & ours, path
            assert not isinstance(node, ast.ImportFrom) or not node.level, path


def test_all_dependencies_are_named():
    """What is loaded on the way to a score comes from the packages that hubconf.py names, or theirs."""
    for name in hubconf.dependencies:
        assert __import__(name)
    listed = {
        alias.split(".")[0]
        for path in python_files()
        if path.parts[0] in ("model.py", "dataset.py", "attention", "faces", "runtime")
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    ours = {path.parts[0].removesuffix(".py") for path in python_files()}
    assert listed - ours - set(sys.stdlib_module_names) <= set(hubconf.dependencies)
