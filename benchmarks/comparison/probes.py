"""How far a linear model gets on what is not worth learning: file size, format, mean spectrum, a thumbnail."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.comparison.images import RAW, features_of, sources_of
from dataset import FaceDataset
from samples.feature_files import find_feature_files

LIKE_CHANCE = (0.45, 0.60)  # AUC of a probe that has found nothing


def of_files(images: np.ndarray, files: list[Path]) -> np.ndarray:
    """(N, 5): size in bytes, width, height, whether a PNG, whether a JPEG."""
    rows = []
    for path in files:
        with Image.open(path) as image:
            rows.append(
                [
                    np.log(path.stat().st_size),
                    np.log(image.width),
                    np.log(image.height),
                    image.format == "PNG",
                    image.format == "JPEG",
                ]
            )
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
    return np.stack([cv2.resize(image, (14, 14), interpolation=cv2.INTER_AREA).ravel() for image in images]).astype(
        float
    )


REAL_SIZES = "real, by size"
PROBES = {"files": of_files, "spectrum": of_spectra, "thumbnail": of_thumbnails}


def linear_model() -> Pipeline:
    """The probe of a shortcut, not fitted yet; both classes weigh the same."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000, class_weight="balanced"))


def probe(args: argparse.Namespace, data_sets: Mapping[str, Path], treatment: str) -> dict[str, dict[str, float]]:
    """{probe: {generator: AUC on the test split}} of logistic regressions that are trained on the training split. Under
    REAL_SIZES, the AUC
    with which the same scores tell real images of more pixels than most from the others: 0.5 where that leaves no
    trace.
    """
    # Files of the raw images: as they were given
    sources = (
        {path: source for name, folder in data_sets.items() for path, source in sources_of(name, folder).items()}
        if treatment == RAW
        else {}
    )
    found = {}
    splits = {
        split: FaceDataset(list(find_feature_files(features_of(args, treatment), split).values()))
        for split in ("train", "test")
    }
    images = {split: data.read(np.arange(len(data)))["image"].transpose(0, 2, 3, 1) for split, data in splits.items()}
    paths = {split: data.column("paths") for split, data in splits.items()}
    files = {
        split: [sources.get(path, args.output_dir / "data" / treatment / path) for path in paths[split]]
        for split in splits
    }
    kinds = np.array(["/".join(path.split("/")[:2]) for path in paths["test"]])
    pixels = np.array(
        [
            np.prod([int(side) for side in original.split()[1].split("x")])
            for original in splits["test"].column("originals")
        ]
    )
    for name, features in PROBES.items():
        rows = {split: features(images[split], files[split]) for split in splits}
        scores = linear_model().fit(rows["train"], splits["train"].labels).decision_function(rows["test"])
        labels = splits["test"].labels
        found[name] = {
            kind.split("/")[1]: float(roc_auc_score(labels[chosen], scores[chosen]))
            for kind in sorted(set(kinds))
            if kind.startswith("fake/")
            for chosen in [(kinds == kind) | (labels == 0)]
        }
        larger = pixels[labels == 0] > np.median(pixels[labels == 0])
        found[name][REAL_SIZES] = float(roc_auc_score(larger, scores[labels == 0])) if larger.any() else None
    return found
