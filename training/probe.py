"""A head that starts where linear probing ends: a linear discriminant of what the frozen model lets the head read.

Linear probing, then fine-tuning (Kumar et al., ICLR 2022, arXiv 2202.10054): a head that starts at random pulls a good
trunk apart before it is of use itself.

Fisher's discriminant and not a logistic regression. Both separate the known sources alike. What the discriminant gets
wrong of unknown ones is less (docs/results.md): it distrusts each direction in which the data sets of one class differ,
while a regression is free to use it as long as the known images are separated.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from dataset import FaceDataset, source_numbers
from evaluation.scoring import predict
from model import LAMMViT
from runtime.processes import gather
from training.run import Run

SHRINKAGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # added to the variance of each feature, which is 1
GROUPS = 3  # of data sets, each left out once to choose the shrinkage


def read_features(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> what the head reads (B, head_inputs)."""
    seen = []
    handle = model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    try:
        device = model.head.weight.device
        model(model.normalize(images.to(device)), region_masks.to(device))
    finally:
        handle.remove()
    return seen[0].float().cpu().numpy()


def balance(labels: np.ndarray, sources: np.ndarray | None) -> np.ndarray:
    """Weights (N,) of mean 1 by which both classes count alike, and with sources (N,) the data sets of a class, too."""
    groups = labels.astype(np.int64) if sources is None else sources
    weights = 1 / np.bincount(groups)[groups]
    for label in (0, 1):
        weights[labels == label] *= len(labels) / 2 / weights[labels == label].sum()
    return weights


class Probe(NamedTuple):
    """A linear model: log odds of a fake = features (N, D) @ weight + bias."""

    weight: np.ndarray  # (D,)
    bias: float

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight + self.bias


def fit(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, shrinkage: float) -> Probe:
    """Fisher's linear discriminant of two classes that are as likely.

    The log odds of two normal distributions with one covariance, that inside of the classes. With data sets that weigh
    alike, it holds how their means differ.

    Args:
        features: (N, D) float32.
        labels, weights: (N,), the class of each sample and how much it counts.
        shrinkage: added to the variances of the features, when these have mean 0 and deviation 1.
    """
    weights = (weights / weights.sum()).astype(np.float32)
    mean = weights @ features
    scaled = features - mean
    deviation = np.sqrt(weights @ scaled**2)
    deviation[deviation <= 1e-5 * np.abs(mean)] = 1  # a constant one: its rounding says nothing
    scaled /= deviation
    means = [np.average(scaled[labels == label], axis=0, weights=weights[labels == label]) for label in (0, 1)]
    inside = scaled - np.stack(means)[labels.astype(int)]
    inside *= np.sqrt(weights)[:, None]
    covariance = (inside.T @ inside).astype(np.float64)
    covariance[np.diag_indices_from(covariance)] += shrinkage
    weight = solve(covariance, means[1] - means[0], assume_a="pos") / deviation
    return Probe(weight, float(-weight @ (mean + deviation * (means[0] + means[1]) / 2)))


def fit_views(
    features: np.ndarray, labels: np.ndarray, sources: np.ndarray, shrinkage: float, by_source: bool
) -> Probe:
    """The same on several views (V, N, D) of the images; labels and sources (N,), the number of each one's data set.

    Args:
        by_source: whether the data sets of a class weigh the same.
    """
    views = len(features)
    tiled = np.tile(labels, views)
    weights = balance(tiled, np.tile(sources, views) if by_source else None)
    return fit(features.reshape(len(tiled), -1), tiled, weights, shrinkage)


def choose_shrinkage(
    features: np.ndarray, labels: np.ndarray, sources: np.ndarray, by_source: bool, val: tuple[np.ndarray, np.ndarray]
) -> float:
    """The shrinkage of the best AUC on data sets that are left out, a third of each class at a time.

    One that is chosen on other images of the same sources is too small: with it the probe learns the sources. It is
    chosen so where a class has one data set alone.

    Args:
        features, labels, sources, by_source: as for fit_views.
        val: features (M, D) and labels (M,) of validation.
    """
    ranks = np.zeros(len(labels), int)  # of each image's data set in its class
    for label in (0, 1):
        ranks[labels == label] = np.unique(sources[labels == label], return_inverse=True)[1]
    count = min(GROUPS, *(ranks[labels == label].max() + 1 for label in (0, 1)))

    def aucs(shrinkage: float) -> list[float]:
        if count < 2:
            found = fit_views(features, labels, sources, shrinkage, by_source).log_odds(val[0])
            return [roc_auc_score(val[1], found)]
        of_groups = []
        for group in range(count):
            out, rest = np.flatnonzero(ranks % count == group), np.flatnonzero(ranks % count != group)
            probe = fit_views(features[:, rest], labels[rest], sources[rest], shrinkage, by_source)
            alike = balance(labels[out], sources[out] if by_source else None)
            of_groups.append(roc_auc_score(labels[out], probe.log_odds(features[0, out]), sample_weight=alike))
        return of_groups

    return max(SHRINKAGES, key=lambda shrinkage: np.mean(aucs(shrinkage)))


def left_out(
    features: np.ndarray, labels: np.ndarray, sources: np.ndarray, shrinkage: float, by_source: bool
) -> dict[int, np.ndarray]:
    """{data set: log odds of its images as they are}, each by a probe that has seen nothing of this data set.

    What a probe gives for the sources of its training is more certain than what it gives for others, and fewer of their
    photographs look like fakes. A data set that is alone in its class cannot be left out.

    Args:
        features, labels, sources, shrinkage, by_source: as for fit_views; of the images as they are first.
    """
    found = {}
    of_classes = [np.unique(sources[labels == label]).tolist() for label in (0, 1)]
    kept = sorted(one for of_class in of_classes if len(of_class) > 1 for one in of_class)
    for one in tqdm(kept, desc="probe without a data set", leave=False, disable=None):
        rest, mine = np.flatnonzero(sources != one), np.flatnonzero(sources == one)
        probe = fit_views(features[:, rest], labels[rest], sources[rest], shrinkage, by_source)
        found[one] = probe.log_odds(features[0, mine])
    return found


def probe_head(run: Run) -> None:
    """Gives the head the weights of a discriminant of the training images, as they are and --probe_views times
    as training would see them.

    All processes read a part of the images, the first one computes the probe.
    """
    args, files = run.args, run.train_set.files
    # A cache is of images as they are
    plain = run.train_set if args.cache_blocks else FaceDataset(files, run.train_set.grid_size, args.mask_style)
    seen = FaceDataset(files, plain.grid_size, args.mask_style, run.train_set.transform, args.seed)
    sources, by_source = source_numbers(plain), args.sampling == "sources"

    def read(dataset: FaceDataset, title: str) -> np.ndarray:
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            return predict(run.fed, dataset, read_features, args.batch_size, args.num_workers, title)

    views = [read(plain, "probe")]
    for view in range(args.probe_views):
        seen.set_epoch(view)
        views.append(read(seen, f"probe, view {view + 1} of {args.probe_views}"))
    outside, found = read(run.val_set, "probe, validation"), None
    if run.rank == 0:
        known = np.stack(views), plain.labels, sources
        shrinkage = choose_shrinkage(*known, by_source, (outside, run.val_set.labels))
        probe = fit_views(*known, shrinkage, by_source)
        auc = float(roc_auc_score(run.val_set.labels, probe.log_odds(outside)))
        # After it, there is training: then it says nothing about what comes out
        others = {} if args.epochs else left_out(*known, shrinkage, by_source)
        found = probe, auc, others
    probe, auc, others = gather(found)[0]
    run.left_out = {one: torch.from_numpy(values) for one, values in others.items()}
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-probe.weight / 2, probe.weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-probe.bias / 2, probe.bias / 2]))
    if run.rank == 0:
        print(f"probe  validation AUC {auc:.4f}{' before the training' if args.epochs else ''}", flush=True)
