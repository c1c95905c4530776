"""Operating points: calibrated scores, thresholds for a rate of false alarms, and the verdicts that follow.

    fit_temperature       by what to divide the logits, so that at equal counts 0.9 means nine in ten
    choose_thresholds     for each rate of false alarms a threshold
    judge_left_out        how data sets fared that a model has not seen
    verdict_of            fake, real or uncertain

train.py chooses both, on validation or on data sets left out in turn (training/probe.py), and puts them into
best_model.pth: `temperature`, which is already in the weights of the head, and `thresholds`, {"0.01": t, "0.05": t}, of
the calibrated scores. Scores are probabilities of a fake in [0, 1]; a score at a threshold is above it. Labels are 1 =
fake, 0 = real.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from evaluation.metrics import roc_auc

RATES = (0.01, 0.05)  # of false alarms, for which a checkpoint has thresholds
TEMPERATURES = (0.05, 20.0)
WORST = 4  # times the rate are false alarms of a single collection that a model has not seen, at the most
# Between the highest score of a photograph and a threshold above it: more than rounding makes of a score elsewhere
MARGIN = 1e-5
ON_VALIDATION = "validation"  # stands in the place of a rate where a checkpoint has val_threshold alone
FAKE, REAL, UNCERTAIN = VERDICTS = ("fake", "real", "uncertain")


# ---------------------------------------------------------------------------------------------------------- calibration


def fit_temperature(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature T of the least log loss of logits / T (Guo et al., ICML 2017), within TEMPERATURES.

    Both classes weigh the same, whatever their counts. The targets are Platt's (1999), (n + 1) / (n + 2) for a class of
    n images in place of 1: so few images that a model separates perfectly do not make it certain.

    Args:
        labels: (N,), both classes present.
        logits: (N,) log odds of a fake, that is logit 1 - logit 0; finite.
        weights: (N,) how much each image counts within its class, positive (default: all alike).
    """
    weights = np.ones(len(labels)) if weights is None else weights
    # Margins: positive on the right side
    classes = [(sign * logits[labels == one], weights[labels == one]) for one, sign in ((1, 1), (0, -1))]

    def loss(log_temperature: float) -> float:
        total = 0.0
        for margins, weight in classes:
            scaled, target = margins / np.exp(log_temperature), (len(margins) + 1) / (len(margins) + 2)
            total += float(np.average(np.logaddexp(0, -scaled) + (1 - target) * scaled, weights=weight))
        return total

    from scipy.optimize import minimize_scalar  # takes a while, and few who read thresholds need it

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fold_temperature(weights: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The weights of a model whose logits are divided by the temperature, in its head. The given ones stay."""
    return dict(weights) | {name: weights[name] / temperature for name in ("head.weight", "head.bias")}


# ----------------------------------------------------------------------------------------------------------- thresholds


def allowed_alarms(count: int, rate: float) -> int:
    """How many of `count` photographs may be at or above a threshold for this rate; -1: too few to say.

    One less than rate · (count + 1): then a further photograph like these is above it with a probability of `rate` at
    the most (split conformal prediction, Vovk et al. 2005), where rate · count would be half an image too many.
    """
    return int(rate * (count + 1) + 1e-9) - 1  # 0.29 · 100 is a little less than 29


def threshold_for(scores: np.ndarray, rate: float) -> float:
    """The lowest threshold, in the middle between two scores, that no more than allowed_alarms of the scores (N,), N >
    0, reach.

    Where none may reach it, it is MARGIN above the highest one. Where there are too few to say, it is half way from the
    highest one to 1, which is a convention: that many images bound no such rate. Above 1 if they have scores of 1.
    """
    alarms = allowed_alarms(len(scores), rate)
    highest = np.sort(scores)[::-1][max(alarms, 0)]  # of those that have to stay below
    return threshold_above(highest, scores, np.inf if alarms < 0 else MARGIN)


def threshold_above(highest: float, scores: np.ndarray, margin: float) -> float:
    """In the middle between `highest` and the next of the scores (N,) above it; where there is none, no more than
    `margin` above it and no nearer to 1."""
    above = scores[scores > highest]
    step = (above.min() - highest) / 2 if len(above) else min((1 - highest) / 2, margin)
    return float(max(highest + step, np.nextafter(highest, 2)))


def threshold_for_others(left_out: Sequence[np.ndarray], rate: float) -> float:
    """The lowest threshold that no more than this share of the photographs reach, in the mean over collections, and of
    each collection no more than WORST times this share.

    Args:
        left_out: of each collection the scores (N,) of a model that has seen nothing of it. Each counts alike: the next
            one may be like any of them, whatever their sizes. One of which WORST times the rate is not an image counts
            in the mean alone.
    """
    scores = np.concatenate(left_out)
    order = np.argsort(scores)[::-1]
    shares = np.cumsum(np.concatenate([np.full(len(one), 1 / len(one)) for one in left_out])[order]) / len(left_out)
    scores = scores[order]
    too_many = np.flatnonzero(shares > rate + 1e-9)  # with the first of these, or one that ties with it
    stay_below = [scores[too_many[0]]] if len(too_many) else []
    for one in left_out:
        alarms = int(WORST * rate * len(one) + 1e-9)
        if 0 < alarms < len(one):
            stay_below.append(np.sort(one)[-1 - alarms])
    return threshold_above(max(stay_below), scores, MARGIN) if stay_below else float(scores[-1])


def choose_thresholds(
    real: Mapping[str, np.ndarray], rates: Sequence[float] = RATES, left_out: Sequence[np.ndarray] = ()
) -> dict[str, float]:
    """{"0.01": threshold, ...}: so that of the photographs of every collection no more than this share is called fake.

    The worst collection has its say: of the threshold for all of them together and that of each collection by itself
    the highest is taken. A collection with too few images for a rate counts in the pool alone. The threshold of a lower
    rate is never below that of a higher one.

    Args:
        real: {collection: scores of its photographs}, of validation; at least one photograph in all.
        rates: 0-1.
        left_out: of two collections or more, as for threshold_for_others: then no threshold is below that one either.
    """
    pool = np.concatenate(list(real.values()))
    thresholds, lowest = {}, 0.0
    for rate in sorted(rates, reverse=True):
        alone = [scores for scores in real.values() if allowed_alarms(len(scores), rate) >= 0]
        lowest = max(lowest, *(threshold_for(scores, rate) for scores in (pool, *alone)))
        if len(left_out) > 1:
            lowest = max(lowest, threshold_for_others(left_out, rate))
        thresholds[f"{rate:g}"] = lowest
    return {f"{rate:g}": thresholds[f"{rate:g}"] for rate in rates}


def operating_points(
    labels: np.ndarray,
    log_odds: np.ndarray,
    real: Mapping[str, Any],
    others: Sequence[tuple[int, np.ndarray]] = (),
) -> tuple[float, dict[str, float]]:
    """The temperature of a model, and the thresholds of the scores that it calibrates.

    Args:
        labels, log_odds: (N,) of validation.
        real: {collection: the index of its photographs in these}.
        others: of each data set that was left out its label, and the log odds (n,) of its images by a model that has
            not seen it. If there are some of both classes, they set the temperature instead of validation: what it is
            for sources that a model does not know. Each data set counts alike: the next one may be like any of them.
    """
    if {label for label, _ in others} == {0, 1}:
        of_others = np.concatenate([np.full(len(values), label) for label, values in others])
        weights = np.concatenate([np.full(len(values), 1 / len(values)) for _, values in others])
        temperature = fit_temperature(of_others, np.concatenate([values for _, values in others]), weights)
    else:
        temperature = fit_temperature(labels, log_odds)
    scores = expit(log_odds / temperature)
    left_out = [expit(values / temperature) for label, values in others if label == 0]
    return temperature, choose_thresholds({name: scores[where] for name, where in real.items()}, left_out=left_out)


def judge_left_out(
    others: Mapping[str, tuple[int, np.ndarray]], temperature: float, thresholds: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """How a model did on data sets that were left out.

    Args:
        others: {data set: its label, and the log odds (n,) of its images by a model that has not seen it}, finite, of
            both classes, none of them empty.
        temperature, thresholds: as of operating_points.

    Returns:
        {data set: "images"; "auc", the mean over the data sets of the other class; and for each rate of the
        thresholds, "0.05", the share of the images that are called fake}.
    """
    found = {}
    for name, (label, values) in others.items():
        pairs = [(values, theirs) if label else (theirs, values) for other, theirs in others.values() if other != label]
        aucs = [roc_auc(np.repeat([1, 0], [len(fake), len(real)]), np.r_[fake, real]) for fake, real in pairs]
        scores = expit(values / temperature)
        shares = {rate: float(np.mean(scores >= threshold)) for rate, threshold in thresholds.items()}
        found[name] = {"images": len(values), "auc": float(np.mean(aucs))} | shares
    return found


# ------------------------------------------------------------------------------------------------------------- verdicts


def thresholds_of(checkpoint: Mapping[str, Any], rate: float | None, path: Path) -> dict[str, float]:
    """By what a checkpoint judges: its thresholds by rate; the one of a rate, if that is given; {ON_VALIDATION:
    val_threshold} where it is of before there were any.

    Raises:
        ValueError: no threshold for this rate; the message names those that there are, and the checkpoint's path.
    """
    there = checkpoint.get("thresholds") or {}
    if rate is None:
        return dict(there) or {ON_VALIDATION: float(checkpoint["val_threshold"])}
    if not there:
        raise ValueError(f"--fpr {rate:g}: {path} has no such thresholds; leave it away, or train again")
    chosen = {name: threshold for name, threshold in there.items() if float(name) == rate}
    if not chosen:
        raise ValueError(f"--fpr {rate:g}: {path} has thresholds for {' and '.join(there)}; take one of these")
    return chosen


def verdict_of(score: float, thresholds: Mapping[str, float]) -> str:
    """One of VERDICTS: fake from the highest threshold on, real below the lowest, uncertain between."""
    if score >= max(thresholds.values()):
        return FAKE
    return UNCERTAIN if score >= min(thresholds.values()) else REAL


def describe_thresholds(thresholds: Mapping[str, float]) -> str:
    """Such as "fake from 0.9312 on, real below 0.6120"."""
    high, low = max(thresholds.values()), min(thresholds.values())
    return f"fake from {high:.4f} on" + (f", real below {low:.4f}" if low < high else "")


def describe_verdict(verdict: str, thresholds: Mapping[str, float]) -> str:
    """Its range of probabilities, such as "real below 0.6120"."""
    high, low = max(thresholds.values()), min(thresholds.values())
    ranges = {FAKE: f"from {high:.4f} on", REAL: f"below {low:.4f}", UNCERTAIN: f"from {low:.4f} to {high:.4f}"}
    return f"{verdict} {ranges[verdict]}"


def why_apart(thresholds: Mapping[str, float]) -> str:
    """Why a face may be called real at 0.74, in a sentence; "" where the threshold was chosen on both classes."""
    if ON_VALIDATION in thresholds:
        return ""
    return (
        "A verdict and its probability may seem to disagree: the thresholds are chosen on the collection of photographs"
        " with the most false alarms, the probability is calibrated on both classes alike."
    )


def describe_rates(thresholds: Mapping[str, float]) -> str:
    """Where they come from, such as "1 % and 5 % of false alarms, chosen in training"."""
    if ON_VALIDATION in thresholds:
        return "the threshold chosen on validation"
    return f"{' and '.join(title_of(name) for name in thresholds)} of false alarms, chosen in training"


def title_of(name: str) -> str:
    """A key of the thresholds, for people: "1 %"."""
    return name if name == ON_VALIDATION else f"{100 * float(name):g} %"
