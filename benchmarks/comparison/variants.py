"""LAMM-ViT and what is left when parts of it are taken away: each trained and tested by this repository's scripts."""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

VARIANTS = {
    "LAMM-ViT": (),
    "without region guidance": ("region_guidance",),
    "without LAMM (fixed λ, θ, w)": ("lamm",),
    "without head interaction": ("head_interaction",),
    "without the diversity loss": ("diversity",),
    "plain ViT": ("region_guidance", "lamm", "head_interaction", "diversity"),
}


@contextlib.contextmanager
def one_line_of_what_went_wrong() -> Iterator[None]:
    """Around the main of a benchmark that can be stopped and goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


def command(script: str, *arguments: str, **options: object) -> list[str]:
    """The command line of a script of this repository: the arguments as they are, then --name value of each option."""
    named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str(ROOT / script), *arguments, *named]


def run(command: list[str]) -> None:
    """Runs a script of this repository. Raises ValueError with what it said where it fails, or was stopped."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ValueError(f"{' '.join(command)}\nended with: {said[-1] if said else done.returncode}")
    if "stopped by SIG" in done.stdout:  # train.py has saved where it was, and ended well
        raise ValueError("stopped; the same command goes on")


def train_and_test(
    folder: Path,
    without: tuple[str, ...],
    seed: int,
    trained_on: list[str],
    args: argparse.Namespace,
    options: list[str],
) -> dict:
    """Trains one model, or goes on with it, and tests it against all generators: inference.py's results."""
    results = folder / "prediction_results.json"
    if not results.exists():
        fit = command("train.py", features=args.features, output_dir=folder, seed=seed)
        fit += ["--resume", *options, "--datasets", *trained_on]  # the last takes all that follow
        run(fit + (["--without", *without] if without else []))
        best = folder / "best_model.pth"
        run(command("inference.py", features=args.features, checkpoint=best, output=results))
    return json.loads(results.read_text())


def row(name: str, runs: list[dict], seen: list[str], held_out: list[str], parameters: int) -> list[str]:
    """A row of the table: mean ± std over seeds, of the mean over generators."""
    cells = [name, f"{parameters / 1e6:.2f}"]
    for generators in (seen, held_out):
        for metric, scale in (("auc", 100), ("ap", 100), ("accuracy", 1)) if generators else ():
            values = [
                scale * np.mean([one[generator][metric] for generator in generators if generator in one])
                for one in runs
            ]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
    return cells


def heads(seen: str, held_out: str) -> list[str]:
    """Over these rows. Arguments: what the two groups of generators are called; "" for one without generators."""
    return ["model", "M parameters"] + [
        f"{metric}, {group}" for group in (seen, held_out) if group for metric in ("AUC %", "AP %", "ACC %")
    ]
