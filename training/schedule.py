"""What the optimizer is given: which parameters decay, and the learning rate of a step."""

import math

from torch import nn

from model import LAMMViT
from runtime.pretrained import block_of
from training.run import Run

MIN_LR = 1e-6  # floor of both schedules; the authors'


def parameter_groups(model: LAMMViT, weight_decay: float, lr: float = 1.0, layer_decay: float = 1.0) -> list[dict]:
    """What is trained. Weight decay for the matrices of linear and convolution layers alone, not for biases, norms and
    tokens; LoRA's matrices among them.

    With layer_decay, a block's learning rate is so many times that of the block after it, the embeddings' that of a
    block before the first; head, LAMM and masks have the whole one. The groups of the whole one come first.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = id(parameter) in matrices or ".lora_" in name
            groups.setdefault((blocks_after(name, model) if layer_decay < 1 else 0, not is_matrix), []).append(
                parameter
            )
    return [
        {"params": params, "weight_decay": 0.0 if is_other else weight_decay, "lr": lr * layer_decay**after}
        | ({"scale": layer_decay**after} if layer_decay < 1 else {})
        for (after, is_other), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def blocks_after(name: str, model: LAMMViT) -> int:
    """How many blocks come after a parameter, itself counted: of the last block 1, of the embeddings depth + 1."""
    depth = len(model.blocks)
    if (block := block_of(name)) >= 0:
        return depth - block
    return depth + 1 if name.startswith(("patch_embed.", "cls_token", "pos_embed", "norm_pre.")) else 0


def cosine_lr(run: Run) -> float:
    """Learning rate of the step to come: a linear warm-up, then half a cosine down to MIN_LR at the end of --epochs."""
    warmup, end = run.args.warmup_epochs * run.epoch_size, run.args.epochs * run.epoch_size  # in samples
    floor = min(MIN_LR, run.args.lr)
    if run.samples < warmup:
        return run.args.lr * min(1, (run.samples + run.window) / warmup)
    done = min(1, (run.samples - warmup) / max(1, end - warmup))
    return floor + (run.args.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))
