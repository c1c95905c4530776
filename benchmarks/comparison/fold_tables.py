"""results.md and results.json of a comparison over folds; left_out.csv, its scores."""

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from benchmarks.comparison.detectors import MASKED, folder_of, others_of
from benchmarks.comparison.folds import Fold, Stock
from benchmarks.comparison.frozen import HEAD_ALONE, LAST_CLASS_TOKEN, PLAIN_HEAD, PROBE
from benchmarks.comparison.judge import Judged, difference, judge, mean_of_folds, pair_auc, paired, pooled_ece
from benchmarks.comparison.tables import images_table, section
from evaluation.intervals import AucDifference
from evaluation.masks import OWN, WRONG
from evaluation.operating import WORST, title_of
from evaluation.typeset import as_markdown
from runtime.files import replacing

PLAIN = "plain ViT"
CONTESTS = (
    (MASKED, PLAIN),
    (MASKED, PROBE),
    (HEAD_ALONE, PLAIN_HEAD),
    (HEAD_ALONE, LAST_CLASS_TOKEN),
    (PLAIN_HEAD, PROBE),
)  # whose differences are tested


class Results(NamedTuple):
    """All that the tables are made of."""

    args: argparse.Namespace
    stock: Stock
    folds: list[Fold]
    names: list[str]  # of the detectors, in the order of their columns
    log_odds: dict[tuple[Fold, str], np.ndarray]  # {(fold, detector): (S, N)}
    judged: dict[tuple[Fold, str], Judged]
    models: Path

    @property
    def kinds(self) -> dict[str, list[Fold]]:
        return {kind: [fold for fold in self.folds if fold.kind == kind] for kind in {f.kind: 0 for f in self.folds}}

    def of(self, folds: list[Fold], name: str) -> list[Judged]:
        return [self.judged[fold, name] for fold in folds]


def judge_all(
    args: argparse.Namespace,
    stock: Stock,
    folds: list[Fold],
    log_odds: dict[tuple[Fold, str], np.ndarray],
    models: Path,
) -> Results:
    names = list(dict.fromkeys(name for _, name in log_odds))
    judged = {
        (fold, name): judge(stock, fold, values, others_of(models, fold, name, len(values)))
        for (fold, name), values in log_odds.items()
    }
    return Results(args, stock, folds, names, log_odds, judged, models)


def write_tables(results: Results, sizes: dict, dropped: dict, command_line: str) -> dict:
    """results.md and results.json. Returns the latter."""
    summary: dict = {"data": {}, "folds": {}, "means": {}, "differences": {}, "masks": {}}
    parts = [images_table(sizes, dropped, summary)]
    for kind, folds in results.kinds.items():
        summary["folds"][kind] = {
            fold.name: {
                "fakes": fold.fakes,
                "photographs": fold.photographs,
                "detectors": {name: results.judged[fold, name].as_json() for name in results.names},
            }
            for fold in folds
        }
        parts.append(auc_table(results, kind, folds, summary))
        parts.append(known_table(results, kind, folds))
        parts.append(shares_table(results, kind, folds, "alarms", "photographs that are called fake"))
        parts.append(shares_table(results, kind, folds, "found", "fakes that are found"))
        parts.append(calibration_table(results, kind, folds, summary))
        parts += [differences_table(results, kind, folds, *names, summary) for names in contests(results)]
        if MASKED in results.names:
            parts.append(masks_table(results, kind, folds, summary))
    parts.append(f"`{command_line}`\n")
    text = "\n".join(parts)
    (results.args.output_dir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (results.args.output_dir / "results.md").write_text(text)
    write_left_out(results)
    print("\n" + text)
    return summary


def write_left_out(results: Results) -> None:
    """left_out.csv: a row for each left-out image of each fold, with what each detector says: the probability of a
    fake, and for each rate of false alarms whether that is a fake (1, 0); means over seeds.

    Whoever knows more about an image than its data set (an age, a size, a camera) can ask whose photographs are called
    fake.
    """
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(results.args.output_dir / "left_out.csv") as partial, open(partial, "w", **text) as file:
        lines = csv.writer(file)
        by_rate = rates(next(iter(results.judged.values())).thresholds[0])
        titles = ("probability", *(f"fake at {title_of(rate)}" for rate in by_rate))
        lines.writerow(["kind", "fold", "path", *(f"{name}: {title}" for name in results.names for title in titles)])
        for fold in results.folds:
            images = results.stock.of(fold.left_out)
            columns = []
            for name in results.names:
                judged, log_odds = results.judged[fold, name], results.log_odds[fold, name][:, images]
                scores = expit(log_odds / np.array(judged.temperatures)[:, None])  # (S, n)
                columns.append([f"{score:.6f}" for score in scores.mean(axis=0)])
                for rate in by_rate:
                    limits = np.array([thresholds[rate] for thresholds in judged.thresholds])
                    columns.append([f"{share:g}" for share in (scores >= limits[:, None]).mean(axis=0)])
            for image, *cells in zip(images, *columns):
                lines.writerow([fold.kind, fold.name, results.stock.paths[image], *cells])


def contests(results: Results) -> list[tuple[str, str]]:
    return [pair for pair in CONTESTS if set(pair) <= set(results.names)]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    of_seeds = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{of_seeds}"


def with_interval(values: list[float], interval: tuple[float, float]) -> str:
    return f"{spread(values)} [{interval[0]:.2f}, {interval[1]:.2f}]"


def auc_table(results: Results, kind: str, folds: list[Fold], summary: dict) -> str:
    rows = [
        [title_of_fold(results, fold), *(with_interval(one.auc, one.interval) for one in of_fold)]
        for fold in folds
        for of_fold in [[results.judged[fold, name] for name in results.names]]
    ]
    means, worst, summary["means"][kind] = [], [], {}
    for name in results.names:
        judged = results.of(folds, name)
        per_seed, interval = mean_of_folds(judged)
        lowest = min(range(len(folds)), key=lambda i: np.mean(judged[i].auc))
        means.append(with_interval(per_seed, interval))
        worst.append(f"{np.mean(judged[lowest].auc):.3f} ({folds[lowest].name})")
        summary["means"][kind][name] = {
            "auc": per_seed,
            "interval": interval,
            "worst": folds[lowest].name,
            "worst_auc": float(np.mean(judged[lowest].auc)),
        }
    rows += [["**mean of folds**", *means], ["**worst fold**", *worst]]
    return section(
        kind[0].upper() + kind[1:],
        "AUC of the left-out fakes against the left-out photographs: the mean over pairs of a source and a collection."
        f" ± is the standard deviation over {results.args.seeds} seeds; in brackets 95 % bootstrap intervals of the"
        " mean over these seeds: what other images would change. What is called a shortcut are linear models on what"
        " is not worth learning.",
        as_markdown(["left out", *results.names], rows),
    )


def title_of_fold(results: Results, fold: Fold) -> str:
    """With the numbers of images: "StyleGAN (1234 photographs, 2345 fakes)"."""
    real, fake = (len(results.stock.of(names)) for names in (fold.photographs, fold.fakes))
    return f"{fold.name} ({real} photographs, {fake} fakes)"


def known_table(results: Results, kind: str, folds: list[Fold]) -> str:
    def rows(value: Callable[[Judged], list[float]]) -> list[list[str]]:
        per_fold = [
            [fold.name, *(spread(value(results.judged[fold, name])) for name in results.names)] for fold in folds
        ]
        means = [np.mean([value(one) for one in results.of(folds, name)], axis=0) for name in results.names]
        return [*per_fold, ["**mean of folds**", *(spread(list(mean)) for mean in means)]]

    return section(
        f"{kind[0].upper()}{kind[1:]}: against photographs of known collections",
        "AUC of the left-out fakes against validation photographs of collections that training knew, mean over pairs.",
        as_markdown(["left out", *results.names], rows(lambda one: one.known)),
    )


def shares_table(results: Results, kind: str, folds: list[Fold], what: str, title: str) -> str:
    """Of each left-out data set the share above the thresholds, `what` being Judged's alarms or found."""
    rows = []
    for fold in folds:
        for name in getattr(results.judged[fold, results.names[0]], what):
            cells = []
            for detector in results.names:
                by_rate = getattr(results.judged[fold, detector], what)[name]
                cells.append(" / ".join(f"{100 * np.mean(by_rate[rate]):.1f}" for rate in rates(by_rate)))
            rows.append([f"{name} ({len(results.stock.of([name]))})", *cells])
    means = []
    for detector in results.names:
        of_sets = [by_rate for one in results.of(folds, detector) for by_rate in getattr(one, what).values()]
        shares = [np.mean([np.mean(by_rate[rate]) for by_rate in of_sets]) for rate in rates(of_sets[0])]
        means.append(" / ".join(f"{100 * share:.1f}" for share in shares))
    rows.append(["**mean**", *means])
    at = " and the ".join(title_of(rate) for rate in rates(results.judged[folds[0], results.names[0]].thresholds[0]))
    return section(
        f"{kind[0].upper()}{kind[1:]}: {title}",
        f"In %, of each left-out data set, at the {at} threshold of the fold: chosen on validation photographs of known"
        " collections so that no more of any of them are called fake. Those of a head alone are also bound by known"
        f" collections that are left out in turn: so many in the mean, {WORST} times as many of each. Mean over seeds.",
        as_markdown(["left out (images)", *results.names], rows),
    )


def rates(by_rate: dict) -> list[str]:
    """The higher one first: "0.05", "0.01"."""
    return sorted(by_rate, key=float, reverse=True)


def calibration_table(results: Results, kind: str, folds: list[Fold], summary: dict) -> str:
    def cell(one: Judged) -> str:
        return f"{np.mean(one.ece):.3f} / {np.mean(one.log_loss):.2f}"

    rows = [[fold.name, *(cell(results.judged[fold, name]) for name in results.names)] for fold in folds]
    means, together = [], []
    for name in results.names:
        judged = {fold: results.judged[fold, name] for fold in folds}
        ece, loss = (np.mean([np.mean(getattr(one, what)) for one in judged.values()]) for what in ("ece", "log_loss"))
        means.append(f"{ece:.3f} / {loss:.2f}")
        pooled = pooled_ece(results.stock, {fold: results.log_odds[fold, name] for fold in folds}, judged)
        together.append(spread(pooled))
        summary["means"][kind][name]["pooled_ece"] = pooled
    return section(
        f"{kind[0].upper()}{kind[1:]}: calibration",
        "Expected calibration error / log loss in nats on the left-out images, both classes weighted alike, and the"
        " data sets of a class, at the fold's temperature. Saying 0.5 of every image has 0 / 0.69. The last line is"
        " the expected calibration error of the images of all these folds together.",
        as_markdown(
            ["left out", *results.names], [*rows, ["**mean of folds**", *means], ["**all together**", *together]]
        ),
    )


def differences_table(results: Results, kind: str, folds: list[Fold], first: str, second: str, summary: dict) -> str:
    rows, kept = [], summary["differences"].setdefault(kind, {}).setdefault(f"{first} - {second}", {})
    for fold in [*folds, None]:
        of = folds if fold is None else [fold]
        gain, test = difference(results.of(of, first), results.of(of, second)), "bootstrap"
        if fold and len(fold.fakes) == len(fold.photographs) == 1:
            gain, test = (
                paired(results.stock, fold, results.log_odds[fold, first], results.log_odds[fold, second]),
                "DeLong",
            )
        a, b = (np.mean([one.auc for one in results.of(of, name)], axis=0) for name in (first, second))
        by_seed = (a - b).tolist() if len(a) == len(b) else (a - b.mean()).tolist()
        name = fold.name if fold else "mean of folds"
        kept[name] = as_finite(gain) | {"test": test, "by_seed": by_seed}
        seeds = ", ".join(f"{value:+.3f}" for value in by_seed)
        rows.append([name if fold else f"**{name}**", *shown(gain), test, seeds])
    return section(
        f"{kind[0].upper()}{kind[1:]}: {first} against {second}",
        "Difference of AUC on the same images, 95 % interval and p: DeLong's paired test where a fold is one source and"
        " one collection, else the bootstrap over images. What other images would change; seed by seed beside it.",
        as_markdown(["left out", f"AUC, {first} − {second}", "95 %", "p", "test", "by seed"], rows),
    )


def as_finite(gain: AucDifference) -> dict:
    """For JSON, which has no NaN."""
    return {name: value if np.isfinite(value) else None for name, value in gain._asdict().items()}


def shown(gain: AucDifference) -> list[str]:
    if not np.isfinite(gain.p_value):
        return [f"{gain.difference:+.3f}", "–", "–"]
    return [f"{gain.difference:+.3f}", f"[{gain.low:+.3f}, {gain.high:+.3f}]", f"{gain.p_value:.2g}"]


def masks_table(results: Results, kind: str, folds: list[Fold], summary: dict) -> str:
    per_fold = {fold.name: masks_of(results, fold) for fold in folds}
    summary["masks"][kind] = per_fold
    ways = [how for how in (OWN, *WRONG) if how in per_fold[folds[0].name]]
    means = {how: np.mean([of[how] for of in per_fold.values()], axis=0) for how in ways}
    rows = [
        [name, f"{of[OWN][1]:.3f}", *(f"{of[how][1]:.3f} ({of[how][0]:.3f})" for how in ways if how != OWN)]
        for name, of in [*per_fold.items(), ("**mean of folds**", means)]
    ]
    return section(
        f"{kind[0].upper()}{kind[1:]}: do the masks of {MASKED} count?",
        "AUC of the left-out images with their own region masks and with wrong ones; in brackets the mean change of a"
        " score. Mean over seeds.",
        as_markdown(["left out", *ways], rows),
    )


def masks_of(results: Results, fold: Fold) -> dict[str, tuple[float, float]]:
    """{evaluation.masks' names: the mean change of a score, AUC}, the mean over seeds."""
    stock, per_seed = results.stock, []
    real, fake, both = (stock.of(names) for names in (fold.photographs, fold.fakes, fold.left_out))
    for seed in range(results.args.seeds):
        with np.load(folder_of(results.models, fold, MASKED, seed) / "masks.npz") as kept:
            of_seed = {}
            for how in kept.files:
                scores = np.full(len(stock.labels), np.nan)
                scores[both] = kept[how]
                change = float(np.mean(np.abs(kept[how] - kept[OWN])))
                of_seed[how] = change, pair_auc(stock, scores, real, fake)
            per_seed.append(of_seed)
    return {how: tuple(np.mean([of[how] for of in per_seed], axis=0).tolist()) for how in per_seed[0]}
