"""The pictures that train.py leaves behind, training_curves.png and lamm_weights.png, and the charts of an evaluation:
those of evaluation/report.py, as SVG for an HTML page, and robustness_curves."""

import html
import re
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from faces.regions import REGIONS

# of model.py, in order
HEADS = (*(name.replace("_", " ") for name in REGIONS), "eyes, brows", "mouth", "nose, outline", "all regions")
TRAIN, VAL, NEUTRAL = "#b5541c", "#1f5f99", "#555555"
STYLE = {"dpi": 150, "facecolor": "white"}

# Of the charts below. In SVG, INK becomes currentColor: the page's text colour, light or dark.
INK = "#010203"
# At least 3.4 : 1 against white and against the dark page, and apart for the colour-blind too (after Okabe and Ito).
SERIES = ("#1f7fc4", "#d55e00", "#009e73", "#b8609f", "#9c7a00")
# on, off, ... in line widths
DASHES = ((), (5, 1.5), (6, 1.5, 1.2, 1.5), (1.5, 1.5), (9, 2), (5, 1.5, 1.2, 1.5, 1.2, 1.5))
REAL, FAKE = SERIES[:2]
MEAN_STYLE = {"color": INK, "linestyle": "-", "linewidth": 2.6}
CHART_STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}
SCORE_BINS = np.linspace(0, 1, 27)  # an even number: 0.5 is an edge, and no bar stands on both of its sides
CHART_SIZE = (3.5, 2.9)  # inches; a column of a page, or a phone
AXIS_LABELS = {
    "jpeg": "JPEG quality",
    "blur": "blur, σ in px",
    "noise": "noise, σ of range 0–1",
    "resize": "resize, factor",
}
CLEAN = {"jpeg": "clean", "blur": "0", "noise": "0", "resize": "1"}  # the clean images, in the words of each axis


def training_curves(log: list[dict[str, float]], path: Path) -> None:
    """Losses, validation AUC and learning rate by epoch, from the lines of log.jsonl."""
    epochs = [line["epoch"] for line in log]
    best = max(log, key=lambda line: line["val_auc"])  # the first of equals, as train.py keeps it
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, auc, rate = figure.subplots(1, 3)
    marker = "o" if len(log) < 12 else None
    loss.plot(epochs, [line["train_ce"] for line in log], color=TRAIN, marker=marker, ms=3, label="training")
    loss.plot(epochs, [line["val_loss"] for line in log], color=VAL, marker=marker, ms=3, label="validation")
    loss.axhline(np.log(2), color=NEUTRAL, lw=0.8, ls=":", label="chance")
    loss.set_ylim(bottom=0)
    loss.set_title("Cross entropy", loc="left")
    auc.plot(epochs, [line["val_auc"] for line in log], color=VAL, marker=marker, ms=3)
    auc.plot(
        best["epoch"],
        best["val_auc"],
        "o",
        color=VAL,
        mfc="white",
        ms=7,
        label=f"best: {best['val_auc']:.4f}, epoch {best['epoch']}",
    )
    auc.axhline(0.5, color=NEUTRAL, lw=0.8, ls=":", label="chance")
    auc.set_ylim(min(0.45, min(line["val_auc"] for line in log) - 0.02), 1.01)
    auc.set_title("Validation AUC", loc="left")
    rate.plot(epochs, [line["lr"] for line in log], color=NEUTRAL, marker=marker, ms=3)
    if min(line["lr"] for line in log) > 0:
        rate.set_yscale("log")
    rate.set_title("Learning rate", loc="left")
    for axes in (loss, auc, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, auc):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, **STYLE)


def lamm_weights(weights: np.ndarray, path: Path) -> None:
    """weights (L, H): w of each head at each layer, as LAMM sets it, in the mean over images."""
    layers, heads = weights.shape
    figure = Figure(figsize=(9, 2.6 + 0.36 * layers), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(weights, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(heads), HEADS, rotation=35, ha="right")
    axes.set_yticks(range(layers), range(1, layers + 1))
    axes.set_ylabel("layer")
    axes.set_title(
        "How strongly LAMM weights each head (region), mean over the validation images", loc="left", fontsize=11
    )
    axes.axvline(len(REGIONS) - 0.5, color="white", lw=2)  # one region a head | mixtures
    for layer, row in enumerate(weights):
        for head, value in enumerate(row):
            light = value > 0.6 * weights.max()
            axes.text(
                head, layer, f"{value:.3f}", ha="center", va="center", fontsize=7, color="black" if light else "white"
            )
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, label="w", pad=0.01)
    figure.savefig(path, **STYLE)


# ---------------------------------------------------------------------------------------------- charts of an evaluation


def line_style(i: int) -> dict:
    """Colour and dashes of the i-th line; 5 and 6 have no common divisor, so 30 lines all differ, and neighbours in
    both.
    """
    dashes = DASHES[i % len(DASHES)]
    return {"color": SERIES[i % len(SERIES)], "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.5}


def as_svg(figure: Figure, prefix: str, label: str) -> str:
    """A chart as an <svg> to stand inside an HTML page: as wide as it is given room, in the page's text colour and
    font.

    Args:
        prefix: of its ids, to keep those of several charts on a page apart.
        label: what is read aloud in the chart's place.
    """
    file = StringIO()
    with matplotlib.rc_context(CHART_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)[0]
    text = text[text.index(">", text.index("<svg")) + 1 :]
    # the page says what the style would
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)  # hundredths of a point are enough
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    text = (
        re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text).replace("xlink:href", "href").replace(INK, "currentColor")
    )
    return f'<svg {view} role="img" aria-label="{html.escape(label)}">{" ".join(text.split())}'


def chart(size: tuple[float, float] = CHART_SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


@matplotlib.rc_context(CHART_STYLE)
def roc_and_pr_charts(comparisons: list[tuple[np.ndarray, np.ndarray]], first: int = 0) -> tuple[Figure, Figure]:
    """The ROC and the precision-recall curves of comparisons, labels (N,) and scores (N,) each, in line_style(first),
    ...
    """
    (roc, left), (pr, right) = chart(), chart()
    for i, (labels, scores) in enumerate(comparisons, first):
        false_positive, true_positive, _ = roc_curve(labels, scores)
        precision, recall, _ = precision_recall_curve(labels, scores, drop_intermediate=True)
        left.plot(false_positive, true_positive, **line_style(i), clip_on=False)
        right.plot(recall, precision, **line_style(i), drawstyle="steps-post", clip_on=False)
    left.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    right.axhline(np.mean(np.concatenate([labels for labels, _ in comparisons])), color=INK, lw=0.8, ls=":")
    left.set(xlabel="real images called fake, share", ylabel="fakes found, share")
    right.set(xlabel="recall: fakes found, share", ylabel="precision, share")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1))
    return roc, pr


def count_scores(scores: np.ndarray) -> np.ndarray:
    """(N,) -> how many are in each of SCORE_BINS."""
    return np.histogram(scores, SCORE_BINS)[0]


@matplotlib.rc_context(CHART_STYLE)
def score_histogram(labels: np.ndarray, scores: np.ndarray, threshold: float, top: float) -> Figure:
    """How many real and fake images have which score, on a logarithmic axis: of a confident model nearly all are in the
    outermost bins, and the few others are what one wants to see. `top`: the largest count of all charts beside this
    one.
    """
    figure, axes = chart((3.5, 2.4))
    floor = 0.6  # a bar of one image is seen, and one of none is not
    for label, name, colour, fill in ((0, "real", REAL, 0.4), (1, "fake", FAKE, 0.15)):
        counts = np.maximum(count_scores(scores[labels == label]), floor)
        axes.stairs(counts, SCORE_BINS, baseline=floor, fill=True, color=colour, alpha=fill, lw=0)
        axes.stairs(
            counts, SCORE_BINS, baseline=floor, color=colour, lw=1.4, ls="-" if label else (0, (4, 1)), label=name
        )
    axes.axvline(0.5, color=INK, lw=0.9, ls=":", label="0.5")
    axes.axvline(
        min(max(threshold, 0), 1), color=INK, lw=0.9, ls="--", label=f"validation: {threshold:.3g}", clip_on=False
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(
        xlim=(0, 1), ylim=(floor, max(1.5 * top, 12)), xlabel="score: probability of a fake", ylabel="images (log)"
    )
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1, borderpad=0)
    return figure


@matplotlib.rc_context(CHART_STYLE)
def reliability_chart(mean_score: np.ndarray, fake_fraction: np.ndarray, counts: np.ndarray) -> Figure:
    """From metrics.calibration, (bins,) each; below it how many images each point stands for."""
    figure = Figure(figsize=(3.5, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = counts > 0
    above.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":", label="calibrated")
    above.plot(
        mean_score[filled],
        fake_fraction[filled],
        "o-",
        color=REAL,
        lw=1.5,
        ms=4,
        label="this model",
        clip_on=False,
        zorder=3,
    )
    above.set(ylim=(0, 1), ylabel="fakes among them, share")
    below.stairs(
        np.maximum(counts, 0.6), np.linspace(0, 1, len(counts) + 1), baseline=0.6, fill=True, color=REAL, alpha=0.5
    )
    below.set_yscale("log")
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_locator(NullLocator())
    below.set(
        xlim=(0, 1),
        ylim=(0.6, max(1.5 * counts.max(), 12)),
        xlabel="score: probability of a fake",
        ylabel="images (log)",
    )
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1, borderpad=0)
    return figure


# ----------------------------------------------------------------------------------------------------------- robustness


def corruptions(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["corruption"] for row in rows if row["corruption"] != "none"))


def draw_robustness(axes: Axes, rows: list[dict], corruption: str) -> None:
    """AUC by level of one corruption, from the clean images on: a line for each generator, a thick one for their mean.

    Levels stand at equal distances, in the rows' order. The y axis is set by all rows, so that it is one for all
    corruptions.
    """
    names = generators_of(rows)
    lowest = min(row[name]["auc"] for row in rows for name in (*names, "Mean") if name in row)
    levels = [row for row in rows if row["corruption"] in ("none", corruption)]
    for name, style in [
        *((name, line_style(i) | {"linewidth": 1.1 if len(names) <= 10 else 0.8}) for i, name in enumerate(names)),
        ("Mean", MEAN_STYLE),
    ]:
        axes.plot(
            range(len(levels)), [row[name]["auc"] if name in row else np.nan for row in levels], **style, clip_on=False
        )
    axes.axhline(0.5, color=INK, lw=0.8, ls=":")
    labels = [CLEAN.get(corruption, "clean") if row["corruption"] == "none" else f"{row['level']:g}" for row in levels]
    axes.set_xticks(range(len(levels)), labels)
    axes.set(xlim=(0, max(len(levels) - 1, 1)), ylim=(min(0.45, np.floor(20 * lowest) / 20), 1))
    axes.set_xlabel(AXIS_LABELS.get(corruption, drawable(corruption)), parse_math=False)


def generators_of(rows: list[dict]) -> list[str]:
    """Names of the generators in rows of inference.py --robustness, in order."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in ("corruption", "level", "Mean")))


@matplotlib.rc_context(CHART_STYLE)
def robustness_charts(rows: list[dict]) -> dict[str, Figure]:
    """{corruption: its chart}, see draw_robustness."""
    charts = {}
    for corruption in corruptions(rows):
        charts[corruption], axes = chart((3.5, 2.7))
        draw_robustness(axes, rows, corruption)
        axes.set_ylabel("AUC")
    return charts


@matplotlib.rc_context(CHART_STYLE)
def robustness_curves(rows: list[dict], path: Path | None) -> Figure:
    """All corruptions beside each other, with a legend below; saved as PNG if there is a path.

    Args:
        rows: of inference.py --robustness: {"corruption", "level", "Mean": metrics, generator: metrics, ...}, first the
            clean one, whose corruption is "none".
    """
    panels, names = corruptions(rows), generators_of(rows)
    columns = 5 if len(panels) > 2 else 2
    width = max(3.0 * len(panels), 5)
    figure = Figure(figsize=(width, 2.9 + 0.2 * -(-(len(names) + 2) // columns)), layout="constrained")
    for axes, corruption in zip(np.atleast_1d(figure.subplots(1, max(len(panels), 1), sharey=True)), panels):
        draw_robustness(axes, rows, corruption)
    figure.axes[0].set_ylabel("AUC")
    styles = [
        ("mean", MEAN_STYLE),
        *((name, line_style(i)) for i, name in enumerate(names)),
        ("chance", {"color": INK, "lw": 0.8, "ls": ":"}),
    ]
    legend = figure.legend(
        [Line2D([], [], **style) for _, style in styles],
        [drawable(name) for name, _ in styles],
        loc="outside lower center",
        ncols=columns,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is no formula
    if path is not None:
        figure.savefig(path, **STYLE, format="png")
    return figure


def drawable(name: str, longest: int = 24) -> str:
    """A name as matplotlib can draw it: one line, no surrogates, not too long."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
