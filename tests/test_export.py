"""export.py: both files give inference.py's scores, say what they are, need no code of ours, and appear whole or not at
all.
"""

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, run_script

import export
from dataset import FaceDataset
from evaluation.scoring import fake_probability, predict_scores
from faces.regions import REGIONS
from model import LAMMViT, LAMMViTConfig
from runtime import weights_file
from runtime.checkpoint import load_checkpoint
from samples.feature_files import find_feature_files

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FILES = ["model.onnx", "model.pt2"]


@pytest.fixture(scope="session")
def exported(trained, made_once) -> SimpleNamespace:
    """What the script wrote and said of the trained model."""

    def export_it(folder: Path) -> None:
        options = ("--checkpoint", trained / "best_model.pth", "--output_dir", folder / "new")
        done = run_script("export.py", *options, cwd=folder)
        (folder / "said.json").write_text(json.dumps([done.stdout, done.stderr]))

    folder = made_once("deployed", export_it)
    stdout, stderr = json.loads((folder / "said.json").read_text())
    return SimpleNamespace(folder=folder / "new", stdout=stdout, stderr=stderr)


def load(file: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function that a file holds, as its users run it: images, region_masks -> probability."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images, region_masks: session.run(
            ["probability"], {"images": images, "region_masks": region_masks}
        )[0]
    module = torch.export.load(file).module()
    return lambda images, region_masks: module(torch.from_numpy(images), torch.from_numpy(region_masks)).numpy()


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_scores_are_those_of_inference(exported, trained, features, name):
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    dataset = FaceDataset(
        list(find_feature_files(features, "test").values()), model.config.grid_size, checkpoint["mask_style"]
    )
    expected, samples = predict_scores(model, dataset), dataset.read(np.arange(len(dataset)))
    run = load(exported.folder / name)
    # Of a model that says the same of all images, any file would agree. This one, hardly trained, is calibrated: its
    # scores are near 1/2
    assert np.ptp(expected) > 0.02
    for size in (1, 2, len(dataset)):
        scores = run(samples["image"][:size], samples["region_masks"][:size])
        assert scores.shape == (size,) and scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected[:size], rtol=0, atol=1e-4)
    many = 300 // len(dataset) + 1
    scores = run(np.tile(samples["image"], (many, 1, 1, 1)), np.tile(samples["region_masks"], (many, 1, 1, 1)))
    np.testing.assert_allclose(scores, np.tile(expected, many), rtol=0, atol=1e-4)


EVERYTHING = ("region_guidance", "lamm", "head_interaction")


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [("region_guidance",), ("lamm", "head_interaction"), EVERYTHING], ids="-".join)
def test_every_ablation(tmp_path, left_out):
    # without it, the first layer's masks do not reach the class token
    depth = 2 if left_out == ("lamm", "head_interaction") else 1
    torch.manual_seed(0)
    model = LAMMViT(
        LAMMViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=depth, **dict.fromkeys(left_out, False))
    ).eval()
    images, region_masks = export.random_batch(model, 16)
    images = (images * torch.rand(16, 3, 1, 1)).to(torch.uint8)  # noise alone would look the same to the model
    with torch.no_grad():
        for parameter in model.parameters():  # so that every part shows in the scores
            parameter.copy_(torch.randn_like(parameter))
        model.head.bias -= model(model.normalize(images), region_masks)["logits"].mean(dim=0)
        expected, blind = (
            fake_probability(model, images, region_masks),
            fake_probability(model, images, 0 * region_masks),
        )
    assert np.ptp(expected) > 0.1 and (abs(blind - expected).max() > 5e-4) == ("region_guidance" not in left_out)

    files = [tmp_path / name for name in FILES]
    export.write_exports(model, {}, *files)
    for file in files:  # with both inputs, also where one is not looked at
        np.testing.assert_allclose(load(file)(images.numpy(), region_masks.numpy()), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.slow
def test_the_files_say_what_they_are(exported, trained):
    checkpoint_file = trained / "best_model.pth"
    model, checkpoint = load_checkpoint(checkpoint_file)
    metadata = onnxruntime.InferenceSession(exported.folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert float(metadata["val_threshold"]) == checkpoint["val_threshold"]
    assert json.loads(metadata["thresholds"]) == checkpoint["thresholds"] and set(checkpoint["thresholds"]) == {
        "0.01",
        "0.05",
    }
    assert float(metadata["temperature"]) == checkpoint["temperature"]
    of_before = {name: fact for name, fact in checkpoint.items() if name not in ("thresholds", "temperature")}
    assert metadata.keys() - export.describe(model, of_before, checkpoint_file).keys() == {"thresholds", "temperature"}
    assert (
        (int(metadata["img_size"]), int(metadata["patch_size"]))
        == (224, 56)
        == (model.config.img_size, model.config.patch_size)
    )
    assert (metadata["mask_style"], metadata["treatment"]) == (
        checkpoint["mask_style"],
        checkpoint["framing"]["treatment"],
    )
    assert json.loads(metadata["regions"]) == list(REGIONS)
    assert (
        json.loads(metadata["datasets"]) == list(checkpoint["datasets"]) and "real/Consistent" in metadata["datasets"]
    )
    assert metadata["checkpoint_sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    of_torch = {"val_threshold": ""}
    torch.export.load(exported.folder / "model.pt2", extra_files=of_torch)
    assert of_torch == metadata


@pytest.mark.slow
def test_the_files_stand_alone(exported):
    assert sorted(path.name for path in exported.folder.iterdir()) == FILES  # no weights beside them
    for name in FILES:
        # as in the stack traces that torch keeps
        assert str(ROOT).encode() not in (exported.folder / name).read_bytes()

    file = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""} and not file.functions  # operators of the standard alone
    assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in file.graph.initializer)
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    shapes = {value.name: (value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "images": ("tensor(uint8)", ["batch", 3, 224, 224]),
        "region_masks": ("tensor(float)", ["batch", 8, 4, 4]),
        "probability": ("tensor(float)", ["batch"]),
    }

    operators = [
        node.target
        for node in torch.export.load(exported.folder / "model.pt2").graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert len(operators) > 50 and {operator.namespace for operator in operators} == {"aten"}


@pytest.mark.slow
def test_it_says_two_lines(exported):
    assert exported.stderr == ""
    assert [line.split(": ")[0] for line in exported.stdout.splitlines()] == [
        str(exported.folder / name) for name in FILES
    ]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_file, "SHIPPED", tmp_path / "weights/lamm_vit.safetensors")
    monkeypatch.setattr(sys, "argv", ["export.py"])
    with pytest.raises(SystemExit) as error:  # run as a script, but without the seconds of another import of torch
        runpy.run_path(str(ROOT / "export.py"), run_name="__main__")
    assert error.value.code == (
        "output_model/best_model.pth: no such checkpoint, and no weights/lamm_vit.safetensors; run train.py first, or"
        " name one with --checkpoint"
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A checkpoint with the files of an earlier export beside it."""
    for name in FILES:
        (tmp_path / name).write_text(f"an earlier {name}")
    return Path(shutil.copy(trained / "best_model.pth", tmp_path))


def assert_untouched(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["best_model.pth", *FILES]
    assert all((folder / name).read_text() == f"an earlier {name}" for name in FILES)


@pytest.mark.slow
def test_the_comparison_notices_another_model(exported, trained):
    model, _ = load_checkpoint(trained / "best_model.pth")
    files = [exported.folder / name for name in FILES]
    assert max(export.compare(model, *files)) < 1e-5
    with torch.no_grad():
        model.head.bias[1] += 0.01
    assert min(export.compare(model, *files)) > 1e-4


@pytest.mark.parametrize("differences, culprit", [((float("nan"), 0.0), "model.onnx"), ((0.0, 2e-4), "model.pt2")])
def test_a_file_that_differs_is_not_kept(checkpoint, monkeypatch, differences, culprit):
    monkeypatch.setattr(
        export, "write_exports", lambda model, metadata, *files: [file.write_text("new") for file in files]
    )
    monkeypatch.setattr(export, "compare", lambda model, *files: differences)
    assert refusal(export, "--checkpoint", checkpoint).startswith(f"{culprit}: differs from {checkpoint} by ")
    assert_untouched(checkpoint.parent)


def test_an_interrupted_export_leaves_nothing(checkpoint, monkeypatch):
    def interrupted(model: LAMMViT, metadata: dict, onnx_file: Path, pt2_file: Path) -> None:
        onnx_file.write_text("half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_exports", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.main(export.get_args_parser().parse_args(["--checkpoint", str(checkpoint)]))
    assert_untouched(checkpoint.parent)


def test_what_cannot_be_written_is_refused(checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "MAX_ONNX_BYTES", export.GRAPH_BYTES + 1000)
        assert "best_model.pth: its weights take 0.00 GB" in refusal(export, "--checkpoint", checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * export.GRAPH_BYTES))
        assert "no space left on the disk" in refusal(export, "--checkpoint", checkpoint)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert (
            refusal(export, "--checkpoint", checkpoint)
            == "onnxscript not installed; pip install onnx onnxscript onnxruntime"
        )
    assert_untouched(checkpoint.parent)
