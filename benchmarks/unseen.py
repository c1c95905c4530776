"""How well detectors do on fakes of sources, and of whole families, that training never saw, against photographs of
collections that it never saw.

    faces/<real|fake>/<Name>/...  ->  unseen/results.md, results.json, left_out.csv

    python benchmarks/unseen.py --data_root faces faces_more
    python benchmarks/unseen.py ... --folds folds.json --seeds 5 --detectors LAMM-ViT "plain ViT"
    python benchmarks/unseen.py ... --scores "theirs=theirs.csv" --epochs 3          options of train.py are passed on

In each fold of benchmarks/comparison/folds.json some data sets are left out of training and validation altogether, and
are tested over all of their images. There are two kinds:

    new families    a family of generators leaves together with the photographs that it learned from, so that nothing
                    of it is known
    new sources     one source of a family that training knows, and one collection of photographs

One command from the files to the tables:

    prepare    every image aligned and recompressed alike; left out are images without a face in the crop,
               near-duplicates, and faces that may be one person's
    extract    feature files; 90 % of each data set to train and 10 % to validation, as far as a fold knows the data
               set; what it does not know is the test
    linear     what frozen trunks say of the images, read once for all folds, and linear models of it; and of shortcuts:
               the mean spectrum, a thumbnail, how much of a crop lies beyond its picture
    train      in each fold LAMM-ViT and a plain ViT on the same trunk, tuned alike, with several seeds each
    compare    AUC of left-out fakes against left-out photographs with bootstrap intervals, false alarms and fakes found
               at thresholds that were chosen on known collections, calibration, paired differences, wrong masks

Before the training starts it says how long that will take. It can be stopped at any time; the same command goes on.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.comparison.detectors import (
    DETECTORS,
    MASKED,
    SHORTCUTS,
    announce,
    left_out_parts,
    models_folder,
    plan_jobs,
    read_others,
    runs_of,
    score_linear_models,
    scores_of,
    train_all,
)
from benchmarks.comparison.fold_tables import judge_all, write_tables
from benchmarks.comparison.folds import FOLDS, Fold, check_images, load_stock, read_folds
from benchmarks.comparison.frozen import PROBES
from benchmarks.comparison.images import EQUALISED, check_splits, data_sets_of, extract, features_of, prepare, sift
from benchmarks.comparison.jobs import train_options
from benchmarks.comparison.variants import VARIANTS, one_line_of_what_went_wrong
from faces.treatment import ALIGNED_CROP
from runtime.processes import default_workers, lock
from training.setup import config_of

SET_HERE = ("--features", "--output_dir", "--patch_size", "--seed", "--datasets", "--resume", "--device")
SHARES = 90, 10, 0  # of each data set to train, val and test, as `make weights` deals them
# The whole trunk stays as it is but for its LayerNorms; the head starts as the probe
RECIPE = {
    "--init_from": "clip",
    "--depth": "8",
    "--read_blocks": "7 8",
    "--pool": "patches face",
    "--head": "probe",
    "--probe_views": "1",
    "--augment": "wild",
    "--sampling": "sources",
    "--tune": "norms",
    "--epochs": "2",
    "--schedule": "cosine",
    "--lr": "1e-4",
    "--batch_size": "32",
    "--accum_steps": "1",
    "--dropout": "0",
    "--without": "diversity",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    option = parser.add_argument
    option(
        "--data_root",
        type=Path,
        nargs="+",
        default=[Path("datasets")],
        metavar="FOLDER",
        help="folders with real/<Collection> and fake/<Generator>; a data set is in one of them (default: datasets)",
    )
    option(
        "--folds",
        type=Path,
        default=FOLDS,
        metavar="FILE",
        help='{kind: {fold: {"fakes": [...], "photographs": [...]}}} (default: benchmarks/comparison/folds.json)',
    )
    option("--output_dir", type=Path, default=Path("unseen"), help="(default: unseen)")
    option(
        "--align",
        type=float,
        default=ALIGNED_CROP,
        metavar="CROP",
        help=f"how much of a face is seen, as of preprocess.py --align (default: {ALIGNED_CROP})",
    )
    option("--img_size", type=int, default=128, help="side of the images in pixels (default: 128)")
    option("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    option(
        "--seeds",
        type=int,
        default=3,
        help="runs of each trained model and of each head, whose views are drawn anew (default: 3)",
    )
    option(
        "--detectors",
        nargs="+",
        choices=DETECTORS,
        default=[*PROBES, MASKED, "plain ViT"],
        metavar="NAME",
        help=f"some of: {'; '.join(DETECTORS)} (default: all but single ablations)",
    )
    option(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="another detector's scores, beside ours: a CSV file with the columns path, as real/FFHQ/0.png or"
        " real/FFHQ/0, and score, the probability of a fake",
    )
    option("--delete_models", action="store_true", help="keep the scores of the trained models, not the models")
    option("--device", default="auto", help="cpu or cuda (default: the GPU where there is one)")
    option(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes for the images (default: one a core, fewer where memory is short)",
    )
    return parser


def check_options(args: argparse.Namespace, options: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The options of train.py, complete, and the same parsed. Raises ValueError where those of either script make no
    sense.
    """
    options, train_args = train_options(options, RECIPE, SET_HERE, args.patch_size)
    if min(args.seeds, args.workers) < 1 or min(args.img_size, args.patch_size) < 1 or args.img_size % args.patch_size:
        raise ValueError("--seeds and --workers have to be at least 1, --img_size a multiple of --patch_size")
    config_of(train_args, args.img_size)  # says what does not fit
    args.detectors = [name for name in DETECTORS if name in args.detectors]
    if not train_args.init_from and (of_trunk := [name for name in args.detectors if name in PROBES]):
        raise ValueError(f"{', '.join(of_trunk)}: a probe of a trunk; name one with --init_from")
    models: dict[tuple[str, ...], str] = {}
    for name in (name for name in args.detectors if name in VARIANTS):
        before = models.setdefault(tuple(left_out_parts(name, train_args)), name)
        if before != name:
            raise ValueError(
                f"--detectors {name}: with --without {' '.join(train_args.without)} the same as {before}; leave it away"
            )
    settings, now = (
        args.output_dir / "settings.json",
        {
            "data_root": [str(root.resolve()) for root in args.data_root],
            "align": args.align,
            "img_size": args.img_size,
            "patch_size": args.patch_size,
        },
    )
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise ValueError(f"{args.output_dir}: holds results with other options ({settings}); give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(now, indent=2) + "\n")
    return options, train_args


def compare(
    args: argparse.Namespace,
    data_sets: dict[str, Path],
    folds: list[Fold],
    options: list[str],
    train_args: argparse.Namespace,
) -> dict:
    """From files to tables."""
    prepare(args, data_sets, [EQUALISED])
    kept, dropped = sift(args, data_sets, [EQUALISED])
    extract(args, treatments=[EQUALISED], shares=SHARES)
    args.features = features_of(args, EQUALISED)
    sizes = check_splits(args.features, kept)
    stock = load_stock(args.features)
    check_images(stock, folds, dropped)
    others = dict(read_others(text, stock, data_sets) for text in args.scores)

    models = models_folder(args, stock, options)
    jobs = plan_jobs(args, folds, models)
    score_linear_models(args, stock, folds, models, train_args)
    announce(args, stock, jobs, options, train_args)
    train_all(args, stock, jobs, options, train_args)

    log_odds = {}
    for fold in folds:
        for name in args.detectors:
            log_odds[fold, name] = scores_of(models, fold, name, runs_of(args, name, train_args))
        log_odds |= {(fold, name): values for name, values in others.items()}
        log_odds |= {(fold, name): scores_of(models, fold, name) for name in SHORTCUTS}
    return write_tables(judge_all(args, stock, folds, log_odds, models), sizes, dropped, command_line(args, options))


def command_line(args: argparse.Namespace, options: list[str]) -> str:
    detectors = " ".join(json.dumps(name, ensure_ascii=False) for name in args.detectors)
    folds = f" --folds {args.folds}" if args.folds != FOLDS else ""
    scores = f" --scores {' '.join(args.scores)}" if args.scores else ""
    return (
        f"python benchmarks/unseen.py --data_root {' '.join(map(str, args.data_root))}{folds} --align {args.align:g}"
        f" --img_size {args.img_size} --patch_size {args.patch_size} --seeds {args.seeds} --detectors"
        f" {detectors}{scores}; train.py {' '.join(options)}"
    )


def main(args: argparse.Namespace, options: list[str]) -> dict:
    started = time.perf_counter()
    data_sets = data_sets_of(*args.data_root)
    folds = read_folds(args.folds, data_sets)
    options, train_args = check_options(args, options)
    with lock(args.output_dir):
        summary = compare(args, data_sets, folds, options, train_args)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes; written to {args.output_dir / 'results.md'}")
    return summary


if __name__ == "__main__":
    with one_line_of_what_went_wrong():
        main(*get_args_parser().parse_known_args())
