"""The trainings of a comparison: which models, how long they will take, several at a time."""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.comparison.images import EQUALISED, RAW, TREATMENTS, data_sets_of, features_of
from benchmarks.comparison.variants import VARIANTS, command, run, train_and_test
from dataset import FaceDataset
from samples.feature_files import find_feature_files
from training.options import check_options
from training.options import get_args_parser as train_parser

# Chosen on the validation split of the equalised images alone; docs/results.md has what else was tried.
RECIPE = {
    "--embed_dim": "96",
    "--depth": "4",
    "--dropout": "0",
    "--schedule": "cosine",
    "--lr": "1e-3",
    "--epochs": "40",
    "--stop_patience": "40",
    "--batch_size": "32",
    "--accum_steps": "1",
    "--color_jitter": "0.25",
    "--num_workers": "0",
}
MAIN = ("LAMM-ViT", "plain ViT")  # trained first, and on raw images too


def train_options(
    options: list[str], recipe: dict[str, str], taken: tuple[str, ...], patch_size: int
) -> tuple[list[str], argparse.Namespace]:
    """The options of train.py, complete: those that are given, and those of a recipe for the others; and parsed.

    Args:
        recipe: {option: its values, with spaces between}.
        taken: options that the benchmark sets itself.

    Raises:
        ValueError: one of these is given, or train.py would not take them.
    """
    if mine := [
        option
        for option in options
        if option.startswith("--") and any(name.startswith(option.split("=")[0]) for name in taken)
    ]:
        raise ValueError(f"{', '.join(mine)}: this script sets it")
    given = {option.split("=")[0] for option in options}
    others = [part for name, values in recipe.items() if name not in given for part in (name, *values.split())]
    options = [*others, "--patch_size", str(patch_size), *options]
    try:
        parsed = train_parser().parse_args(options)
        check_options(parsed)
    except SystemExit as error:  # argparse has printed why
        raise ValueError(f"train.py does not take these options: {' '.join(options)}") from error
    return options, parsed


def plan_jobs(args: argparse.Namespace) -> list[tuple[str, str, int, Path]]:
    """(treatment, variant, seed, folder) of all models, the comparison that matters first."""
    others = [] if args.main_only else [name for name in VARIANTS if name not in MAIN]
    jobs = [(EQUALISED, name, seed) for seed in range(args.seeds) for name in MAIN]
    jobs += [(EQUALISED, name, seed) for seed in range(args.seeds) for name in others]
    jobs += [(RAW, name, seed) for seed in range(0 if args.without_raw else args.seeds) for name in MAIN]
    # Other images, other models: those of earlier ones stay beside them
    prints = {
        treatment: FaceDataset(list(find_feature_files(features_of(args, treatment), "test").values())).fingerprint
        for treatment in TREATMENTS
    }
    folders = {
        treatment: args.output_dir / "models" / f"{treatment}_{prints[treatment][:8]}" for treatment in TREATMENTS
    }
    return [
        (treatment, name, seed, folders[treatment] / name.split(" (")[0].replace(" ", "_") / f"seed_{seed}")
        for treatment, name, seed in jobs
    ]


def announce(args: argparse.Namespace, jobs: list, options: list[str]) -> None:
    """Says how long the training will take, from an epoch of LAMM-ViT."""
    left = [job for job in jobs if not (job[-1] / "prediction_results.json").exists()]
    print(f"train  {len(jobs)} models, {len(jobs) - len(left)} of them are there already", flush=True)
    if not left:
        return
    epochs = train_parser().parse_args(options).epochs
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        # A probe would read all images once more, for nothing
        one_epoch = {"epochs": 1, "warmup_epochs": 0, "schedule": "cosine", "head": "random", "probe_views": 0}
        features = features_of(args, EQUALISED)
        run(command("train.py", *options, features=features, output_dir=folder, **one_epoch))
        seconds = json.loads(Path(folder, "timing.jsonl").read_text().splitlines()[-1])["seconds"]
    total = seconds * epochs * len(left) / args.jobs
    print(
        f"train  an epoch takes {seconds:.1f} s: {len(left)} models of {epochs} epochs, {args.jobs} at a time, about"
        f" {total / 60:.0f} minutes at the most",
        flush=True,
    )


def train_all(args: argparse.Namespace, jobs: list, options: list[str]) -> dict[tuple[str, str], list[dict]]:
    """{(treatment, variant): inference.py's results of each seed}."""
    results: dict[tuple[str, str], list] = {(treatment, name): [None] * args.seeds for treatment, name, *_ in jobs}
    trained_on = [
        data_set
        for data_set in data_sets_of(args.output_dir / "data" / EQUALISED)
        if data_set.startswith("real/") or data_set.split("/")[1] in args.train_on
    ]

    def train_one(treatment: str, name: str, seed: int, folder: Path) -> dict:
        features = argparse.Namespace(features=features_of(args, treatment))
        return train_and_test(folder, VARIANTS[name], seed, trained_on, features, options)

    pool = ThreadPoolExecutor(args.jobs)
    try:
        futures = {pool.submit(train_one, *job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), desc="train", unit="model"):
            treatment, name, seed, _ = futures[future]
            results[treatment, name][seed] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return results
