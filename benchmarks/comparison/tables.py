"""results.md and results.json of a comparison."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.comparison.images import EQUALISED, REASONS, TREATMENTS, features_of
from benchmarks.comparison.jobs import MAIN
from benchmarks.comparison.probes import LIKE_CHANCE, REAL_SIZES
from benchmarks.comparison.scores import masks_of_models, read_scores
from benchmarks.comparison.variants import heads, row
from evaluation.intervals import auc_replicates, compare_aucs, interval, win_matrix
from evaluation.typeset import as_markdown
from samples.feature_files import SPLITS

RESAMPLES = 2000


class Comparison(NamedTuple):
    """All that the tables are made of."""

    args: argparse.Namespace
    sizes: dict[str, tuple[int, int, int]]  # {data set: images in train, val, test}
    dropped: dict[str, Counter]  # {data set: how many images were left out for which reason}
    probes: dict[str, dict]  # {treatment: probes.probe}
    folders: dict[tuple[str, str], list[Path]]  # {(treatment, variant): folder of each seed}
    results: dict[tuple[str, str], list[dict]]  # the same: inference.py's results
    scores: dict[tuple[str, str], tuple[dict, int]]  # the same: scores.read_scores

    @property
    def unseen(self) -> list[str]:
        names = [name.split("/")[1] for name in self.sizes if name.startswith("fake/")]
        return sorted(set(names) - set(self.args.train_on))

    @property
    def titles(self) -> dict[str, str]:
        """{generator: head of its column}, those that training saw first."""
        return {name: f"{name} (seen)" for name in self.args.train_on} | {name: name for name in self.unseen}


def write_tables(
    args: argparse.Namespace, sizes: dict, dropped: dict, probes: dict, jobs: list, results: dict, options: list[str]
) -> dict:
    """results.md and results.json. Returns the latter."""
    folders = {key: [folder for *of, _, folder in jobs if tuple(of) == key] for key in results}
    scores = {key: read_scores(of) for key, of in folders.items()}
    comparison = Comparison(args, sizes, dropped, probes, folders, results, scores)
    summary: dict = {"data": {}, "probes": probes, "detectors": {}, "comparison": {}}
    parts = [
        images_table(sizes, dropped, summary),
        shortcuts_table(comparison),
        detectors_table(comparison, summary),
        all_metrics_table(comparison),
        masks_table(comparison, summary),
        paired_table(comparison, summary),
        f"`{command_line(args, options)}`\n",
    ]
    text = "\n".join(parts)
    (args.output_dir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.output_dir / "results.md").write_text(text)
    print("\n" + text)
    return summary


def section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *paragraphs]) + "\n"


def images_table(sizes: dict[str, tuple[int, int, int]], dropped: dict[str, Counter], summary: dict) -> str:
    rows = []
    for data_set, split in sizes.items():
        counts = dropped[data_set]
        summary["data"][data_set] = {"dropped": dict(counts), **dict(zip(SPLITS, split))}
        total = sum(counts.values()) + sum(split)
        rows.append([data_set, str(total), *(str(counts[reason]) for reason in REASONS), *map(str, split)])
    return section("Images", as_markdown(["", "given", *REASONS.values(), *SPLITS], rows))


def shortcuts_table(comparison: Comparison) -> str:
    low, high = LIKE_CHANCE
    titles, probes = comparison.titles, comparison.probes

    def shown(auc: float | None) -> str:
        return "–" if auc is None else f"{auc:.3f}" if low <= auc <= high else f"**{auc:.3f}**"

    rows = [
        [f"{name}, {treatment}", *(shown(aucs[column]) for column in (*titles, REAL_SIZES))]
        for treatment in TREATMENTS
        for name, aucs in probes[treatment].items()
    ]
    by_chance_alone = ", ".join(f"±{by_chance(comparison.sizes, generator):.2f} ({generator})" for generator in titles)
    return section(
        "Shortcuts",
        f"AUC of logistic regressions on what is not worth learning; **bold** beyond {low:.2f}–{high:.2f}. "
        f"A probe's 95 % interval by chance alone: {by_chance_alone}.",
        f"“{REAL_SIZES}”: the same scores between photographs published with more pixels than most and the others.",
        as_markdown(["probe", *titles.values(), REAL_SIZES], rows),
    )


def detectors_table(comparison: Comparison, summary: dict) -> str:
    rows = []
    for (treatment, name), runs in comparison.results.items():
        by_generator, pool = comparison.scores[treatment, name]
        cells, replicates, means, smallest = [], {}, {}, sys.maxsize
        for stream, generator in enumerate(comparison.titles, 1):
            wins = win_matrix(*by_generator[generator])
            replicates[generator] = auc_replicates(wins, RESAMPLES, 0, stream, pool)
            means[generator] = [one[generator]["auc"] for one in runs]
            smallest = min(smallest, *wins.shape) if generator in comparison.unseen else smallest
            cells.append(with_interval(means[generator], replicates[generator], min(wins.shape)))
        per_seed = np.mean([means[generator] for generator in comparison.unseen], axis=0)
        of_mean = np.mean([replicates[generator] for generator in comparison.unseen], axis=0)
        cells.append(with_interval(per_seed, of_mean, smallest))
        summary["detectors"].setdefault(treatment, {})[name] = means | {"unseen": list(map(float, per_seed))}
        rows.append([f"{name}, {treatment}", *cells])
    return section(
        "Detectors",
        f"AUC, mean ± standard deviation over {comparison.args.seeds} seeds; in brackets 95 % bootstrap intervals of"
        " the mean over these seeds: what other images would change.",
        as_markdown(["", *comparison.titles.values(), "mean of unseen"], rows),
    )


def all_metrics_table(comparison: Comparison) -> str:
    rows = []
    for (treatment, name), runs in comparison.results.items():
        model = torch.load(
            comparison.folders[treatment, name][0] / "best_model.pth", map_location="cpu", weights_only=True
        )
        parameters = sum(values.numel() for values in model["model"].values())
        rows.append(row(f"{name}, {treatment}", runs, list(comparison.args.train_on), comparison.unseen, parameters))
    about = (
        "The same runs, all metrics; mean ± standard deviation over seeds of the mean over generators. ACC is at 0.5."
    )
    return f"{about}\n\n{as_markdown(heads('generators seen', 'unseen'), rows)}\n"


def masks_table(comparison: Comparison, summary: dict) -> str:
    models = {name: folders for (of, name), folders in comparison.folders.items() if of == EQUALISED}
    summary["masks"], table = masks_of_models(features_of(comparison.args, EQUALISED), models)
    return section(
        "Do the masks count?",
        "Each test image with its own region masks and with wrong ones: those of another face, drawn at random, none,"
        " and its own exchanged or moved down; equalised images, mean over generators and seeds.",
        table,
    )


def paired_table(comparison: Comparison, summary: dict) -> str:
    rows = []
    for generator, title in comparison.titles.items():
        (labels, first), (_, second) = (comparison.scores[EQUALISED, name][0][generator] for name in MAIN)
        gain = compare_aucs(labels, first, second)
        pairs = zip(*(comparison.results[EQUALISED, name] for name in MAIN))
        by_seed = [a[generator]["auc"] - b[generator]["auc"] for a, b in pairs]
        finite = {name: value if np.isfinite(value) else None for name, value in gain._asdict().items()}
        summary["comparison"][generator] = finite | {"by_seed": by_seed}
        between, p_value = "–", "–"
        if np.isfinite(gain.p_value):
            between, p_value = f"[{gain.low:+.3f}, {gain.high:+.3f}]", f"{gain.p_value:.2g}"
        seeds = ", ".join(f"{value:+.3f}" for value in by_seed)
        rows.append([title, f"{gain.difference:+.3f}", between, p_value, seeds])
    return section(
        "LAMM-ViT against a plain ViT",
        "Same width, depth, data, budget and seeds; equalised images. Difference of AUC, 95 % interval and p by"
        " DeLong's paired test on the\nimages' win rates over all seeds: what other test images would change. The"
        " differences seed by seed stand beside it.",
        as_markdown(["generator", "AUC, LAMM-ViT − plain ViT", "95 %", "p", "by seed"], rows),
    )


def by_chance(sizes: dict, generator: str) -> float:
    """1.96 standard deviations of the AUC of scores that know nothing (Mann and Whitney's)."""
    n_real, n_fake = (
        sum(of[2] for name, of in sizes.items() if name.startswith("real/")),
        sizes[f"fake/{generator}"][2],
    )
    return 1.96 * np.sqrt((n_real + n_fake + 1) / (12 * n_real * n_fake)) if n_real and n_fake else np.nan


def with_interval(values: list[float], replicates: np.ndarray, size: int) -> str:
    low, high = interval(float(np.mean(values)), replicates, size)
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread} [{low:.2f}, {high:.2f}]"


def command_line(args: argparse.Namespace, options: list[str]) -> str:
    return (
        f"python benchmarks/real_faces.py --data_root {args.data_root} --train_on {' '.join(args.train_on)} --align"
        f" {args.align:g} --img_size {args.img_size} --patch_size {args.patch_size} --seeds {args.seeds}"
        f"{' --main_only' * args.main_only}{' --without_raw' * args.without_raw}; train.py {' '.join(options)}"
    )
