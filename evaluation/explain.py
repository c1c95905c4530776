"""Why the model said so, for one face: where it looked, and how strongly each head (region) counted.

    image + region masks  ->  Explanation  ->  one picture: the regions, the attention over the face, LAMM's weights

`python inference.py --images photo.jpg --explain why` writes such pictures. The attention is that of the model in use:
hooks note what enters RG-MHA in each block during an ordinary forward. The fused operator never holds the attention
whole, so it is computed again from what was noted, by attention/textbook.py. Letters in shape comments are those of
model.py, and L layers.

It is the class token that looks; in a model whose head does not read it (--pool), all patches together. What they
looked at is not what was decided on: read the picture as a hint, and no bright patch as a proof.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon
from matplotlib.patheffects import withStroke
from torch import Tensor

from attention.textbook import textbook_attention
from evaluation.figures import HEADS, STYLE
from faces.regions import CONVEX_HULLS, CORNER_RADIUS, OUTLINES, REGIONS
from model import NUM_HEADS, LAMMViT, RegionGuidedAttention

# Okabe and Ito's eight colours, which the colour-blind tell apart, in the order of REGIONS; neighbours in the face
# differ most.
COLOURS = dict(zip(REGIONS, ("#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#000000", "#0072b2", "#e69f00")))
MIXTURE = "#666666"  # of the heads that see several regions
BELOW_EVEN_ABOVE = ("#2b6cb0", "#f5f5f5", "#e04a2b")  # of the heat map; light enough to see the face through them
FIGURE_SIZE = (10, 7.6)  # inches, at STYLE's resolution 1500 x 1140 pixels
TITLE_WIDTH = 170  # characters
LEAST_RANGE = 1.25  # of the colours of the heat map: attention that is nearly even gets no deep colours


class Explanation(NamedTuple):
    """What draw_explanation shows of one face, beside the face."""

    heat: np.ndarray  # (G, G) float32, share of each patch in the rollout of the attention; sum 1
    lamm_weights: np.ndarray | None  # w (L, H) float32; None: the model has no LAMM
    of_class: bool = True  # the class token's attention; else the mean of the patches'


# ------------------------------------------------------------------------------------------------------------ attention


def attention_maps(model: LAMMViT, images: Tensor, region_masks: Tensor) -> tuple[Iterator[Tensor], Tensor | None]:
    """The attention A of every layer, as the model has it in eval mode, without dropout.

    Args:
        images, region_masks: as model.forward takes them, on its device.

    Returns:
        maps: L times A (B, H, N, N), rows sum to 1, each computed when it is asked for, so that they need not all be in
            memory.
        weights: w (L, B, H) of LAMM; None without LAMM, where all heads count the same.
    """
    calls: list[tuple[RegionGuidedAttention, tuple]] = []  # of each block, the module and its arguments (x, M, w, λ, θ)
    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, inputs: calls.append((attn, inputs)))
        for block in model.blocks
    ]
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(images, region_masks)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    weights = torch.stack([w for _, (_, _, w, _, _) in calls]) if model.lamm else None
    return (layer_attention(attn, x, masks, lam, theta) for attn, (x, masks, _, lam, theta) in calls), weights


@torch.inference_mode()
def layer_attention(
    attn: RegionGuidedAttention, x: Tensor, masks: Tensor | None, lam: Tensor | None, theta: Tensor | None
) -> Tensor:
    """A (B, H, N, N) of one layer; arguments as for RegionGuidedAttention.forward."""
    B, N, D = x.shape
    # (B, H, N, Dh)
    q, k, _ = (part.transpose(1, 2) for part in attn.qkv(x).view(B, N, 3, NUM_HEADS, D // NUM_HEADS).unbind(2))
    values = torch.eye(N, dtype=q.dtype, device=q.device).expand(B, NUM_HEADS, N, N)  # A V is A if V is the identity
    return (
        F.scaled_dot_product_attention(q, k, values)
        if masks is None
        else textbook_attention(q, k, values, masks, lam, theta)
    )


@torch.inference_mode()
def rollout(maps: Iterable[Tensor], weights: Tensor | None, of_class: bool = True) -> Tensor:
    """Attention rollout (Abnar and Zuidema, ACL 2020, arXiv 2005.00928).

    Where they take the plain mean over heads, heads count here by their share of w, as they do in the model. MLP, head
    interaction and the size of the values are left out, as in any rollout.

    Args:
        maps: L times A (B, H, N, N), the first layer first.
        weights: w (L, B, H), or None for all heads alike.
        of_class: of the class token; else the mean of the patches', that is, what each patch gets from all.

    Returns:
        (B, G, G), the share of each patch; sum 1.
    """
    rolled = None  # (B, N, N): how much of each token of the input is in each token after the layers so far
    for layer, attention in enumerate(maps):
        B, H, N, _ = attention.shape
        w = attention.new_ones(B, H) if weights is None else weights[layer]
        mean = torch.einsum("bh,bhij->bij", w / w.sum(dim=-1, keepdim=True), attention)  # rows sum to 1, as those of A
        step = (mean + torch.eye(N, dtype=mean.dtype, device=mean.device)) / 2  # the residual connection
        rolled = step if rolled is None else step @ rolled  # (B, N, N) x (B, N, N)
    # Without the share of the class token itself: (B, P)
    patches = rolled[:, 0, 1:] if of_class else rolled[:, 1:, 1:].mean(dim=1)
    grid_size = math.isqrt(patches.shape[1])
    return (patches / patches.sum(dim=-1, keepdim=True)).view(-1, grid_size, grid_size)


def explain(model: LAMMViT, images: Tensor, region_masks: Tensor) -> list[Explanation]:
    """images (B, 3, h, w) uint8 RGB and region_masks (B, 8, G, G), on any device -> one Explanation for each image."""
    device = next(model.parameters()).device
    maps, weights = attention_maps(model, model.normalize(images.to(device)), region_masks.to(device))
    of_class = "class" in model.config.pool
    heat = rollout(maps, weights, of_class).float().cpu().numpy()
    # (L, B, H) -> (B, L, H)
    per_image = [None] * len(heat) if weights is None else weights.transpose(0, 1).float().cpu().numpy()
    return [Explanation(*pair, of_class) for pair in zip(heat, per_image)]


# -------------------------------------------------------------------------------------------------------------- picture


def draw_explanation(
    image: np.ndarray, landmarks: np.ndarray | None, explanation: Explanation, title: str, path: Path | BinaryIO
) -> None:
    """Writes the picture, a PNG of 1500 x 1140 pixels, to a path or a stream.

    Args:
        image: (h, w, 3) uint8 RGB, as the model got it.
        landmarks: (68, 2) x and y in pixels of the image; may lie outside of it. None: the model has no region
            guidance.
        title: verdict and score, any text; a very long one loses its middle.
    """
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    faces, bars = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    left, right = faces.subplots(1, 2)
    if landmarks is None:
        show(left, image, f"What it saw: {image.shape[1]} x {image.shape[0]} pixels, and no regions")
    else:
        draw_regions(left, image, landmarks)
    draw_heat(right, image, explanation.heat, explanation.of_class)
    draw_weights(bars.subplots(), explanation.lamm_weights)
    text = figure.suptitle(fit_title(title), fontsize=12, fontweight="bold", parse_math=False)
    text.set_fontsize(12 * min(1, 0.97 * figure.bbox.width / max(text.get_window_extent().width, 1)))
    figure.savefig(path, format="png", **STYLE)


def fit_title(title: str) -> str:
    """At most two lines of what the font can show. File names may be long, in any script, and hold line breaks and
    bytes that are no text.
    """
    known = get_font(findfont(FontProperties(weight="bold"))).get_charmap()
    title = "".join(c if c.isprintable() and ord(c) in known else "\u25a1" for c in title)
    if len(title) > TITLE_WIDTH:  # the name comes first, the verdict last
        title = f"{title[: TITLE_WIDTH // 2]} … {title[3 - TITLE_WIDTH // 2 :]}"
    return "\n".join(textwrap.wrap(title, TITLE_WIDTH // 2 + 10))


def region_outlines(landmarks: np.ndarray) -> dict[str, list[Patch]]:
    """The shapes that faces.regions.draw_region_masks fills in polygon style, in pixels of the image; eyebrows and
    corners have two.
    """
    points = np.asarray(landmarks, dtype=np.float32)
    eye_distance = max(np.linalg.norm(points[36:42].mean(axis=0) - points[42:48].mean(axis=0)), 1.0)
    shapes: dict[str, list[Patch]] = {}
    for name, members in REGIONS.items():
        if name == "mouth_corners":
            shapes[name] = [Circle(points[corner], CORNER_RADIUS * eye_distance) for corner in members]
        else:
            corners = [points[list(outline)] for outline in OUTLINES[name]]
            shapes[name] = [Polygon(cv2.convexHull(c)[:, 0] if name in CONVEX_HULLS else c) for c in corners]
    return shapes


def show(axes: Axes, picture: np.ndarray, title: str) -> None:
    """A picture (h, w, 3) as the whole of a panel, whatever is drawn over it later."""
    axes.imshow(picture)
    axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5), xticks=(), yticks=())
    axes.set_title(title, loc="left", fontsize=10)


def draw_regions(axes: Axes, image: np.ndarray, landmarks: np.ndarray) -> None:
    """The face, as the model got it, with the outlines of the eight regions."""
    show(axes, image, f"What it saw: {image.shape[1]} x {image.shape[0]} pixels and eight regions")
    for name, shapes in region_outlines(landmarks).items():
        dark = sum(to_rgb(COLOURS[name])) < 1.5
        for shape in shapes:
            shape.set(fill=False, edgecolor=COLOURS[name], linewidth=1.5, joinstyle="round", label=name)
            # seen on any skin
            shape.set_path_effects([withStroke(linewidth=2.8, foreground="white" if dark else "black", alpha=0.7)])
            axes.add_patch(shape)
    lines = [Line2D([], [], color=colour, linewidth=4) for colour in COLOURS.values()]
    axes.legend(
        lines,
        HEADS[: len(REGIONS)],
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=9,
        handlelength=1,
    )


def draw_heat(axes: Axes, image: np.ndarray, heat: np.ndarray, of_class: bool = True) -> None:
    """The face in gray, each patch tinted by its share of the attention: red above an even share, blue below."""
    whose = "the class token's" if of_class else "all patches'"
    ratio = heat * heat.size
    limit = max(LEAST_RANGE, ratio.max())
    scale = ScalarMappable(LogNorm(1 / limit, limit), LinearSegmentedColormap.from_list("share", BELOW_EVEN_ABOVE))
    colours = scale.to_rgba(np.maximum(ratio, 1 / limit))[..., :3]  # a share of 0 has no logarithm
    tint = cv2.resize(colours, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)  # (G, G, 3) -> (h, w, 3)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] / 255  # (h, w, 1)
    show(axes, tint * (0.35 + 0.65 * gray), f"Where it looked: rollout of {whose} attention")
    ticks = np.geomspace(1 / limit, limit, 7)
    bar = axes.figure.colorbar(
        scale, ax=axes, shrink=0.9, pad=0.02, extend="min" if ratio.min() < 1 / limit else "neither"
    )
    bar.set_ticks(ticks, labels=[f"{tick:.2f} ×" for tick in ticks], fontsize=9)
    bar.ax.minorticks_off()
    bar.set_label(f"share of {whose} attention,\nrelative to even", fontsize=9)


def draw_weights(axes: Axes, weights: np.ndarray | None) -> None:
    """Bars in groups, one for each head; in a group, one for each layer."""
    axes.set_title("How strongly each head (region) counts", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if weights is None:
        axes.set(xticks=(), yticks=(), facecolor="#f4f4f4")
        axes.spines[:].set_visible(False)
        axes.text(
            0.5,
            0.5,
            "This model has no LAMM:\nall heads count the same, at every layer and for every face.",
            ha="center",
            va="center",
            linespacing=1.6,
        )
        return
    layers, heads = weights.shape
    width = 0.8 / layers
    colours = [*COLOURS.values(), *[MIXTURE] * (heads - len(COLOURS))]
    for layer, row in enumerate(weights):
        axes.bar(
            np.arange(heads) + (layer - (layers - 1) / 2) * width,
            row,
            width,
            color=[shade(colour, layer, layers) for colour in colours],
        )
    axes.axhline(
        weights.mean(),
        color="black",
        linewidth=0.9,
        linestyle=":",
        label=f"mean over heads and layers, {weights.mean():.3f}",
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, borderpad=0, borderaxespad=0.4)
    axes.axvline(len(REGIONS) - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_xticks(range(heads), [name.replace(" ", "\n") for name in HEADS], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set(
        xlim=(-0.6, heads - 0.4),
        xlabel="head, by the region it looks through; the last four have mixtures of regions",
        ylabel="weight w, set by LAMM",
    )
    if layers > 1:
        shades = ScalarMappable(
            BoundaryNorm(np.arange(layers + 1) + 0.5, layers),
            ListedColormap([shade(MIXTURE, layer, layers) for layer in range(layers)]),
        )
        bar = axes.figure.colorbar(shades, ax=axes, pad=0.01)
        bar.set_ticks(range(1, layers + 1))
        bar.ax.tick_params(which="both", length=0, labelsize=8)
        bar.set_label("layer")


def shade(colour: str, layer: int, layers: int) -> np.ndarray:
    """A colour as it stands for a layer: pale at the first, itself at the last."""
    share = 1 if layers == 1 else 0.4 + 0.6 * layer / (layers - 1)
    return 1 - share * (1 - np.array(to_rgb(colour)))
