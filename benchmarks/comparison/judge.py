"""How well a detector does in a fold: from log odds of all images to AUC, false alarms, fakes found, calibration.

    AUC            of each left-out source of fakes against each left-out collection of photographs; the mean over these
                   pairs is the fold's, so each source and each collection counts alike
    thresholds     for 1 % and 5 % of false alarms, chosen on validation photographs of known collections; those of a
                   head alone also on known collections that are left out in turn
    temperature    chosen on validation, too; it makes log odds probabilities

Bootstrap resamples are of the images of each data set by itself, and the same for all detectors, so that replicates can
be subtracted. They say what other images would change; other seeds show in the spread over runs alone.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from benchmarks.comparison.folds import VAL, Fold, Stock
from evaluation.intervals import AucDifference, compare_aucs, draw_multiplicities, interval, win_matrix
from evaluation.metrics import calibration, log_loss
from evaluation.operating import operating_points

RESAMPLES = 2000


class Judged(NamedTuple):
    """A detector in a fold. Lists have an entry for each run (seed)."""

    auc: list[float]  # mean over pairs of a left-out source and a left-out collection
    pairs: dict[str, float]  # {"StyleGAN1 | FFHQ": AUC, mean over runs}
    replicates: np.ndarray  # (RESAMPLES,) of the mean of auc
    size: int  # images of the smallest left-out data set
    known: list[float]  # AUC of left-out fakes against validation photographs of known collections, mean over pairs
    alarms: dict[str, dict[str, list[float]]]  # {left-out collection: {"0.05": share called fake}}
    found: dict[str, dict[str, list[float]]]  # {left-out source: {"0.05": share called fake}}
    ece: list[float]  # on the left-out images, both classes weighted alike, and the data sets of a class
    log_loss: list[float]
    temperatures: list[float]
    thresholds: list[dict[str, float]]  # of calibrated scores

    @property
    def interval(self) -> tuple[float, float]:
        return interval(float(np.mean(self.auc)), self.replicates, self.size)

    def as_json(self) -> dict:
        return {name: value for name, value in self._asdict().items() if name not in ("replicates", "size")} | {
            "interval": self.interval
        }


def alike(groups: np.ndarray) -> np.ndarray:
    """Weights (n,) of sum 1 by which each of the groups (n,) counts alike."""
    _, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[number])


def resamples(names: np.ndarray) -> np.ndarray:
    """Weights (RESAMPLES, n) of images of these data sets (n,), as `alike`, in bootstrap resamples of each data set.

    The draws of a data set depend on its name and size alone.
    """
    weights = np.empty((RESAMPLES, len(names)))
    for name in np.unique(names):
        mine = np.flatnonzero(names == name)
        stream = 1 + zlib.crc32(os.fsencode(str(name)))
        weights[:, mine] = np.stack(list(draw_multiplicities(RESAMPLES, len(mine), 0, stream)))
    return weights * alike(names)


def pair_auc(stock: Stock, scores: np.ndarray, real: np.ndarray, fake: np.ndarray) -> float:
    """AUC, mean over pairs of a data set of `real` and one of `fake`, both indices. scores (N,)."""
    wins = win_matrix(stock.labels[np.r_[real, fake]], scores[None, np.r_[real, fake]])
    return float(np.clip(alike(stock.names[real]) @ wins @ alike(stock.names[fake]), 0, 1))  # 1 + 2e-16, say


def judge(stock: Stock, fold: Fold, log_odds: np.ndarray, others: Sequence[Mapping[str, np.ndarray]] = ()) -> Judged:
    """
    Args:
        log_odds: (S, N) of the stock's images, a row for each run; those of stock.needed(fold) are looked at.
        others: of each run {known data set: log odds of its images by what has not seen it}: temperature and thresholds
            are of these, then, as training.state.calibrated chooses them.
    """
    real, fake = stock.of(fold.photographs), stock.of(fold.fakes)
    both, val = np.r_[real, fake], stock.known(fold, VAL)
    wins = win_matrix(stock.labels[both], log_odds[:, both])  # (n_real, n_fake), the mean over runs
    per_pair = {
        f"{source.split('/')[1]} | {collection.split('/')[1]}": float(
            wins[np.ix_(stock.names[real] == collection, stock.names[fake] == source)].mean()
        )
        for source in fold.fakes
        for collection in fold.photographs
    }
    of_real, of_fake = resamples(stock.names[real]), resamples(stock.names[fake])
    judged = Judged(
        auc=[pair_auc(stock, row, real, fake) for row in log_odds],
        pairs=per_pair,
        replicates=((of_real @ wins) * of_fake).sum(axis=1),
        size=min(len(stock.of([name])) for name in fold.left_out),
        known=[pair_auc(stock, row, stock.known(fold, VAL, 0), fake) for row in log_odds],
        alarms={name: {} for name in fold.photographs},
        found={name: {} for name in fold.fakes},
        ece=[],
        log_loss=[],
        temperatures=[],
        thresholds=[],
    )
    collections = {name: stock.names[val] == name for name in np.unique(stock.names[val][stock.labels[val] == 0])}
    for row, theirs in zip(log_odds, others or [{}] * len(log_odds), strict=True):
        of_others = [(int(one.startswith("fake/")), values) for one, values in theirs.items()]
        temperature, thresholds = operating_points(stock.labels[val], row[val], collections, of_others)
        scores = expit(row / temperature)
        judged.temperatures.append(temperature)
        judged.thresholds.append(thresholds)
        labels, of_left_out, weights = left_out_scores(stock, fold, scores)
        judged.ece.append(calibration(labels, of_left_out, weights=weights)[3])
        judged.log_loss.append(log_loss(labels, of_left_out, weights))
        for shares in (judged.alarms, judged.found):
            for name, by_rate in shares.items():
                for rate, threshold in thresholds.items():
                    by_rate.setdefault(rate, []).append(float(np.mean(scores[stock.of([name])] >= threshold)))
    return judged


def left_out_scores(stock: Stock, fold: Fold, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and weights of the left-out images (n,): both classes count alike, and the data sets of a class.

    scores: (N,) of the stock's images."""
    real, fake = stock.of(fold.photographs), stock.of(fold.fakes)
    both = np.r_[real, fake]
    weights = np.r_[alike(stock.names[real]), alike(stock.names[fake])] / 2
    return stock.labels[both], scores[both], weights


def pooled_ece(stock: Stock, log_odds: Mapping[Fold, np.ndarray], judged: Mapping[Fold, Judged]) -> list[float]:
    """Of each run the ECE of the left-out images of all folds together, the folds alike.

    In a fold alone, a source that is easier or harder than most is a calibration error. Whoever judges pictures of many
    sources that they do not know meets this one.
    """
    errors = []
    for seed in range(len(next(iter(log_odds.values())))):
        parts = [
            left_out_scores(stock, fold, expit(rows[seed] / judged[fold].temperatures[seed]))
            for fold, rows in log_odds.items()
        ]
        labels, scores, weights = (np.concatenate(part) for part in zip(*parts))
        errors.append(calibration(labels, scores, weights=weights)[3])
    return errors


def mean_of_folds(judged: list[Judged]) -> tuple[list[float], tuple[float, float]]:
    """AUC of each run, the mean over folds, and the interval of their mean."""
    per_run = np.mean([one.auc for one in judged], axis=0).tolist()
    replicates = np.mean([one.replicates for one in judged], axis=0)
    return per_run, interval(float(np.mean(per_run)), replicates, min(one.size for one in judged))


def difference(first: list[Judged], second: list[Judged]) -> AucDifference:
    """Of the AUC of two detectors, mean over these folds, with the bootstrap's normal interval and p."""
    gain = float(np.mean([np.mean(a.auc) - np.mean(b.auc) for a, b in zip(first, second)]))
    replicates = np.mean([a.replicates - b.replicates for a, b in zip(first, second)], axis=0)
    error = float(np.std(replicates, ddof=1))
    if error < 1e-9:  # the same scores: the images cannot tell
        return AucDifference(gain, np.nan, np.nan, np.nan)
    reach = float(norm.ppf(0.975)) * error
    return AucDifference(gain, gain - reach, gain + reach, float(2 * norm.sf(abs(gain) / error)))


def paired(stock: Stock, fold: Fold, first: np.ndarray, second: np.ndarray) -> AucDifference:
    """DeLong's test of two detectors in a fold of one source and one collection. log odds (S, N), each."""
    both = stock.of(fold.left_out)
    return compare_aucs(stock.labels[both], first[:, both], second[:, both])
