"""Errors by group: false alarms and missed fakes by skin tone, age, or whatever a manifest says of its images; and at
each threshold of a checkpoint, false alarms by collection of photographs and fakes found by generator.
"""

import json

import numpy as np

from evaluation.metrics import roc_auc
from evaluation.operating import title_of
from evaluation.protocol import TestSet
from evaluation.typeset import as_markdown, as_text

DATA_SET = "dataset"  # a column that is always there
NOT_SAID = "(not said)"
FEW = 30  # images of a class, under which a rate says little
MOST_VALUES = 12  # of a column of numbers; one with more is cut into as many parts as PARTS, alike in images
PARTS = 5


def groups_of(test_set: TestSet, column: str) -> np.ndarray:
    """What a column says of each sample, (N,) str.

    Raises:
        ValueError: no sample has this column; the message names those that there are.
    """
    if column == DATA_SET:
        sizes = np.array(test_set.dataset.ends) - np.array(test_set.dataset.starts)
        return np.repeat(list(test_set.files), sizes)
    about = [json.loads(text) if text else {} for text in test_set.dataset.column("about")]
    if not any(column in row for row in about):
        known = sorted({name for row in about for name in row} | {DATA_SET})
        raise ValueError(
            f"--by {column}: no such column in these features; there are {', '.join(known)}. Columns come from"
            " feature_extraction.py --manifest"
        )
    return in_parts(np.array([str(row.get(column) or NOT_SAID) for row in about]))


def in_parts(values: np.ndarray) -> np.ndarray:
    """The values (N,), or, of numbers with many different ones, the range of each: "20 to 29"."""
    said = values != NOT_SAID
    try:
        numbers = values[said].astype(float)
    except ValueError:
        return values
    if not np.isfinite(numbers).all() or len(np.unique(numbers)) <= MOST_VALUES:
        return values
    inner = np.unique(np.quantile(numbers, np.linspace(0, 1, PARTS + 1)[1:-1]))
    part = np.searchsorted(inner, numbers, side="right")
    order = np.argsort(numbers, kind="stable")
    firsts = np.searchsorted(part[order], np.arange(part.max() + 1))
    lasts = np.append(firsts[1:], len(order)) - 1
    names = [f"{low} to {high}" for low, high in zip(values[said][order[firsts]], values[said][order[lasts]])]
    result = values.astype(object)
    result[said] = [names[k] for k in part]
    return result.astype(str)


def rate(hits: np.ndarray) -> dict[str, float] | None:
    """Share of True in (N,), with Wilson's 95 % interval; None of nothing."""
    if not len(hits):
        return None
    from scipy.stats import binomtest  # half a second, hence only here

    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"rate": float(hits.mean()), "low": float(low), "high": float(high)}


def errors_by(test_set: TestSet, scores: np.ndarray, groups: np.ndarray, threshold: float) -> dict[str, dict]:
    """{group: {"real", "fake": images; "false_alarms", "missed": rate at the threshold, or None; "auc", or None}}.

    Args:
        scores: (N,) of all samples, NaN of those that are not compared.
        groups: (N,) of groups_of.
    """
    labels, compared = test_set.dataset.labels, ~np.isnan(scores)
    found = {}
    for group in sorted(set(groups[compared]), key=in_order):
        of_group, truth = scores[compared & (groups == group)], labels[compared & (groups == group)]
        both = 0 < truth.sum() < len(truth)
        found[group] = {
            "real": int((truth == 0).sum()),
            "fake": int(truth.sum()),
            "false_alarms": rate(of_group[truth == 0] >= threshold),
            "missed": rate(of_group[truth == 1] < threshold),
            "auc": roc_auc(truth, of_group) if both else None,
        }
    return found


def in_order(group: str) -> tuple:
    """Numbers by size, then names, then those of which nothing is said."""
    first = group.split(" to ")[0]
    try:
        if np.isfinite(number := float(first)):
            return 0, number, group
    except ValueError:
        pass
    return 1 + (group == NOT_SAID), 0.0, group


def warn_of_few(errors: dict[str, dict], column: str) -> list[str]:
    few = [f"{group} ({row['real']} real, {row['fake']} fake)" for group, row in errors.items() if is_small(row)]
    return [f"--by {column}: too few images to say much, under {FEW} of a class: {', '.join(few)}"] if few else []


def is_small(row: dict) -> bool:
    return any(0 < row[kind] < FEW for kind in ("real", "fake"))


def group_table(errors: dict[str, dict], column: str, markdown: bool = False) -> str:
    heads = [f"by {column}", "real", "false alarms %", "fake", "missed %", "AUC"]
    rows = [
        [
            group,
            str(row["real"]),
            rate_cell(row["false_alarms"]),
            str(row["fake"]),
            rate_cell(row["missed"]),
            "" if row["auc"] is None else f"{row['auc']:.4f}",
        ]
        for group, row in errors.items()
    ]
    return (as_markdown if markdown else as_text)(heads, rows)


# ------------------------------------------------------------------------------------------------- at each threshold


def at_thresholds(test_set: TestSet, scores: np.ndarray, thresholds: dict[str, float]) -> dict[str, dict]:
    """What came of the thresholds of a checkpoint: {"thresholds": as given; "collections": {"real/FFHQ": {"n": images;
    "false_alarms": {name of the threshold: rate}}}; "generators": {"StyleGAN3": {"n"; "found": likewise}}}.

    Args:
        scores: (N,) of all samples, NaN of those that are not compared.
    """
    labels, data_sets = test_set.dataset.labels, groups_of(test_set, DATA_SET)
    compared = ~np.isnan(scores)

    def rates(chosen: np.ndarray, what: str) -> dict:
        above = {name: rate(scores[chosen] >= threshold) for name, threshold in thresholds.items()}
        return {"n": int(chosen.sum()), what: above}

    real = {name: compared & (data_sets == name) for name in test_set.files if name.startswith("real/")}
    fake = {
        name: np.isin(np.arange(len(labels)), chosen) & (labels == 1) for name, chosen in test_set.comparisons.items()
    }
    return {
        "thresholds": thresholds,
        "collections": {name: rates(chosen, "false_alarms") for name, chosen in real.items() if chosen.any()},
        "generators": {name: rates(chosen, "found") for name, chosen in fake.items()},
    }


def threshold_tables(operating: dict) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of two tables from at_thresholds, with Wilson's 95 % intervals in brackets: false alarms by
    collection, fakes found by generator."""
    by_threshold = [f"% at {threshold:.4f} ({title_of(name)})" for name, threshold in operating["thresholds"].items()]
    tables = []
    for part, prefix, title, kind, what in (
        ("collections", "", "false alarms by collection", "real", "false_alarms"),
        ("generators", "fake/", "fakes found by generator", "fake", "found"),
    ):
        rows = [
            [" ".join(f"{prefix}{name}".split()), str(row["n"]), *map(rate_cell, row[what].values())]
            for name, row in operating[part].items()
        ]
        tables.append(([title, kind, *by_threshold], rows))
    return tables


def rate_cell(rate: dict[str, float] | None) -> str:
    return "" if rate is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * rate[k] for k in ("rate", "low", "high")))
