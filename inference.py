"""Tests a trained model against each generator, or scores loose images.

    output_model/best_model.pth + features/  ->  a table; prediction_results.json, .csv (scores), .md, .tex
    output_model/best_model.pth + images     ->  a row for each face, CSV

    python inference.py                                      every generator in ./features, its test split
    python inference.py --datasets FFHQ StyleGAN3            these alone
    python inference.py --robustness --report report         also under JPEG, blur, noise and resize; one HTML file
    torchrun --nproc_per_node=4 inference.py                 the same numbers, sooner
    python inference.py --images photo.jpg folder/           loose images: a row for each face, with its probability
    python inference.py --images photo.jpg --explain why     and a picture of what the model looked at
    python inference.py --images photo.jpg --fpr 0.01        fake or real at 1 % of false alarms, nothing is uncertain

Each generator's fakes stand against as many real images, drawn by seed from the pool of all real data sets. The model
is rebuilt from the checkpoint alone. Where nothing was trained yet, it is that of the weights that ship
(weights/lamm_vit.safetensors; docs/weights.md).

With --images the exit code is 0 if every file got a score, 3 if some did not, 1 if nothing could be done.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np

from evaluation import tables
from evaluation.groups import at_thresholds, errors_by, group_table, groups_of, threshold_tables, warn_of_few
from evaluation.mistakes import find_mistakes
from evaluation.operating import thresholds_of, verdict_of
from evaluation.pictures import BATCH_SIZE, score_images
from evaluation.protocol import PROTOCOLS, TestSet, load_test_set, score
from evaluation.robustness import test_robustness
from evaluation.summary import summarize
from evaluation.traces import count_originals, warn_of_traces, warn_of_treatment
from evaluation.typeset import as_markdown, as_text
from model import LAMMViT
from runtime.checkpoint import load_checkpoint
from runtime.devices import backend_for, keep_freed_memory, pick_process_device
from runtime.files import replacing
from runtime.hub_folder import weights_in
from runtime.processes import default_workers, gather, join_processes, under_torchrun
from runtime.weights_file import choose_checkpoint

EXIT_UNSCORED = 3


def evaluate(model: LAMMViT, checkpoint: dict, rank: int, args: argparse.Namespace) -> None:
    """The whole evaluation. All processes score, the first one writes and prints."""
    thresholds = thresholds_of(checkpoint, args.fpr, args.checkpoint)
    threshold = checkpoint["val_threshold"] if args.fpr is None else min(thresholds.values())  # of right and wrong
    test_set = load_test_set(model, checkpoint, args)
    groups = {column: groups_of(test_set, column) for column in args.by}  # raises before hours are spent
    check_outputs(args)
    scores = score(model, test_set, args)
    results = summarize(test_set, scores, checkpoint, args.bootstrap if rank == 0 else 0, args.seed)
    robustness = test_robustness(model, checkpoint, test_set, results, args) if args.robustness else None
    if rank > 0:
        return
    by = {column: errors_by(test_set, scores, groups[column], threshold) for column in args.by}
    operating = at_thresholds(test_set, scores, thresholds)
    warnings = warn_of_treatment(test_set, checkpoint["framing"]["treatment"]) + warn_of_traces(test_set, args.protocol)
    warnings += [line for column, errors in by.items() for line in warn_of_few(errors, column)]
    results["Run"] = describe_run(checkpoint, test_set, warnings, args) | {"threshold": threshold}
    # before anything is printed: a reader that has gone costs nothing
    write_results(args.output, results, robustness, by, operating)
    write_scores(args.output.with_suffix(".csv"), test_set, scores, thresholds)
    if args.report:
        from evaluation.report import write_report  # matplotlib, where it is needed

        mistakes = find_mistakes(test_set, scores, threshold)
        comparisons = test_set.labels_and_scores(scores)
        write_report(args.report / "report.html", results, comparisons, mistakes, robustness, operating)
    tables.print_results(results)
    for heads, rows in threshold_tables(operating):
        print(f"\n{as_text(heads, rows)}")
    if robustness:
        tables.print_robustness(robustness)
    for column, errors in by.items():
        print(f"\n{group_table(errors, column)}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    beside = args.output.with_suffix(".csv").name
    print(f"written to {args.output}; scores in {beside}, rows for a paper in .md and .tex")
    if args.report:
        print(f"report in {args.report / 'report.html'}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError where the results could not be written: before hours are spent on them."""
    for folder in (args.output.parent, *([args.report] if args.report else [])):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder}: nothing can be written there; name another folder")
    files = [args.output.with_suffix(suffix) for suffix in (".json", ".csv", ".md", ".tex")]
    if taken := [path for path in files if path.is_dir()]:
        raise ValueError(f"{taken[0]}: is a folder; give --output another name")


def write_results(
    out: Path, results: dict, robustness: list[dict] | None, by: dict[str, dict], operating: dict
) -> None:
    """The JSON file, tables in Markdown and LaTeX beside it, and the curves of robustness.

    Args:
        by: {column of --by: errors_by}.
        operating: of at_thresholds.
    """
    further = {"Operating": operating}
    further |= ({"Robustness": robustness} if robustness else {}) | ({"By": by} if by else {})
    with replacing(out) as partial:
        partial.write_text(json.dumps(results | further, indent=2) + "\n")
    markdown = tables.results_as_markdown(results, robustness)
    markdown += "".join(f"\n{as_markdown(*table)}\n" for table in threshold_tables(operating))
    markdown += "".join(f"\n{group_table(errors, column, markdown=True)}\n" for column, errors in by.items())
    texts = {".md": markdown, ".tex": tables.results_as_latex(results)}
    for suffix, text in texts.items():
        out.with_suffix(suffix).write_text(text, encoding="utf-8", errors="backslashreplace")
    if robustness:
        from evaluation.figures import robustness_curves

        robustness_curves(robustness, out.with_name(f"{out.stem}_robustness.png"))


def write_scores(path: Path, test_set: TestSet, scores: np.ndarray, thresholds: dict[str, float]) -> None:
    """A row for each image of each comparison: a real image is there once for each generator that it stands against."""
    paths, labels = test_set.dataset.column("paths"), test_set.dataset.labels
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("generator", "path", "label", "score", "verdict"))
        for generator, chosen in test_set.comparisons.items():
            for i in chosen:
                score = float(scores[i])
                writer.writerow((generator, paths[i], labels[i], repr(score), verdict_of(score, thresholds)))


def describe_run(checkpoint: dict, test_set: TestSet, warnings: list[str], args: argparse.Namespace) -> dict:
    """How the results came about."""
    with open(weights_in(args.checkpoint), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    packages = ("torch", "torchvision", "numpy", "scikit-learn")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    return {
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": digest,
        "val_threshold": checkpoint["val_threshold"],
        "temperature": checkpoint.get("temperature"),
        "protocol": args.protocol,
        "split": args.split,
        "arguments": arguments,
        "train_arguments": checkpoint["arguments"],
        "datasets_trained": checkpoint["datasets"],
        "versions": versions,
        "warnings": warnings,
        "sources": count_originals(test_set),
    }


# --------------------------------------------------------------------------------------------------------------- script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option(
        "--checkpoint",
        type=Path,
        help="model to test, of train.py, export.py --weights or export.py --hub (default: output_model/best_model.pth;"
        " where there is none, the weights that ship)",
    )
    option("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    option(
        "--output",
        type=Path,
        help="a name in .json, the other files beside it (default: prediction_results.json); with --images the rows, a"
        " name in .csv (default: standard output)",
    )
    option("--batch_size", type=int, default=BATCH_SIZE, help=f"images at a time (default: {BATCH_SIZE})")
    option(
        "--fpr",
        type=float,
        metavar="RATE",
        help="judge at this rate of false alarms alone, 0.01 or 0.05: fake or real (default: fake from the threshold of"
        " 0.01 on, real below that of 0.05, uncertain between)",
    )
    option(
        "--without_cnn",
        action="store_true",
        help="do not look with dlib's CNN for faces that its frontal detector misses; for --images and --redetect",
    )
    option(
        "--predictor",
        type=Path,
        help="dlib's 68-point predictor, as for feature_extraction.py; for --images and --redetect",
    )
    add_comparison(parser)
    add_loose_images(parser)
    return parser


def add_comparison(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("against generators").add_argument
    option("--features", type=Path, default=Path("features"), help="of feature_extraction.py (default: features)")
    option("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    option("--split", default="test", choices=("train", "val", "test"), help="(default: test)")
    option(
        "--protocol",
        default="native",
        choices=PROTOCOLS,
        help="images as they are, or fakes, or all, through a JPEG of quality 96 first (default: native)",
    )
    option("--bootstrap", type=int, default=1000, help="resamples for the 95 %% intervals, 0: none (default: 1000)")
    option("--seed", type=int, default=0, help="of the draw of real images and of the bootstrap (default: 0)")
    option(
        "--robustness",
        action="store_true",
        help="also under JPEG, blur, noise and resize, at several levels; a table and a picture of curves",
    )
    option(
        "--redetect",
        action="store_true",
        help="find the face again in each corrupted image, instead of keeping the clean one's landmarks",
    )
    option(
        "--by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="false alarms and missed fakes, at the validation threshold or --fpr's, also by these columns of the"
        " manifest, or by dataset (default: none)",
    )
    option("--report", type=Path, metavar="DIR", help="write DIR/report.html, one file with tables, curves, mistakes")
    option("--num_workers", type=int, default=2, help="threads that read features (default: 2)")


def add_loose_images(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("loose images").add_argument
    option("--images", nargs="+", metavar="PATH", help="images, videos, folders of them, patterns; a row for each face")
    option("--frames", type=int, default=16, help="of each video, evenly spread (default: 16)")
    option("--format", default="csv", choices=("csv", "jsonl"), help="of the rows: CSV or JSON lines (default: csv)")
    option("--whole_image", action="store_true", help="score pictures without a face, too, with mean landmarks")
    option(
        "--explain", type=Path, metavar="DIR", help="write a picture for each face: regions, attention, LAMM weights"
    )
    option(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes that look for faces (default: one a core, fewer where memory is short)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Completes the options. Raises ValueError where they make no sense together."""
    if (
        min(args.batch_size, args.workers, args.frames) < 1
        or min(args.num_workers, args.bootstrap, args.seed) < 0
        or 0 < args.bootstrap < 100
    ):
        raise ValueError(
            "--batch_size, --workers and --frames have to be at least 1, --num_workers and --seed at least 0,"
            " --bootstrap 0 or at least 100"
        )
    finder = ("without_cnn", "predictor")
    loose = ("frames", "format", "whole_image", "explain", "workers", *(() if args.redetect else finder))
    others = (
        "features",
        "datasets",
        "split",
        "protocol",
        "bootstrap",
        "seed",
        "robustness",
        "redetect",
        "report",
        "by",
        "num_workers",
    )
    defaults = vars(get_args_parser().parse_args([]))
    if idle := [f"--{name}" for name in (others if args.images else loose) if getattr(args, name) != defaults[name]]:
        raise ValueError(f"{', '.join(idle)}: {'not for' if args.images else 'only for'} loose images, --images")
    if args.redetect and not args.robustness:
        raise ValueError("--redetect goes with --robustness")
    if args.images and under_torchrun():
        raise ValueError("--images runs in one process, which starts --workers more; leave torchrun away")
    if args.images and args.output and args.output.suffix == ".json":
        raise ValueError(f"--output {args.output}: the rows of --images are CSV; give it a name in .csv")
    if not args.images:
        args.output = args.output or Path("prediction_results.json")
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output}: has to end in .json; .csv, .md and .tex get its name")


def main(args: argparse.Namespace) -> None:
    check_options(args)
    device = pick_process_device(args.device)
    keep_freed_memory(device)
    rank, _, _ = join_processes(backend_for(device), timedelta(minutes=30))
    args.checkpoint = choose_checkpoint(args.checkpoint, rank)
    model, checkpoint = load_checkpoint(args.checkpoint, device)
    if args.images:
        sys.exit(EXIT_UNSCORED if score_images(model, checkpoint, args) else 0)
    evaluate(model, checkpoint, rank, args)
    gather(None)  # nobody leaves while others need it


if __name__ == "__main__":
    if sys.stdout is not None:  # closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except BrokenPipeError:  # whoever read the rows has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BrokenProcessPool:
        sys.exit("a worker process was killed, as the system does when memory is short; lower --workers")
    except (ValueError, OSError) as error:  # FeatureFileError and CheckpointError among them
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
