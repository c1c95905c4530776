"""Scores of all comparisons to results: the metrics of each generator with their intervals, mean, spread and worst."""

import os
import zlib

import numpy as np

from evaluation.intervals import bootstrap_replicates, interval
from evaluation.metrics import METRIC_RANGE, METRICS, binary_metrics
from evaluation.protocol import TestSet


def summarize(test_set: TestSet, scores: np.ndarray, checkpoint: dict, bootstrap: int, seed: int) -> dict[str, dict]:
    """The metrics of each generator, with intervals if bootstrap > 0; and "Mean", "Std", "Worst"."""
    results, replicates = {}, {}
    threshold = checkpoint["val_threshold"]
    places, pool = order_reals(test_set, scores) if bootstrap else (None, 0)
    for generator, (labels, of_generator) in test_set.labels_and_scores(scores).items():
        row = binary_metrics(labels, of_generator, threshold)
        row["seen"] = f"fake/{generator}" in checkpoint["datasets"]
        if bootstrap:
            # The real images are resampled alike for all generators that stand against the same ones, the fakes of each
            # apart.
            stream, chosen = 1 + zlib.crc32(os.fsencode(generator)), test_set.comparisons[generator]
            replicates[generator] = bootstrap_replicates(
                labels, of_generator, threshold, bootstrap, seed, stream, places[chosen], pool
            )
            size = min(row["n_real"], row["n_fake"])
            row["intervals"] = {
                metric: interval(row[metric], replicates[generator][metric], size, top)
                for metric, top in METRIC_RANGE.items()
            }
        results[generator] = row
    rows = list(results.values())
    worst = min(results, key=lambda generator: results[generator]["auc"])
    mean = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
    if bootstrap:
        size = min(min(row["n_real"], row["n_fake"]) for row in rows)
        of_mean = {metric: np.mean([of[metric] for of in replicates.values()], axis=0) for metric in METRIC_RANGE}
        mean["intervals"] = {
            metric: interval(mean[metric], of_mean[metric], size, top) for metric, top in METRIC_RANGE.items()
        }
    results["Mean"] = mean
    results["Std"] = {
        metric: float(np.std([row[metric] for row in rows], ddof=1)) if len(rows) > 1 else 0.0 for metric in METRICS
    }
    results["Worst"] = {"generator": worst} | {metric: results[worst][metric] for metric in METRICS}
    return results


def order_reals(test_set: TestSet, scores: np.ndarray) -> tuple[np.ndarray, int]:
    """An order of the real images in which every generator stands against the first ones: the place of each sample
    (N,), 0 where it has none, and how many there are. It depends on scores, not on names."""
    times = np.bincount(np.concatenate(list(test_set.comparisons.values())), minlength=len(scores)) * (
        test_set.dataset.labels == 0
    )
    used = np.flatnonzero(times)
    places = np.zeros(len(scores), int)
    places[used[np.lexsort((scores[used], -times[used]))]] = np.arange(len(used))
    return places, len(used)
