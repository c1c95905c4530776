"""Pre-trained Vision Transformers as a start: whose names of parameters are which of ours."""

import math
import os
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ViT_B_16_Weights

from model import LAMMViT

TORCHVISION_NORM_EPS = 1e-6


def init_from(model: LAMMViT, source: str, rank: int) -> None:
    """Starts from a Vision Transformer of torchvision: a file with its state dict, or its ImageNet weights."""
    try:
        if source == "imagenet":
            weights = ViT_B_16_Weights.IMAGENET1K_V1
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                weights.get_state_dict(progress=rank == 0, check_hash=True)  # one process of each machine downloads it
            if dist.is_initialized():
                dist.barrier()
            state = weights.get_state_dict(progress=False, check_hash=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "; download it where there is a network, and name the file" if source == "imagenet" else ""
        raise ValueError(f"--init_from {source}: {error}{hint}") from error
    except Exception as error:  # whatever torch.load makes of a foreign file
        raise ValueError(
            f"--init_from {source}: not a file of torch.save with tensors alone ({type(error).__name__}); save"
            " model.state_dict()"
        ) from error
    try:
        unused = load_torchvision_vit(model, state)
    except ValueError as error:
        raise ValueError(f"--init_from {source}: {error}") from error
    if rank == 0:
        print(f"init   {len(state) - len(unused)} tensors of {source}; not used: {', '.join(unused) or 'none'}")


def torchvision_names(depth: int) -> dict[str, str]:
    """{name of a parameter in torchvision's Vision Transformer: ours}."""
    in_block = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj": "attn.qkv",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.0",
        "mlp.3": "mlp.3",
        "mlp.linear_1": "mlp.0",  # older files
        "mlp.linear_2": "mlp.3",
    }
    modules = {"conv_proj": "patch_embed", "encoder.ln": "norm", "heads.head": "head"}
    for i in range(depth):
        block = f"encoder.layers.encoder_layer_{i}"
        modules |= {f"{block}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in in_block.items()}
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
    for theirs, ours in modules.items():
        joint = "_" if theirs.endswith("in_proj") else "."  # in_proj_weight is no module's parameter there
        names |= {f"{theirs}{joint}{part}": f"{ours}.{part}" for part in ("weight", "bias")}
    return names


def load_torchvision_vit(model: LAMMViT, state: dict[str, Tensor]) -> list[str]:
    """Copies the weights of a torchvision Vision Transformer (vit_b_16 for the default model) to their counterparts.

    Position embeddings are interpolated where the grids differ. The classifier is copied where it has as many classes.
    The model takes over torchvision's eps of LayerNorm, with which the weights were made. What belongs to the masks,
    LAMM and the head interaction has no counterpart and keeps its initial values.

    Args:
        state: a state dict of torchvision.models.vit_*.

    Returns:
        The names of the tensors in `state` that were not used.

    Raises:
        ValueError: no Vision Transformer of torchvision, or one of another width or patch size.
    """
    names = torchvision_names(model.config.depth)
    if not isinstance(state, dict) or not {"conv_proj.weight", "class_token", "encoder.pos_embedding"} <= state.keys():
        entries = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else ""
        what = f"its entries are {entries or 'none'}" if isinstance(state, dict) else f"it is a {type(state).__name__}"
        raise ValueError(f"not a state dict of a torchvision vit_b_16: {what}")
    wanted = {ours for ours in names.values() if not ours.startswith("head.")}
    if missing := sorted(wanted - {names.get(theirs) for theirs in state}):
        raise ValueError(
            f"has nothing for {missing[0]} and {len(missing) - 1} more; choose a --depth of no more than its layers"
        )

    parameters, unused = model.state_dict(), []
    for theirs, tensor in state.items():
        ours = names.get(theirs)
        if ours and not isinstance(tensor, Tensor):
            raise ValueError(f"{theirs} is no tensor but {type(tensor).__name__}")
        if ours is None or (ours.startswith("head.") and parameters[ours].shape != tensor.shape):
            unused.append(theirs)
            continue
        if ours == "pos_embed" and tensor.ndim == 3:
            tensor = interpolate_positions(tensor, model.config.grid_size)
        if parameters[ours].shape != tensor.shape:
            raise ValueError(
                f"{theirs} is {tuple(tensor.shape)}, but the model's {ours} is {tuple(parameters[ours].shape)}; choose"
                " its width and patch size"
            )
        parameters[ours].copy_(tensor)
    model.config = replace(model.config, norm_eps=TORCHVISION_NORM_EPS)
    for norm in (model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))):
        norm.eps = TORCHVISION_NORM_EPS
    return unused


def interpolate_positions(pos_embed: Tensor, grid_size: int) -> Tensor:
    """(1, 1 + g * g, D) -> (1, 1 + grid_size², D), bicubic; the class token's position, the first, stays."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old * old != pos_embed.shape[1] - 1:
        raise ValueError(
            f"encoder.pos_embedding has {pos_embed.shape[1]} positions, which are no square and a class token"
        )
    if old == grid_size:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old))  # (1, P, D) -> (1, D, P) -> (1, D, g, g)
    patches = F.interpolate(patches.float(), size=(grid_size, grid_size), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
