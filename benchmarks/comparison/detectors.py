"""The detectors of a comparison over folds, each to log odds of the images that a fold needs; all kept in scores.npz.

probes             frozen.py's, on what a frozen trunk says of the images
trained models     train.py's, on the data sets that a fold leaves: LAMM-ViT, the plain ViT, variants of them
shortcuts          probes.py's linear models on the mean spectrum, a thumbnail, and how much of a crop was filled
others             somebody else's scores, from a CSV file
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logit
from tqdm import tqdm

from benchmarks.comparison.folds import TRAIN, VAL, Fold, Stock
from benchmarks.comparison.frozen import (
    HEADS,
    PROBES,
    fit_probe,
    learn,
    probe_inputs,
    read_frozen,
    read_head_inputs,
)
from benchmarks.comparison.images import sources_of
from benchmarks.comparison.probes import PROBES as LINEAR_MODELS
from benchmarks.comparison.probes import linear_model
from benchmarks.comparison.variants import VARIANTS, command, run
from evaluation.masks import scores_by_masks
from evaluation.metrics import SMALLEST_PROBABILITY
from evaluation.scoring import predict, scores_and_log_odds
from runtime.checkpoint import load_checkpoint
from runtime.devices import pick_device
from runtime.files import save_arrays
from training.probe import BETWEEN, CHANGE, SHRINKAGE

DETECTORS = (*PROBES, *VARIANTS)
MASKED = "LAMM-ViT"  # of which it is asked whether the masks count
OF_IMAGES = {f"shortcut, {name}": LINEAR_MODELS[name] for name in ("spectrum", "thumbnail")}
FILLED_SHARE = "shortcut, filled share"
SHORTCUTS = (*OF_IMAGES, FILLED_SHARE)
FORWARD_SHARE = 0.4  # of a training step's time, where parts are trained: for the forecast alone
START_SECONDS = 10  # of a process that trains, likewise


class Job(NamedTuple):
    """A model to train and its scores."""

    fold: Fold
    detector: str
    seed: int
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "scores.npz").exists() and (
            self.detector != MASKED or (self.folder / "masks.npz").exists()
        )


def models_folder(args: argparse.Namespace, stock: Stock, options: list[str]) -> Path:
    """Other images, options or constants of the probe, other scores: those of earlier ones stay beside them."""
    constants = SHRINKAGE, BETWEEN, CHANGE
    told = hashlib.sha256(repr((options, constants)).encode()).hexdigest()
    return args.output_dir / "models" / f"{stock.fingerprint[:8]}_{told[:8]}"


def folder_of(models: Path, fold: Fold, detector: str, seed: int = 0) -> Path:
    return models / fold.folder / detector.split(" (")[0].replace(",", "").replace(" ", "_") / f"seed_{seed}"


def plan_jobs(args: argparse.Namespace, folds: list[Fold], models: Path) -> list[Job]:
    """The trainings, whole folds with one seed first."""
    names = [name for name in args.detectors if name in VARIANTS]
    jobs = [(fold, name, seed) for seed in range(args.seeds) for fold in folds for name in names]
    return [Job(fold, name, seed, folder_of(models, fold, name, seed)) for fold, name, seed in jobs]


def runs_of(args: argparse.Namespace, detector: str, train_args: argparse.Namespace) -> int:
    """How many runs there are of a detector: one where no seed changes it. That of a head alone draws its views."""
    return args.seeds if detector in VARIANTS or (detector in HEADS and train_args.probe_views) else 1


def scores_of(models: Path, fold: Fold, detector: str, seeds: int = 1) -> np.ndarray:
    """Log odds (S, N) of the stock's images, NaN where the fold needs none."""
    rows = []
    for seed in range(seeds):
        with np.load(folder_of(models, fold, detector, seed) / "scores.npz") as kept:
            rows.append(kept["log_odds"])
    return np.stack(rows)


def others_of(models: Path, fold: Fold, detector: str, seeds: int) -> list[dict[str, np.ndarray]]:
    """Of each run {data set: log odds of its images by what has not seen it}, where scores.npz has them."""
    found = []
    for seed in range(seeds):
        path = folder_of(models, fold, detector, seed) / "scores.npz"
        with np.load(path) if path.exists() else contextlib.nullcontext({}) as kept:
            found.append({name: kept[name] for name in kept if name != "log_odds"})
    return found


# ------------------------------------------------------------------------------------------------------- linear models


def score_linear_models(
    args: argparse.Namespace, stock: Stock, folds: list[Fold], models: Path, train_args: argparse.Namespace
) -> None:
    """The probes of the frozen trunk that are asked for, and the shortcuts. One seed of all of them first."""
    names = [*(name for name in args.detectors if name in PROBES), *SHORTCUTS]
    runs = [(seed, name) for seed in range(args.seeds) for name in names if seed < runs_of(args, name, train_args)]
    todo = [
        (seed, name, fold, folder_of(models, fold, name, seed) / "scores.npz") for seed, name in runs for fold in folds
    ]
    todo = [job for job in todo if not job[-1].exists()]
    frozen = functools.cache(lambda: read_frozen(args, stock, train_args))  # once for both probes of the trunk alone

    def inputs_of(name: str, seed: int) -> np.ndarray:
        if name in HEADS:
            return read_head_inputs(args, stock, train_args, left_out_parts(HEADS[name], train_args), seed)
        return probe_inputs(name, frozen(), train_args) if name in PROBES else shortcut_inputs(stock, name)

    inputs, known, read = np.empty(0), None, None
    for seed, name, fold, path in (bar := tqdm(todo, desc="linear models", unit="fold", disable=not todo)):
        bar.set_postfix_str(f"{name}, {fold.name}, seed {seed}")
        if read != (seed, name):
            inputs, read = inputs_of(name, seed), (seed, name)
            known = learn(stock, inputs) if name in PROBES else None  # for all folds
        others = {}
        if name in PROBES:
            log_odds, others = fit_probe(known, fold, inputs[0], for_others=name in HEADS)
        else:
            inside = stock.known(fold, TRAIN)
            log_odds = linear_model().fit(inputs[inside], stock.labels[inside]).decision_function(inputs)
        save_arrays(path, log_odds=log_odds, **others)


def shortcut_inputs(stock: Stock, name: str) -> np.ndarray:
    """(N, D) of one of SHORTCUTS, of all images."""
    dataset = stock.dataset()
    if name == FILLED_SHARE:
        filled = dataset.column("filled")
        return np.stack([filled, filled**2], axis=1)
    parts = []
    for start in range(0, len(dataset), 256):  # spectra take a few hundred times an image's memory
        images = dataset.read(np.arange(start, min(start + 256, len(dataset))))["image"]
        parts.append(OF_IMAGES[name](images.transpose(0, 2, 3, 1), []))
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------ trained models


def left_out_parts(detector: str, train_args: argparse.Namespace) -> list[str]:
    """Of the method: by a variant, and by the options."""
    return sorted({*VARIANTS[detector], *train_args.without})


def train_command(
    args: argparse.Namespace, options: list[str], without: list[str], data_sets: list[str], **more: object
) -> list[str]:
    given = command("train.py", *options, features=args.features, device=args.device, **more)
    return given + ["--datasets", *data_sets] + (["--without", *without] if without else [])


def announce(
    args: argparse.Namespace, stock: Stock, jobs: list[Job], options: list[str], train_args: argparse.Namespace
) -> None:
    """Says how long the training will take, from an epoch over the smallest data sets."""
    left = [job for job in jobs if not job.is_done]
    print(f"train  {len(jobs)} models, {len(jobs) - len(left)} of them are there already", flush=True)
    if not left:
        return
    per_second = measure_speed(args, stock, left[0], options, train_args)
    seconds = 0.0
    for job in left:
        train, val = len(stock.known(job.fold, TRAIN)), len(stock.known(job.fold, VAL))
        forward = val * train_args.epochs + len(stock.needed(job.fold))
        forward += (train * (1 + train_args.probe_views) + val) * (train_args.head == "probe")
        forward += 5 * len(stock.of(job.fold.left_out)) * (job.detector == MASKED)
        seconds += START_SECONDS + (train * train_args.epochs + FORWARD_SHARE * forward) / per_second
    print(
        f"train  {per_second:.0f} images/s: {len(left)} models of {train_args.epochs} epochs, one at a time, about"
        f" {seconds / 60:.0f} minutes",
        flush=True,
    )


def measure_speed(
    args: argparse.Namespace, stock: Stock, job: Job, options: list[str], train_args: argparse.Namespace
) -> float:
    """Training images per second, of one short epoch."""
    some = []
    for kind in ("real", "fake"):
        names = [name for name in stock.known_names(job.fold) if name.startswith(f"{kind}/")]
        whole = [name for name in names if len(stock.of([name], TRAIN)) and len(stock.of([name], VAL))]
        some.append(min(whole or names, key=lambda name: len(stock.of([name], TRAIN)) or np.inf))
    one_epoch = {"epochs": 1, "warmup_epochs": 0, "schedule": "cosine", "head": "random", "probe_views": 0}
    without = left_out_parts(job.detector, train_args)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        run(train_command(args, options, without, some, output_dir=folder, **one_epoch))
        timing = json.loads(Path(folder, "timing.jsonl").read_text().splitlines()[-1])
    return timing["images_per_second"]


def train_all(
    args: argparse.Namespace, stock: Stock, jobs: list[Job], options: list[str], train_args: argparse.Namespace
) -> None:
    """Trains and scores what is not there yet."""
    left = [job for job in jobs if not job.is_done]
    for job in (bar := tqdm(left, desc="train", unit="model", disable=not left)):
        bar.set_postfix_str(f"{job.detector}, {job.fold.name}, seed {job.seed}")
        without, known = left_out_parts(job.detector, train_args), stock.known_names(job.fold)
        own = {"output_dir": job.folder, "seed": job.seed}
        started = time.perf_counter()
        run([*train_command(args, options, without, known, **own), "--resume"])
        score_model(args, stock, job)
        if args.delete_models:
            for path in job.folder.glob("*.pth"):
                path.unlink()
        bar.write(f"{job.detector}, {job.fold.name}, seed {job.seed}: {time.perf_counter() - started:.0f} s")


def score_model(args: argparse.Namespace, stock: Stock, job: Job) -> None:
    """scores.npz: log odds (N,) of the images that the fold needs. Of LAMM-ViT also masks.npz: scores of the left-out
    images with each kind of masks, {evaluation.masks' names: (n,)}.
    """
    model, checkpoint = load_checkpoint(job.folder / "best_model.pth", pick_device(args.device))
    needed = stock.needed(job.fold)
    style = {"grid_size": model.config.grid_size, "mask_style": checkpoint["mask_style"]}
    seen = sum(len(stock.known(job.fold, split)) for split in (TRAIN, VAL))
    if checkpoint["features"] != stock.fingerprint or len(checkpoint["images"]) != seen:
        raise ValueError(f"{job.folder}: trained on other images; remove it and run the same command again")
    log_odds = np.full(len(stock.labels), np.nan)
    with torch.inference_mode():
        read = predict(model, stock.dataset(**style), scores_and_log_odds, title="score", indices=needed)
    log_odds[needed] = read[:, 1]
    if job.detector == MASKED:
        save_arrays(job.folder / "masks.npz", **scores_by_masks(model, stock.dataset(job.fold.left_out, **style)))
    save_arrays(job.folder / "scores.npz", log_odds=log_odds)


# -------------------------------------------------------------------------------------------------------------- others


def read_others(text: str, stock: Stock, data_sets: dict[str, Path]) -> tuple[str, np.ndarray]:
    """NAME=file.csv -> the name and log odds (1, N) of the stock's images.

    The columns are path and score. A path is that of the image below its data root, of its prepared copy, or the first
    without its ending, where one image alone has it. Scores are probabilities of a fake; where any of them is not from
    0 to 1, log odds.

    Raises:
        ValueError: the file cannot be read, a path twice in it, a score that is no number, images without a score.
    """
    name, _, file = text.partition("=")
    if not name or not file or name in DETECTORS or name in SHORTCUTS:
        raise ValueError(f"--scores {text}: has to be NAME=file.csv, and NAME none of {', '.join(DETECTORS)}")
    scores: dict[str, float] = {}
    try:
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
            for line in csv.DictReader(lines):
                path = line["path"].removeprefix("./")
                if path in scores:
                    raise ValueError(f"{path} is in it twice")
                scores[path] = float(line["score"])
                if not np.isfinite(scores[path]):
                    raise ValueError(f"the score of {path} is {line['score']}")
    except KeyError as error:
        raise ValueError(f"--scores {file}: no column {error}; path and score are needed") from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--scores {file}: {error}") from error
    found = [next((scores[key] for key in keys if key in scores), None) for keys in keys_of(stock, data_sets)]
    if missing := [path for path, score in zip(stock.paths, found) if score is None]:
        raise ValueError(f"--scores {file}: no score for {len(missing)} of {len(found)} images, {missing[0]} for one")
    values = np.array(found, float)
    if 0 <= values.min() and values.max() <= 1:
        values = logit(values.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY))
    return name, values[None]


def keys_of(stock: Stock, data_sets: dict[str, Path]) -> list[list[str]]:
    """By which paths each image of the stock may be named."""
    sources: dict[str, str] = {}
    for name, folder in data_sets.items():
        sources |= {path: f"{name}/{file.relative_to(folder)}" for path, file in sources_of(name, folder).items()}
    stems = {path: str(Path(source).with_suffix("")) for path, source in sources.items()}
    times = Counter(stems.values())
    return [[sources[path], path, *([stems[path]] if times[stems[path]] == 1 else [])] for path in stock.paths.tolist()]
