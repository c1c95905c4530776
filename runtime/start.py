"""How the parameters of the method start: as the authors', or so that a trunk's function is kept.

All of it is initial values. No formula changes, and checkpoints stay exchangeable with the authors' code.

With the authors' values the method wipes out what a trunk knows at the first step: w = 1/12 divides each head's output
by twelve, the gate σ(λ(MM − θ)) is near 1/2 and halves each score, the mask projections are random matrices that have
nothing to do with the face, and the head interaction adds a random projection. From scratch the same is a long plateau.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from model import NUM_HEADS, LAMMViT


class Gate(NamedTuple):
    """Where the gates of a start are open, and what makes up for those that are not."""

    lam: float  # λ, the same in all heads
    theta: float  # θ, likewise
    query_gain: float  # times which query weights and biases are taken: a gate of 1/2 outside of the regions wants 2


# The start of each --start but the authors'. Gates σ(λ (M_i M_j − θ)), M the region masks themselves:
GATES = {
    # 1/2 for every pair, to 3e-8, and the queries take it back: the trunk's tokens, but gates that hardly learn
    "preserved": Gate(1e-7, 0.0, 2.0),
    # 1/2 outside of a region, 0.88 inside: a pair inside has 1.76 times the score
    "guided": Gate(2.0, 0.0, 2.0),
}
STARTS = ("paper", *GATES)


@torch.no_grad()
def start_method(model: LAMMViT, start: str, gate: Gate | None = None) -> None:
    """Gives the method's parameters their initial values; those of the trunk are there already.

    Args:
        start: one of STARTS. "paper": the model has the authors' values, drawn when it was made.
        gate: instead of that of the start.
    """
    if start == "paper":
        return
    gate, config = gate or GATES[start], model.config
    if config.region_guidance:
        for projection in model.mask_processor.mask_projection:  # M is the region mask itself
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        for block in model.blocks:
            block.attn.qkv.weight[: config.embed_dim] *= gate.query_gain
            block.attn.qkv.bias[: config.embed_dim] *= gate.query_gain
    if config.lamm:
        # α = softmax(0) = 1/12, β = γ = σ(0) = 1/2: w = α/2 + w_before/2 = 1/12 at every layer and for every face
        for last in (model.lamm.region_importance_mlp[-1], model.lamm.memory_gate, model.lamm.new_info_gate):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if not config.scale_weights:  # which takes w = 1/12 back in the formula
            for block in model.blocks:
                block.attn.proj.weight *= NUM_HEADS
        if config.region_guidance:
            for last in (model.lamm.lambda_generator[-1], model.lamm.theta_generator[-1]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            lam = gate.lam + math.log(-math.expm1(-gate.lam))  # softplus⁻¹
            nn.init.constant_(model.lamm.lambda_generator[-1].bias, lam)
            nn.init.constant_(model.lamm.base_theta, gate.theta)
    if config.head_interaction:  # adds nothing yet; its queries, keys and values stay random, so that it can learn
        for block in model.blocks:
            nn.init.zeros_(block.head_interaction.proj.weight)
            nn.init.zeros_(block.head_interaction.proj.bias)
