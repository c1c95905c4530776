"""The pictures that train.py leaves behind: training_curves.png and lamm_weights.png."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dataset import REGIONS

HEADS = (*(name.replace("_", " ") for name in REGIONS), "eyes, brows", "mouth", "nose, outline", "all regions")  # of model.py, in order
TRAIN, VAL, NEUTRAL = "#b5541c", "#1f5f99", "#555555"
STYLE = {"dpi": 150, "facecolor": "white"}


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
    auc.plot(best["epoch"], best["val_auc"], "o", color=VAL, mfc="white", ms=7, label=f"best: {best['val_auc']:.4f}, epoch {best['epoch']}")
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
    axes.set_title("How strongly LAMM weights each head (region), mean over the validation images", loc="left", fontsize=11)
    axes.axvline(len(REGIONS) - 0.5, color="white", lw=2)  # one region a head | mixtures
    for layer, row in enumerate(weights):
        for head, value in enumerate(row):
            light = value > 0.6 * weights.max()
            axes.text(head, layer, f"{value:.3f}", ha="center", va="center", fontsize=7, color="black" if light else "white")
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, label="w", pad=0.01)
    figure.savefig(path, **STYLE)
