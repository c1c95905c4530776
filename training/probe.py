"""A head that starts where linear probing ends: a linear discriminant of what the frozen model lets the head read.

Linear probing, then fine-tuning (Kumar et al., ICLR 2022, arXiv 2202.10054): a head that starts at random pulls a good
trunk apart before it is of use itself.

Fisher's discriminant and not a logistic regression. Both separate the known sources alike. What the discriminant gets
wrong of unknown ones is less (docs/results.md): it distrusts each direction in which images of one class differ, while
a regression is free to use it as long as the known images are separated. How two images of one data set differ counts
whole, how the means of the data sets differ counts a tenth: there are few of these, and they also differ in how
strongly a generator shows.

Views of an image, smaller, cut tighter, compressed once more, are of its class and its face. The directions in which
they differ from it are distrusted, too: else a collection of small pictures would be one of fakes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import FaceDataset, source_numbers
from evaluation.metrics import roc_auc
from evaluation.scoring import predict
from model import LAMMViT
from runtime.processes import gather
from training.run import Run

# Added to the variances of the features, which are scaled to be about 1. Fixed: one that is chosen on other images of
# the same data sets is too small, and the probe learns their looks; to choose it on data sets left out is a lottery
SHRINKAGE = 0.3
# Weights in the covariance, where the scatter of images inside of their data sets has 1
BETWEEN = 0.1  # of the scatter of the means of a class's data sets
CHANGE = 0.5  # of the differences between views and their images


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


class Probe(NamedTuple):
    """A linear model: log odds of a fake = features (N, D) @ weight + bias."""

    weight: np.ndarray  # (D,)
    bias: float

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight + self.bias


class Moments(NamedTuple):
    """What a discriminant has to know of images of one class. Those of several data sets add up."""

    weight: float
    total: np.ndarray  # (D,) float64, the weighted sum of the features
    # (D, D) float64, weighted: scatter inside of data sets, BETWEEN times the outer products of their means, and CHANGE
    # times the scatter of views about their images
    products: np.ndarray

    def plus(self, other: "Moments", sign: int = 1) -> "Moments":
        return Moments(*(mine + sign * theirs for mine, theirs in zip(self, other)))


class Known:
    """What a probe may learn from: images in data sets, each of which may be left out.

    Args:
        features: (V, N, D) float32, each image as it is, then in V - 1 views.
        labels, sources: (N,) the class of each image, and the number of its data set, which is of one class.
        by_source: whether the data sets of a class weigh the same; else all images do.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, sources: np.ndarray, by_source: bool):
        self.features, self.labels, self.sources, self.by_source = features, labels, sources, by_source
        self.of_classes = [np.unique(sources[labels == label]).tolist() for label in (0, 1)]
        self._whole = self._add(*self.of_classes)

    def _moments(self, source: int) -> Moments:
        first, *views = self.features[:, self.sources == source]
        count, mean = len(first), first.mean(axis=0, dtype=np.float64)
        inside = first - mean.astype(np.float32)  # products of large numbers would lose the variances
        products = inside.T @ inside + BETWEEN * count * np.outer(mean, mean)
        for view in views:
            change = view - first
            products += CHANGE / len(views) * (change.T @ change)
        weight = 1 / count if self.by_source else 1.0
        return Moments(weight * count, weight * count * mean, weight * products)

    def _add(self, real: Sequence[int], fake: Sequence[int]) -> list[Moments]:
        """Of each class the moments of these data sets, which are read one after another."""
        D = self.features.shape[-1]
        sums = []
        for of_class in (real, fake):
            found = Moments(0.0, np.zeros(D), np.zeros((D, D)))
            for source in of_class:
                found = found.plus(self._moments(source))
            sums.append(found)
        return sums

    def fit(self, without: Sequence[int] = (), shrinkage: float = SHRINKAGE) -> Probe:
        """The probe of all data sets but some. A data set has to be left of each class."""
        out = self._add(*([one for one in of_class if one in without] for of_class in self.of_classes))
        real, fake = (whole.plus(less, -1) for whole, less in zip(self._whole, out))
        return discriminant(real, fake, shrinkage)


def discriminant(real: Moments, fake: Moments, shrinkage: float) -> Probe:
    """Fisher's linear discriminant of two classes that are as likely.

    The log odds of two normal distributions with one covariance: that inside of the data sets, and with less weight
    those of their means and of what views change.

    Args:
        shrinkage: added to the variances of the features, scaled so that with the distance of the classes they are 1.
    """
    means = [of_class.total / of_class.weight for of_class in (real, fake)]
    inside = [of.products / of.weight - BETWEEN * np.outer(mean, mean) for of, mean in zip((real, fake), means)]
    covariance, apart, middle = (inside[0] + inside[1]) / 2, means[1] - means[0], (means[0] + means[1]) / 2
    deviation = np.sqrt(np.maximum(covariance.diagonal() + (apart / 2) ** 2, 0))
    deviation[deviation <= 1e-5 * np.abs(middle)] = np.inf  # a constant one: its rounding says nothing
    scaled = covariance / deviation[:, None]
    scaled /= deviation
    scaled[np.diag_indices_from(scaled)] += np.where(np.isinf(deviation), 1, shrinkage)
    # Of these sizes, several times as fast as SciPy
    factor, aim = torch.linalg.cholesky(torch.from_numpy(scaled)), torch.from_numpy(apart / deviation)
    weight = torch.cholesky_solve(aim[:, None], factor)[:, 0].numpy() / deviation
    return Probe(weight, float(-weight @ middle))


def left_out(known: Known) -> dict[int, np.ndarray]:
    """{data set: log odds of its images as they are}, each by a probe that has seen nothing of this data set.

    What a probe gives for the sources of its training is more certain than what it gives for others, and fewer of their
    photographs look like fakes. A data set that is alone in its class cannot be left out.
    """
    kept = sorted(one for of_class in known.of_classes if len(of_class) > 1 for one in of_class)
    found = {}
    for one in tqdm(kept, desc="probe without a data set", leave=False, disable=None):
        found[one] = known.fit([one]).log_odds(known.features[0, known.sources == one])
    return found


def probe_head(run: Run) -> None:
    """Gives the head the weights of a discriminant of the training images, which have --probe_views views.

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
    # Where training follows, it begins at this AUC, and what a probe says of data sets left out is not its result
    outside, found = read(run.val_set, "probe, validation") if args.epochs else None, None
    if run.rank == 0:
        known = Known(np.stack(views), plain.labels, sources, by_source)
        probe = known.fit()
        found = probe, {} if args.epochs else left_out(known)
    probe, others = gather(found)[0]
    run.left_out = {one: torch.from_numpy(values) for one, values in others.items()}
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-probe.weight / 2, probe.weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-probe.bias / 2, probe.bias / 2]))
    if run.rank == 0 and args.epochs:
        auc = roc_auc(run.val_set.labels, probe.log_odds(outside))
        print(f"probe  validation AUC {auc:.4f} before the training", flush=True)
