"""What a run leaves for people to look at: a line an epoch, TensorBoard, two pictures."""

import json

import numpy as np
import torch

from runtime.card import ABOVE_GUESSING
from training.run import BEST, BOARD, CURVES, TIMES, WEIGHTS, Run

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # not installed
    SummaryWriter = None


def open_board(run: Run) -> "SummaryWriter | None":
    """Where TensorBoard is installed; epochs that are trained again replace those of before."""
    return SummaryWriter(run.path(BOARD), purge_step=run.epoch) if SummaryWriter else None


def report_epoch(run: Run, line: dict, timing: dict, is_best: bool) -> None:
    """A finished epoch, printed; what it took, in timing.jsonl."""
    print(
        f"epoch {run.epoch:>3}  loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}"
        f"  val ACC {line['val_accuracy']:.2f} %  val AUC {line['val_auc']:.4f}{' *' if is_best else '  '}"
        f"  {timing['images_per_second']:.0f} images/s, {100 * timing['data_wait']:.0f} % waiting for data",
        flush=True,
    )
    with open(run.path(TIMES), "a") as file:
        file.write(json.dumps({"epoch": run.epoch} | timing) + "\n")


def report_left_out(unknown: dict[str, dict]) -> None:
    """Of evaluation.operating.judge_left_out the mean, and where it is lowest."""
    if unknown:
        of_each = {name: found["auc"] for name, found in unknown.items()}
        lowest = ", ".join(f"{name} {of_each[name]:.3f}" for name in sorted(of_each, key=of_each.get)[:3])
        mean = np.mean(list(of_each.values()))
        print(f"unknown  AUC {mean:.4f} of data sets left out in turn; lowest {lowest}")
        if mean < ABOVE_GUESSING:
            print(
                "WARNING: on data sets that it does not know, the head is hardly better than guessing (0.5), or worse."
                " Its verdicts on other pictures are worth nothing; more data sets of each class may help"
            )


def write_board(
    board: "SummaryWriter", line: dict, labels: np.ndarray, scores: np.ndarray, weights: torch.Tensor | None
) -> None:
    """The same for TensorBoard, with the curve of precision and recall and LAMM's weights."""
    for name, value in line.items():
        kind, _, rest = name.partition("_")
        board.add_scalar(f"{kind}/{rest}" if kind in ("train", "val") else name, value, line["epoch"])
    board.add_pr_curve("val/precision_recall", labels, scores, line["epoch"])
    if weights is not None:  # (L, H) -> an image with a square of 16 pixels for each head of each layer
        squares = np.kron(weights / weights.max(), np.ones((16, 16)))
        board.add_image("lamm_weights", squares, line["epoch"], dataformats="HW")
    board.flush()


def draw_pictures(run: Run) -> None:
    from evaluation.figures import lamm_weights, training_curves  # matplotlib, at the end of a run

    if run.log:
        training_curves(run.log, run.path(CURVES))
    weights = torch.load(run.path(BEST), map_location="cpu", weights_only=True)["lamm_weights"]
    if weights is not None:
        lamm_weights(weights.numpy(), run.path(WEIGHTS))
