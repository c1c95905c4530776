"""benchmarks/ablation.py: every variant is trained and tested, one table says how well, a stopped run goes on."""

import json

import numpy as np
import pytest
import torch
from conftest import GENERATORS, SMALL

import inference
import train
from benchmarks import ablation
from benchmarks.comparison import variants


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """Runs the scripts in this process, which takes no seconds to import torch, and notes how they were called."""
    seen: list[list[str]] = []

    def run(command: list[str]) -> None:
        script = train if command[0].endswith("train.py") else inference
        seen.append(command)
        script.main(script.get_args_parser().parse_args(command[1:]))

    monkeypatch.setattr(variants, "run", run)
    return seen


def ablate(*arguments: object) -> None:
    ablation.main(*ablation.get_args_parser().parse_known_args(list(map(str, arguments))))


@pytest.mark.slow
def test_all_variants_in_one_table_and_a_stopped_run_goes_on(features, tmp_path, calls, monkeypatch, capsys):
    arguments = (
        "--features",
        features,
        "--output_dir",
        tmp_path / "out",
        *"--seeds 1 --held_out IrisMismatch".split(),
        *SMALL,
        "--epochs",
        1,
    )
    run, stop_at = variants.run, 5

    def run_until(command: list[str]) -> None:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        run(command)

    monkeypatch.setattr(variants, "run", run_until)
    with pytest.raises(KeyboardInterrupt):
        ablate(*arguments)
    monkeypatch.setattr(variants, "run", run)
    ablate(*arguments)
    assert len(calls) == 2 * len(variants.VARIANTS) + 1, "the training before the stop was taken up again, nothing else"

    table = (tmp_path / "out/ablation.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:8]]
    rows = {name: of_name for name, *of_name in cells}
    assert rows.keys() == variants.VARIANTS.keys() and table in capsys.readouterr().out
    for name, without in variants.VARIANTS.items():
        folder = tmp_path / "out" / name.split(" (")[0].replace(" ", "_") / "seed_0"
        checkpoint = torch.load(folder / "best_model.pth", weights_only=True)
        assert (
            checkpoint["arguments"]["without"] == sorted(without) and "fake/IrisMismatch" not in checkpoint["datasets"]
        )
        results = json.loads((folder / "prediction_results.json").read_text())
        assert set(GENERATORS) < set(results), "the one that was kept from training is tested"
        parameters = sum(values.numel() for values in checkpoint["model"].values())
        millions, auc, ap, accuracy, *held_out = rows[name]
        assert float(millions) == pytest.approx(parameters / 1e6, abs=0.006)
        assert (auc, accuracy) == (
            f"{100 * results['OffAxisMouth']['auc']:.1f}",
            f"{results['OffAxisMouth']['accuracy']:.1f}",
        )
        assert held_out[1] == f"{100 * results['IrisMismatch']['ap']:.1f}"
    with pytest.raises(ValueError, match="holds an ablation with other options"):
        ablate(*arguments, "--lr", 1)


def test_mean_and_spread_over_seeds():
    runs = [
        {"A": {"auc": auc, "ap": 0.5, "accuracy": 50.0}, "B": {"auc": auc + 0.1, "ap": 0.5, "accuracy": 50.0}}
        for auc in (0.5, 0.6, 0.7)
    ]
    cells = variants.row("plain", runs, ["A", "B"], [], 2_000_000)
    assert cells == ["plain", "2.00", f"65.0 ± {np.std([55, 65, 75], ddof=1):.1f}", "50.0 ± 0.0", "50.0 ± 0.0"]


def test_options_that_it_sets_itself_are_refused(features, tmp_path, calls):
    for option in ("--seed", "--without=lamm", "--datasets"):
        with pytest.raises(ValueError, match="this script sets it"):
            ablate("--features", features, "--output_dir", tmp_path / "out", option, 1)
    with pytest.raises(ValueError, match="no such generator; there are IrisMismatch"):
        ablate("--features", features, "--output_dir", tmp_path / "out", "--held_out", "Nobody")
    assert not calls and not (tmp_path / "out").exists()
