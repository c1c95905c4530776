"""The same test under corruptions: JPEG, blur, noise and resizing, each at several levels."""

import argparse
import queue
from collections.abc import Callable

import numpy as np
from PIL import Image

from evaluation.metrics import METRICS
from evaluation.protocol import TestSet, score
from evaluation.summary import summarize
from faces.finder import FaceFinder, FinderFiles, find_face, finder_files
from faces.regions import draw_region_masks
from model import LAMMViT

# The grid of the field; level 0 of blur and noise and 1 of resize are the clean images.
ROBUSTNESS = {
    "jpeg": (100, 90, 80, 70, 60, 50, 40, 30),
    "blur": (1, 2, 3, 4, 5),
    "noise": (0.05, 0.1, 0.15, 0.2, 0.25),
    "resize": (0.75, 0.5, 0.25),
}


def finder_again(test_set: TestSet, checkpoint: dict, files: FinderFiles) -> Callable:
    """For TestTransform: finds the face in a corrupted image; where there is none any more, the mean landmarks stand
    in.
    """
    side, grid_size, mean = test_set.dataset.img_size, test_set.dataset.grid_size, test_set.dataset.mean_landmarks
    free = queue.LifoQueue()  # a finder is for one thread at a time

    def find(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            finder = free.get_nowait()
        except queue.Empty:
            finder = FaceFinder(files)
        _, landmarks, _ = find_face(Image.fromarray(image), finder, side)
        free.put(finder)
        landmarks = mean if landmarks is None else landmarks
        return landmarks, draw_region_masks(landmarks, (side, side), grid_size, checkpoint["mask_style"])

    return find


def test_robustness(
    model: LAMMViT, checkpoint: dict, test_set: TestSet, clean: dict[str, dict], args: argparse.Namespace
) -> list[dict]:
    """A row for each corruption and level: {"corruption", "level", generator: metrics, ..., "Mean": metrics}; first the
    clean one.
    """
    files = finder_files(args.predictor, not args.without_cnn) if args.redetect else None
    find_again = finder_again(test_set, checkpoint, files) if files else None
    names = [*test_set.comparisons, "Mean"]
    rows = [
        {"corruption": "none", "level": 0}
        | {name: {metric: clean[name][metric] for metric in METRICS} for name in names}
    ]
    for corruption, level in [(corruption, level) for corruption, levels in ROBUSTNESS.items() for level in levels]:
        scores = score(model, test_set, args, ((corruption, level),), find_again, f"{corruption} {level:g}")
        results = summarize(test_set, scores, checkpoint, 0, args.seed)
        rows.append(
            {"corruption": corruption, "level": level}
            | {name: {metric: results[name][metric] for metric in METRICS} for name in names}
        )
    return rows


test_robustness.__test__ = False  # no test of pytest's
