"""What the optimizer is given: which parameters decay, and the learning rate of a step."""

import math

from torch import nn

from training.run import Run

MIN_LR = 1e-6  # floor of both schedules; the authors'


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of linear and convolution layers alone, not for biases, norms and tokens."""
    matrices = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_lr(run: Run) -> float:
    """Learning rate of the step to come: a linear warm-up, then half a cosine down to MIN_LR at the end of --epochs."""
    warmup, end = run.args.warmup_epochs * run.epoch_size, run.args.epochs * run.epoch_size  # in samples
    floor = min(MIN_LR, run.args.lr)
    if run.samples < warmup:
        return run.args.lr * min(1, (run.samples + run.window) / warmup)
    done = min(1, (run.samples - warmup) / max(1, end - warmup))
    return floor + (run.args.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))
