"""Trains on real photographs, a GAN and a diffusion model, tests on generators never seen, and says how sure the result is.

    datasets/<real|fake>/<Name>/...  ->  real_faces/results.md, results.json

    python benchmarks/real_faces.py --data_root datasets --train_on StyleGAN1 StableDiffusion21
    python benchmarks/real_faces.py ... --seeds 5 --embed_dim 192 --epochs 80 --device cuda     options of train.py are passed on

One command from the files to the tables:

    prepare    every image twice: raw (resized, nothing else) and equalised (preprocess.py --align --recompress)
    sift       leaves out, in both, images whose face is not found in the crop, near-duplicates, and faces that may be one person's
    extract    feature files; generators that are not named by --train_on are only tested
    probe      how far a linear model gets on what is not worth learning: file size, format, mean spectrum, a thumbnail
    train      LAMM-ViT and a plain ViT, then LAMM-ViT without each of its parts, with several seeds each, on equalised images; the
               first two once more on raw ones
    compare    AUC over seeds with bootstrap intervals, what other faces' masks change, and the paired test of LAMM-ViT against
               the plain ViT

Before the training starts it says how long that will take. It can be stopped at any time; the same command goes on, and on a CPU
ends with the same numbers.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation import VARIANTS, row, run, train_and_test  # noqa: E402
from near_duplicates import Fingerprint, find_network, find_pairs, leave_out, take_fingerprint  # noqa: E402

import train  # noqa: E402
from dataset import CLASSES, SPLITS, FaceDataset, find_feature_files, open_features  # noqa: E402
from faces import FaceFinder, detect_face, find_predictor  # noqa: E402
from feature_extraction import data_set_folders  # noqa: E402
from inference import fake_probability, load_checkpoint  # noqa: E402
from metrics import auc_replicates, compare_aucs, interval, win_matrix  # noqa: E402
from preprocess import (  # noqa: E402
    BEYOND,
    NO_FACE,
    REJECTED_SUFFIX,
    default_workers,
    end_with,
    list_images,
    lock,
    plan_outputs,
    read_reasons,
    write_reasons,
)

# Chosen on the validation split of the equalised images alone; docs/results.md has what else was tried.
RECIPE = {"--embed_dim": "96", "--depth": "4", "--dropout": "0", "--schedule": "cosine", "--lr": "1e-3", "--epochs": "40", "--stop_patience": "40",
          "--batch_size": "32", "--accum_steps": "1", "--color_jitter": "0.25", "--num_workers": "0"}  # fmt: skip
TREATMENTS = {"raw": (), "equalised": ("--align", "--recompress", "75-95")}  # options of preprocess.py
MAIN = ("LAMM-ViT", "plain ViT")  # trained first, and on raw images too
SET_HERE = ("--features", "--output_dir", "--patch_size", "--seed", "--datasets", "--resume", "--without", "--device")
NOT_AGAIN = "no face found in the aligned crop"
RESAMPLES = 2000
LIKE_CHANCE = (0.45, 0.60)  # AUC of a probe that has found nothing


# ------------------------------------------------------------------------------------------------------ prepare, sift, extract


def data_sets_of(data_root: Path) -> list[str]:
    """["real/FFHQ", "fake/StyleGAN1", ...]"""
    return [f"{kind}/{folder.name}" for kind in CLASSES for folder in data_set_folders(data_root, kind)]


def prepare(args: argparse.Namespace, data_sets: list[str]) -> None:
    """Every image raw and equalised, in prepared/<treatment>/."""
    for treatment, options in TREATMENTS.items():
        for data_set in tqdm(data_sets, desc=f"prepare, {treatment}", unit="data set"):
            target = args.output_dir / "prepared" / treatment / data_set
            run([str(ROOT / "preprocess.py"), "--directory", str(args.data_root / data_set), "--output_dir", str(target), "--workers", str(args.workers),
                 "--target_height", str(args.img_size), "--target_width", str(args.img_size), *options])  # fmt: skip


def sources_of(args: argparse.Namespace, data_set: str) -> dict[str, Path]:
    """{path of a prepared image, below prepared/<treatment>: its file} of a data set, as preprocess.py gives names."""
    folder = args.data_root / data_set
    return {f"{data_set}/{path}": source for source, path in plan_outputs(folder, list_images(folder)).items()}


def fingerprint(path: Path) -> Fingerprint:
    """In a worker process."""
    global _tools
    if "_tools" not in globals():
        import dlib

        cv2.setNumThreads(1)
        _tools = FaceFinder(find_predictor(None)), dlib.face_recognition_model_v1(str(find_network()))
    with Image.open(path) as image:
        stored, face = detect_face(image.convert("RGB"), _tools[0], image.width)
    return take_fingerprint(stored, face, *_tools)


def take_fingerprints(folder: Path, paths: list[str], args: argparse.Namespace) -> list[Fingerprint]:
    """Of the images with these paths below the folder. Kept in fingerprints.npz while neither images nor method change."""
    store = args.output_dir / "fingerprints.npz"
    digest = hashlib.sha256(b"".join(Path(method.__code__.co_filename).read_bytes() for method in (take_fingerprint, detect_face)))
    for path in paths:
        stat = (folder / path).stat()
        digest.update(json.dumps([path, stat.st_size, stat.st_mtime_ns]).encode())
    if store.exists():
        with np.load(store) as kept:
            if str(kept["key"]) == digest.hexdigest():
                return [Fingerprint(*pair) for pair in zip(kept["hashes"], kept["faces"])]
    with ProcessPoolExecutor(args.workers, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        found = list(tqdm(pool.map(fingerprint, [folder / path for path in paths], chunksize=8), total=len(paths), desc="sift", unit="image"))
    partial = store.with_name("partial.npz")
    np.savez(partial, key=digest.hexdigest(), hashes=np.stack([one.hashes for one in found]), faces=np.stack([one.face for one in found]))
    os.replace(partial, store)
    return found


def sift(args: argparse.Namespace, data_sets: list[str]) -> tuple[dict[str, Fingerprint], dict[str, Counter]]:
    """Which of the prepared images are used, those of data/<treatment>/, the same for both; all others are in dropped.csv.

    Returns:
        {path of an image: its fingerprint} and {data set: how many were left out for which reason}.
    """
    prepared = args.output_dir / "prepared"
    paths, dropped, sizes = [], {}, Counter()
    for data_set in data_sets:
        reasons: dict[str, str] = {}
        for treatment in TREATMENTS:
            reasons |= read_reasons(prepared / treatment / f"{data_set}{REJECTED_SUFFIX}" / "rejected.csv")
        for path, source in sources_of(args, data_set).items():
            if all((prepared / treatment / path).exists() for treatment in TREATMENTS):
                paths.append(path)
                sizes[data_set] += 1
            else:
                dropped[path] = reasons.get(str(source.relative_to(args.data_root / data_set)), "could not be prepared")
    paths.sort()
    fingerprints = take_fingerprints(prepared / "equalised", paths, args)
    seen = [i for i, one in enumerate(fingerprints) if np.isfinite(one.face).all()]
    dropped |= {paths[i]: NOT_AGAIN for i in set(range(len(paths))) - set(seen)}
    # The smaller a data set, the more its images are worth
    rank = [sizes["/".join(Path(paths[i]).parts[:2])] for i in seen]
    for i, (stays, reason) in leave_out(find_pairs([fingerprints[i] for i in seen]), rank).items():
        dropped[paths[seen[i]]] = f"{reason}: {paths[seen[stays]]}"
    kept = {path: one for path, one in zip(paths, fingerprints) if path not in dropped}
    write_reasons(args.output_dir / "dropped.csv", dropped)
    for treatment in TREATMENTS:
        shutil.rmtree(args.output_dir / "data" / treatment, ignore_errors=True)
        for path in kept:
            target = args.output_dir / "data" / treatment / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(prepared / treatment / path, target)
            except OSError:  # a file system without
                shutil.copy2(prepared / treatment / path, target)
    return kept, {data_set: Counter(kind_of(reason) for path, reason in dropped.items() if path.startswith(f"{data_set}/")) for data_set in data_sets}


def kind_of(reason: str) -> str:
    """The reason without what differs from image to image."""
    return next((kind for kind in (NOT_AGAIN, NO_FACE, BEYOND, "near-duplicate", "face at a distance") if reason.startswith(kind)), "unusable")


def extract(args: argparse.Namespace, data_sets: list[str]) -> None:
    unseen = [data_set for data_set in data_sets if data_set.startswith("fake/") and data_set.split("/")[1] not in args.train_on]
    for treatment in tqdm(TREATMENTS, desc="extract"):
        command = ["feature_extraction.py", "--data_root", str(args.output_dir / "data" / treatment), "--output_dir", str(features_of(args, treatment))]
        command = [str(ROOT / command[0]), *command[1:], "--img_size", str(args.img_size), "--patch_size", str(args.patch_size), "--workers", str(args.workers)]
        run([*command, "--test_only", *unseen])


def features_of(args: argparse.Namespace, treatment: str) -> Path:
    return args.output_dir / "features" / treatment


def check_splits(features: Path, kept: dict[str, Fingerprint]) -> dict[str, tuple[int, int, int]]:
    """That nothing stands on both sides of a split that is near each other. Returns {data set: images in train, val, test}.

    Raises:
        ValueError: names the pair.
    """
    split_of, sizes = {}, {}
    for split in SPLITS:
        for data_set, path in find_feature_files(features, split).items():
            there = FaceDataset([path]).column("paths") if count_of(path) else []
            split_of |= dict.fromkeys(there, split)
            sizes.setdefault(data_set, {})[split] = len(there)
    if set(split_of) != set(kept):
        raise ValueError(f"{features}: does not hold the images that were chosen; remove it and run the same command again")
    paths = list(kept)
    for i, j, reason in find_pairs(list(kept.values())):
        if split_of[paths[i]] != split_of[paths[j]]:
            raise ValueError(f"{paths[i]} is in {split_of[paths[i]]}, {paths[j]} in {split_of[paths[j]]}: {reason}")
    return {data_set: tuple(of[split] for split in SPLITS) for data_set, of in sizes.items()}


def count_of(path: Path) -> int:
    with open_features(path) as file:
        return len(file["labels"])


# -------------------------------------------------------------------------------------------------------------------- probes


def of_files(images: np.ndarray, files: list[Path]) -> np.ndarray:
    """(N, 5): size in bytes, width, height, whether a PNG, whether a JPEG."""
    rows = []
    for path in files:
        with Image.open(path) as image:
            rows.append([np.log(path.stat().st_size), np.log(image.width), np.log(image.height), image.format == "PNG", image.format == "JPEG"])
    return np.array(rows, float)


def of_spectra(images: np.ndarray, files: list[Path]) -> np.ndarray:
    """(N, h / 2): the logarithm of the power spectrum of the brightness, its mean over rings of one frequency."""
    side = images.shape[1]
    gray = images @ np.array([0.299, 0.587, 0.114], np.float32)
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((gray - gray.mean(axis=(1, 2), keepdims=True)) * window * window[:, None])) ** 2
    frequency = np.fft.fftfreq(side) * side
    ring = np.hypot(frequency, frequency[:, None]).astype(int)
    return np.log(np.stack([power[:, ring == k].mean(axis=1) for k in range(side // 2)], axis=1) + 1e-6)


def of_thumbnails(images: np.ndarray, files: list[Path]) -> np.ndarray:
    """(N, 588): copies of 14 x 14 pixels."""
    return np.stack([cv2.resize(image, (14, 14), interpolation=cv2.INTER_AREA).ravel() for image in images]).astype(float)


REAL_SIZES = "real, by size"
PROBES = {"files": of_files, "spectrum": of_spectra, "thumbnail": of_thumbnails}


def probe(args: argparse.Namespace, data_sets: list[str], treatment: str) -> dict[str, dict[str, float]]:
    """{probe: {generator: AUC on the test split}} of logistic regressions that are trained on the training split. Under REAL_SIZES, the AUC
    with which the same scores tell real images of more pixels than most from the others: 0.5 where that leaves no trace."""
    # Files of the raw images: as they were given
    sources = {path: source for data_set in data_sets for path, source in sources_of(args, data_set).items()} if treatment == "raw" else {}
    found = {}
    splits = {split: FaceDataset(list(find_feature_files(features_of(args, treatment), split).values())) for split in ("train", "test")}
    images = {split: data.read(np.arange(len(data)))["image"].transpose(0, 2, 3, 1) for split, data in splits.items()}
    paths = {split: data.column("paths") for split, data in splits.items()}
    files = {split: [sources.get(path, args.output_dir / "data" / treatment / path) for path in paths[split]] for split in splits}
    kinds = np.array(["/".join(path.split("/")[:2]) for path in paths["test"]])
    pixels = np.array([np.prod([int(side) for side in original.split()[1].split("x")]) for original in splits["test"].column("originals")])
    for name, features in PROBES.items():
        rows = {split: features(images[split], files[split]) for split in splits}
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000, class_weight="balanced"))
        scores = model.fit(rows["train"], splits["train"].labels).decision_function(rows["test"])
        labels = splits["test"].labels
        found[name] = {kind.split("/")[1]: float(roc_auc_score(labels[chosen], scores[chosen])) for kind in sorted(set(kinds)) if kind.startswith("fake/") for chosen in [(kinds == kind) | (labels == 0)]}
        larger = pixels[labels == 0] > np.median(pixels[labels == 0])
        found[name][REAL_SIZES] = float(roc_auc_score(larger, scores[labels == 0])) if larger.any() else None
    return found


# ------------------------------------------------------------------------------------------------------------------- training


def plan_jobs(args: argparse.Namespace) -> list[tuple[str, str, int, Path]]:
    """(treatment, variant, seed, folder) of all models, the comparison that matters first."""
    others = [] if args.main_only else [name for name in VARIANTS if name not in MAIN]
    jobs = [("equalised", name, seed) for seed in range(args.seeds) for name in MAIN]
    jobs += [("equalised", name, seed) for seed in range(args.seeds) for name in others]
    jobs += [("raw", name, seed) for seed in range(args.seeds) for name in MAIN]
    # Other images, other models: those of earlier ones stay beside them
    prints = {treatment: FaceDataset(list(find_feature_files(features_of(args, treatment), "test").values())).fingerprint for treatment in TREATMENTS}
    folders = {treatment: args.output_dir / "models" / f"{treatment}_{prints[treatment][:8]}" for treatment in TREATMENTS}
    return [(treatment, name, seed, folders[treatment] / name.split(" (")[0].replace(" ", "_") / f"seed_{seed}") for treatment, name, seed in jobs]


def announce(args: argparse.Namespace, jobs: list, options: list[str]) -> None:
    """Says how long the training will take, from an epoch of LAMM-ViT."""
    left = [job for job in jobs if not (job[-1] / "prediction_results.json").exists()]
    print(f"train  {len(jobs)} models, {len(jobs) - len(left)} of them are there already", flush=True)
    if not left:
        return
    epochs = train.get_args_parser().parse_args(options).epochs
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        run([str(ROOT / "train.py"), "--features", str(features_of(args, "equalised")), "--output_dir", folder, *options, "--epochs", "1", "--warmup_epochs", "0", "--schedule", "cosine"])
        seconds = json.loads(Path(folder, "timing.jsonl").read_text().splitlines()[-1])["seconds"]
    total = seconds * epochs * len(left) / args.jobs
    print(f"train  an epoch takes {seconds:.1f} s: {len(left)} models of {epochs} epochs, {args.jobs} at a time, about {total / 60:.0f} minutes at the most", flush=True)


def train_all(args: argparse.Namespace, jobs: list, options: list[str]) -> dict[tuple[str, str], list[dict]]:
    """{(treatment, variant): inference.py's results of each seed}."""
    results: dict[tuple[str, str], list] = {(treatment, name): [None] * args.seeds for treatment, name, *_ in jobs}
    trained_on = [data_set for data_set in data_sets_of(args.output_dir / "data/equalised") if data_set.startswith("real/") or data_set.split("/")[1] in args.train_on]

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


# --------------------------------------------------------------------------------------------------------------------- tables


def read_table(folder: Path) -> dict[str, dict[tuple[int, str], float]]:
    """{generator: {(label, path): score}} of a model, from inference.py's CSV file."""
    table = defaultdict(dict)
    with open(folder / "prediction_results.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        for line in csv.DictReader(file):
            table[line["generator"]][int(line["label"]), line["path"]] = float(line["score"])
    return table


def read_scores(folders: list[Path]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """{generator: labels (N,) and the scores of all seeds (S, N) of the images that stand against each other}, and how many real images
    there are in all. These are in an order in which each generator has the first ones.

    Raises:
        ValueError: the folders are of different images.
    """
    tables = []
    for folder in folders:
        tables.append(read_table(folder))
        if {name: of.keys() for name, of in tables[-1].items()} != {name: of.keys() for name, of in tables[0].items()}:
            raise ValueError(f"{folder}: tested on other images than {folders[0]}; remove it and run the same command again")
    times = Counter(image for of in tables[0].values() for image in of)
    scores = {}
    for generator, of in tables[0].items():
        images = sorted(of, key=lambda image: (image[0], -times[image], image[1]))
        scores[generator] = np.array([label for label, _ in images]), np.array([[table[generator][image] for image in images] for table in tables])
    return scores, sum(label == 0 for label, _ in times)


def swap_masks(args: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """What a model of equalised images makes of faces with the region masks of other faces: the mean change of a score, and the mean AUC
    over generators with the own masks and with others'."""
    model, checkpoint = load_checkpoint(folder / "best_model.pth")
    data = FaceDataset(list(find_feature_files(features_of(args, "equalised"), "test").values()), model.config.grid_size, checkpoint["mask_style"])
    samples = data.read(np.arange(len(data)))
    images, masks = torch.from_numpy(samples["image"]), torch.from_numpy(samples["region_masks"][np.random.default_rng(0).permutation(len(data))])
    with torch.inference_mode():
        swapped = np.concatenate([fake_probability(model, *part) for part in zip(images.split(64), masks.split(64))])
    scores = dict(zip(data.column("paths"), swapped))
    # (3, N) for each generator: label, score, score with another's masks
    tables = [np.array([(label, own, scores[path]) for (label, path), own in of.items()]).T for of in read_table(folder).values()]
    changes = [np.abs(own - others).mean() for _, own, others in tables]
    aucs = [[roc_auc_score(labels, values) for values in (own, others)] for labels, own, others in tables]
    return float(np.mean(changes)), *np.mean(aucs, axis=0).tolist()


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}", *(f"| {' | '.join(cells)} |" for cells in rows), ""]


def write_tables(args: argparse.Namespace, sizes: dict, dropped: dict, probes: dict, jobs: list, results: dict, options: list[str]) -> dict:
    """results.md and results.json. Returns the latter."""
    generators = [*args.train_on, *sorted(data_set.split("/")[1] for data_set in sizes if data_set.startswith("fake/") and data_set.split("/")[1] not in args.train_on)]
    unseen = generators[len(args.train_on) :]
    titles = {generator: generator if generator in unseen else f"{generator} (seen)" for generator in generators}
    folders = {key: [folder for treatment, name, _, folder in jobs if (treatment, name) == key] for key in results}
    scores = {key: read_scores(of) for key, of in folders.items()}
    summary: dict = {"data": {}, "probes": probes, "detectors": {}, "comparison": {}}

    lines = ["## Images", ""]
    reasons = {NO_FACE: "no face", BEYOND: "crop beyond the border", NOT_AGAIN: "no face in the crop", "near-duplicate": "near-duplicate", "face at a distance": "perhaps one person", "unusable": "unusable"}
    table = []
    for data_set, split in sizes.items():
        counts = dropped[data_set]
        summary["data"][data_set] = {"dropped": dict(counts), **dict(zip(SPLITS, split))}
        table.append([data_set, str(sum(counts.values()) + sum(split)), *(str(counts[reason]) for reason in reasons), *map(str, split)])
    lines += markdown(["", "given", *reasons.values(), *SPLITS], table)

    lines += ["## Shortcuts", "", f"AUC of logistic regressions on what is not worth learning; **bold** beyond {LIKE_CHANCE[0]:.2f}–{LIKE_CHANCE[1]:.2f}. A probe's 95 % interval by chance alone: {', '.join(f'±{by_chance(sizes, generator):.2f} ({generator})' for generator in generators)}.", ""]
    lines += [f"“{REAL_SIZES}”: the same scores between photographs published with more pixels than most and the others.", ""]

    def shown(auc: float | None) -> str:
        return "–" if auc is None else f"{auc:.3f}" if LIKE_CHANCE[0] <= auc <= LIKE_CHANCE[1] else f"**{auc:.3f}**"

    table = [[f"{name}, {treatment}", *(shown(aucs[column]) for column in (*generators, REAL_SIZES))] for treatment in TREATMENTS for name, aucs in probes[treatment].items()]
    lines += markdown(["probe", *titles.values(), REAL_SIZES], table)

    lines += ["## Detectors", "", f"AUC, mean ± standard deviation over {args.seeds} seeds; in brackets 95 % bootstrap intervals of the mean over these seeds: what other images would change.", ""]
    table = []
    for (treatment, name), runs in results.items():
        cells, replicates, means, smallest = [], {}, {}, sys.maxsize
        for stream, generator in enumerate(generators, 1):
            by_generator, pool = scores[treatment, name]
            wins = win_matrix(*by_generator[generator])
            replicates[generator], means[generator] = auc_replicates(wins, RESAMPLES, 0, stream, pool), [one[generator]["auc"] for one in runs]
            smallest = min(smallest, *wins.shape) if generator in unseen else smallest
            cells.append(with_interval(means[generator], replicates[generator], min(wins.shape)))
            summary["detectors"].setdefault(treatment, {}).setdefault(name, {})[generator] = means[generator]
        per_seed = np.mean([means[generator] for generator in unseen], axis=0)
        cells.append(with_interval(per_seed, np.mean([replicates[generator] for generator in unseen], axis=0), smallest))
        summary["detectors"][treatment][name]["unseen"] = list(map(float, per_seed))
        table.append([f"{name}, {treatment}", *cells])
    lines += markdown(["", *titles.values(), "mean of unseen"], table)

    parameters = {name: torch.load(of[0] / "best_model.pth", map_location="cpu", weights_only=True)["model"] for (_, name), of in folders.items()}
    lines += ["The same runs, all metrics; mean ± standard deviation over seeds of the mean over generators. ACC is at 0.5.", ""]
    heads = ["model", "M parameters"] + [f"{metric}, {which}" for which in ("generators seen", "unseen") for metric in ("AUC %", "AP %", "ACC %")]
    lines += [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    lines += [row(f"{name}, {treatment}", runs, list(args.train_on), unseen, sum(values.numel() for values in parameters[name].values())) for (treatment, name), runs in results.items()]

    lines += ["", "## Do the masks count?", "", "Each test image with its own region masks and with those of another face, drawn at random; equalised images, mean over generators and seeds.", ""]
    guided = [name for treatment, name in results if treatment == "equalised" and "region_guidance" not in VARIANTS[name]]
    summary["masks"] = {name: dict(zip(("change", "auc", "auc_swapped"), np.mean([swap_masks(args, folder) for folder in folders["equalised", name]], axis=0).tolist())) for name in guided}
    table = [[name, f"{of['change']:.4f}", f"{of['auc']:.4f}", f"{of['auc_swapped']:.4f}"] for name, of in summary["masks"].items()]
    lines += markdown(["", "change of a score, mean", "AUC, own masks", "AUC, another's"], table)

    lines += ["## LAMM-ViT against a plain ViT", "", "Same width, depth, data, budget and seeds; equalised images. Difference of AUC, 95 % interval and p by DeLong's paired test on the", "images' win rates over all seeds: what other test images would change. The differences seed by seed stand beside it.", ""]
    table = []
    for generator in generators:
        (labels, first), (_, second) = (scores["equalised", name][0][generator] for name in MAIN)
        gain = compare_aucs(labels, first, second)
        by_seed = [a[generator]["auc"] - b[generator]["auc"] for a, b in zip(*(results["equalised", name] for name in MAIN))]
        known = np.isfinite(gain.p_value)
        summary["comparison"][generator] = {**{name: value if np.isfinite(value) else None for name, value in gain._asdict().items()}, "by_seed": by_seed}
        table.append([titles[generator], f"{gain.difference:+.3f}", *((f"[{gain.low:+.3f}, {gain.high:+.3f}]", f"{gain.p_value:.2g}") if known else ("–", "–")), ", ".join(f"{value:+.3f}" for value in by_seed)])
    lines += markdown(["generator", "AUC, LAMM-ViT − plain ViT", "95 %", "p", "by seed"], table)
    lines += [f"`{command_line(args, options)}`", ""]

    for name, text in (("results.json", json.dumps(summary, indent=2)), ("results.md", "\n".join(lines))):
        (args.output_dir / name).write_text(text + "\n" if name.endswith("json") else text)
    print("\n" + "\n".join(lines))
    return summary


def by_chance(sizes: dict, generator: str) -> float:
    """1.96 standard deviations of the AUC of scores that know nothing (Mann and Whitney's)."""
    n_real, n_fake = (sum(of[2] for name, of in sizes.items() if name.startswith("real/")), sizes[f"fake/{generator}"][2])
    return 1.96 * np.sqrt((n_real + n_fake + 1) / (12 * n_real * n_fake)) if n_real and n_fake else np.nan


def with_interval(values: list[float], replicates: np.ndarray, size: int) -> str:
    low, high = interval(float(np.mean(values)), replicates, size)
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread} [{low:.2f}, {high:.2f}]"


def command_line(args: argparse.Namespace, options: list[str]) -> str:
    return f"python benchmarks/real_faces.py --data_root {args.data_root} --train_on {' '.join(args.train_on)} --img_size {args.img_size} --patch_size {args.patch_size} --seeds {args.seeds}{' --main_only' if args.main_only else ''}; train.py {' '.join(options)}"


# --------------------------------------------------------------------------------------------------------------------- script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder with real/<Name> and fake/<Generator> (default: datasets)")
    parser.add_argument("--train_on", nargs="+", required=True, metavar="NAME", help="generators to train on; all others are only tested")
    parser.add_argument("--output_dir", type=Path, default=Path("real_faces"), help="(default: real_faces)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model, with the seeds 0, 1, ... (default: 3)")
    parser.add_argument("--img_size", type=int, default=112, help="side of the images in pixels (default: 112)")
    parser.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    parser.add_argument("--main_only", action="store_true", help="LAMM-ViT and plain ViT alone, without the single ablations")
    parser.add_argument("--device", default="auto", help="for the training: cpu, cuda (default: the GPU where there is one)")
    parser.add_argument("--jobs", type=int, help="models trained at a time (default: one a core, one on a GPU)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes for the images (default: one a core, fewer where memory is short)")
    return parser


def check_options(args: argparse.Namespace, options: list[str], data_sets: list[str]) -> list[str]:
    """The options of train.py, complete. Raises ValueError where those of either script make no sense."""
    if taken := [option for option in options if option.startswith("--") and any(name.startswith(option.split("=")[0]) for name in SET_HERE)]:
        raise ValueError(f"{', '.join(taken)}: this script sets it")
    generators = [data_set.split("/")[1] for data_set in data_sets if data_set.startswith("fake/")]
    if unknown := [name for name in args.train_on if name not in generators]:
        raise ValueError(f"--train_on {', '.join(unknown)}: no such generator in {args.data_root}; there are {', '.join(generators) or 'none'}")
    if len(set(args.train_on)) == len(generators) or not any(data_set.startswith("real/") for data_set in data_sets):
        raise ValueError(f"{args.data_root}: real images are needed, and a generator that is not in --train_on; there are {', '.join(data_sets)}")
    if min(args.seeds, args.workers, args.jobs) < 1 or args.img_size % args.patch_size:
        raise ValueError("--seeds, --workers and --jobs have to be at least 1, --img_size a multiple of --patch_size")
    given = {option.split("=")[0] for option in options}
    options = [*(part for pair in RECIPE.items() if pair[0] not in given for part in pair), "--patch_size", str(args.patch_size), *options]
    try:
        train.check_options(train.get_args_parser().parse_args(options))
    except SystemExit as error:  # argparse has printed why
        raise ValueError(f"train.py does not take these options: {' '.join(options)}") from error
    settings = args.output_dir / "settings.json"
    now = {"data_root": str(args.data_root.resolve()), "train_on": args.train_on, "img_size": args.img_size, "patch_size": args.patch_size, "options": options}
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise ValueError(f"{args.output_dir}: holds results with other options ({settings}); give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(now, indent=2) + "\n")
    return [*options, "--device", args.device]


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


def compare(args: argparse.Namespace, data_sets: list[str], options: list[str]) -> dict:
    """From files to tables."""
    prepare(args, data_sets)
    kept, dropped = sift(args, data_sets)
    extract(args, data_sets)
    sizes = [check_splits(features_of(args, treatment), kept) for treatment in TREATMENTS][-1]
    probes = {treatment: probe(args, data_sets, treatment) for treatment in TREATMENTS}
    jobs = plan_jobs(args)
    announce(args, jobs, options)
    return write_tables(args, sizes, dropped, probes, jobs, train_all(args, jobs, options), options)


if __name__ == "__main__":
    try:
        main(*get_args_parser().parse_known_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
