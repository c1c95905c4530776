"""Which images stand against each other, and how they are treated before: the protocol of a comparison.

Each generator's fakes stand against as many real images, drawn by seed from the pool of all real data sets.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import FaceDataset, image_ids
from evaluation.scoring import predict_scores
from model import LAMMViT
from samples.feature_files import FeatureFileError, find_feature_files
from samples.transforms import TestTransform

# Keys beside the generators, of the results and of the rows of "Robustness": no data set can be called so
SUMMARIES = ("Mean", "Std", "Worst", "Run", "Robustness", "By", "Operating", "corruption", "level")
PROTOCOLS = ("native", "fakes_jpeg96", "all_jpeg96")
ALIGNED_QUALITY = 96  # of the JPEG of fakes_jpeg96 and all_jpeg96 (arXiv 2403.17608)


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
        return {
            generator: (self.dataset.labels[chosen], scores[chosen]) for generator, chosen in self.comparisons.items()
        }


def load_test_set(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> TestSet:
    files = find_feature_files(args.features, args.split, args.datasets)
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    if dataset.img_size != model.config.img_size:
        raise FeatureFileError(
            f"{args.features}: images of {dataset.img_size} px, but {args.checkpoint} takes {model.config.img_size} px;"
            f" run feature_extraction.py --img_size {model.config.img_size}"
        )
    if set(dataset.labels) != {0, 1}:
        raise FeatureFileError(
            f"{args.features}: the {args.split} split of {', '.join(files)} holds one class only; both are needed"
        )
    comparisons = draw_comparisons(dataset, list(files), args.seed)
    if taken := [name for name in SUMMARIES if name in comparisons]:
        raise FeatureFileError(
            f"{args.features}/fake/{taken[0]}: this name means something else in the results; give the data set another"
        )
    if args.split == "test" and (known := int(np.isin(image_ids(dataset), checkpoint["images"].cpu().numpy()).sum())):
        raise FeatureFileError(
            f"{args.features}: {args.checkpoint} was trained or validated on {known} of these {len(dataset)} test"
            " images, since the splits were dealt anew; train again on these features, or give those of its training"
        )
    return TestSet(dataset, files, comparisons)


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


def score(
    model: LAMMViT,
    test_set: TestSet,
    args: argparse.Namespace,
    corruptions: tuple = (),
    find_again: Callable | None = None,
    title: str = "scoring",
) -> np.ndarray:
    """The probability of a fake, (N,), NaN where a sample is not compared. By --protocol, fakes or all go through a
    JPEG first.
    """
    dataset, scores = test_set.dataset, np.full(len(test_set.dataset), np.nan)
    first = {
        label: (
            (("jpeg", ALIGNED_QUALITY),)
            if args.protocol == "all_jpeg96" or (args.protocol, label) == ("fakes_jpeg96", 1)
            else ()
        )
        for label in (0, 1)
    }
    needed = test_set.needed
    groups = [needed] if first[0] == first[1] else [needed[dataset.labels[needed] == label] for label in (0, 1)]
    for group in groups:
        steps = (*first[int(dataset.labels[group[0]])], *corruptions)
        dataset.transform = TestTransform(steps, find_again) if steps else None
        scores[group] = predict_scores(model, dataset, args.batch_size, args.num_workers, title, group)
    dataset.transform = None
    return scores
