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
from model import LAMMViT
from runtime.processes import gather
from training.cache import fingerprint
from training.readings import read_all
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


class DataSet(NamedTuple):
    """What a discriminant has to know of a data set."""

    label: int
    weight: float
    mean: np.ndarray  # (D,) float64
    # (D, D) float32, its covariance, and CHANGE times that of the differences between views and their images
    scatter: torch.Tensor


def look_at(first: np.ndarray, *views: np.ndarray, label: int, by_source: bool) -> DataSet:
    """first: (n, D) float32, the images of a data set as they are; views: the same in views."""
    count, mean = len(first), first.mean(axis=0, dtype=np.float64)
    inside = first - mean.astype(np.float32)  # products of large numbers would lose the variances
    products = inside.T @ inside
    for view in views:
        change = view - first
        products += np.float32(CHANGE / len(views)) * (change.T @ change)
    products /= np.float32(count)
    return DataSet(label, 1 if by_source else count, mean, torch.from_numpy(products))


class Known:
    """What a probe may learn from: images in data sets, each of which may be left out.

    It holds a (D, D) matrix of each data set, so that a probe of all but some is a matter of additions.

    Args:
        features: (V, N, D) float32, each image as it is, then in V - 1 views.
        labels, sources: (N,) the class of each image, and the number or name of its data set, which is of one class.
        by_source: whether the data sets of a class weigh the same; else all images do.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, sources: np.ndarray, by_source: bool):
        self.features, self.sources, self.data_sets = features, sources, {}
        for source in np.unique(sources).tolist():
            mine = sources == source
            label = int(labels[mine][0])
            self.data_sets[source] = look_at(*features[:, mine], label=label, by_source=by_source)

    def of_class(self, label: int, without: Sequence[int | str]) -> list[int | str]:
        """The data sets of a class, but some."""
        return [source for source, one in self.data_sets.items() if one.label == label and source not in without]

    def fit(self, without: Sequence[int | str] = (), shrinkage: float = SHRINKAGE) -> Probe:
        """The probe of all data sets but some. A data set has to be left of each class."""
        D = self.features.shape[-1]
        means, covariance = [], torch.zeros(D, D)
        for label in (0, 1):
            kept = [self.data_sets[source] for source in self.of_class(label, without)]
            total = sum(one.weight for one in kept)
            shares = np.array([one.weight / total for one in kept])
            of_sets = np.stack([one.mean for one in kept])  # (S, D)
            means.append(shares @ of_sets)
            for one, share in zip(kept, shares.tolist()):
                covariance.add_(one.scatter, alpha=0.5 * share)
            between = torch.from_numpy(((of_sets - means[-1]) * np.sqrt(shares)[:, None]).astype(np.float32))
            covariance.addmm_(between.T, between, alpha=0.5 * BETWEEN)
        return discriminant(*means, covariance, shrinkage)


def discriminant(real: np.ndarray, fake: np.ndarray, covariance: torch.Tensor, shrinkage: float) -> Probe:
    """Fisher's linear discriminant of two classes that are as likely: the log odds of two normal distributions with one
    covariance.

    Args:
        real, fake: (D,) float64, the means.
        covariance: (D, D) float32: that inside of the data sets, and with less weight those of their means and of what
            views change. It is overwritten.
        shrinkage: added to the variances of the features, scaled so that with the distance of the classes they are 1.
            Then the matrix is a good one to solve, in single precision, too.
    """
    apart, middle = fake - real, (real + fake) / 2
    deviation = np.sqrt(np.maximum(covariance.diagonal().double().numpy() + (apart / 2) ** 2, 0))
    deviation[deviation <= 1e-5 * np.abs(middle)] = np.inf  # a constant one: its rounding says nothing
    scale = torch.from_numpy(1 / deviation).float()
    covariance.mul_(scale).mul_(scale[:, None])
    covariance.diagonal().add_(torch.from_numpy(np.where(np.isinf(deviation), 1, shrinkage)))
    aim = torch.from_numpy(apart / deviation).float()
    weight = torch.cholesky_solve(aim[:, None], torch.linalg.cholesky(covariance))[:, 0].double().numpy() / deviation
    return Probe(weight, float(-weight @ middle))


def left_out(known: Known, without: Sequence[int | str] = ()) -> dict[int | str, np.ndarray]:
    """{data set: log odds of its images as they are}, each by a probe that has seen nothing of this data set.

    What a probe gives for the sources of its training is more certain than what it gives for others, and fewer of their
    photographs look like fakes. A data set that is alone in its class cannot be left out.

    Args:
        without: data sets that none of these probes may see.
    """
    of_classes = [known.of_class(label, without) for label in (0, 1)]
    kept = sorted(one for of_class in of_classes if len(of_class) > 1 for one in of_class)
    found = {}
    for one in tqdm(kept, desc="probe without a data set", leave=False, disable=None):
        found[one] = known.fit([*without, one]).log_odds(known.features[0, known.sources == one])
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

    of_views = args.augment, args.color_jitter, args.seed
    told = repr((fingerprint(run, only_frozen=False), of_views, args.batch_size, run.world))
    views = [read_all(run, plain, read_features, "probe", told)]
    for view in range(args.probe_views):
        seen.set_epoch(view)
        views.append(read_all(run, seen, read_features, f"probe, view {view + 1}", told))
    found = None
    if run.rank == 0:
        known = Known(np.stack(views), plain.labels, sources, by_source)
        # With training after it, what a probe says of data sets left out is not the result
        found = known.fit(), {} if args.epochs else left_out(known)
    probe, others = gather(found)[0]
    run.left_out = {one: torch.from_numpy(values) for one, values in others.items()}
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-probe.weight / 2, probe.weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-probe.bias / 2, probe.bias / 2]))
    if args.epochs:
        outside = read_all(run, run.val_set, read_features, "probe, validation", told)
        if run.rank == 0:
            auc = roc_auc(run.val_set.labels, probe.log_odds(outside))
            print(f"probe  validation AUC {auc:.4f} before the training", flush=True)
