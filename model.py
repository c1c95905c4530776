"""LAMM-ViT: a Vision Transformer whose attention is guided by facial regions (Zhang et al., ECAI 2025, arXiv
2505.07734).

    images (B, 3, h, w) + region masks (B, 8, G, G)  ->  {"logits": (B, 2), "mask_weights": 3 x (B, 12)}

Read it from the bottom up: LAMMViT stacks Blocks; a Block is RG-MHA, head interaction and an MLP; LAMM decides, once
per layer, how strongly each head (each region) counts. Greek letters are those of the paper. Letters in shape comments:

    B  batch          R  regions, 8            H   heads, 12           D   embedding width
    G  patch grid     P  patches, G * G        N   tokens, P + 1       Dh  head width, D / H

Parameter names are those of the authors' code, so that checkpoints can be exchanged with it. Each part of the method
can be left out (LAMMViTConfig); without all of them the model is the plain Vision Transformer of torchvision.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import region_gated_attention
from attention.dropout import dropout

# left_eye, right_eye, nose, upper_lip, lower_lip, mouth_corners, face_outline, eyebrows (faces/regions.py)
NUM_REGIONS = 8
NUM_HEADS = 12  # one head per region + four learned mixtures of regions
LAYER_EMBED_DIM = 64
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect
ACTIVATIONS = ("gelu", "quick_gelu")  # of the MLPs; the second is x σ(1.702 x), CLIP's
POOLS = ("class", "patches", "face", "regions")  # what the head may read
FACE_COVER = 0.25  # a patch is of the face if a region covers more than this part of it
FIXED_LAMBDA, FIXED_THETA = 1.0, 0.0  # of every gate in a model without LAMM; there, w = 1


@dataclass(frozen=True)
class LAMMViTConfig:
    """All that is needed to build a LAMMViT. The defaults are the paper's model, of the size of ViT-B/16.

    Raises:
        ValueError: a combination that the model is not defined for.
    """

    img_size: int = 224  # side of the square input, in pixels
    patch_size: int = 16  # side of a patch, in pixels
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = NUM_HEADS
    mlp_ratio: float = 4.0
    num_classes: int = 2  # class 1 = fake
    dropout: float = 0.1
    region_guidance: bool = True  # without: plain attention, no λ and θ
    lamm: bool = True  # without: the same fixed λ, θ and w in all heads, layers and images
    head_interaction: bool = True
    norm_eps: float = 1e-5  # of all LayerNorms but LAMM's
    # What pre-trained trunks need; the rest is the paper's
    pre_norm: bool = False  # a LayerNorm before the first block, as CLIP has it
    activation: str = "gelu"  # one of ACTIVATIONS
    image_mean: tuple[float, ...] = IMAGE_MEAN  # (3,) RGB, of pixels in [0, 1]
    image_std: tuple[float, ...] = IMAGE_STD
    # What departs from the paper: off by default (docs/differences.md)
    scale_weights: bool = False  # each head's output times H · w, which is 1 where all heads count alike, instead of w
    pool: tuple[str, ...] = ("class",)  # some of POOLS: the class token, and means of the patches
    read_blocks: tuple[int, ...] = ()  # after these blocks, counted from 1; none: after the last

    def __post_init__(self):
        if self.num_heads != NUM_HEADS:
            raise ValueError(
                f"num_heads is {self.num_heads}, but LAMM-ViT has {NUM_HEADS} heads: one for each of the {NUM_REGIONS} "
                f"regions and {NUM_HEADS - NUM_REGIONS} for mixtures of them"
            )
        if self.embed_dim <= 0 or self.embed_dim % NUM_HEADS:
            raise ValueError(f"embed_dim is {self.embed_dim}, but has to be a positive multiple of {NUM_HEADS} heads")
        if self.patch_size <= 0 or self.img_size <= 0 or self.img_size % self.patch_size:
            raise ValueError(
                f"img_size is {self.img_size}, but has to be a positive multiple of patch_size, {self.patch_size}"
            )
        if self.depth < 1 or self.num_classes < 2 or self.mlp_ratio <= 0:
            raise ValueError(
                f"depth {self.depth}, num_classes {self.num_classes} or mlp_ratio {self.mlp_ratio} is too small"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but has to be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation}, but has to be one of {', '.join(ACTIVATIONS)}")
        if not self.pool or len(set(self.pool)) < len(self.pool) or not set(self.pool) <= set(POOLS):
            raise ValueError(f"pool is {self.pool}, but has to be some of {', '.join(POOLS)}, each once")
        if self.read_blocks and (
            list(self.read_blocks) != sorted(set(self.read_blocks))
            or self.read_blocks[0] < 1
            or self.read_blocks[-1] != self.depth
        ):
            raise ValueError(f"read_blocks are {self.read_blocks}, but have to rise and end with depth, {self.depth}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError("image_mean and image_std have to be three numbers each, the second above 0")

    @property
    def grid_size(self) -> int:
        """G, the number of patches along one side of the image."""
        return self.img_size // self.patch_size

    @property
    def uses_masks(self) -> bool:
        return self.region_guidance or not {"face", "regions"}.isdisjoint(self.pool)

    @property
    def head_inputs(self) -> int:
        """Width of what the head reads."""
        of_a_block = self.embed_dim * sum(NUM_REGIONS if part == "regions" else 1 for part in self.pool)
        return of_a_block * max(1, len(self.read_blocks))


class QuickGELU(nn.Module):
    """x σ(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class MaskProcessor(nn.Module):
    """Turns 8 region masks into the masks of 12 heads: 8 projected regions, then 4 learned mixtures of them."""

    EYE_FOREHEAD = (0, 1, 7)  # both eyes, eyebrows
    MOUTH_CHIN = (3, 4, 5)  # both lips, mouth corners
    NOSE_CONTOUR = (2, 6)  # nose, face outline

    def __init__(self, num_patches: int):
        super().__init__()
        self.mask_projection = nn.ModuleList(nn.Linear(num_patches, num_patches) for _ in range(NUM_REGIONS))
        self.combine_weights_eye_forehead = nn.Parameter(torch.ones(len(self.EYE_FOREHEAD)))
        self.combine_weights_mouth_chin = nn.Parameter(torch.ones(len(self.MOUTH_CHIN)))
        self.combine_weights_nose_contour = nn.Parameter(torch.ones(len(self.NOSE_CONTOUR)))
        self.combine_weights_all = nn.Parameter(torch.ones(NUM_REGIONS))

    def forward(self, region_masks: Tensor) -> Tensor:
        """region_masks (B, R, G, G) in [0, 1] -> M (B, H, N); the class token's entry, the first, is 0."""
        flat = region_masks.flatten(2)  # (B, R, G, G) -> (B, R, P)
        regions = [project(flat[:, r]) for r, project in enumerate(self.mask_projection)]  # R x (B, P)
        groups = (
            (self.EYE_FOREHEAD, self.combine_weights_eye_forehead),
            (self.MOUTH_CHIN, self.combine_weights_mouth_chin),
            (self.NOSE_CONTOUR, self.combine_weights_nose_contour),
            (range(NUM_REGIONS), self.combine_weights_all.softmax(dim=0)),
        )
        # Stacked, as an index of several numbers would be copied to the GPU, which then waits
        mixtures = [
            torch.einsum("brp,r->bp", torch.stack([regions[r] for r in group], dim=1), weights)  # 4 x (B, P)
            for group, weights in groups
        ]
        return F.pad(torch.stack(regions + mixtures, dim=1), (1, 0))  # (B, H, P) -> (B, H, N)


class LAMM(nn.Module):
    """Layer-aware mask modulation: one module, shared by all layers, that sets each head's weight and gate at each
    layer.

    Where attention has no gates (region_guidance False) it sets the weights alone.
    """

    def __init__(self, embed_dim: int, depth: int, region_guidance: bool = True):
        super().__init__()
        self.region_guidance = region_guidance
        self.layer_embeddings = nn.Parameter(torch.randn(depth, LAYER_EMBED_DIM))
        self.global_feature_fusion = nn.Linear(2 * embed_dim, embed_dim)
        self.context_mlp = nn.Sequential(
            nn.Linear(embed_dim + LAYER_EMBED_DIM, embed_dim), nn.GELU(), nn.LayerNorm(embed_dim)
        )
        self.region_importance_mlp = nn.Sequential(
            nn.Linear(embed_dim + NUM_HEADS, 64), nn.GELU(), nn.Linear(64, NUM_HEADS)
        )
        self.memory_gate = nn.Linear(embed_dim, 1)
        self.new_info_gate = nn.Linear(embed_dim, 1)
        if region_guidance:
            self.lambda_generator = nn.Sequential(
                nn.Linear(embed_dim + NUM_HEADS, 32), nn.Tanh(), nn.Linear(32, NUM_HEADS)
            )
            self.theta_generator = nn.Sequential(
                nn.Linear(embed_dim + NUM_HEADS, 32), nn.Tanh(), nn.Linear(32, NUM_HEADS)
            )
            self.base_theta = nn.Parameter(torch.zeros(1, NUM_HEADS))

    def forward(self, x: Tensor, layer: int, previous: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The block's input x (B, N, D), w of the layer before (B, H) -> w, λ, θ, each (B, H), the last two or None."""
        # max has the fast backward, amax the fast forward
        peak = x.max(dim=1).values if x.requires_grad else x.amax(dim=1)
        pooled = torch.cat([x.mean(dim=1), peak], dim=-1)  # (B, 2D)
        layer_embedding = self.layer_embeddings[layer].expand(x.shape[0], -1)  # (64,) -> (B, 64)
        context = self.context_mlp(torch.cat([self.global_feature_fusion(pooled), layer_embedding], dim=-1))  # c (B, D)

        importance = self.region_importance_mlp(torch.cat([context, previous], dim=-1)).softmax(dim=-1)  # α (B, H)
        keep = self.memory_gate(context).sigmoid()  # β (B, 1)
        renew = self.new_info_gate(context).sigmoid()  # γ (B, 1)
        weights = renew * importance + keep * previous  # w (B, H)
        if not self.region_guidance:
            return weights, None, None

        modulation = torch.cat([context, weights], dim=-1)  # (B, D + H)
        lam = F.softplus(self.lambda_generator(modulation))  # λ (B, H)
        theta = self.base_theta + self.theta_generator(modulation).tanh()  # θ (B, H)
        return weights, lam, theta


class RegionGuidedAttention(nn.Module):
    """RG-MHA: multi-head attention in which each head looks through the mask of its region."""

    def __init__(self, embed_dim: int, dropout: float, scale_weights: bool = False):
        super().__init__()
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = dropout
        self.weight_scale = NUM_HEADS if scale_weights else 1

    def forward(
        self, x: Tensor, masks: Tensor | None, weights: Tensor | None, lam: Tensor | None, theta: Tensor | None
    ) -> Tensor:
        """x (B, N, D), masks M (B, H, N), weights w, lam λ and theta θ (B, H) -> (B, N, D). Without masks: no gates;
        weights None: all 1.
        """
        B, N, D = x.shape
        dropout_p = self.dropout if self.training else 0.0
        # 3 x (B, H, N, Dh)
        q, k, v = (x.transpose(1, 2) for x in self.qkv(x).view(B, N, 3, NUM_HEADS, D // NUM_HEADS).unbind(2))
        if masks is None:
            heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)  # (B, H, N, Dh)
        else:  # dropout(softmax(S ⊙ Γ)) V with S = Q Kᵀ / √Dh and the gate Γ_ij = σ(λ (M_i M_j − θ))
            heads = region_gated_attention(q, k, v, masks, lam, theta, dropout_p)  # (B, H, N, Dh)
        if weights is not None:
            heads = heads * (self.weight_scale * weights).to(heads.dtype)[..., None, None]  # w_h · (A V)
        return self.proj(heads.transpose(1, 2).reshape(B, N, D))  # (B, H, N, Dh) -> (B, N, H, Dh) -> (B, N, D)


class HeadInteraction(nn.Module):
    """Self-attention among the heads' mean outputs: the same for every token, so it is computed once per image."""

    def __init__(self, embed_dim: int):
        super().__init__()
        head_dim = embed_dim // NUM_HEADS
        self.qkv_heads = nn.Linear(head_dim, 3 * head_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        B, N, D = x.shape
        # (B, N, D) -> (B, D) -> (B, H, Dh); mean() would widen a bfloat16 x
        heads = (x.sum(dim=1) / N).view(B, NUM_HEADS, D // NUM_HEADS)
        q, k, v = self.qkv_heads(heads).chunk(3, dim=-1)  # 3 x (B, H, Dh)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, Dh), scale 1/√Dh
        return x + self.proj(mixed.reshape(B, 1, D))  # (B, N, D) + (B, 1, D)


class Dropout(nn.Dropout):
    """nn.Dropout with attention.dropout, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class Block(nn.Module):
    """x + HeadInteraction(RG-MHA(LN(x))), then x + MLP(LN(x))."""

    def __init__(self, config: LAMMViTConfig):
        super().__init__()
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.attn = RegionGuidedAttention(D, config.dropout, config.scale_weights)
        self.head_interaction = HeadInteraction(D) if config.head_interaction else nn.Identity()
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(D, hidden),
            nn.GELU() if config.activation == "gelu" else QuickGELU(),
            Dropout(config.dropout),
            nn.Linear(hidden, D),
            Dropout(config.dropout),
        )

    def forward(
        self, x: Tensor, masks: Tensor | None, weights: Tensor | None, lam: Tensor | None, theta: Tensor | None
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D); the other arguments as for RegionGuidedAttention."""
        x = x + self.head_interaction(self.attn(self.norm1(x), masks, weights, lam, theta))
        return x + self.mlp(self.norm2(x))


class LAMMViT(nn.Module):
    """The whole detector. `model(images, region_masks)["logits"].softmax(-1)[:, 1]` is the probability of a fake."""

    def __init__(self, config: LAMMViTConfig):
        super().__init__()
        self.config = config
        D, num_patches = config.embed_dim, config.grid_size**2
        self.patch_embed = nn.Conv2d(3, D, kernel_size=config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, D))
        self.norm_pre = nn.LayerNorm(D, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.mask_processor = MaskProcessor(num_patches) if config.region_guidance else None
        self.lamm = LAMM(D, config.depth, config.region_guidance) if config.lamm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.head = nn.Linear(config.head_inputs, config.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 RGB -> float32, by the mean and deviation that the model was made with. On the device that
        the images are on.
        """
        # As torchvision.transforms.v2 does it, to the bit; to import that would take a second of each start
        settings = (self.config.image_mean, self.config.image_std)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in settings)
        return (images.float() * (1 / 255)).sub_(mean).div_(std)

    def read_out(self, x: Tensor, region_masks: Tensor) -> Tensor:
        """x (B, N, D) after a block -> what the head reads of it, (B, head_inputs) / number of read_blocks."""
        if self.config.pool == ("class",):
            return self.norm(x[:, 0])
        x = self.norm(x)
        patches, masks = x[:, 1:], region_masks.flatten(2).to(x.dtype)  # (B, P, D), (B, R, P)
        cover = region_masks.flatten(2).amax(dim=1)  # (B, P)
        face = (cover > FACE_COVER) | (cover.amax(dim=-1, keepdim=True) <= FACE_COVER)  # all patches if none is of it
        of_regions = masks @ patches / masks.sum(dim=-1, keepdim=True).clamp(min=1e-6)  # 0 of one outside of the image
        parts = {"class": x[:, 0], "patches": patches.mean(dim=1), "regions": of_regions.flatten(1)}
        parts["face"] = (face.unsqueeze(-1) * patches).sum(dim=1) / face.sum(dim=-1, keepdim=True)
        return torch.cat([parts[part] for part in self.config.pool], dim=-1)

    def forward(self, images: Tensor, region_masks: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Args:
            images: (B, 3, h, w) float, RGB, from normalize.
            region_masks: (B, 8, G, G) float in [0, 1], in the order of faces.regions.REGIONS.

        Returns:
            logits: (B, num_classes), class 1 = fake.
            mask_weights: w (B, 12) of the last three layers, the first of them first; empty without LAMM.

        Raises:
            ValueError: the images or the masks are not of the sizes that the model was built for.
        """
        side, grid = self.config.img_size, self.config.grid_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images are {tuple(images.shape)}, but this model takes (B, 3, {side}, {side})")
        if region_masks.shape != (images.shape[0], NUM_REGIONS, grid, grid):
            raise ValueError(
                f"region_masks are {tuple(region_masks.shape)}, but {len(images)} images want ({len(images)},"
                f" {NUM_REGIONS}, {grid}, {grid})"
            )

        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, D, G, G) -> (B, D, P) -> (B, P, D)
        x = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.pos_embed  # (B, N, D)
        x = self.norm_pre(x)
        masks = self.mask_processor(region_masks) if self.mask_processor else None  # (B, H, N)

        history, read = [], []
        if self.lamm:
            weights = x.new_full((x.shape[0], NUM_HEADS), 1 / NUM_HEADS)  # w_0
        else:
            weights = None
            lam, theta = (x.new_full((x.shape[0], NUM_HEADS), value) for value in (FIXED_LAMBDA, FIXED_THETA))
        for layer, block in enumerate(self.blocks):
            if self.lamm:
                weights, lam, theta = self.lamm(x, layer, weights)
                history.append(weights)
            x = block(x, masks, weights, lam, theta)
            if layer + 1 in (self.config.read_blocks or (self.config.depth,)):
                read.append(self.read_out(x, region_masks))
        return {"logits": self.head(torch.cat(read, dim=-1)), "mask_weights": history[-3:]}


class LAMMLoss(nn.Module):
    """Cross entropy + diversity_weight · diversity, which asks the samples of a batch to weight heads differently."""

    def __init__(self, diversity_weight: float = 0.2, label_smoothing: float = 0.0):
        super().__init__()
        self.diversity_weight, self.label_smoothing = diversity_weight, label_smoothing

    @staticmethod
    def diversity(weights: Tensor) -> Tensor:
        """w (B, H) of one layer -> mean((Ŵ Ŵᵀ − I)²), Ŵ the rows of w scaled to unit length; 0 for a batch of one."""
        if len(weights) < 2:
            return weights.new_zeros(())
        unit = F.normalize(weights, dim=-1)  # (B, H)
        similarity = unit @ unit.T  # (B, H) x (H, B) -> (B, B)
        return (similarity - torch.eye(len(unit), device=unit.device)).square().mean()

    def forward(self, outputs: dict[str, Tensor | list[Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """outputs of LAMMViT and labels (B,) int64 -> scalars {"total", "ce", "diversity"}, total = ce + diversity.

        mask_weights may have more rows than there are labels: train.py gathers them from all processes. A model without
        LAMM has no weights, and no diversity loss. As in the authors' code, "diversity" is what diversity adds to the
        total: it has its weight on.
        """
        ce = F.cross_entropy(outputs["logits"].float(), labels, label_smoothing=self.label_smoothing)
        per_layer = [self.diversity(w.float()) for w in outputs["mask_weights"]]
        weighted = self.diversity_weight * (torch.stack(per_layer).mean() if per_layer else torch.zeros_like(ce))
        return {"total": ce + weighted, "ce": ce, "diversity": weighted}
