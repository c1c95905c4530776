"""How much the region masks count, and what that costs: LAMM-ViT with several starts, each tested with wrong masks.

    features/  ->  starts/<start>/seed_<n>/ (train.py's and inference.py's files), starts/starts.md

    python benchmarks/starts.py --seeds 1 --epochs 32 --embed_dim 96 --depth 2 --without diversity

All get the same data, budget and seeds. Every option that this script does not know goes to train.py. The AUC is that
over all generators of the test split; in brackets, how much a score changes in the mean with these masks. Stop it at
any time, the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.comparison.scores import masks_of_models
from benchmarks.comparison.variants import one_line_of_what_went_wrong, train_and_test
from samples.feature_files import find_feature_files

STARTS = {
    "plain ViT": ["--without", "region_guidance", "lamm", "head_interaction", "diversity"],
    "paper": ["--start", "paper"],
    "preserved": ["--start", "preserved"],
    "guided": ["--start", "guided"],
    "guided, 12 w": ["--start", "guided", "--scale_weights"],
    **{
        f"gates {lam} {theta} {gain}": ["--start", "guided", "--gates", lam, theta, gain]
        for lam, theta, gain in (
            ("6", "0", "4"),  # open inside, half open outside, as guided, but more
            ("8", "0.5", "2"),  # from here on nearly closed outside
            ("20", "0.5", "1"),
            ("20", "0.5", "2"),
            ("20", "0.5", "4"),
        )
    },
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--features", type=Path, default=Path("features"), help="(default: features)")
    parser.add_argument("--output_dir", type=Path, default=Path("starts"), help="(default: starts)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each start, with the seeds 0, 1, ... (default: 1)"
    )
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS), help="(default: all)")
    return parser


def main(args: argparse.Namespace, options: list[str]) -> None:
    trained_on = [name.split("/")[1] for name in find_feature_files(args.features, "train")]
    models: dict[str, list[Path]] = {}
    for seed, name in (bar := tqdm([(seed, name) for seed in range(args.seeds) for name in args.only], unit="model")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        folder = args.output_dir / name.replace(",", "").replace(" ", "_") / f"seed_{seed}"
        train_and_test(folder, (), seed, trained_on, args, [*options, *STARTS[name]])
        models.setdefault(name, []).append(folder)
    _, table = masks_of_models(args.features, models)
    note = f"{args.seeds} seed{'s' if args.seeds > 1 else ''}; `train.py {' '.join(options)}`"
    (args.output_dir / "starts.md").write_text(f"{table}\n\n{note}\n")
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    with one_line_of_what_went_wrong():
        main(*get_args_parser().parse_known_args())
