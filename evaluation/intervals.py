"""How sure a metric is: bootstrap intervals, and the paired test between two detectors.

    bootstrap_intervals   {metric: (low, high)} of one comparison
    bootstrap_replicates, interval
                          the two halves of it; for the mean over generators, average the replicates, then call interval
    compare_aucs          the difference between two detectors on the same images, with its interval and a paired test

Labels and scores as in metrics.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from evaluation.metrics import FALSE_POSITIVE_RATES, METRIC_RANGE, binary_metrics

CHUNK_ELEMENTS = 1_000_000  # multiplicities held at once, in rows of N: some 60 MB with all that is made of them


# ------------------------------------------------------------------------------------------------------------ bootstrap


def draw_multiplicities(count: int, size: int, seed: int, stream: int) -> Iterator[np.ndarray]:
    """How often each of `size` images is in each of `count` resamples: multinomial rows (size,) of int, each of sum
    `size`.

    They depend on the three numbers and the row's place alone, not on how the rows are put into chunks.
    """
    rng = np.random.default_rng((seed, stream))
    for _ in range(count):
        yield np.bincount(rng.integers(0, size, size), minlength=size)


def draw_real_multiplicities(count: int, size: int, pool: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of the first `size` of `pool` real images is in each of `count` resamples: rows (size,) of sum
    `size`.

    Comparisons against fewer and more of the same images follow the same draws, of which each leaves out what it does
    not have: the replicates of a mean over generators keep what these have in common. Multinomial, each row by itself.
    """
    shared, own = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 0, size))
    for _ in range(count):
        drawn = shared.integers(0, pool, pool)
        mine = drawn[drawn < size][:size]
        yield np.bincount(np.concatenate([mine, own.integers(0, size, size - len(mine))]), minlength=size)


def weighted_metrics(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, threshold: float
) -> dict[str, np.ndarray]:
    """Those of METRIC_RANGE in binary_metrics, of R resamples at once, each array (R,).

    Args:
        labels: (N,), 1 = fake.
        scores: (N,), falling.
        weights: (R, N) int, how often each sample is in each resample; both classes are in each.
    """
    # the last of each run of equal scores: only there is a threshold
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true_positive = np.cumsum(weights * labels, axis=1)[:, ends]  # (R, E), fakes among those called fake
    false_positive = np.cumsum(weights, axis=1)[:, ends] - true_positive
    n_fake, n_real = true_positive[:, -1], false_positive[:, -1]
    new_fake = np.diff(true_positive, axis=1, prepend=0)
    # 0 / 0 where none is drawn yet, and new_fake is 0
    precision = true_positive / np.maximum(true_positive + false_positive, 1)
    new_real = np.diff(false_positive, axis=1, prepend=0)

    def right(at: float) -> tuple[np.ndarray, np.ndarray]:
        """Reals and fakes (R,) that are right at a threshold."""
        above = np.searchsorted(-scores[ends], -at, side="right")  # runs of scores >= at
        if above == 0:
            return n_real, np.zeros_like(n_fake)
        return n_real - false_positive[:, above - 1], true_positive[:, above - 1]

    def found(rate: float) -> np.ndarray:
        """The largest true positive rate (R,) where no more than this share of the reals is called fake."""
        fits = (false_positive <= rate * n_real[:, None] + 1e-9).sum(axis=1)  # runs; false_positive grows along them
        return np.where(fits, true_positive[rows, fits - 1], 0) / n_fake

    rows = np.arange(len(weights))
    real, fake = right(0.5)
    real_val, fake_val = right(threshold)
    pairs = n_real * n_fake
    # The ROC curve crosses at the first run where fpr + tpr >= 1; in whole numbers, so that nothing is lost to
    # rounding.
    excess = false_positive * n_fake[:, None] + true_positive * n_real[:, None] - pairs[:, None]
    after = np.argmax(excess >= 0, axis=1)
    excess_after = excess[rows, after]
    step = new_real[rows, after] * n_fake + new_fake[rows, after] * n_real
    share = 1 - excess_after / step
    return {
        "accuracy": 100 * (real + fake) / (n_real + n_fake),
        "accuracy_val_threshold": 100 * (real_val + fake_val) / (n_real + n_fake),
        "real_accuracy": 100 * real / n_real,
        "fake_accuracy": 100 * fake / n_fake,
        "ap": np.sum(new_fake * precision, axis=1) / n_fake,
        "auc": np.sum(new_real * (true_positive - new_fake / 2), axis=1) / pairs,
        "eer": (false_positive[rows, after] - (1 - share) * new_real[rows, after]) / n_real,
        **{metric: 100 * found(rate) for metric, rate in FALSE_POSITIVE_RATES.items()},
    }


def bootstrap_replicates(
    labels: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    count: int,
    seed: int,
    stream: int = 1,
    places: np.ndarray | None = None,
    pool: int = 0,
) -> dict[str, np.ndarray]:
    """The metrics of `count` resamples: {metric: (count,)}, units as in binary_metrics. The order of the samples does
    not matter.

    Real and fake images are resampled apart, as their numbers are set by the design of the comparison. The real ones
    follow
    draw_real_multiplicities: generators that stand against the same real images, or some of them, get the same
    resamples of these. The fakes follow default_rng((seed, stream)).

    Args:
        labels, scores: (N,) each.
        threshold: for accuracy_val_threshold.
        stream: 1 or more, another for each generator of a mean; with the same one their fakes would be drawn alike,
            place by place, and the mean's interval would be too wide. A number made of the generator's name
            (zlib.crc32) does not change when others come or go.
        places: (N,), for a mean over generators that stand against some of the same real images: the place of each real
            one in an order that all of them share, in which every generator has the first ones. pool: how many there
            are in it.
    """
    if stream == 0:
        raise ValueError("stream 0 draws the real images; give the fakes another")
    labels, scores = np.asarray(labels), np.asarray(scores)
    ascending = np.lexsort((scores, labels))  # first the real ones: a draw belongs to a rank within a class
    labels, scores = labels[ascending].astype(np.int64), scores[ascending]
    n_fake = int(labels.sum())
    n_real = len(labels) - n_fake
    if not n_real or not n_fake:
        raise ValueError(f"{n_real} real and {n_fake} fake images; both are needed")
    places = np.arange(n_real) if places is None else np.asarray(places)[ascending][:n_real]
    if not np.array_equal(np.sort(places), np.arange(n_real)):
        raise ValueError("the places of the real images have to be the first ones of the order")
    falling = np.argsort(-scores, kind="stable")
    reals, fakes = (
        draw_real_multiplicities(count, n_real, max(pool, n_real), seed),
        draw_multiplicities(count, n_fake, seed, stream),
    )
    rows = max(1, CHUNK_ELEMENTS // len(labels))
    chunks = []
    for start in range(0, count, rows):
        weights = np.stack(
            [np.concatenate([next(reals)[places], next(fakes)])[falling] for _ in range(min(rows, count - start))]
        )
        chunks.append(weighted_metrics(labels[falling], scores[falling], weights, threshold))
    return {metric: np.concatenate([chunk[metric] for chunk in chunks]) for metric in METRIC_RANGE}


def interval(
    estimate: float, replicates: np.ndarray, size: int, top: float = 1.0, level: float = 0.95
) -> tuple[float, float]:
    """A confidence interval (low, high) from an estimate and its bootstrap replicates; low <= estimate <= high, within
    [0, top].

    The interval is symmetric on the logit scale (Boyd, Eng & Page, "Area under the precision-recall curve", ECML 2013)
    with the replicates' standard error, and two additions for small samples: Student's t with size - 1 degrees of
    freedom and the factor sqrt(size / (size - 1)), which undoes the bootstrap's too small variance; and of two standard
    errors the larger one, that of the replicates carried over by the slope of the logit or that of their logits. In
    simulations (normal and beta scores, true AP 0.63-0.99, 50-500 images a class) it covered AP in 93.6-95.9 % and AUC
    in 94.6-96.9 %; percentile intervals covered AP in 86-94 %, for AP is skewed and its estimate a little too high.
    Least good, 90-94 %: fakes that are more alike than the real images, some of which outrank them.
    tests/test_metrics.py repeats a part.

    If all replicates are alike, with perfect separation for instance, they tell nothing of the spread. Then the rule of
    three is used: what was not seen in `size` images has a probability below 1 - (1 - level) ** (1 / size), about 3 /
    size. The interval reaches so far to both sides, within the range. For AUC that is a bound whatever the scores
    (`size` disjoint pairs were all in the right order), and for the accuracies; for AP it is a convention: a few real
    images that outrank all fakes cost more.

    Args:
        estimate: a metric of binary_metrics, or its mean over generators.
        replicates: (R,), from bootstrap_replicates; for the mean over generators the mean of theirs, row by row.
        size: images in the smaller class; for a mean, in the smallest of all generators' classes.
        top: the metric's largest value, METRIC_RANGE.
        level: 0-1.
    """
    share, spread = estimate / top, np.asarray(replicates) / top
    if np.ptp(spread) < 1e-12 or not 0 < share < 1:
        reach = 1 - (1 - level) ** (1 / size)
        low, high = min(share - reach, spread.min()), max(share + reach, spread.max())
    else:
        # Replicates at the very end of the range have no logit: all are moved towards the middle, by less than one
        # image counts.
        margin = 0.1 / size
        of_logits = np.std(logit((spread + margin) / (1 + 2 * margin)), ddof=1)
        by_slope = np.std(spread, ddof=1) / (share * (1 - share))
        freedom = max(size - 1, 1)
        reach = stdtrit(freedom, (1 + level) / 2) * np.sqrt((freedom + 1) / freedom) * max(of_logits, by_slope)
        low, high = expit(logit(share) - reach), expit(logit(share) + reach)
    return float(top * max(0.0, min(low, share))), float(top * min(1.0, max(high, share)))


def bootstrap_intervals(
    labels: np.ndarray, scores: np.ndarray, threshold: float, count: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """{metric: (low, high)} for each of METRIC_RANGE, units as in binary_metrics; see bootstrap_replicates and
    interval.

    1,000 replicates are enough for two digits of the interval's width.
    """
    estimates = binary_metrics(labels, scores, threshold)
    replicates = bootstrap_replicates(labels, scores, threshold, count, seed)
    size = min(estimates["n_real"], estimates["n_fake"])
    return {
        metric: interval(estimates[metric], replicates[metric], size, top, level)
        for metric, top in METRIC_RANGE.items()
    }


# -------------------------------------------------------------------------------------------------------- two detectors


def win_matrix(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of each pair of a real and a fake image, how often the fake has the higher score; its mean is the AUC.

    Args:
        labels: (N,), 1 = fake.
        scores: (S, N), a row for each run (seed) of a detector.

    Returns:
        (n_real, n_fake) in [0, 1], the mean over runs; ties count half.
    """
    real, fake = scores[:, labels == 0], scores[:, labels == 1]
    return np.mean([(f[None] > r[:, None]) + 0.5 * (f[None] == r[:, None]) for r, f in zip(real, fake)], axis=0)


def auc_replicates(wins: np.ndarray, count: int, seed: int, stream: int = 1, pool: int = 0) -> np.ndarray:
    """The AUC of `count` resamples of the images, (count,), from win_matrix. The same draws for any detector on these
    images, so that replicates of two can be subtracted; stream and pool, and the order of the real images then, as in
    bootstrap_replicates.
    """
    n_real, n_fake = wins.shape
    reals = np.stack(list(draw_real_multiplicities(count, n_real, max(pool, n_real), seed)))
    fakes = np.stack(list(draw_multiplicities(count, n_fake, seed, stream)))
    return np.einsum("br,rf,bf->b", reals, wins, fakes, optimize=True) / wins.size


class AucDifference(NamedTuple):
    difference: float  # first - second
    low: float  # 95 % interval; NaN, as p_value, where the images cannot tell: one of a class, or all alike
    high: float
    p_value: float  # two-sided, of no difference


def compare_aucs(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> AucDifference:
    """The paired test of DeLong, DeLong & Clarke-Pearson (Biometrics 1988) between two detectors on the same images.

    It tells what other images would have changed; scores of several runs are averaged over these, pair by pair, before.
    What other seeds would have changed shows in the spread over runs alone.

    Args:
        labels: (N,), 1 = fake.
        first, second: (S, N) scores, a row for each run; the numbers of runs may differ.
    """
    gain = win_matrix(labels, first) - win_matrix(labels, second)
    difference, error = float(gain.mean()), 0.0
    if min(gain.shape) > 1:
        error = float(
            np.sqrt(gain.mean(axis=1).var(ddof=1) / gain.shape[0] + gain.mean(axis=0).var(ddof=1) / gain.shape[1])
        )
    if not error:
        return AucDifference(difference, np.nan, np.nan, np.nan)
    reach, p_value = float(ndtri(0.975)) * error, float(2 * ndtr(-abs(difference) / error))
    return AucDifference(difference, difference - reach, difference + reach, p_value)
