"""A training run: what it consists of, where it stands, and the names of what it leaves in --output_dir."""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

from dataset import FaceDataset, TrainSampler
from model import LAMMViT

BEST, LAST, PREVIOUS, LOG, TIMES = "best_model.pth", "last.pth", "previous.pth", "log.jsonl", "timing.jsonl"
CURVES, WEIGHTS, BOARD = "training_curves.png", "lamm_weights.png", "tensorboard"
FILES = (BEST, LAST, PREVIOUS, LOG, TIMES, CURVES, WEIGHTS, BOARD)  # of a run, in --output_dir


class Stopped(Exception):
    """The run was asked to end, and can go on."""


@dataclasses.dataclass
class Run:
    """A training run: what it consists of, and where it stands."""

    args: argparse.Namespace
    device: torch.device
    rank: int
    world: int
    datasets: list[str]
    framing: dict  # of the faces in the training images, for inference.py --images
    images: torch.Tensor  # image_ids of training and validation, so that inference.py does not test on them
    train_set: FaceDataset
    val_set: FaceDataset
    model: LAMMViT
    fed: nn.Module  # what takes the samples: the model, or the part of it that is behind a cache
    trained: nn.Module  # the same as training calls it: distributed
    trunk: dict | None  # of a frozen one: source, SHA-256, start; None: the checkpoints hold the whole model
    optimizer: torch.optim.Optimizer
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    sampler: TrainSampler
    is_captured: bool = False  # the model in CUDA graphs, of training.compiled
    # where it stands
    epoch: int = 1  # begun, not finished
    samples: int = 0  # seen so far, by all processes; the place in the sampler's order
    # this process's losses in this epoch: total, ce, diversity; samples
    sums: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    best_auc: float = -math.inf
    epochs_since_best: int = 0
    val_threshold: float = 0.5  # of the last validation
    ema: dict[str, torch.Tensor] | None = None  # the averages of the trained weights, with --ema
    left_out: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # of training.probe, with --epochs 0
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)  # a line each finished epoch
    stop: str = ""  # the signal that asked this process to end

    @property
    def window(self) -> int:
        """Samples in a step of the optimizer."""
        return self.args.batch_size * self.world * self.args.accum_steps

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch: as many as there are training images, but a step at the least."""
        return max(len(self.train_set), self.window)

    @property
    def is_finished(self) -> bool:
        return self.epoch > self.args.epochs or self.epochs_since_best >= self.args.stop_patience

    def path(self, name: str) -> Path:
        return self.args.output_dir / name
