"""Pre-trained Vision Transformers as a trunk: whose names of parameters are which of ours, and what goes with them.

    read_trunk("clip")  ->  Trunk  ->  LAMMViTConfig(**trunk.config)  ->  load_trunk(model, trunk)

One table for each naming: the parameters outside of the blocks, the name of a block, the parameters in it. Every
ViT-B/16 with 12 heads of 64 can be a trunk, and its first blocks can. runtime/trunk_files.py reads the files.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import IMAGE_MEAN, IMAGE_STD, NUM_HEADS, LAMMViT
from runtime.trunk_files import Read, read_source

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
CLIP = {
    "pre_norm": True,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# What a file's names cannot tell, by a word before it: --init_from augreg:FILE
KINDS = {
    "augreg": {"image_mean": HALF, "image_std": HALF},  # Google's ViT, of timm or Hugging Face
    "laion": {"activation": "gelu"},  # open_clip's own CLIPs; OpenAI's have QuickGELU
}
WRAPPERS = ("teacher", "state_dict", "model", "model_state")  # in which training scripts keep the parameters
HEAD_WIDTH = 64  # of all Vision Transformers of the field: their number of heads is width / 64


class Naming(NamedTuple):
    """How one library calls the parameters of a Vision Transformer. A name that ends in a dot or an underscore is a
    module's, and its weight and bias are meant."""

    what: str  # for messages
    marks: tuple[str, ...]  # parameters by which it is known
    outside: dict[str, str]  # theirs -> ours
    block: str  # the beginning of a block's names, {} its number from 0 on
    inside: dict[str, str]  # theirs -> ours; "attn.qkv.0": the first third of attn.qkv
    config: dict[str, object]  # fields of LAMMViTConfig that go with it


TORCHVISION = Naming(
    "torchvision's",
    ("conv_proj.weight", "class_token", "encoder.pos_embedding"),
    {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj.": "patch_embed.",
        "encoder.ln.": "norm.",
    },
    "encoder.layers.encoder_layer_{}.",
    {
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj.": "attn.proj.",
        "mlp.0.": "mlp.0.",
        "mlp.3.": "mlp.3.",
        "mlp.linear_1.": "mlp.0.",  # older files
        "mlp.linear_2.": "mlp.3.",
    },
    {"norm_eps": 1e-6},
)
TIMM = Naming(
    "timm's",  # and DINO's, MAE's and DeiT's
    ("cls_token", "pos_embed", "patch_embed.proj.weight"),
    {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.": "patch_embed.",
        "norm_pre.": "norm_pre.",
        "norm.": "norm.",
        "fc_norm.": "norm.",
    },
    "blocks.{}.",
    {
        "norm1.": "norm1.",
        "norm2.": "norm2.",
        "attn.qkv.": "attn.qkv.",
        "attn.proj.": "attn.proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    },
    {"norm_eps": 1e-6},
)
OPENAI = Naming(
    "OpenAI's CLIP's",  # and open_clip's
    ("visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"),
    {
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "pos_embed",
        "visual.conv1.": "patch_embed.",
        "visual.ln_pre.": "norm_pre.",
        "visual.ln_post.": "norm.",
    },
    "visual.transformer.resblocks.{}.",
    {
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.0.",
        "mlp.c_proj.": "mlp.3.",
    },
    CLIP,
)
HUGGING_FACE_CLIP = Naming(
    "Hugging Face's CLIP's",
    tuple(
        f"vision_model.embeddings.{name}"
        for name in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    ),
    {
        "vision_model.embeddings.class_embedding": "cls_token",
        "vision_model.embeddings.position_embedding.weight": "pos_embed",
        "vision_model.embeddings.patch_embedding.": "patch_embed.",
        "vision_model.pre_layrnorm.": "norm_pre.",  # spelt so
        "vision_model.post_layernorm.": "norm.",
    },
    "vision_model.encoder.layers.{}.",
    {
        "layer_norm1.": "norm1.",
        "layer_norm2.": "norm2.",
        "self_attn.q_proj.": "attn.qkv.0.",
        "self_attn.k_proj.": "attn.qkv.1.",
        "self_attn.v_proj.": "attn.qkv.2.",
        "self_attn.out_proj.": "attn.proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    },
    CLIP,
)
HUGGING_FACE_VIT = Naming(
    "Hugging Face's ViT's",  # and its DINO's, MAE's and DeiT's
    ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"),
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.": "patch_embed.",
        "layernorm.": "norm.",
    },
    "encoder.layer.{}.",
    {
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "attention.attention.query.": "attn.qkv.0.",
        "attention.attention.key.": "attn.qkv.1.",
        "attention.attention.value.": "attn.qkv.2.",
        "attention.output.dense.": "attn.proj.",
        "intermediate.dense.": "mlp.0.",
        "output.dense.": "mlp.3.",
    },
    {"norm_eps": 1e-12},
)
NAMINGS = (TORCHVISION, TIMM, OPENAI, HUGGING_FACE_CLIP, HUGGING_FACE_VIT)

# Parts of names of what LAMM-ViT's block has not, and how a message calls it
FOREIGN = {
    r"reg_token|register_tokens": "register tokens",
    r"dist_token|distillation_token": "a distillation token",
    r"rope|rotary|freqs_cis": "rotary positions",
    r"rel_pos|relative_position": "relative positions",
    r"\bls1\.|layer_scale|gamma_1|\.lambda1": "scaled layers (LayerScale)",
    r"q_norm|k_norm": "normalised queries and keys",
    r"mlp\.w12|mlp\.w1\.|fc1_g|gate_proj": "a gated MLP",
}


@dataclass
class Trunk:
    """The weights of a pre-trained Vision Transformer, in our names."""

    source: str  # by which it is found again, as --init_from takes it
    naming: str
    weights: dict[str, Tensor]  # of all of its blocks; without the masks, LAMM and the head interaction
    config: dict[str, object]  # fields of LAMMViTConfig that go with it
    unused: list[str]  # their names of the tensors that have no counterpart

    @property
    def depth(self) -> int:
        return 1 + max(block_of(name) for name in self.weights)

    def first(self, depth: int) -> dict[str, Tensor]:
        """The weights without the blocks from this one on."""
        return {name: values for name, values in self.weights.items() if block_of(name) < depth}

    def digest(self, depth: int) -> str:
        """SHA-256 of the weights of so many blocks and what is outside of them, without the head: the same from
        whichever file they come."""
        digest = hashlib.sha256()
        for name, values in sorted(self.first(depth).items()):
            digest.update(name.encode() + values.contiguous().numpy().tobytes())
        return digest.hexdigest()


def block_of(name: str) -> int:
    """The number of the block that a parameter of ours is in; -1: in none."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def read_trunk(source: str, rank: int = 0) -> Trunk:
    """
    Args:
        source: as --init_from takes it.
        rank: of this process; the first one of a machine downloads, with a bar where it is 0.

    Raises:
        ValueError: no such file or package, or a trunk that cannot serve.
    """
    kind, _, rest = source.partition(":")
    name = rest if kind in KINDS else source
    try:
        read = read_source(name, rank)
        trunk = translate(source, read)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init_from {source}: {error}") from error
    trunk.config |= KINDS.get(kind, {})
    return trunk


def split_source(source: str) -> tuple[str, Path | None]:
    """The file that a source names, after the word before it: "augreg:" and vit.pth of "augreg:vit.pth". None: clip,
    imagenet or timm's, which are no files."""
    kind, _, rest = source.partition(":")
    prefix, name = (f"{kind}:", rest) if kind in KINDS else ("", source)
    return prefix, None if name in ("clip", "imagenet") or name.startswith("timm:") else Path(name)


def translate(source: str, read: Read) -> Trunk:
    """A state dict of any naming in our names.

    Raises:
        ValueError: it is of no Vision Transformer that is known, or of one that cannot serve.
    """
    state = unwrap(read.state)
    naming = next((naming for naming in NAMINGS if set(naming.marks) <= state.keys()), None)
    for part, what in FOREIGN.items():
        if found := next((name for name in state if re.search(part, name)), None):
            raise ValueError(f"has {what} ({found}), which LAMM-ViT's blocks have not; take another ViT-B/16")
    if naming is None:
        entries = ", ".join(list(state)[:5]) or "none"
        raise ValueError(
            "not a state dict of a Vision Transformer that is known (torchvision, timm, DINO, MAE, DeiT; CLIP of"
            f" OpenAI, open_clip, Hugging Face; ViT of Hugging Face): its entries are {entries}"
        )
    weights, parts, unused = {}, {}, []
    for theirs, tensor in state.items():
        ours = our_name(theirs, naming)
        if ours is None and re.match(block_pattern(naming), theirs):
            raise ValueError(f"has {theirs}, which LAMM-ViT's blocks have not; take another ViT-B/16")
        if ours is None:
            unused.append(theirs)
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{theirs} is no tensor of plain numbers but {kind}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{theirs} holds numbers that are not finite; take another copy")
        third = re.fullmatch(r"(.*attn\.qkv)\.(\d)\.(weight|bias)", ours)
        if third:
            parts.setdefault(f"{third[1]}.{third[3]}", {})[third[2]] = tensor.detach().float()
        else:
            weights[ours] = tensor.detach().float()
    for name, thirds in parts.items():
        if thirds.keys() != {"0", "1", "2"}:
            raise ValueError(f"has queries, keys and values not all of {name}")
        weights[name] = torch.cat([thirds[number] for number in "012"])
    width = weights["cls_token"].numel()
    weights["cls_token"] = weights["cls_token"].reshape(1, 1, -1)
    if weights["pos_embed"].shape[-1:] != (width,):
        raise ValueError(f"its positions are {tuple(weights['pos_embed'].shape)}, and its class token is {width} wide")
    weights["pos_embed"] = weights["pos_embed"].reshape(1, -1, width)
    if width % HEAD_WIDTH == 0 and width // HEAD_WIDTH != NUM_HEADS:
        raise ValueError(f"is {width} wide, hence has {width // HEAD_WIDTH} heads; LAMM-ViT has {NUM_HEADS}: a ViT-B")
    config = dict(naming.config)
    if naming is TIMM and "norm_pre.weight" in weights:
        config |= CLIP
    config["pre_norm"] = "norm_pre.weight" in weights
    if config["pre_norm"] and "patch_embed.bias" not in weights:
        weights["patch_embed.bias"] = torch.zeros(width)  # CLIP has none
    served = f"{kind}:{read.served}" if (kind := source.partition(":")[0]) in KINDS else read.served
    return Trunk(served, naming.what, weights, {**default_config(), **config, **read.config}, unused)


def default_config() -> dict[str, object]:
    return {"activation": "gelu", "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}


def our_name(theirs: str, naming: Naming) -> str | None:
    """Ours of a parameter of theirs, None where there is no counterpart."""
    match = re.match(block_pattern(naming), theirs)
    table, rest, begin = naming.outside, theirs, ""
    if match:
        table, rest, begin = naming.inside, theirs[match.end() :], f"blocks.{match[1]}."
    for name, ours in table.items():
        if rest == name:
            return begin + ours
        if name[-1] in "._" and rest in (f"{name}weight", f"{name}bias"):
            return begin + ours + rest[len(name) :]
    return None


def block_pattern(naming: Naming) -> str:
    return re.escape(naming.block).replace(r"\{\}", r"(\d+)")


def unwrap(state: object) -> dict:
    """The parameters by name, without what the authors of training scripts wrap them in."""
    for _ in range(10):  # a dictionary may hold itself
        if not isinstance(state, dict):
            break
        inner = next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = state[inner]
    if not isinstance(state, dict):
        raise ValueError(f"not a state dict but a {type(state).__name__}; save model.state_dict()")
    state = {str(name): values for name, values in state.items()}
    for prefix in ("module.", "backbone.", "vit.", "deit.", "model."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): values for name, values in state.items()}
    return state


def load_trunk(model: LAMMViT, trunk: Trunk) -> list[str]:
    """Copies a trunk's weights to the model, whose config is the trunk's, its first blocks where it has more.

    Position embeddings are interpolated where the grids differ. The classifier, whose classes may be others, and what
    belongs to the masks, LAMM and the head interaction keep their values.

    Returns:
        The names of the trunk's tensors, ours, that were not used.

    Raises:
        ValueError: another width, patch size or number of blocks.
    """
    parameters, used = model.state_dict(), set()
    for name, tensor in trunk.first(model.config.depth).items():
        if name == "pos_embed":
            try:
                tensor = interpolate_positions(tensor, model.config.grid_size)
            except ValueError as error:
                raise ValueError(f"--init_from {trunk.source}: {error}") from error
        if name not in parameters or parameters[name].shape != tensor.shape:
            there = tuple(parameters[name].shape) if name in parameters else "not there"
            raise ValueError(
                f"--init_from {trunk.source}: its {name} is {tuple(tensor.shape)}, but the model's is {there}; choose"
                " its width, --mlp_ratio and patch size"
            )
        parameters[name].copy_(tensor)
        used.add(name)
    of_trunk = {name for name in parameters if is_of_trunk(name)}
    missing = sorted(of_trunk - used)
    if missing and block_of(missing[0]) < trunk.depth:
        raise ValueError(
            f"--init_from {trunk.source}: has no {missing[0]}, which LAMM-ViT needs; take another ViT-B/16"
        )
    if missing:
        way_out = f"choose a --depth of no more than its layers, {trunk.depth}" if trunk.depth else "it has no blocks"
        raise ValueError(
            f"--init_from {trunk.source}: has nothing for {missing[0]} and {len(missing) - 1} more; {way_out}"
        )
    return [name for name in trunk.weights if name not in used]


def is_of_trunk(name: str) -> bool:
    """Whether a parameter of ours is one of a plain Vision Transformer's, without its head."""
    if re.match(r"(mask_processor|lamm|head)\.", name):
        return False
    return ".head_interaction." not in name


def interpolate_positions(pos_embed: Tensor, grid_size: int) -> Tensor:
    """(1, 1 + g * g, D) -> (1, 1 + grid_size², D), bicubic; the class token's position, the first, stays."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if not old or old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"its pos_embed has {pos_embed.shape[1]} positions, which are no square and a class token")
    if old == grid_size:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old))  # (1, P, D) -> (1, D, P) -> (1, D, g, g)
    patches = F.interpolate(patches.float(), size=(grid_size, grid_size), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
