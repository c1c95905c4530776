"""What of a model is trained: all of it, or a part, the rest being a frozen trunk.

    all      everything
    norms    LayerNorms, class token, and all that is the method's: masks, LAMM, head interaction, head
    lora:R   all that is the method's, and beside each matrix of the blocks a product of rank R (arXiv 2106.09685)
    head     the head alone

Frozen parameters need no gradient, no state of the optimizer and no room in the checkpoint. LoRA is written out here:
peft would bring transformers and accelerate with it.
"""

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LAMMViT
from runtime.pretrained import is_of_trunk

LORA_MODULES = ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")  # of a block


class LoRALinear(nn.Linear):
    """W x + b + B A x, W and b frozen. It starts as W x + b: B is 0."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear starts

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as one matrix."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.weight.device)
        linear.weight.copy_(self.weight + self.lora_b @ self.lora_a)
        linear.bias.copy_(self.bias)
        return linear


def lora_rank(tune: str) -> int:
    """R of "lora:R"; 0 of the others.

    Raises:
        ValueError: none of all, norms, lora:R and head.
    """
    match = re.fullmatch(r"lora:([1-9]\d{0,2})", tune)
    if not match and tune not in ("all", "norms", "head"):
        raise ValueError(f"--tune {tune}: has to be all, norms, head, or lora:R with a rank R as in lora:8")
    return int(match[1]) if match else 0


def replace_matrices(model: LAMMViT, make: Callable[[nn.Linear], nn.Linear]) -> None:
    """Puts make(module) in the place of each matrix of the blocks that LoRA is for."""
    for block in model.blocks:
        for name in LORA_MODULES:
            parent, _, child = name.rpartition(".")
            parent = block.get_submodule(parent)
            setattr(parent, child, make(getattr(parent, child)))


def choose_trained(model: LAMMViT, tune: str) -> None:
    """Freezes what is not trained. For LoRA, gives the blocks' matrices their products first.

    What is frozen and of no trunk is rounded to what in_half leaves of it."""
    if rank := lora_rank(tune):
        replace_matrices(model, lambda linear: LoRALinear(linear, rank))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, tune))
    frozen = {name: values for name, values in held_state(model, tune).items() if not is_trained(name, tune)}
    model.load_state_dict(in_half(frozen), strict=False)  # as the checkpoint has it


def is_trained(name: str, tune: str) -> bool:
    if tune == "all":
        return True
    if tune == "head":
        return name.startswith("head.")
    if tune == "norms" and (name == "cls_token" or re.search(r"(^|\.)norm(1|2|_pre)?\.(weight|bias)$", name)):
        return True
    return not is_of_trunk(name) or ".lora_" in name


def is_held(name: str, tune: str) -> bool:
    """Whether a checkpoint holds a parameter: what was trained, and what no trunk has."""
    return is_trained(name, tune) or not is_of_trunk(name)


def held_state(model: LAMMViT, tune: str) -> dict[str, Tensor]:
    return {name: values for name, values in model.state_dict().items() if is_held(name, tune)}


def in_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with matrices in float16, but for those with a value beyond its range (65504) and the head's, which is
    small and has a temperature folded in; vectors stay as they are."""
    halves = {name: values.half() for name, values in state.items() if values.ndim >= 2 and name != "head.weight"}
    return state | {name: half for name, half in halves.items() if half.isfinite().all()}


def merge_lora(model: LAMMViT) -> None:
    """A model of LAMMViT's own modules, with the same function."""
    replace_matrices(model, lambda linear: linear.merged() if isinstance(linear, LoRALinear) else linear)
