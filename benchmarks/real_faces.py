"""Trains on real photographs, a GAN and a diffusion model, tests on generators never seen, and says how sure the result
is.

    datasets/<real|fake>/<Name>/...  ->  real_faces/results.md, results.json

    python benchmarks/real_faces.py --data_root datasets --train_on StyleGAN1 StableDiffusion21
    python benchmarks/real_faces.py ... --seeds 5 --embed_dim 192 --device cuda     options of train.py are passed on

One command from the files to the tables:

    prepare    every image twice: raw (resized, nothing else) and equalised (preprocess.py --align --recompress)
    sift       leaves out, in both, images whose face is not found in the crop, near-duplicates, and faces that may be
               one person's
    extract    feature files; generators that are not named by --train_on are only tested
    probe      how far a linear model gets on what is not worth learning: file size, format, mean spectrum, a thumbnail
    train      LAMM-ViT and a plain ViT, then LAMM-ViT without each of its parts, with several seeds each, on equalised
               images; the first two once more on raw ones
    compare    AUC over seeds with bootstrap intervals, what wrong masks change, and the paired test of LAMM-ViT
               against the plain ViT

Before the training starts it says how long that will take. It can be stopped at any time; the same command goes on, and
on a CPU ends with the same numbers.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.comparison.images import TREATMENTS, check_splits, data_sets_of, extract, features_of, prepare, sift
from benchmarks.comparison.jobs import RECIPE, announce, plan_jobs, train_all, train_options
from benchmarks.comparison.probes import probe
from benchmarks.comparison.tables import write_tables
from benchmarks.comparison.variants import one_line_of_what_went_wrong
from faces.treatment import ALIGNED_CROP
from runtime.processes import default_workers, lock

SET_HERE = ("--features", "--output_dir", "--patch_size", "--seed", "--datasets", "--resume", "--without", "--device")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data_root",
        type=Path,
        default=Path("datasets"),
        help="folder with real/<Name> and fake/<Generator> (default: datasets)",
    )
    parser.add_argument(
        "--train_on",
        nargs="+",
        required=True,
        metavar="NAME",
        help="generators to train on; all others are only tested",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("real_faces"), help="(default: real_faces)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each model, with the seeds 0, 1, ... (default: 3)"
    )
    parser.add_argument(
        "--align",
        type=float,
        default=ALIGNED_CROP,
        metavar="CROP",
        help=f"how much of a face is seen, as of preprocess.py --align (default: {ALIGNED_CROP})",
    )
    parser.add_argument("--img_size", type=int, default=112, help="side of the images in pixels (default: 112)")
    parser.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    parser.add_argument(
        "--main_only", action="store_true", help="LAMM-ViT and plain ViT alone, without the single ablations"
    )
    parser.add_argument("--without_raw", action="store_true", help="no models of raw images")
    parser.add_argument(
        "--device", default="auto", help="for the training: cpu, cuda (default: the GPU where there is one)"
    )
    parser.add_argument("--jobs", type=int, help="models trained at a time (default: one a core, one on a GPU)")
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes for the images (default: one a core, fewer where memory is short)",
    )
    return parser


def check_options(args: argparse.Namespace, options: list[str], data_sets: dict[str, Path]) -> list[str]:
    """The options of train.py, complete. Raises ValueError where those of either script make no sense."""
    options, _ = train_options(options, RECIPE, SET_HERE, args.patch_size)
    generators = [data_set.split("/")[1] for data_set in data_sets if data_set.startswith("fake/")]
    if unknown := [name for name in args.train_on if name not in generators]:
        raise ValueError(
            f"--train_on {', '.join(unknown)}: no such generator in {args.data_root}; there are"
            f" {', '.join(generators) or 'none'}"
        )
    if len(set(args.train_on)) == len(generators) or not any(data_set.startswith("real/") for data_set in data_sets):
        raise ValueError(
            f"{args.data_root}: real images are needed, and a generator that is not in --train_on; there are"
            f" {', '.join(data_sets)}"
        )
    if min(args.seeds, args.workers, args.jobs) < 1 or args.img_size % args.patch_size:
        raise ValueError("--seeds, --workers and --jobs have to be at least 1, --img_size a multiple of --patch_size")
    settings = args.output_dir / "settings.json"
    now = {
        "data_root": str(args.data_root.resolve()),
        "train_on": args.train_on,
        "align": args.align,
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "options": options,
    }
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise ValueError(f"{args.output_dir}: holds results with other options ({settings}); give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(now, indent=2) + "\n")
    return [*options, "--device", args.device]


def compare(args: argparse.Namespace, data_sets: dict[str, Path], options: list[str]) -> dict:
    """From files to tables."""
    prepare(args, data_sets)
    kept, dropped = sift(args, data_sets)
    fakes = [data_set for data_set in data_sets if data_set.startswith("fake/")]
    extract(args, [data_set for data_set in fakes if data_set.split("/")[1] not in args.train_on])
    sizes = [check_splits(features_of(args, treatment), kept) for treatment in TREATMENTS][-1]
    probes = {treatment: probe(args, data_sets, treatment) for treatment in TREATMENTS}
    jobs = plan_jobs(args)
    announce(args, jobs, options)
    return write_tables(args, sizes, dropped, probes, jobs, train_all(args, jobs, options), options)


def main(args: argparse.Namespace, options: list[str]) -> dict:
    started = time.perf_counter()
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    args.jobs = args.jobs or (1 if on_gpu else cores)
    if not on_gpu:  # models this small wait for a second thread
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.jobs)))
    data_sets = data_sets_of(args.data_root)
    options = check_options(args, options, data_sets)
    with lock(args.output_dir):
        summary = compare(args, data_sets, options)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes; written to {args.output_dir / 'results.md'}")
    return summary


if __name__ == "__main__":
    with one_line_of_what_went_wrong():
        main(*get_args_parser().parse_known_args())
