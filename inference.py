"""Tests a trained model against each generator, or scores loose images.

    output_model/best_model.pth + features/  ->  a table; prediction_results.json, .csv (scores), .md, .tex
    output_model/best_model.pth + images     ->  a row for each face, CSV

    python inference.py                                      every generator in ./features, its test split
    python inference.py --datasets FFHQ StyleGAN3            these alone
    python inference.py --robustness --report report         also under JPEG, blur, noise and resize; one HTML file
    torchrun --nproc_per_node=4 inference.py                 the same numbers, sooner
    python inference.py --images photo.jpg folder/           loose images: probability of a fake, verdict, how the face was found
    python inference.py --images photo.jpg --explain why     and a picture of what the model looked at

Each generator's fakes stand against as many real images, drawn by seed from the pool of all real data sets. The model is
rebuilt from the checkpoint alone. train.py uses predict_scores for its validation.

With --images the exit code is 0 if every file got a score, 3 if some did not, 1 if nothing could be done.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import queue
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.metrics import roc_curve
from torchvision.transforms import v2
from tqdm import tqdm

from dataset import FaceDataset, FeatureFileError, TestTransform, draw_region_masks, find_feature_files
from metrics import METRIC_RANGE, binary_metrics, bootstrap_replicates, interval
from model import LAMMViT, LAMMViTConfig
from preprocess import default_workers, describe_treatment, gather, join_processes, map_ahead, under_torchrun

if TYPE_CHECKING:
    from report import Mistake

CHECKPOINT_VERSION = 5
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect
METRICS = tuple(METRIC_RANGE)
HEADS = ("ACC %", "at val. threshold", "real ACC %", "fake ACC %", "AP", "AUC", "EER")  # of METRICS
SUMMARIES = ("Mean", "Std", "Worst", "Run", "Robustness", "corruption", "level")  # keys beside the generators, of the results and of Robustness' rows
ALIGNED_QUALITY = 96  # of the protocols fakes_jpeg96 and all_jpeg96 (arXiv 2403.17608)
# The grid of the field; level 0 of blur and noise and 1 of resize are the clean images.
ROBUSTNESS = {"jpeg": (100, 90, 80, 70, 60, 50, 40, 30), "blur": (1, 2, 3, 4, 5), "noise": (0.05, 0.1, 0.15, 0.2, 0.25), "resize": (0.75, 0.5, 0.25)}
SHOWN_MISTAKES = 12  # of each class, in the report
EXIT_UNSCORED = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names it and the way out."""


# --------------------------------------------------------------------------------------------------------------- checkpoint


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[LAMMViT, dict]:
    """Rebuilds the model that train.py saved, in eval mode, and returns it with everything else in the file.

    Raises:
        CheckpointError: missing, damaged, foreign, or of another architecture than it says.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run train.py first, or name one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch looks at no checksum
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words are about how to load it all the same
        raise CheckpointError(f"{path}: not a checkpoint of train.py: it holds more than tensors and settings; run train.py again") from error
    except Exception as error:  # whatever torch.load makes of a damaged or foreign file
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not a whole checkpoint ({cause}); take another one or run train.py again") from error
    if not isinstance(checkpoint, dict) or not {"version", "config", "model", "mask_style", "val_threshold", "framing", "images"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of train.py: it does not say what model it is; run train.py again")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint version {checkpoint['version']}, this program reads {CHECKPOINT_VERSION}; run train.py again")
    try:
        model = LAMMViT(LAMMViTConfig(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(f"{path}: its weights are of another architecture than its config {checkpoint['config']}: {lines[:400]}") from error
    return model.eval(), checkpoint


def pick_device(name: str) -> torch.device:
    """"auto" -> the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no GPU that torch can use; leave the option away to use the CPU")
    return device


def pick_process_device(name: str) -> torch.device:
    """The device of this process: under torchrun, a GPU of its own."""
    device = pick_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"torchrun started {device.index + 1} processes or more, but there are {torch.cuda.device_count()} GPUs; lower --nproc_per_node, or give --device cpu")
        torch.cuda.set_device(device)
    return device


# ---------------------------------------------------------------------------------------------- samples -> the model's input


def load_batches(dataset: FaceDataset, batches: Iterable[tuple], num_workers: int, pin_memory: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """What dataset.read makes of each of `batches`, (indices,) or (indices, draws), in order, as tensors, read by
    `num_workers` threads ahead of their use.

    Threads, since what takes time (reading, JPEG, blur, noise) runs outside of Python's lock, and since processes would have
    to send every batch through shared memory: benchmarks/data_speed.py measures torch's DataLoader beside this.
    """

    def read(batch: tuple) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(values) for name, values in dataset.read(*batch).items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors

    return map_ahead(read, batches, num_workers, ahead=num_workers) if num_workers else map(read, batches)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, h, w) uint8 RGB -> float32, zero mean and unit variance over ImageNet. On the device that the images are on."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), IMAGE_MEAN, IMAGE_STD)


# ------------------------------------------------------------------------------------------------------------------ scores


def fake_probability(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> (B,) float64.

    In double precision from the logits on: in single precision all confident scores would be 1 and tie.
    """
    device = next(model.parameters()).device
    outputs = model(normalize(images.to(device, non_blocking=True)), region_masks.to(device, non_blocking=True))
    return outputs["logits"].double().softmax(dim=-1)[:, 1].cpu().numpy()


@torch.inference_mode()
def predict_scores(
    model: LAMMViT, dataset: FaceDataset, batch_size: int = 64, num_workers: int = 0, title: str = "", indices: np.ndarray | None = None
) -> np.ndarray:
    """The probability of a fake for the samples of a dataset with these indices, all if None; (N,) float64 in their order.

    In a process group, every process returns all scores. Batches, not samples, are divided among the processes: each batch
    is the same as in a single process, so nobody's score depends on the number of processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = np.arange(len(dataset)) if indices is None else indices
    size = len(indices)
    starts = range(rank * batch_size, size, world * batch_size)
    loader = load_batches(dataset, ((indices[start : start + batch_size],) for start in starts), num_workers, torch.cuda.is_available())
    was_training = model.training
    model.eval()
    bar = tqdm(loader, desc=title, unit="batch", total=len(starts), leave=False, disable=True if rank > 0 or not title else None)
    mine = [(start, fake_probability(model, batch["image"], batch["region_masks"])) for start, batch in zip(starts, bar)]
    model.train(was_training)

    everyone = [mine]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    scores = np.empty(size)
    for start, values in (part for parts in everyone for part in parts):
        scores[start : start + len(values)] = values
    return scores


# ------------------------------------------------------------------------------------------------------- against generators


@dataclass
class TestSet:
    """The samples of a split, and which of them stand against each other."""

    __test__ = False  # no test of pytest's

    dataset: FaceDataset
    files: dict[str, Path]  # {data set, "real/FFHQ": its file}
    comparisons: dict[str, np.ndarray]  # {generator: indices of its fakes and of as many real samples}

    @property
    def needed(self) -> np.ndarray:
        """Indices of all samples that are compared."""
        return np.unique(np.concatenate(list(self.comparisons.values())))

    def labels_and_scores(self, scores: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {generator: (self.dataset.labels[chosen], scores[chosen]) for generator, chosen in self.comparisons.items()}


def load_test_set(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> TestSet:
    files = find_feature_files(args.features, args.split, args.datasets)
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    if dataset.img_size != model.config.img_size:
        raise FeatureFileError(
            f"{args.features}: images of {dataset.img_size} px, but {args.checkpoint} takes {model.config.img_size} px; "
            f"run feature_extraction.py --img_size {model.config.img_size}"
        )
    if set(dataset.labels) != {0, 1}:
        raise FeatureFileError(f"{args.features}: the {args.split} split of {', '.join(files)} holds one class only; both are needed")
    comparisons = draw_comparisons(dataset, list(files), args.seed)
    if taken := [name for name in SUMMARIES if name in comparisons]:
        raise FeatureFileError(f"{args.features}/fake/{taken[0]}: this name means something else in the results; give the data set another")
    if args.split == "test" and (known := int(np.isin(image_ids(dataset), checkpoint["images"].cpu().numpy()).sum())):
        raise FeatureFileError(
            f"{args.features}: {args.checkpoint} was trained or validated on {known} of these {len(dataset)} test images, since the splits were dealt anew; "
            "train again on these features, or give those of its training"
        )
    return TestSet(dataset, files, comparisons)


def image_ids(dataset: FaceDataset) -> np.ndarray:
    """(N,) int64: of each image eight bytes of the SHA-256 of what is stored of it."""
    return np.ascontiguousarray(dataset.column("sha256")[:, :8]).view(np.int64).ravel()


def draw_comparisons(dataset: FaceDataset, names: list[str], seed: int) -> dict[str, np.ndarray]:
    """{generator: indices of as many real as fake samples}. The draw depends on the seed and the images' content alone.

    Args:
        names: the data set of each file of `dataset`, "real/FFHQ".
    """
    files = {name: np.arange(start, end) for name, start, end in zip(names, dataset.starts, dataset.ends)}
    contents = [row.tobytes() for row in dataset.column("sha256")]

    def shuffled(indices: np.ndarray) -> np.ndarray:
        in_order = np.array(sorted(indices, key=lambda i: contents[i]), dtype=int)
        return np.random.default_rng(seed).permutation(in_order)

    real = shuffled(np.flatnonzero(dataset.labels == 0))
    comparisons = {}
    for name, indices in files.items():
        kind, generator = name.split("/")
        if kind == "fake" and len(indices):
            count = min(len(real), len(indices))
            comparisons[generator] = np.sort(np.concatenate([real[:count], shuffled(indices)[:count]]))
    return comparisons


def score(model: LAMMViT, test_set: TestSet, args: argparse.Namespace, corruptions: tuple = (), find_again: Callable | None = None, title: str = "scoring") -> np.ndarray:
    """The probability of a fake, (N,), NaN where a sample is not compared. By --protocol, fakes or all go through a JPEG first."""
    dataset, scores = test_set.dataset, np.full(len(test_set.dataset), np.nan)
    first = {label: (("jpeg", ALIGNED_QUALITY),) if args.protocol == "all_jpeg96" or (args.protocol, label) == ("fakes_jpeg96", 1) else () for label in (0, 1)}
    needed = test_set.needed
    groups = [needed] if first[0] == first[1] else [needed[dataset.labels[needed] == label] for label in (0, 1)]
    for group in groups:
        steps = (*first[int(dataset.labels[group[0]])], *corruptions)
        dataset.transform = TestTransform(steps, find_again) if steps else None
        scores[group] = predict_scores(model, dataset, args.batch_size, args.num_workers, title, group)
    dataset.transform = None
    return scores


def tabulate(test_set: TestSet, scores: np.ndarray, checkpoint: dict, bootstrap: int, seed: int) -> dict[str, dict]:
    """The metrics of each generator, with their intervals if bootstrap > 0, and the summaries: "Mean", "Std", "Worst"."""
    results, replicates = {}, {}
    threshold = checkpoint["val_threshold"]
    places, pool = order_reals(test_set, scores) if bootstrap else (None, 0)
    for generator, (labels, of_generator) in test_set.labels_and_scores(scores).items():
        row = binary_metrics(labels, of_generator, threshold)
        row["seen"] = f"fake/{generator}" in checkpoint["datasets"]
        if bootstrap:
            # The real images are resampled alike for all generators that stand against the same ones, the fakes of each apart.
            stream, chosen = 1 + zlib.crc32(os.fsencode(generator)), test_set.comparisons[generator]
            replicates[generator] = bootstrap_replicates(labels, of_generator, threshold, bootstrap, seed, stream, places[chosen], pool)
            size = min(row["n_real"], row["n_fake"])
            row["intervals"] = {metric: interval(row[metric], replicates[generator][metric], size, top) for metric, top in METRIC_RANGE.items()}
        results[generator] = row
    rows = list(results.values())
    worst = min(results, key=lambda generator: results[generator]["auc"])
    mean = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
    if bootstrap:
        size = min(min(row["n_real"], row["n_fake"]) for row in rows)
        of_mean = {metric: np.mean([of[metric] for of in replicates.values()], axis=0) for metric in METRICS}
        mean["intervals"] = {metric: interval(mean[metric], of_mean[metric], size, top) for metric, top in METRIC_RANGE.items()}
    results["Mean"] = mean
    results["Std"] = {metric: float(np.std([row[metric] for row in rows], ddof=1)) if len(rows) > 1 else 0.0 for metric in METRICS}
    results["Worst"] = {"generator": worst} | {metric: results[worst][metric] for metric in METRICS}
    return results


def order_reals(test_set: TestSet, scores: np.ndarray) -> tuple[np.ndarray, int]:
    """An order of the real images in which every generator stands against the first ones: the place of each sample (N,), 0 where it has
    none, and how many there are. It depends on scores, not on names."""
    times = np.bincount(np.concatenate(list(test_set.comparisons.values())), minlength=len(scores)) * (test_set.dataset.labels == 0)
    used = np.flatnonzero(times)
    places = np.zeros(len(scores), int)
    places[used[np.lexsort((scores[used], -times[used]))]] = np.arange(len(used))
    return places, len(used)


def count_originals(test_set: TestSet) -> dict[str, Counter]:
    """{data set: how many of its compared images were of which format and size before preprocess.py}, the most frequent first."""
    originals, needed = test_set.dataset.column("originals"), test_set.needed
    ends = dict(zip(test_set.files, zip(test_set.dataset.starts, test_set.dataset.ends)))
    counts = {name: Counter(originals[needed[(needed >= start) & (needed < end)]].tolist()) for name, (start, end) in ends.items()}
    return {name: Counter(dict(count.most_common())) for name, count in counts.items() if count}


def warn_of_treatment(test_set: TestSet, trained_on: str) -> list[str]:
    """A sentence where preprocess.py has treated some of the images otherwise than those of the training."""
    others = set(test_set.dataset.column("treatments")[test_set.needed]) - {trained_on}
    return [f"the model was trained on images that were {describe_treatment(trained_on)}; images tested here are {', '.join(map(describe_treatment, sorted(others)))}"] if others else []


def warn_of_traces(test_set: TestSet, protocol: str) -> list[str]:
    """A sentence where the formats or sizes of the original files differ between a generator and the real images. What no --protocol
    makes alike, sizes, is told under all of them."""
    originals, warnings = test_set.dataset.column("originals"), []
    for generator, chosen in test_set.comparisons.items():
        labels, kinds = test_set.dataset.labels[chosen], [original.split() for original in originals[chosen]]
        pixels = [math.prod(map(int, size.split("x"))) for _, size in kinds]
        formats = [np.mean([[kind == name for (kind, _), of in zip(kinds, labels) if of == label] for label in (0, 1)], axis=1) for name in {kind for kind, _ in kinds}]
        apart = 0.5 * float(np.sum([abs(real - fake) for real, fake in formats]))  # total variation
        false_positive, true_positive, _ = roc_curve(labels, pixels, drop_intermediate=False)
        bound = max(0.1, 1.36 * math.sqrt(4 / len(labels)))  # no chance difference, to 95 % (Kolmogorov and Smirnov)
        traces = [what for what, distance in (("format", apart), ("size", np.abs(true_positive - false_positive).max())) if distance > bound]
        if "format" in traces and protocol != "native":
            traces.remove("format")
        if traces:
            shown = [", ".join(f"{name} {100 * n / len(labels) * 2:.0f} %" for name, n in Counter(originals[chosen[labels == label]]).most_common(3)) for label in (0, 1)]
            warnings.append(f"{generator}: the {' and '.join(traces)} of its files tell{'' if len(traces) > 1 else 's'} it from the real ones ({shown[1]}; real: {shown[0]}){'; --protocol all_jpeg96 makes formats more alike' if 'format' in traces else ''}")
    return warnings


# --------------------------------------------------------------------------------------------------------------- robustness


def finder_again(test_set: TestSet, checkpoint: dict, predictor: Path | None) -> Callable:
    """For TestTransform: finds the face in a corrupted image; where there is none any more, the mean landmarks stand in."""
    from faces import FaceFinder, find_face, find_predictor  # dlib, where it is needed

    side, grid_size, mean = test_set.dataset.img_size, test_set.dataset.grid_size, test_set.dataset.mean_landmarks
    path, free = find_predictor(predictor), queue.LifoQueue()  # a finder is for one thread at a time

    def find(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            finder = free.get_nowait()
        except queue.Empty:
            finder = FaceFinder(path)
        _, landmarks, _ = find_face(Image.fromarray(image), finder, side)
        free.put(finder)
        landmarks = mean if landmarks is None else landmarks
        return landmarks, draw_region_masks(landmarks, (side, side), grid_size, checkpoint["mask_style"])

    return find


def test_robustness(model: LAMMViT, checkpoint: dict, test_set: TestSet, clean: dict[str, dict], args: argparse.Namespace) -> list[dict]:
    """A row for each corruption and level: {"corruption", "level", generator: metrics, ..., "Mean": metrics}; first the clean one."""
    find_again = finder_again(test_set, checkpoint, args.predictor) if args.redetect else None
    names = [*test_set.comparisons, "Mean"]
    rows = [{"corruption": "none", "level": 0} | {name: {metric: clean[name][metric] for metric in METRICS} for name in names}]
    for corruption, level in [(corruption, level) for corruption, levels in ROBUSTNESS.items() for level in levels]:
        scores = score(model, test_set, args, ((corruption, level),), find_again, f"{corruption} {level:g}")
        results = tabulate(test_set, scores, checkpoint, 0, args.seed)
        rows.append({"corruption": corruption, "level": level} | {name: {metric: results[name][metric] for metric in METRICS} for name in names})
    return rows


test_robustness.__test__ = False


# --------------------------------------------------------------------------------------------------------------- the record


def cells(row: dict) -> list[str]:
    """The numbers of a row of the table, as text, in the order of HEADS; AP and AUC with their intervals."""
    values = [f"{row[metric]:.2f}" for metric in METRICS[:4]]
    for metric in METRICS[4:]:
        between = f" [{row['intervals'][metric][0]:.3f}, {row['intervals'][metric][1]:.3f}]" if metric in ("ap", "auc") and row.get("intervals") else ""
        values.append(f"{row[metric]:.4f}{between}")
    return values


def aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def title_of(name: str, row: dict) -> str:
    """A row's first cell, in one line whatever the data set is called."""
    return " ".join((f"Worst: {row['generator']}" if name == "Worst" else name).split())


def table_rows(results: dict[str, dict]) -> list[list[str]]:
    """The table as text, a row for each generator and the summaries: name, seen or unseen, the numbers, images."""
    rows = []
    for name, row in results.items():
        if name != "Run":
            seen = {True: "seen", False: "unseen"}.get(row.get("seen"), "")
            rows.append([title_of(name, row), seen, *cells(row), str(row["n_real"] + row["n_fake"]) if "n_real" in row else ""])
    return rows


def print_table(results: dict[str, dict]) -> None:
    print(aligned(["generator", "", *HEADS, "images"], table_rows(results)))


def print_robustness(rows: list[dict]) -> None:
    print("\nmean over generators, under corruptions that training has also seen (but resize)")
    lines = [[row["corruption"], f"{row['level']:g}", *cells(row["Mean"])] for row in rows]
    print(aligned(["corruption", "level", *HEADS], lines))


def as_markdown(results: dict[str, dict], robustness: list[dict] | None) -> str:
    table = [["generator", "in training", *HEADS, "images"]] + [[cell.replace("|", "\\|") for cell in row] for row in table_rows(results)]
    lines = [f"| {' | '.join(line)} |" for line in table]
    lines.insert(1, f"|---|---|{'--:|' * (len(HEADS) + 1)}")
    if robustness:
        lines += ["", f"| corruption | level | {' | '.join(HEADS)} |", f"|---|--:|{'--:|' * len(HEADS)}"]
        lines += [f"| {row['corruption']} | {row['level']:g} | {' | '.join(cells(row['Mean']))} |" for row in robustness]
    return "\n".join(lines) + "\n"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {letter: f"\\{letter}" for letter in "&%$#_{}"}


def as_latex(results: dict[str, dict]) -> str:
    """Rows for a tabular: generator, seen or unseen, HEADS in percent, images."""
    lines = ["% generator & in training & " + " & ".join(HEADS).replace(" %", "") + r" (all in percent) & images \\"]
    for name, row in results.items():
        if name not in ("Run", "Std"):
            values, spread = ([row_of[metric] * (100 if METRIC_RANGE[metric] == 1 else 1) for metric in METRICS] for row_of in (row, results["Std"]))
            shown = [f"{value:.1f}" + (f" $\\pm$ {spread[i]:.1f}" if name == "Mean" else "") for i, value in enumerate(values)]
            title = "".join(LATEX.get(letter, letter) for letter in title_of(name, row))
            seen = {True: "seen", False: "unseen"}.get(row.get("seen"), "")
            lines += ([r"\midrule"] if name == "Mean" else []) + [" & ".join([title, seen, *shown, str(row["n_real"] + row["n_fake"]) if "n_real" in row else ""]) + r" \\"]
    return "\n".join(lines) + "\n"


def write_scores(path: Path, test_set: TestSet, scores: np.ndarray, threshold: float) -> None:
    """A row for each image of each comparison: real images that stand against several generators are there once for each."""
    paths = test_set.dataset.column("paths")
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("generator", "path", "label", "score", "verdict"))
        for generator, chosen in test_set.comparisons.items():
            for i in chosen:
                writer.writerow((generator, paths[i], test_set.dataset.labels[i], repr(float(scores[i])), "fake" if scores[i] >= threshold else "real"))


def describe_run(checkpoint: dict, test_set: TestSet, warnings: list[str], args: argparse.Namespace) -> dict:
    with open(args.checkpoint, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn")}
    return {
        "checkpoint": str(args.checkpoint), "checkpoint_sha256": digest, "val_threshold": checkpoint["val_threshold"], "protocol": args.protocol, "split": args.split,
        "arguments": arguments, "train_arguments": checkpoint["arguments"], "datasets_trained": checkpoint["datasets"], "versions": versions,
        "warnings": warnings, "sources": count_originals(test_set),
    }  # fmt: skip


def find_mistakes(test_set: TestSet, scores: np.ndarray, threshold: float) -> list["Mistake"]:
    """The images on the wrong side of the threshold, of each class the furthest from it, in turns."""
    from report import Mistake

    needed, labels, paths = test_set.needed, test_set.dataset.labels, test_set.dataset.column("paths")
    wrong = needed[(scores[needed] >= threshold) != labels[needed]]
    furthest = [sorted(wrong[labels[wrong] == label], key=lambda i: -abs(scores[i] - threshold))[:SHOWN_MISTAKES] for label in (0, 1)]
    chosen = [i for pair in itertools.zip_longest(*furthest) for i in pair if i is not None]
    images = test_set.dataset.read(chosen)["image"].transpose(0, 2, 3, 1) if chosen else []  # (B, 3, h, w) -> (B, h, w, 3)
    return [Mistake(image, paths[i], int(labels[i]), float(scores[i])) for image, i in zip(images, chosen)]


def evaluate(model: LAMMViT, checkpoint: dict, rank: int, args: argparse.Namespace) -> None:
    """The whole evaluation. All processes score, the first one writes and prints."""
    test_set = load_test_set(model, checkpoint, args)
    for folder in (args.output.parent, *([args.report] if args.report else [])):  # before hours are spent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder}: nothing can be written there; name another folder")
    if taken := [path for path in (args.output.with_suffix(suffix) for suffix in (".json", ".csv", ".md", ".tex")) if path.is_dir()]:
        raise ValueError(f"{taken[0]}: is a folder; give --output another name")
    scores = score(model, test_set, args)
    results = tabulate(test_set, scores, checkpoint, args.bootstrap, args.seed) if rank == 0 else None
    robustness = test_robustness(model, checkpoint, test_set, results or tabulate(test_set, scores, checkpoint, 0, args.seed), args) if args.robustness else None
    if rank > 0:
        return
    warnings = warn_of_treatment(test_set, checkpoint["framing"]["treatment"]) + warn_of_traces(test_set, args.protocol)
    results["Run"] = describe_run(checkpoint, test_set, warnings, args)
    out = args.output  # written before anything is printed: a reader that has gone costs no results
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(results | ({"Robustness": robustness} if robustness else {}), indent=2) + "\n")
    partial.replace(out)
    write_scores(out.with_suffix(".csv"), test_set, scores, checkpoint["val_threshold"])
    out.with_suffix(".md").write_text(as_markdown(results, robustness), encoding="utf-8", errors="backslashreplace")
    out.with_suffix(".tex").write_text(as_latex(results), encoding="utf-8", errors="backslashreplace")
    if robustness:
        import figures

        figures.robustness_curves(robustness, out.with_name(f"{out.stem}_robustness.png"))
    if args.report:
        from report import write_report

        mistakes = find_mistakes(test_set, scores, checkpoint["val_threshold"])
        write_report(args.report / "report.html", results, test_set.labels_and_scores(scores), mistakes, robustness)
    print_table(results)
    if robustness:
        print_robustness(robustness)
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"written to {out}; scores in {out.with_suffix('.csv').name}, rows for a paper in .md and .tex")
    if args.report:
        print(f"report in {args.report / 'report.html'}")


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("output_model/best_model.pth"), help="model to test (default: output_model/best_model.pth)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    parser.add_argument("--output", type=Path, help="a name in .json, the other files beside it (default: prediction_results.json); with --images the rows (default: standard output)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--predictor", type=Path, help="dlib's 68-point predictor, as for feature_extraction.py; for --images and --redetect")
    against = parser.add_argument_group("against generators")
    against.add_argument("--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)")
    against.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    against.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default: test)")
    against.add_argument("--protocol", default="native", choices=("native", "fakes_jpeg96", "all_jpeg96"), help="images as they are, or fakes, or all, through a JPEG of quality 96 first (default: native)")
    against.add_argument("--bootstrap", type=int, default=1000, help="resamples for the 95 %% intervals, 0: none (default: 1000)")
    against.add_argument("--seed", type=int, default=0, help="of the draw of real images and of the bootstrap (default: 0)")
    against.add_argument("--robustness", action="store_true", help="also under JPEG, blur, noise and resize, at several levels; a table and a picture of curves")
    against.add_argument("--redetect", action="store_true", help="find the face again in each corrupted image, instead of keeping the clean one's landmarks")
    against.add_argument("--report", type=Path, metavar="DIR", help="write DIR/report.html, one file with tables, curves and mistakes")
    against.add_argument("--num_workers", type=int, default=2, help="threads that read features (default: 2)")
    loose = parser.add_argument_group("loose images")
    loose.add_argument("--images", nargs="+", metavar="PATH", help="images, folders of images, patterns; a row for each face")
    loose.add_argument("--format", default="csv", choices=("csv", "jsonl"), help="of the rows: CSV or JSON lines (default: csv)")
    loose.add_argument("--whole_image", action="store_true", help="score pictures without a face, too, with mean landmarks")
    loose.add_argument("--explain", type=Path, metavar="DIR", help="write a picture for each face: regions, attention, LAMM weights")
    loose.add_argument("--workers", type=int, default=default_workers(), help="processes that look for faces (default: one a core, fewer where memory is short)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Completes the options. Raises ValueError where they make no sense together."""
    if min(args.batch_size, args.workers) < 1 or min(args.num_workers, args.bootstrap, args.seed) < 0 or 0 < args.bootstrap < 100:
        raise ValueError("--batch_size and --workers have to be at least 1, --num_workers and --seed at least 0, --bootstrap 0 or at least 100")
    loose = ("format", "whole_image", "explain", "workers")
    others = ("features", "datasets", "split", "protocol", "bootstrap", "seed", "robustness", "redetect", "report", "num_workers")
    defaults = vars(get_args_parser().parse_args([]))
    if idle := [f"--{name}" for name in (others if args.images else loose) if getattr(args, name) != defaults[name]]:
        raise ValueError(f"{', '.join(idle)}: {'not for' if args.images else 'only for'} loose images, --images")
    if args.redetect and not args.robustness:
        raise ValueError("--redetect goes with --robustness")
    if args.images and under_torchrun():
        raise ValueError("--images runs in one process, which starts --workers more; leave torchrun away")
    if not args.images:
        args.output = args.output or Path("prediction_results.json")
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output}: has to end in .json; .csv, .md and .tex get its name")


def main(args: argparse.Namespace) -> None:
    check_options(args)
    device = pick_process_device(args.device)
    rank, _, _ = join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(minutes=30))
    model, checkpoint = load_checkpoint(args.checkpoint, device)
    if args.images:
        from loose_images import score_images

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
