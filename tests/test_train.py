"""train.py: every step is a full one, processes decide alike, a run that was stopped in any way goes on to the same
bits.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import psutil
import pytest
import torch
import torchvision
from conftest import GENERATORS, ROOT, SMALL, error_line, launcher, refusal, run_one_after_another, run_script
from PIL import Image
from scipy.special import expit, logit

import train
from dataset import FaceDataset
from evaluation.metrics import binary_metrics, log_loss
from evaluation.operating import choose_thresholds, fit_temperature
from evaluation.scoring import predict_scores
from model import LAMMViT, LAMMViTConfig
from runtime.checkpoint import CheckpointError, load_checkpoint, save
from runtime.processes import lock
from samples.feature_files import find_feature_files
from train import get_args_parser as train_parser
from training import state
from training.data import check_views
from training.schedule import MIN_LR, cosine_lr, parameter_groups


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pth", weights_only=True)["model"]


def assert_same_run(folder: Path, other: Path) -> None:
    assert (folder / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert (folder / "best_model.pth").read_bytes() == (other / "best_model.pth").read_bytes()
    mine, others = weights_of(folder), weights_of(other)
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in others)


def wait_for_saves(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Returns as soon as last.pth has been written `count` times from now on."""

    def state() -> int:  # not the inode: its number is given again to a later file
        with contextlib.suppress(FileNotFoundError):
            return (folder / "last.pth").stat().st_mtime_ns
        return before

    before, deadline = 0, time.monotonic() + 100
    before = state()
    seen = {before}
    while len(seen) <= count:
        assert process.poll() is None and time.monotonic() < deadline, "the run has ended, or stands still"
        seen.add(state())
        time.sleep(0.001)


def test_the_defaults_are_the_papers_recipe():
    args = train_parser().parse_args([])
    assert (args.lr, args.weight_decay, args.batch_size, args.accum_steps, args.epochs) == (1e-4, 0.05, 32, 4, 100)
    assert (args.lr_patience, args.stop_patience, args.diversity_weight, args.dropout, MIN_LR) == (
        3,
        10,
        0.2,
        0.1,
        1e-6,
    )
    assert (args.embed_dim, args.depth, args.patch_size, args.mlp_ratio) == (768, 12, 16, 4.0)


# ---------------------------------------------------------------------------------------------------------- one process


def test_a_run_leaves_what_it_promises(features, trained):
    log = log_of(trained)
    assert [line["epoch"] for line in log] == [1, 2]
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    assert checkpoint["val_auc"] == max(line["val_auc"] for line in log)
    assert checkpoint["datasets"] == ["real/Consistent", *(f"fake/{name}" for name in sorted(GENERATORS))]
    assert checkpoint["config"]["embed_dim"] == 24 and model.config.patch_size == 56
    assert 0 <= checkpoint["val_threshold"] <= 1
    assert checkpoint["arguments"]["batch_size"] == 16 and checkpoint["arguments"]["without"] == []
    assert not list(trained.glob(".*")), "no temporary file is left"
    last = torch.load(trained / "last.pth", weights_only=True)
    assert {
        "model",
        "optimizer",
        "schedule",
        "scaler",
        "processes",
        "samples",
        "epoch",
        "config",
        "arguments",
        "best_auc",
        "val_threshold",
    } <= last.keys()
    for name in ("training_curves.png", "lamm_weights.png"):
        with Image.open(trained / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 50
    times = [json.loads(line) for line in (trained / "timing.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in times)


def test_tensorboard_gets_scalars_a_curve_and_the_weights_of_heads(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "val/auc", "lr", "images_per_second"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("val/auc")] == [1, 2]
    assert any("precision_recall" in tag for tag in tags["tensors"]) and tags["images"] == ["lamm_weights"]
    assert (events.Images("lamm_weights")[0].width, events.Images("lamm_weights")[0].height) == (12 * 16, 2 * 16)


@pytest.mark.slow
def test_the_plan_is_printed_before_the_first_step(features, tmp_path):
    printed = run_script(
        "train.py", "--features", features, *SMALL, "--epochs", 1, "--schedule", "cosine", cwd=tmp_path
    ).stdout
    plan, _, _ = printed.partition("epoch   1")
    for text in (
        "36 real, 36 fake   balanced",
        "12 real, 13 fake",
        "0.25 M parameters",
        "32 images = 16 x 1 process x 2 accumulated; lr 0.0001",
        "cosine over 1 epochs, 0.05 of warm-up",
        "device cpu, float32",
    ):
        assert text in plan


def test_decay_is_for_matrices_alone():
    model = LAMMViT(LAMMViTConfig(embed_dim=24, depth=2, patch_size=56))
    decayed, others = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_others = {names[id(parameter)] for parameter in others["params"]}
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(names) and all(
        parameter.ndim > 1 for parameter in decayed["params"]
    )
    for name in (
        "cls_token",
        "pos_embed",
        "lamm.layer_embeddings",
        "lamm.base_theta",
        "norm.weight",
        "blocks.0.attn.qkv.bias",
        "mask_processor.combine_weights_all",
    ):
        assert name in of_others
    assert {"patch_embed.weight", "head.weight", "blocks.1.mlp.0.weight"}.isdisjoint(of_others)


def test_cosine_warms_up_and_ends_at_the_floor():
    args = train_parser().parse_args(
        [*"--schedule cosine --epochs 10 --warmup_epochs 2 --lr 1e-3 --batch_size 5 --accum_steps 2".split()]
    )

    class At:
        epoch_size, window = 100, 10

        def __init__(self, samples: int):
            self.args, self.samples = args, samples

    rates = [cosine_lr(At(samples)) for samples in range(0, 1001, 10)]
    assert (
        rates[0] == pytest.approx(1e-3 / 20) and rates[19] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-6)
    )
    assert all(a < b for a, b in zip(rates[:19], rates[1:20])) and all(a > b for a, b in zip(rates[20:], rates[21:]))


def test_validation_auc_is_the_one_of_the_saved_weights(features, trained):
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    dataset = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    metrics = binary_metrics(dataset.labels, predict_scores(model, dataset), 0.5)
    assert metrics["auc"] == pytest.approx(checkpoint["val_auc"], abs=1e-6)


def test_the_best_model_is_calibrated_and_the_run_is_not(features, trained):
    """best_model.pth is the last epoch's here, so that last.pth has the same weights, but for the head's."""
    model, best = load_checkpoint(trained / "best_model.pth")
    as_trained, last = load_checkpoint(trained / "last.pth")
    line = log_of(trained)[-1]
    assert best["epoch"] == line["epoch"] and last["val_threshold"] == line["val_threshold"]
    assert not {"temperature", "thresholds"} & last.keys()
    for name, weights in as_trained.state_dict().items():
        scale = best["temperature"] if name.startswith("head.") else 1
        torch.testing.assert_close(model.state_dict()[name] * scale, weights, rtol=1e-6, atol=0)
    dataset = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    before, scores = predict_scores(as_trained, dataset), predict_scores(model, dataset)
    assert log_loss(dataset.labels, before) == pytest.approx(line["val_loss"], abs=1e-6)
    assert log_loss(dataset.labels, scores) == pytest.approx(best["val_loss"], abs=1e-6)
    assert fit_temperature(dataset.labels, logit(before)) == pytest.approx(best["temperature"], rel=1e-3)
    assert best["temperature"] > 1.5 and best["val_loss"] < line["val_loss"] - 0.05
    assert choose_thresholds({"Consistent": scores[dataset.labels == 0]}) == pytest.approx(best["thresholds"], abs=1e-6)
    # the same images are called fake, by other numbers
    assert (scores >= best["val_threshold"]).tolist() == (before >= line["val_threshold"]).tolist()


def test_thresholds_are_of_collections_and_of_calibrated_scores(monkeypatch):
    """Two collections of photographs and two generators, in files of their own."""
    rng, sizes = np.random.default_rng(0), (400, 120, 0, 300, 200)
    labels = np.repeat([0, 0, 0, 1, 1], sizes)
    log_odds = 6 * rng.normal(2.0 * labels - 1, 1)
    log_odds[400:520] += 4
    ends = np.cumsum(sizes)
    val_set = argparse.Namespace(
        labels=labels,
        files=[f"features/{name}/val_features.h5" for name in ("real/A", "real/B", "real/C", "fake/A", "fake/B")],
        starts=ends - sizes,
        ends=ends,
    )
    weights = {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2), "norm.weight": torch.ones(3)}
    monkeypatch.setattr(state, "describe", lambda run: {"model": weights, "val_threshold": 0.5})
    run = argparse.Namespace(val_set=val_set, args=argparse.Namespace(epochs=1), left_out={0: torch.zeros(3)})
    held = state.calibrated(run, {"val_auc": 0.9, "val_loss": 3.0}, weights, log_odds)
    scores = expit(log_odds / held["temperature"])
    assert held["temperature"] == fit_temperature(labels, log_odds) and held["val_auc"] == 0.9
    assert held["thresholds"] == choose_thresholds({"A": scores[:400], "B": scores[400:520]})
    assert held["thresholds"] == choose_thresholds({"B": scores[400:520]}), "it is the worse one"
    torch.testing.assert_close(held["model"]["head.weight"], torch.ones(2, 3) / held["temperature"])
    assert held["model"]["norm.weight"] is weights["norm.weight"] and (weights["head.bias"] == 1).all()


@pytest.mark.slow
def test_an_earlier_model_is_kept(features, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "output_model")
    before = (trained / "best_model.pth").read_bytes()
    printed = run_script("train.py", "--features", features, *SMALL, "--epochs", 1, "--seed", 7, cwd=tmp_path).stdout
    assert "output_model/earlier_1" in printed
    assert (tmp_path / "output_model/earlier_1/best_model.pth").read_bytes() == before
    assert len(log_of(tmp_path / "output_model")) == 1


@pytest.mark.slow
def test_it_learns(features, tmp_path):
    """The training loss falls well below chance's 0.693 on a handful of faces: gradients reach what they should."""
    run_script(
        "train.py",
        "--features",
        features,
        *"--patch_size 56 --embed_dim 48 --depth 2 --batch_size 8 --accum_steps 1 --num_workers 0".split(),
        *"--dropout 0 --lr 2e-3 --epochs 16 --stop_patience 16 --lr_patience 16".split(),
        cwd=tmp_path,
    )
    log = log_of(tmp_path / "output_model")
    assert log[-1]["train_ce"] < 0.8 * log[0]["train_ce"] and log[-1]["train_ce"] < 0.6


@pytest.mark.slow
def test_refusals(features, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(features, tmp_path / "cut")
    victim = tmp_path / "cut/real/Consistent/train_features.h5"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    shutil.copytree(features, tmp_path / "other_val")
    with (
        h5py.File(tmp_path / "other_val/real/Consistent/val_features.h5", "r+") as one,
        h5py.File(tmp_path / "other_val/fake/IrisMismatch/val_features.h5", "r+") as two,
        h5py.File(tmp_path / "other_val/fake/OffAxisMouth/val_features.h5", "r+") as three,
    ):
        for file in (one, two, three):
            file.attrs["fingerprint"] = "of another run"
    shutil.copytree(trained, tmp_path / "foreign")
    shutil.copytree(trained, tmp_path / "without_best")
    (tmp_path / "without_best/best_model.pth").unlink()
    shutil.copytree(features, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer/fake/OffAxisMouth")
    torch.save(torchvision.models.VisionTransformer(224, 56, 1, 12, 24, 96).state_dict(), tmp_path / "one_layer.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    vit = torchvision.models.VisionTransformer(224, 16, 2, 12, 24, 96)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    for arguments, message in (
        (("--features", "nowhere"), "nowhere: no train features in it"),
        (("--features", "cut"), "cut/real/Consistent/train_features.h5: not a complete HDF5 file"),
        (("--features", "other_val"), "train and val are of different runs of feature_extraction.py"),
        (
            ("--features", features, "--datasets", "Nobody"),
            "no data set Nobody; there are real/Consistent, fake/IrisMismatch",
        ),
        (("--features", features, "--datasets", "Consistent"), "has 36 real and 0 fake images; both are needed"),
        (("--features", features, "--embed_dim", 100), "embed_dim is 100"),
        (
            ("--features", features, "--patch_size", 60),
            "img_size is 224, but has to be a positive multiple of patch_size, 60",
        ),
        (("--features", features, "--accum_steps", 0), "have to be at least 1"),
        (("--features", features, "--seed", -1), "--seed -1: has to be from 0"),
        (("--features", features, "--warmup_epochs", 2), "goes with --schedule cosine"),
        (("--features", features, "--device", "gpu"), "--device gpu: no such device"),
        (("--features", features, *SMALL, "--output_dir", "text.pth"), "--output_dir text.pth: File exists"),
        (("--features", features, *SMALL, "--resume", "nowhere.pth"), "nowhere.pth: no such checkpoint"),
        (
            ("--features", features, *SMALL, "--resume", "text.pth", "--output_dir", "."),
            "text.pth: not a whole checkpoint",
        ),
        (
            ("--features", features, *SMALL, "--resume", "foreign/last.pth"),
            "of a run in another folder; go on with --output_dir foreign",
        ),
        (
            ("--features", features, *SMALL, "--resume", "foreign/best_model.pth", "--output_dir", "foreign"),
            "foreign/best_model.pth: holds a model, not a run",
        ),
        (("--features", "fewer", *SMALL, "--resume", "--output_dir", "foreign"), "trained with datasets ["),
        (
            ("--features", features, *SMALL, "--resume", "--output_dir", "without_best"),
            "without_best/best_model.pth: is gone",
        ),
        (
            ("--features", features, "--resume", "--output_dir", "foreign", "--embed_dim", 48),
            "resume with the same options",
        ),
        (
            ("--features", features, *SMALL, "--resume", "--output_dir", "foreign", "--mask_style", "gaussian"),
            "trained with --mask_style polygon;",
        ),
        (("--features", features, *SMALL, "--init_from", "nowhere.pth"), "--init_from nowhere.pth: "),
        (("--features", features, *SMALL, "--init_from", "linear.pth"), "not a state dict of a Vision Transformer"),
        (("--features", features, *SMALL, "--init_from", "vit.pth"), "choose its width, --mlp_ratio and patch size"),
        (("--features", features, *SMALL, "--init_from", "one_layer.pth"), "has nothing for blocks.1."),
        (
            ("--features", features, *SMALL, "--init_from", "whole.pth"),
            "whole.pth: holds more than tensors, and is not opened",
        ),
        (("--features", features, *SMALL, "--init_from", "empty.pth"), "empty.pth: not a whole file of torch.save"),
    ):
        assert message in refusal(train, *arguments)
    assert "nowhere" in error_line(run_script("train.py", "--features", "nowhere", cwd=tmp_path, expect=1))


def test_a_disk_without_room_is_told_before_the_first_step(features, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    message = refusal(train, "--features", features, *SMALL, "--output_dir", tmp_path / "out")
    assert "the checkpoints need 0.01 GB and the disk has 0.00 GB left" in message and not list(
        (tmp_path / "out").iterdir()
    )


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "out")
    before = (tmp_path / "out/last.pth").read_bytes()

    def full(checkpoint: dict, file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last.pth: could not be written .*No space left.*go on with --resume"):
        save({}, tmp_path / "out/last.pth", tmp_path / "out/previous.pth")
    assert (tmp_path / "out/last.pth").read_bytes() == before and not list((tmp_path / "out").glob(".*"))


def spoil(features: Path, folder: Path, name: str, row: int) -> str:
    """A copy of the features in which a sample has masks that are no numbers. Returns its path."""
    shutil.copytree(features, folder)
    with h5py.File(folder / name / "train_features.h5", "r+") as file:
        file["region_masks"][row] = np.nan
        return file["paths"].asstr()[row]


NOT_FINITE = (*"--features spoilt --patch_size 16 --embed_dim 24 --depth 2".split(),)
NOT_FINITE += (*"--batch_size 8 --accum_steps 2 --num_workers 1".split(),)


def assert_named_and_kept(said: str, path: str, folder: Path) -> None:
    """What a run says of the sample at this path, and what it leaves in its folder."""
    line = next(line for line in said.replace("\r", "\n").splitlines() if "the loss is not finite" in line)
    assert (
        f"not finite with {path}; the last good checkpoint is kept in output_model/last.pth, " in line
        and "epoch 1, after" in line
    )
    kept = torch.load(folder / "last.pth", weights_only=True)["model"]
    assert all(values.isfinite().all() for values in kept.values())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_sample_and_keeps_the_checkpoint(features, tmp_path):
    path = spoil(features, tmp_path / "spoilt", "fake/OffAxisMouth", 5)
    done = run_script("train.py", *NOT_FINITE, cwd=tmp_path, expect=1)
    assert_named_and_kept(done.stderr, path, tmp_path / "output_model")


def test_weights_that_run_away_stop_the_run(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(train, "--features", features, *SMALL, "--lr", 1e30, "--epochs", 3)
    assert "is not finite with " in line and line.count(".png") == 32 and "lower --lr" in line


def test_scores_that_are_not_finite_say_which_checkpoint_is_of_before(features, tmp_path, monkeypatch):
    one_step = ("--batch_size", 64, "--accum_steps", 2, "--clip_grad", 0)
    monkeypatch.chdir(tmp_path)
    line = refusal(train, "--features", features, *SMALL, *one_step, "--lr", 1e30, "--epochs", 3)
    assert "in validation, no finite score for " in line and "previous.pth are of before" in line
    kept = torch.load(tmp_path / "output_model/previous.pth", weights_only=True)["model"]
    assert all(values.abs().max() < 1e3 for values in kept.values())


# ----------------------------------------------------------------------------------------------------- going on exactly

# Long enough to be stopped in many places: five steps an epoch, each saved.
LONG = (*"--patch_size 56 --embed_dim 24 --depth 2 --batch_size 8 --accum_steps 2 --num_workers 1 --lr 1e-3".split(),)
LONG += ("--lr_patience", 0, "--save_minutes", 0, "--epochs", 4)


# Until the early stop. 72 samples are 4 1/2 steps.
TO_THE_END = (*"--patch_size 56 --embed_dim 24 --depth 2 --dropout 0 --accum_steps 2 --num_workers 0".split(),)
TO_THE_END += (*"--lr 1e-4 --lr_patience 1 --stop_patience 3 --epochs 20".split(),)
CACHED = (*"--tune head --augment none --epochs 2 --lr 1e-2 --num_workers 0 --cache_blocks 2".split(),)
ABLATED = (*SMALL, "--epochs", 1, "--without", "region_guidance", "head_interaction")


def save_trunk(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(torchvision.models.VisionTransformer(224, 56, 2, 12, 24, 96).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def in_one(features, made_once) -> Path:
    def train_it(folder: Path) -> None:
        run_script("train.py", "--features", features, *LONG, "--output_dir", folder / "straight", cwd=folder)

    return made_once("in_one", train_it)


@pytest.fixture(scope="session")
def in_two(features, made_once, in_one) -> Path:
    """Runs of two processes, one after another in one torchrun, which saves the seconds of starting it each time."""

    def train_all(folder: Path) -> None:
        shutil.copytree(in_one / "straight", folder / "of_one_before")
        (folder / "of_one_before/last.pth").unlink()
        runs = {
            "straight": LONG,
            "to_the_end": (*TO_THE_END, "--batch_size", 4),
            "ablated": ABLATED,
            "of_one_before": (*LONG, "--epochs", 5, "--resume"),
            "cached": (*SMALL, "--accum_steps", 1, *CACHED, "--init_from", save_trunk(folder / "vit.pth")),
        }
        runs = [["--features", features, "--output_dir", folder / name, *given] for name, given in runs.items()]
        (folder / "said").write_text(run_one_after_another("train.py", runs, folder))

    return made_once("in_two", train_all)


@pytest.fixture
def straight(in_one, in_two) -> dict[int, Path]:
    """Runs that were not stopped, of one process and of two."""
    return {0: in_one / "straight", 2: in_two / "straight"}


def started(tmp_path: Path, processes: int, features: Path) -> subprocess.Popen:
    """The long run in tmp_path/out, going on where it stood; what it says is in tmp_path/printed."""
    options = ("--features", features, *LONG, "--output_dir", tmp_path / "out", "--resume")
    command = [*launcher(processes), ROOT / "train.py", *options]
    with open(tmp_path / "printed", "w") as printed:
        return subprocess.Popen(list(map(str, command)), stdout=printed, stderr=subprocess.STDOUT)


def stop_in_any_way(tmp_path: Path, processes: int, features: Path, signals: tuple[int, ...]) -> None:
    """Each signal at a step of its own, the run going on before the next one."""
    rng = np.random.default_rng(processes)
    for number in signals:
        process = started(tmp_path, processes, features)
        wait_for_saves(process, tmp_path / "out", int(rng.integers(1, 4)))
        process.send_signal(number)
        process.wait()
        # the processes of a torchrun that was killed end soon after it; they would print, and save once more
        with lock(tmp_path / "out"):
            pass
        if number == signal.SIGTERM:
            # torchrun's own is 1
            assert "stopped by SIGTERM in epoch" in (tmp_path / "printed").read_text() and process.returncode == (
                1 if processes else 0
            )
    position = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert 0 < position["samples"] <= 4 * 72 + 8


@pytest.mark.slow
def test_stopped_in_any_way_and_resumed_is_the_run_that_was_not_stopped(features, straight, tmp_path):
    """Killed at a step of its own, asked to end at another, killed again; then left alone."""
    stop_in_any_way(tmp_path, 0, features, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL))
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)
    for group in last["optimizer"]["param_groups"]:
        group["fused"] = True  # as on a GPU: a run may go on elsewhere
    save(last, tmp_path / "out/last.pth")
    run_script("train.py", "--features", features, *LONG, "--output_dir", "out", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "out", straight[0])


@pytest.mark.slow
def test_torchrun_stopped_in_any_way_goes_on_to_the_same_end(features, straight, tmp_path):
    """Killed, asked to end; then left alone. Where a worker dies, torchrun goes on by itself: the next test."""
    stop_in_any_way(tmp_path, 2, features, (signal.SIGKILL, signal.SIGTERM))
    process = started(tmp_path, 2, features)
    assert process.wait(200) == 0 and "goes on from" in (tmp_path / "printed").read_text()
    assert_same_run(tmp_path / "out", straight[2])


# Each run is killed once, by itself and with SIGKILL: in a step, in the last process; while a checkpoint is written, in
# the first one. Started again, it goes on; the runs before it are finished, and are left as they are.
KILLED = """import functools, json, os, signal, sys
from pathlib import Path

sys.path.insert(0, {root!r})
import train

rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
moments = {{"norms": (train, "one_step", 4, world - 1), "lora": (os, "fsync", 5, 0)}}


def killing(real, number, is_killed):
    calls = []

    def counted(*arguments):
        calls.append(0)
        if len(calls) == number:
            is_killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    return counted


train.join_processes = functools.cache(train.join_processes)
train.draw_pictures = lambda run: None  # seconds of each process, and nobody looks at them
for folder, arguments in json.loads(sys.argv[1]).items():
    module, name, number, victim = moments.get(folder, (train, "one_step", 0, -1))
    real, is_killed = getattr(module, name), Path(folder + ".killed")
    if rank == victim and not is_killed.exists():
        setattr(module, name, killing(real, number, is_killed))
    train.main(train.get_args_parser().parse_args([*arguments, "--output_dir", folder, "--resume"]))
    setattr(module, name, real)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_part_beside_a_trunk_is_killed_and_goes_on_to_the_same_bits(features, tmp_path, processes):
    save_trunk(tmp_path / "vit.pth")
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT)))
    options = ["--features", features, *LONG, "--epochs", 2, "--init_from", tmp_path / "vit.pth", "--tune"]
    parts = {"norms": ["norms", "--ema", 0.9], "lora": ["lora:2"]}
    runs = {folder: [*options, *part] for name, part in parts.items() for folder in (name, f"straight_{name}")}
    runs = {folder: list(map(str, run)) for folder, run in runs.items()}
    killed = {name: runs[name] for name in parts}
    # torchrun starts its processes again by itself; one process ends, and what it left is gone on with here
    for given, end in [(runs, 0)] if processes else [(killed, -signal.SIGKILL)] * 2:
        command = [*launcher(processes, "--max_restarts=2"), "killed.py", json.dumps(given)]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert done.returncode == end, done.stderr
        assert not processes or all(f"goes on from {name}/" in done.stdout for name in parts)
    for folder in () if processes else runs:
        printed = run_script("train.py", *runs[folder], "--output_dir", folder, "--resume", cwd=tmp_path).stdout
        assert ("goes on from" in printed) == (folder in parts)
    for name in parts:
        assert (tmp_path / f"{name}.killed").exists()
        assert_same_run(tmp_path / name, tmp_path / f"straight_{name}")
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("norms", "straight_norms"))
    assert all(torch.equal(one["ema"][name], two["ema"][name]) for name in two["ema"])


@pytest.mark.slow
def test_two_machines_go_on_when_one_of_them_loses_its_process(features, straight, tmp_path):
    """Two agents of torchrun. They count restarts for themselves, the one that has lost nothing counts none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *"--nnodes=2 --nproc_per_node=1 --max_restarts=1".split(),
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={endpoint}",
        "--rdzv_id=two",
    ]
    command += [str(ROOT / "train.py"), "--features", features, *LONG, "--output_dir", tmp_path / "out"]
    with open(tmp_path / "printed", "w") as printed:
        agents = [
            subprocess.Popen(
                list(map(str, command)),
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(2)
        ]
    wait_for_saves(agents[0], tmp_path / "out", 5)
    psutil.Process(agents[1].pid).children()[0].kill()
    assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "printed").read_text()
    assert (tmp_path / "printed").read_text().count("goes on from") == 1
    assert_same_run(tmp_path / "out", straight[2])


@pytest.mark.slow
def test_a_run_that_lost_its_last_checkpoint_goes_on_from_the_one_before(features, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    (tmp_path / "out/last.pth").unlink()
    printed = run_script(
        "train.py", "--features", features, *LONG, "--output_dir", "out", "--resume", cwd=tmp_path
    ).stdout
    assert "goes on from out/previous.pth" in printed
    assert_same_run(tmp_path / "out", straight[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc")
def test_the_memory_of_freed_tensors_comes_again_without_the_system():
    program = """import resource, torch
from runtime.devices import keep_freed_memory

keep_freed_memory(torch.device("cpu"))
for _ in range(20):
    torch.ones(2**24)  # 64 MB, 16,384 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    faults = list(map(int, done.stdout.split()))
    assert faults[-1] - faults[-6] < 1000


def test_damage_inside_a_checkpoint_is_seen(trained, tmp_path):
    data = bytearray((trained / "last.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "last.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="last.pth: not a whole checkpoint .* is damaged"):
        load_checkpoint(tmp_path / "last.pth")


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(features, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    run_script("train.py", "--features", features, *LONG, "--output_dir", "out", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "out", straight[0])


@pytest.mark.slow
def test_more_epochs_are_what_they_would_have_been(features, straight, tmp_path):
    arguments = ("--features", features, *LONG, "--output_dir", "out")
    run_script("train.py", *arguments, "--epochs", 2, cwd=tmp_path)
    run_script("train.py", *arguments, "--resume", cwd=tmp_path)
    assert (tmp_path / "out/log.jsonl").read_bytes() == (straight[0] / "log.jsonl").read_bytes()
    assert torch.equal(weights_of(tmp_path / "out")["head.weight"], weights_of(straight[0])["head.weight"])


@pytest.mark.slow
def test_a_torn_checkpoint_is_named_and_the_older_one_offered(features, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight[0], "out")
    last = tmp_path / "out/last.pth"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    message = refusal(train, "--features", features, *LONG, "--output_dir", "out", "--resume")
    assert "out/last.pth: not a whole checkpoint" in message and "--resume out/previous.pth" in message
    run_script(
        "train.py", "--features", features, *LONG, "--output_dir", "out", "--resume", "out/previous.pth", cwd=tmp_path
    )
    assert_same_run(tmp_path / "out", straight[0])


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_so(in_two, straight):
    """Also where only the validation of an epoch is left to do: previous.pth is from before the last one."""
    assert "of 1 processes, these are 2" in (in_two / "said").read_text()
    log = log_of(in_two / "of_one_before")
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    assert log[3]["train_ce"] == pytest.approx(log_of(straight[0])[3]["train_ce"])


def test_two_runs_on_one_folder(features, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with lock(tmp_path):
        assert "another run is at work on it" in refusal(
            train, "--features", features, *SMALL, "--output_dir", tmp_path
        )


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="session")
def one_and_two(features, made_once, in_two) -> tuple[list[dict], list[dict], Path, Path]:
    """1 x batch 8 and 2 x batch 4 until the early stop: their logs, and their folders."""

    def fit(folder: Path) -> None:
        options = (*TO_THE_END, "--batch_size", 8, "--output_dir", "one")
        run_script("train.py", "--features", features, *options, cwd=folder)

    one, two = made_once("one_to_the_end", fit) / "one", in_two / "to_the_end"
    return log_of(one), log_of(two), one, two


@pytest.mark.slow
def test_two_processes_train_as_one(one_and_two):
    """The same losses, the diversity loss among them, up to rounding; the same schedule, the same end."""
    one, two, *_ = one_and_two
    for name in ("train_loss", "train_ce", "train_diversity", "val_loss"):
        np.testing.assert_allclose([line[name] for line in one], [line[name] for line in two], atol=1e-5)
    assert [line["lr"] for line in one] == [line["lr"] for line in two] and len({line["lr"] for line in one}) > 1
    assert len(one) == len(two) < 20, "the early stop is in the same epoch"


@pytest.mark.slow
def test_validation_over_two_processes_is_exact(one_and_two, features):
    model, checkpoint = load_checkpoint(one_and_two[3] / "best_model.pth")
    dataset = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    scores = predict_scores(model, dataset, batch_size=16)
    assert binary_metrics(dataset.labels, scores, 0.5)["auc"] == pytest.approx(checkpoint["val_auc"], abs=1e-6)
    assert log_loss(dataset.labels, scores) == pytest.approx(checkpoint["val_loss"], abs=1e-6)
    one = torch.load(one_and_two[2] / "best_model.pth", weights_only=True)
    torch.testing.assert_close(one["lamm_weights"], checkpoint["lamm_weights"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_one_process_that_fails_ends_all_and_its_cause_comes_first(features, tmp_path):
    """In one torchrun: a loss that is not finite, which all processes hear of; then one whose disk is on fire."""
    path = spoil(features, tmp_path / "spoilt", "fake/OffAxisMouth", 5)
    (tmp_path / "failing.py").write_text(
        f"""import functools, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train


def broken(*arguments, **options):
    raise OSError("features/real/FFHQ/train_features.h5: the disk is on fire")


train.join_processes = functools.cache(train.join_processes)
sys.argv[1:] = {list(map(str, NOT_FINITE))!r}
try:
    train.guarded_main()
except SystemExit as stop:
    assert train.gather(isinstance(stop.code, str)) == [True, True]
    print(stop.code, file=sys.stderr)
sys.argv[1:] = {["--features", str(features), *map(str, SMALL)]!r}
if os.environ["RANK"] == "1":
    train.load_batches = broken
train.guarded_main()
"""
    )
    started = time.monotonic()
    done = run_script(tmp_path / "failing.py", cwd=tmp_path, processes=2, expect=1)
    assert_named_and_kept(done.stderr, path, tmp_path / "output_model/earlier_1")
    said = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if "disk is on fire" in line or "another process" in line or "Traceback" in line
    ]
    # The bar of rank 0 may stand before it on the line
    assert said[0].endswith("features/real/FFHQ/train_features.h5: the disk is on fire")
    assert time.monotonic() - started < 90


# ------------------------------------------------------------------------------------------------------------- variants


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize(
    "without",
    [
        ("region_guidance",),
        ("lamm",),
        ("head_interaction", "diversity"),
        ("region_guidance", "lamm", "head_interaction", "diversity"),
    ],
)
def test_ablations_train_and_are_recorded(features, tmp_path, without):
    arguments = ("--features", features, *SMALL, "--output_dir", tmp_path, "--epochs", 1, "--without", *without)
    train.main(train_parser().parse_args(list(map(str, arguments))))
    model, checkpoint = load_checkpoint(tmp_path / "best_model.pth")
    assert checkpoint["arguments"]["without"] == sorted(without)
    for part in ("region_guidance", "lamm", "head_interaction"):
        assert checkpoint["config"][part] == (part not in without)
    assert (log_of(tmp_path)[0]["train_diversity"] == 0) == bool({"lamm", "diversity"} & set(without))
    assert (tmp_path / "lamm_weights.png").exists() == ("lamm" not in without)


@pytest.mark.slow
def test_an_ablation_trains_on_two_processes(in_two):
    """No parameter is left without a gradient: DistributedDataParallel would wait for it."""
    assert len(log_of(in_two / "ablated")) == 1


@pytest.mark.slow
def test_starts_from_a_vision_transformer(features, tmp_path, capsys):
    torch.manual_seed(3)
    vit = torchvision.models.VisionTransformer(224, 56, 2, 12, 24, 96)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    arguments = (
        "--features",
        features,
        *SMALL,
        "--output_dir",
        tmp_path / "out",
        *"--epochs 1 --lr 0 --start paper".split(),
        "--init_from",
        tmp_path / "vit.pth",
    )
    train.main(train_parser().parse_args(list(map(str, arguments))))
    said = capsys.readouterr().out
    assert "30 tensors of " in said and "by torchvision's names, 2 of 2 blocks" in said
    assert "not used: heads.head.weight, heads.head.bias\n" in said
    model, _ = load_checkpoint(tmp_path / "out/best_model.pth")
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight, vit.encoder.layers[1].self_attention.in_proj_weight)
    assert model.norm.eps == vit.encoder.ln.eps


@pytest.mark.slow
def test_bf16_and_fp16_train(features, tmp_path):
    for precision in ("bf16", "fp16"):
        arguments = (
            "--features",
            features,
            *SMALL,
            "--output_dir",
            tmp_path / precision,
            "--epochs",
            1,
            "--precision",
            precision,
        )
        train.main(train_parser().parse_args(list(map(str, arguments))))
        assert np.isfinite(log_of(tmp_path / precision)[0]["train_loss"])


def test_wild_views_are_not_of_images_with_mirrored_borders():
    wild, plain = (SimpleNamespace(augment=augment, features="features") for augment in ("wild", "none"))
    earlier = {"treatment": "aligned 0.6, JPEG 75-95, 224x224"}
    for treatment in ("", "JPEG 75-95, 224x224", "aligned 0.6 on grey, 224x224"):
        check_views(wild, {"treatment": treatment})
    check_views(plain, earlier)
    with pytest.raises(ValueError, match="--augment wild: features is of images that an earlier version aligned 0.6"):
        check_views(wild, earlier)
