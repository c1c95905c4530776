"""Metrics of real-against-fake comparisons: accuracy, AP, AUC, EER, TPR at low FPR, the threshold, calibration.

    binary_metrics        the figures of one comparison
    choose_threshold      the threshold for accuracy_val_threshold, from validation scores
    calibration           reliability diagram and expected calibration error
    roc_auc, roc_curve    scikit-learn's, which takes a second to import: not before it is needed

How sure they are: intervals.py. Everywhere labels (N,) are 1 = fake, 0 = real, both classes present, and scores (N,)
probabilities of a fake in [0, 1].
"""

import numpy as np

# The metrics with an interval, and the largest value that each can have. The smallest is 0.
METRIC_RANGE = {
    "accuracy": 100.0,
    "accuracy_val_threshold": 100.0,
    "real_accuracy": 100.0,
    "fake_accuracy": 100.0,
    "ap": 1.0,
    "auc": 1.0,
    "eer": 1.0,
    "tpr_at_fpr1": 100.0,
    "tpr_at_fpr5": 100.0,
    "tpr_at_fpr10": 100.0,
}
# The others: resamples of images are always less calibrated than these, and one image may cost any log loss.
METRICS = (*METRIC_RANGE, "ece", "log_loss")
FALSE_POSITIVE_RATES = {"tpr_at_fpr1": 0.01, "tpr_at_fpr5": 0.05, "tpr_at_fpr10": 0.1}
SMALLEST_PROBABILITY = 1e-12  # in the log loss


def binary_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Metrics of one real-against-fake comparison. labels (N,) 1 = fake, both classes present; scores (N,) in [0, 1].

    accuracy is in percent at 0.5, and so are real_accuracy and fake_accuracy, its two halves; accuracy_val_threshold is
    at the threshold that was chosen on validation. ap, auc and eer are in 0-1. eer, the equal error rate, is where the
    ROC curve, straight between its points, crosses false positive rate = 1 - true positive rate. tpr_at_fpr1, 5 and 10,
    in percent, are the share of fakes that are found where no more than 1, 5, 10 % of these real images are called
    fake. ece is calibration's, 0-1; log_loss is in nats, the mean over the images.
    """
    from sklearn.metrics import average_precision_score

    predicted = scores >= 0.5
    false_positive, true_positive, _ = roc_curve(labels, scores)
    return {
        "accuracy": 100 * float(np.mean(predicted == labels)),
        "accuracy_val_threshold": 100 * float(np.mean((scores >= threshold) == labels)),
        "real_accuracy": 100 * float(np.mean(~predicted[labels == 0])),
        "fake_accuracy": 100 * float(np.mean(predicted[labels == 1])),
        "ap": float(average_precision_score(labels, scores)),
        "auc": roc_auc(labels, scores),
        "eer": equal_error_rate(false_positive, true_positive),
        **{name: 100 * tpr_at_fpr(false_positive, true_positive, rate) for name, rate in FALSE_POSITIVE_RATES.items()},
        "ece": calibration(labels, scores)[3],
        "log_loss": log_loss(labels, scores),
        "n_real": int(np.sum(labels == 0)),
        "n_fake": int(np.sum(labels == 1)),
    }


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve, 0-1."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False and true positive rates and the thresholds, (T,) each, of all thresholds."""
    from sklearn.metrics import roc_curve as curve_of

    return curve_of(labels, scores, drop_intermediate=False)


def equal_error_rate(false_positive: np.ndarray, true_positive: np.ndarray) -> float:
    """The equal error rate, 0-1, of roc_curve's rates (T,)."""
    excess = false_positive + true_positive - 1  # rises from -1 to 1; 0 where the two errors are equal
    after = int(np.argmax(excess >= 0))
    share = -excess[after - 1] / (excess[after] - excess[after - 1])
    return float(false_positive[after - 1] + share * (false_positive[after] - false_positive[after - 1]))


def tpr_at_fpr(false_positive: np.ndarray, true_positive: np.ndarray, rate: float) -> float:
    """The largest true positive rate, 0-1, of roc_curve's rates (T,), where the false positive rate is no more than
    `rate`.

    Nothing is interpolated between two thresholds. With fewer than 1 / rate real images that means: above all of them.
    """
    return float(true_positive[false_positive <= rate + 1e-12].max())


def log_loss(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean of -log(probability of the image's class), in nats. labels (N,), scores (N,) in [0, 1]; weights (N,):
    how much each image counts, all alike if None.
    """
    right = np.where(labels == 1, scores, 1 - scores)
    losses = -np.log(right.clip(min=SMALLEST_PROBABILITY))
    return float(losses.mean() if weights is None else np.average(losses, weights=weights))


def choose_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold of the best balanced accuracy, in the middle between the two scores that it separates.

    For validation scores only: chosen on test, it would make the test's accuracy too good.
    """
    false_positive, true_positive, thresholds = roc_curve(labels, scores)
    best = thresholds[np.argmax(true_positive - false_positive)]
    below = scores[scores < best]
    if not np.isfinite(best):  # no threshold is better than calling everything real
        return float(np.nextafter(scores.max(), 2))
    return float((best + below.max()) / 2) if len(below) else float(best)


def calibration(
    labels: np.ndarray, scores: np.ndarray, bins: int = 10, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A reliability diagram, and the expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017).

    Are of the images with a score around 0.7 seven in ten fakes? Right for this mix of classes alone: at equal counts a
    calibrated score is no probability where fakes are rare.

    Args:
        labels, scores: (N,) each; one class alone will do.
        bins: of equal width over [0, 1]; a score on an edge is in the upper one, 1 in the last.
        weights: (N,) how much each image counts, all alike if None.

    Returns:
        mean_score: (bins,), NaN where a bin is empty.
        fake_fraction: (bins,) 0-1, NaN where a bin is empty.
        counts: (bins,) int; with weights, their sums.
        ece: 0-1, the mean of |mean_score - fake_fraction| over the images.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    # Edges by division, as one would write them: 0.3 * 10 and 3 / 10 differ in the last digit.
    which = np.searchsorted(np.arange(1, bins) / bins, scores, side="right")
    counts = np.bincount(which, weights, bins)
    filled = np.where(counts, counts, 1)
    weights = np.ones(len(scores)) if weights is None else weights
    mean_score = np.where(counts, np.bincount(which, weights * scores, bins) / filled, np.nan)
    fake_fraction = np.where(counts, np.bincount(which, weights * labels, bins) / filled, np.nan)
    ece = float(np.nansum(counts * np.abs(mean_score - fake_fraction)) / weights.sum())
    return mean_score, fake_fraction, counts, ece
