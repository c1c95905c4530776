"""Trains LAMM-ViT, LAMM-ViT without each of its parts, and a plain ViT of the same width and depth, and compares them.

    features/  ->  ablation/<variant>/seed_<n>/ (train.py's and inference.py's files), ablation/ablation.md

    python benchmarks/ablation.py --seeds 3 --epochs 47 --embed_dim 96 --depth 2     the features in ./features

All variants get the same data, budget and seeds. Every option that this script does not know goes to train.py. With --held_out,
generators are kept from training and tested apart. It says how long it will take after the first run; stop it at any time, the
same command goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import find_feature_files  # noqa: E402
from inference import load_checkpoint  # noqa: E402

VARIANTS = {
    "LAMM-ViT": (),
    "without region guidance": ("region_guidance",),
    "without LAMM (fixed λ, θ, w)": ("lamm",),
    "without head interaction": ("head_interaction",),
    "without the diversity loss": ("diversity",),
    "plain ViT": ("region_guidance", "lamm", "head_interaction", "diversity"),
}


OURS = ("--without", "--seed", "--resume", "--datasets")  # options of train.py


def run(command: list[str]) -> None:
    """Runs a script of this repository. Raises ValueError with what it said where it fails, or was stopped."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ValueError(f"{' '.join(command)}\nended with: {said[-1] if said else done.returncode}")
    if "stopped by SIG" in done.stdout:  # train.py has saved where it was, and ended well
        raise ValueError("stopped; the same command goes on")


def train_and_test(folder: Path, without: tuple[str, ...], seed: int, trained_on: list[str], args: argparse.Namespace, options: list[str]) -> dict:
    """Trains one model, or goes on with it, and tests it against all generators: inference.py's results."""
    results = folder / "prediction_results.json"
    if not results.exists():
        command = [str(ROOT / "train.py"), "--features", str(args.features), "--output_dir", str(folder), "--resume", "--seed", str(seed), *options]
        command += ["--datasets", *trained_on]  # after the other options: it takes all that follow
        run(command + (["--without", *without] if without else []))
        test = [str(ROOT / "inference.py"), "--features", str(args.features), "--checkpoint", str(folder / "best_model.pth")]
        run([*test, "--output", str(results)])
    return json.loads(results.read_text())


def row(name: str, runs: list[dict], seen: list[str], held_out: list[str], parameters: int) -> str:
    """A line of the table: mean ± std over seeds, of the mean over generators."""
    cells = [name, f"{parameters / 1e6:.2f}"]
    for generators in (seen, held_out):
        for metric, scale in (("auc", 100), ("ap", 100), ("accuracy", 1)) if generators else ():
            values = [scale * np.mean([one[generator][metric] for generator in generators if generator in one]) for one in runs]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
    return f"| {' | '.join(cells)} |"


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)")
    parser.add_argument("--output_dir", type=Path, default=Path("ablation"), help="(default: ablation)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, with the seeds 0, 1, ... (default: 3)")
    parser.add_argument("--held_out", nargs="+", default=[], metavar="NAME", help="generators to keep from training (default: none)")
    return parser


def main(args: argparse.Namespace, options: list[str]) -> None:
    if taken := [option for option in options if option.split("=")[0] in OURS]:
        raise ValueError(f"{', '.join(taken)}: this script sets it; --seeds says how many")
    if args.seeds < 1:
        raise ValueError("--seeds has to be at least 1")
    names = [name.split("/") for name in find_feature_files(args.features, "train")]
    generators = [name for kind, name in names if kind == "fake"]
    if ambiguous := set(generators) & {name for kind, name in names if kind == "real"}:
        raise ValueError(f"{', '.join(ambiguous)}: a real and a fake data set; give them different names")
    if unknown := set(args.held_out) - set(generators):
        raise ValueError(f"--held_out {', '.join(sorted(unknown))}: no such generator; there are {', '.join(generators)}")
    seen = [name for name in generators if name not in args.held_out]
    trained_on = [name for kind, name in names if kind == "real"] + seen
    settings = args.output_dir / "settings.json"
    now = {"features": str(args.features.resolve()), "held_out": sorted(args.held_out), "options": options}
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise ValueError(f"{args.output_dir}: holds an ablation with other options ({settings}); give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # seed by seed, so that a table of what is there is a fair one at any time
    jobs = [(seed, name, args.output_dir / name.split(" (")[0].replace(" ", "_") / f"seed_{seed}") for seed in range(args.seeds) for name in VARIANTS]
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    started, folders = time.perf_counter(), {}
    for seed, name, folder in (bar := tqdm(jobs, unit="model")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        runs[name].append(train_and_test(folder, VARIANTS[name], seed, trained_on, args, options))
        folders[name] = folder
        settings.write_text(json.dumps(now, indent=2) + "\n")  # these options have worked

    heads = ["model", "M parameters"] + [f"{metric}, {which}" for which, group in (("generators seen", seen), ("held out", args.held_out)) if group for metric in ("AUC %", "AP %", "ACC %")]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for name in VARIANTS:
        parameters = sum(parameter.numel() for parameter in load_checkpoint(folders[name] / "best_model.pth")[0].parameters())
        lines.append(row(name, runs[name], seen, args.held_out, parameters))
    lines.append(f"\nMean ± std over {args.seeds} seeds, of the mean over {', '.join(seen)}{' and, held out, ' + ', '.join(args.held_out) if args.held_out else ''}; `train.py {' '.join(options)}`")
    (args.output_dir / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{time.perf_counter() - started:.0f} s; written to {args.output_dir / 'ablation.md'}")


if __name__ == "__main__":
    try:
        main(*get_args_parser().parse_known_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
