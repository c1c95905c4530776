"""The images on the wrong side of the threshold, those that the model is surest of first."""

import itertools
from typing import NamedTuple

import numpy as np

from evaluation.protocol import TestSet

SHOWN_MISTAKES = 12  # of each class


class Mistake(NamedTuple):
    """An image on the wrong side of the threshold."""

    image: np.ndarray  # (h, w, 3) uint8 RGB
    path: str  # below the data root, "fake/StyleGAN3/0001.png"
    label: int  # 0 real, 1 fake
    score: float  # probability of a fake


def find_mistakes(test_set: TestSet, scores: np.ndarray, threshold: float) -> list["Mistake"]:
    """The images on the wrong side of the threshold, of each class the furthest from it, in turns."""
    needed, labels, paths = test_set.needed, test_set.dataset.labels, test_set.dataset.column("paths")
    wrong = needed[(scores[needed] >= threshold) != labels[needed]]
    furthest = [
        sorted(wrong[labels[wrong] == label], key=lambda i: -abs(scores[i] - threshold))[:SHOWN_MISTAKES]
        for label in (0, 1)
    ]
    chosen = [i for pair in itertools.zip_longest(*furthest) for i in pair if i is not None]
    # (B, 3, h, w) -> (B, h, w, 3)
    images = test_set.dataset.read(chosen)["image"].transpose(0, 2, 3, 1) if chosen else []
    return [Mistake(image, paths[i], int(labels[i]), float(scores[i])) for image, i in zip(images, chosen)]
