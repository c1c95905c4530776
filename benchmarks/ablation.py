"""Trains LAMM-ViT, LAMM-ViT without each of its parts, and a plain ViT of the same width and depth, and compares them.

    features/  ->  ablation/<variant>/seed_<n>/ (train.py's and inference.py's files), ablation/ablation.md

    python benchmarks/ablation.py --seeds 3 --epochs 47 --embed_dim 96 --depth 2     the features in ./features

All variants get the same data, budget and seeds. Every option that this script does not know goes to train.py. With
--held_out, generators are kept from training and tested apart. It says how long it will take after the first run; stop
it at any time, the same command goes on.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.comparison.scores import masks_of_models
from benchmarks.comparison.variants import VARIANTS, heads, one_line_of_what_went_wrong, row, train_and_test
from evaluation.typeset import as_markdown
from runtime.checkpoint import load_checkpoint
from samples.feature_files import find_feature_files

OURS = ("--without", "--seed", "--resume", "--datasets")  # options of train.py


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("ablation"), help="(default: ablation)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each variant, with the seeds 0, 1, ... (default: 3)"
    )
    parser.add_argument(
        "--held_out", nargs="+", default=[], metavar="NAME", help="generators to keep from training (default: none)"
    )
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
        raise ValueError(
            f"--held_out {', '.join(sorted(unknown))}: no such generator; there are {', '.join(generators)}"
        )
    seen = [name for name in generators if name not in args.held_out]
    trained_on = [name for kind, name in names if kind == "real"] + seen
    settings = args.output_dir / "settings.json"
    now = {"features": str(args.features.resolve()), "held_out": sorted(args.held_out), "options": options}
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise ValueError(
            f"{args.output_dir}: holds an ablation with other options ({settings}); give another --output_dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # seed by seed, so that a table of what is there is a fair one at any time
    jobs = [
        (seed, name, args.output_dir / name.split(" (")[0].replace(" ", "_") / f"seed_{seed}")
        for seed in range(args.seeds)
        for name in VARIANTS
    ]
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    started, folders = time.perf_counter(), {}
    for seed, name, folder in (bar := tqdm(jobs, unit="model")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        runs[name].append(train_and_test(folder, VARIANTS[name], seed, trained_on, args, options))
        folders[name] = folder
        settings.write_text(json.dumps(now, indent=2) + "\n")  # these options have worked

    rows = []
    for name in VARIANTS:
        parameters = sum(
            parameter.numel() for parameter in load_checkpoint(folders[name] / "best_model.pth")[0].parameters()
        )
        rows.append(row(name, runs[name], seen, args.held_out, parameters))
    table = as_markdown(heads("generators seen", "held out" if args.held_out else ""), rows)
    apart = f" and, held out, {', '.join(args.held_out)}" if args.held_out else ""
    note = (
        f"Mean ± std over {args.seeds} seeds, of the mean over {', '.join(seen)}{apart}; `train.py {' '.join(options)}`"
    )
    models = {name: [folder for _, of, folder in jobs if of == name] for name in VARIANTS}
    _, masks = masks_of_models(args.features, models)
    page = f"{table}\n\n{note}\n\nWith wrong region masks, all generators of the test split:\n\n{masks}\n"
    (args.output_dir / "ablation.md").write_text(page)
    print(page)
    print(f"{time.perf_counter() - started:.0f} s; written to {args.output_dir / 'ablation.md'}")


if __name__ == "__main__":
    with one_line_of_what_went_wrong():
        main(*get_args_parser().parse_known_args())
