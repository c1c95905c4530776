"""train.py: one process and several make the same decisions, nothing is dropped, a stopped run goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GENERATORS, ROOT, SMALL, error_line, refusal, run_script

import train
from dataset import FaceDataset, find_feature_files
from inference import binary_metrics, load_checkpoint, normalize, predict_scores
from train import EpochBatches, load_split, train_one_epoch
from train import get_args_parser as train_parser


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in log]


# ----------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("size", "batch_size", "world"), [(37, 4, 1), (37, 4, 2), (64, 8, 4), (3, 2, 2), (1, 4, 3)])
def test_processes_share_an_epoch_without_rest(size, batch_size, world):
    ranks = [EpochBatches(size, batch_size, rank, world, seed=0, epoch=3) for rank in range(world)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1, "as many batches of the same lengths in each process"
    seen = [i for batches in ranks for batch in batches for i in batch]
    assert set(seen) == set(range(size)) and len(seen) - size < world


def test_two_processes_see_the_batches_of_one():
    one = EpochBatches(40, 8, 0, 1, seed=5, epoch=2)
    two = [EpochBatches(40, 4, rank, 2, seed=5, epoch=2) for rank in (0, 1)]
    assert [set(a) | set(b) for a, b in zip(*two)] == [set(batch) for batch in one]
    assert not np.array_equal(one.order, EpochBatches(40, 8, 0, 1, seed=5, epoch=3).order)


def test_last_short_window_is_used_and_weighted_by_its_samples(features):
    """With plain SGD, an epoch of windows equals steps along the mean gradient of each window's samples."""
    args = train_parser().parse_args(["--features", str(features), "--accum_steps", "3", "--num_workers", "0"])
    args.dtype = torch.float32
    dataset, _ = load_split(args, "train", 4, None)
    batches = [list(range(start, min(start + 8, 27))) for start in range(0, 27, 8)]  # 8, 8, 8 | 3

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images, masks):
            return images.mean(dim=(1, 2, 3)) * self.weight

    def criterion(outputs, labels):
        loss = outputs.mean()
        return {"total": loss, "ce": loss, "diversity": loss * 0}

    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train_one_epoch(model, dataset, optimizer, torch.amp.GradScaler("cpu", enabled=False), criterion, batches, 1, args, torch.device("cpu"), 0)
    assert dataset.epoch == 1, "the transforms are those of this epoch"
    means = normalize(torch.from_numpy(dataset.read(range(27))["image"])).mean(dim=(1, 2, 3))
    torch.testing.assert_close(model.weight.detach(), -(means[:24].mean() + means[24:].mean()))


def test_the_defaults_are_the_papers_recipe():
    args = train_parser().parse_args([])
    assert (args.lr, args.weight_decay, args.batch_size, args.accum_steps, args.epochs) == (1e-4, 0.05, 32, 4, 100)
    assert (args.lr_patience, args.stop_patience, args.diversity_weight, args.dropout, train.MIN_LR) == (3, 10, 0.2, 0.1, 1e-6)
    assert (args.embed_dim, args.depth, args.patch_size, args.mlp_ratio) == (768, 12, 16, 4.0)


# -------------------------------------------------------------------------------------------------------------- one process


def test_a_run_leaves_what_it_promises(features, trained):
    log = log_of(trained)
    assert [line["epoch"] for line in log] == [1, 2]
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    assert checkpoint["val_auc"] == max(line["val_auc"] for line in log)
    assert checkpoint["datasets"] == ["real/Consistent", *(f"fake/{name}" for name in sorted(GENERATORS))]
    assert checkpoint["config"]["embed_dim"] == 24 and model.config.patch_size == 56
    assert 0 <= checkpoint["val_threshold"] <= 1
    assert not list(trained.glob(".*")), "no temporary file is left"


def test_validation_auc_is_the_one_of_the_saved_weights(features, trained):
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    dataset = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    metrics = binary_metrics(dataset.labels, predict_scores(model, dataset), 0.5)
    assert metrics["auc"] == pytest.approx(checkpoint["val_auc"], abs=1e-6)


def test_resumed_run_is_the_run_that_was_not_stopped(features, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "resumed")
    arguments = ("--features", features, *SMALL, "--epochs", 4)
    run_script("train.py", *arguments, "--output_dir", "resumed", "--resume", cwd=tmp_path)
    run_script("train.py", *arguments, "--output_dir", "straight", cwd=tmp_path)
    assert without_times(log_of(tmp_path / "resumed")) == without_times(log_of(tmp_path / "straight"))
    resumed, straight = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("resumed", "straight"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_an_earlier_model_is_kept(features, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "output_model")
    before = (trained / "best_model.pth").read_bytes()
    done = run_script("train.py", "--features", features, *SMALL, "--epochs", 1, "--seed", 7, cwd=tmp_path)
    assert "output_model/earlier_1" in done.stdout
    assert (tmp_path / "output_model/earlier_1/best_model.pth").read_bytes() == before
    assert len(log_of(tmp_path / "output_model")) == 1


def test_it_learns(features, tmp_path):
    """The training loss falls well below chance's 0.693 on a handful of faces: gradients reach what they should."""
    run_script(
        "train.py", "--features", features, "--patch_size", 56, "--embed_dim", 48, "--depth", 2, "--batch_size", 8, "--accum_steps", 1, "--num_workers", 0,
        "--dropout", 0, "--lr", 2e-3, "--epochs", 25, "--stop_patience", 25, "--lr_patience", 25, cwd=tmp_path,
    )  # fmt: skip
    log = log_of(tmp_path / "output_model")
    assert log[-1]["train_ce"] < 0.8 * log[0]["train_ce"] and log[-1]["train_ce"] < 0.6


def test_refusals(features, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(features, tmp_path / "cut")
    victim = tmp_path / "cut/real/Consistent/train_features.h5"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    shutil.copytree(trained, tmp_path / "foreign")
    for arguments, message in (
        (("--features", "nowhere"), "nowhere: no train features in it"),
        (("--features", "cut"), "cut/real/Consistent/train_features.h5: not a complete HDF5 file"),
        (("--features", features, "--datasets", "Nobody"), "no data set Nobody; there are real/Consistent, fake/BlurredRegion"),
        (("--features", features, "--datasets", "Consistent"), "has 36 real and 0 fake images; both are needed"),
        (("--features", features, "--embed_dim", 100), "embed_dim is 100"),
        (("--features", features, "--patch_size", 60), "img_size is 224, but has to be a positive multiple of patch_size, 60"),
        (("--features", features, "--resume"), "last.pth: no such checkpoint"),
        (("--features", features, "--resume", "--output_dir", "foreign", "--embed_dim", 48), "resume with the same options"),
        (("--features", features, *SMALL, "--resume", "--output_dir", "foreign", "--mask_style", "gaussian"), "trained with --mask_style polygon;"),
    ):
        assert message in refusal(train, *arguments)
    assert "nowhere" in error_line(run_script("train.py", "--features", "nowhere", cwd=tmp_path, expect=1))


def test_a_loss_that_is_no_number_stops_the_run(features, tmp_path):
    line = error_line(run_script("train.py", "--features", features, *SMALL, "--lr", 1e30, "--epochs", 3, cwd=tmp_path, expect=1))
    assert "the loss is" in line and "--lr" in line


# ----------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def together(features, tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes that stops early, and what it printed. Odd sizes: no split is divisible by two batches."""
    folder = tmp_path_factory.mktemp("together")
    done = run_script(
        "train.py", "--features", features, *SMALL, "--lr", 0.0, "--epochs", 30, "--stop_patience", 3, cwd=folder, processes=2
    )
    return folder / "output_model", done.stdout


def test_early_stop_is_the_same_decision_in_all_processes(together):
    folder, printed = together
    epochs = [line["epoch"] for line in log_of(folder)]
    assert epochs == [1, 2, 3, 4]  # a rate of 0: the first epoch is the best, three more without a better one
    for rank in (0, 1):
        assert f"rank {rank}: no better AUC for 3 epochs, stopped after epoch 4" in printed


def test_validation_over_two_processes_is_exact(together, features):
    model, checkpoint = load_checkpoint(together[0] / "best_model.pth")
    dataset = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    scores = predict_scores(model, dataset, batch_size=16)
    assert binary_metrics(dataset.labels, scores, 0.5)["auc"] == pytest.approx(checkpoint["val_auc"], abs=1e-6)


def test_two_processes_train_as_one(features, tmp_path):
    """2 x batch 4 is 1 x batch 8: the same cross entropy epoch by epoch, up to rounding, and the same schedule."""
    arguments = ("--features", features, "--patch_size", 56, "--embed_dim", 24, "--depth", 2, "--dropout", 0, "--diversity_weight", 0)
    arguments += ("--epochs", 4, "--accum_steps", 2, "--num_workers", 0, "--lr", 1e-3, "--lr_patience", 0)
    run_script("train.py", *arguments, "--batch_size", 8, "--output_dir", "one", cwd=tmp_path)
    run_script("train.py", *arguments, "--batch_size", 4, "--output_dir", "two", cwd=tmp_path, processes=2)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    np.testing.assert_allclose([line["train_ce"] for line in one], [line["train_ce"] for line in two], atol=1e-4)


def test_an_error_in_two_processes_ends_both(features, tmp_path):
    done = run_script("train.py", "--features", features, "--datasets", "Nobody", cwd=tmp_path, processes=2, expect=1)
    assert "no data set Nobody" in done.stderr


def test_train_is_imported_by_nothing():
    for script in ("model", "dataset", "preprocess", "feature_extraction", "inference", "demo"):
        text = (ROOT / f"{script}.py").read_text()
        assert "import train" not in text and "from train" not in text
