"""What frozen blocks give is computed once (--cache_blocks), and nothing comes out otherwise for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, refusal, run_script
from test_train import CACHED, in_one, in_two, save_trunk  # noqa: F401, fixtures

import train
from model import Block, LAMMViT
from training import readings

HEAD = CACHED[: CACHED.index("--cache_blocks")]


@pytest.fixture
def vit(tmp_path) -> Path:
    return save_trunk(tmp_path / "vit.pth")


def options(features, folder, vit, *more) -> list[str]:
    return list(map(str, ("--features", features, *SMALL, "--output_dir", folder, "--init_from", vit, *more)))


def fit(*arguments) -> None:
    train.main(train.get_args_parser().parse_args(options(*arguments)))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def cache_of(folder: Path) -> Path:
    (path,) = folder.glob("*cache_*")
    return path


def assert_same_bits(folder: Path, other: Path) -> None:
    for name in ("log.jsonl", "best_model.pth"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [("--ema", 0.9), ("--pool", "patches", "regions", "--head", "probe"), ("--without", "lamm")]
)
def test_a_head_on_the_cache_is_the_head_without(features, tmp_path, vit, monkeypatch, capsys, more):
    """Losses, metrics, weights and LAMM's mean weights; the model itself runs once for each image."""
    fit(features, tmp_path / "without", vit, *HEAD, *more)
    seen, real = [], LAMMViT.forward

    def counted(model, images, masks):
        seen.extend(images)
        return real(model, images, masks)

    monkeypatch.setattr(LAMMViT, "forward", counted)
    capsys.readouterr()
    fit(features, tmp_path / "cached", vit, *CACHED, *more)
    rows = np.load(cache_of(tmp_path / "cached"))
    assert len(seen) == len(rows) == 72 + 25
    said = f"cache  97 rows of {rows.shape[1]} numbers, {rows.nbytes / 1e9:.3f} GB in {tmp_path}/cached/cache_"
    assert said in capsys.readouterr().out
    for one, other in zip(log_of(tmp_path / "without"), log_of(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    one, other = (torch.load(tmp_path / name / "best_model.pth", weights_only=True) for name in ("without", "cached"))
    for name, values in one["model"].items():
        torch.testing.assert_close(values, other["model"][name], atol=1e-3, rtol=0)
        if not name.startswith("head."):
            assert torch.equal(values, other["model"][name])
    assert (one["lamm_weights"] is None) == ("lamm" in more)
    if "lamm" not in more:
        torch.testing.assert_close(one["lamm_weights"], other["lamm_weights"], atol=1e-6, rtol=0)
    first, second = log_of(tmp_path / "cached")
    assert abs(first["val_loss"] - second["val_loss"]) > 1e-4, "it learns, or the comparison would prove nothing"


@pytest.mark.slow
def test_validation_is_in_single_precision_with_the_cache_too(features, tmp_path, vit):
    for name, given in (("without", HEAD), ("cached", CACHED)):
        fit(features, tmp_path / name, vit, *given, "--precision", "bf16")
    for one, other in zip(*(log_of(tmp_path / name) for name in ("without", "cached")), strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-6)
    one, other = (torch.load(tmp_path / name / "best_model.pth", weights_only=True) for name in ("without", "cached"))
    assert one["val_threshold"] == pytest.approx(other["val_threshold"], abs=1e-6)


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits_with_the_file_and_without_it(features, tmp_path, vit, monkeypatch):
    fit(features, tmp_path / "straight", vit, *CACHED)
    real, calls = train.one_step, []

    def stopping(run, *rest):
        calls.append(0)
        if len(calls) == 3:
            run.stop = "SIGTERM"
        return real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", stopping)
        fit(features, tmp_path / "stopped", vit, *CACHED)
    shutil.copytree(tmp_path / "stopped", tmp_path / "lost")
    cache_of(tmp_path / "lost").unlink()
    written = cache_of(tmp_path / "stopped").stat().st_mtime_ns
    for name in ("stopped", "lost"):
        fit(features, tmp_path / name, vit, *CACHED, "--resume")
        assert_same_bits(tmp_path / name, tmp_path / "straight")
    assert cache_of(tmp_path / "stopped").stat().st_mtime_ns == written


@pytest.mark.slow
def test_two_processes_write_the_same_rows(features, tmp_path, in_two):  # noqa: F811
    fit(features, tmp_path, in_two / "vit.pth", *CACHED)
    assert cache_of(tmp_path).read_bytes() == cache_of(in_two / "cached").read_bytes()
    for one, other in zip(log_of(tmp_path), log_of(in_two / "cached"), strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)


@pytest.mark.slow
def test_the_file_of_another_frozen_part_is_not_taken(features, tmp_path, vit):
    fit(features, tmp_path / "out", vit, *CACHED)
    before = cache_of(tmp_path / "out")
    fit(features, tmp_path / "out", vit, *CACHED, "--lr", 1e-3)
    assert cache_of(tmp_path / "out") == before, "another head on the same rows"
    fit(features, tmp_path / "out", vit, *CACHED, "--start", "preserved")
    assert cache_of(tmp_path / "out") != before
    before = cache_of(tmp_path / "out")
    before.write_bytes(before.read_bytes()[:-1000])
    arguments = options(features, tmp_path / "out", vit, *CACHED, "--start", "preserved")
    assert f"{before}: not whole (" in refusal(train, *arguments)


def test_what_cannot_be_cached_is_refused(features, tmp_path, vit, monkeypatch):
    for more, message in (
        (("--tune", "norms"), "--cache_blocks 2 with --tune norms: "),
        (("--cache_blocks", 1), "with --tune head, all of them, --cache_blocks 2"),
        (("--augment", "paper"), "with --augment none, and without --color_jitter"),
        (("--color_jitter", 0.1), "without --color_jitter"),
    ):
        message_given = refusal(train, *options(features, tmp_path / "out", vit, *CACHED, *more))
        assert message in message_given and "\n" not in message_given
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10, 10)
    monkeypatch.setattr("runtime.files.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(train, "check_disk", lambda run, goes_on: None)
    assert "no space left on the disk" in refusal(train, *options(features, tmp_path / "out", vit, *CACHED))
    assert not list((tmp_path / "out").glob("*cache*"))


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "first"), [("head", 2), ("norms", 0), ("lora:2", 0)])
def test_blocks_below_what_is_trained_have_no_graph_and_no_dropout(features, tmp_path, vit, monkeypatch, tune, first):
    """With the cache or without it: of blocks that are wholly frozen nothing is kept for a backward."""
    seen, real = {}, Block.forward

    def watching(block, x, *gates):
        out = real(block, x, *gates)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            seen.setdefault(id(block), (out.requires_grad, block.training, block.mlp[2].training))
        return out

    monkeypatch.setattr(Block, "forward", watching)
    fit(features, tmp_path / "out", vit, "--tune", tune, "--epochs", 1)
    assert list(seen.values()) == [(False, False, False)] * first + [(True, True, True)] * (2 - first)


@pytest.mark.slow
def test_what_was_read_before_a_stop_is_not_read_again(features, tmp_path, vit, monkeypatch):
    """--head probe, stopped in its third part: on it goes. Parts of other options and damaged ones are read anew."""
    monkeypatch.setattr(readings, "BATCHES", 2)
    calls, stop_at, predict = [], [3], readings.predict

    def counted(*arguments):
        calls.append(arguments[-2])
        if len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return predict(*arguments)

    monkeypatch.setattr(readings, "predict", counted)
    fixed = ("--features", features, *SMALL, "--init_from", vit, "--tune", "head", "--epochs", 0, "--head", "probe")
    fixed = (*fixed, "--pool", "patches", "--augment", "wild", "--probe_views", 1)

    def train(name: str, *more: object, expect: int = 0) -> int:
        calls.clear()
        run_script("train.py", *fixed, "--output_dir", name, *more, cwd=tmp_path, expect=expect)
        return len(calls)

    assert train("out", "--resume", expect=1) == 3 and calls[0].startswith("probe, images 1 to ")
    parts = sorted((tmp_path / "out/readings").iterdir())
    assert len(parts) == 2 and not (tmp_path / "out/last.pth").exists()
    stop_at[0] = 0
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    (tmp_path / "damaged/readings" / parts[1].name).write_bytes(parts[1].read_bytes()[:-100])
    whole = train("straight")
    assert train("out", "--resume") == whole - 2 and not (tmp_path / "out/readings").exists()
    assert train("damaged", "--resume") == whole - 1
    for name in ("out", "damaged"):
        assert (tmp_path / name / "best_model.pth").read_bytes() == (tmp_path / "straight/best_model.pth").read_bytes()
    assert train("other", "--resume", "--augment", "none", "--probe_views", 0) == whole // 2
