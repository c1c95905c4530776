"""explain.py: the attention shown is that of the fused model, the rollout is right where that is known, the picture
shows it all.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from evaluation import explain
from evaluation.explain import (
    Explanation,
    attention_maps,
    draw_explanation,
    draw_heat,
    draw_regions,
    fit_title,
    region_outlines,
    rollout,
)
from faces.regions import REGIONS, draw_region_masks
from model import LAMMViT, LAMMViTConfig

ABLATIONS = (
    {},
    {"region_guidance": False},
    {"lamm": False},
    {"head_interaction": False},
    {"region_guidance": False, "lamm": False, "head_interaction": False},
)
WIDTH, HEIGHT = 1500, 1140  # of the picture


def make_model(**settings) -> LAMMViT:
    """A small random model, in which no bias is 0 and no gate half open."""
    torch.manual_seed(0)
    model = LAMMViT(
        LAMMViTConfig(**{"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "mlp_ratio": 2.0} | settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_inputs(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (size, 3, 64, 64), generator=generator, dtype=torch.uint8), torch.rand(
        size, 8, 4, 4, generator=generator
    )


def make_landmarks(size: int) -> np.ndarray:
    """(68, 2): a plain face in the middle of a square image, point after point in iBUG's order."""

    def arc(x, y, rx, ry, start, end, count):  # degrees, 0 to the right, 90 down
        angle = np.radians(np.linspace(start, end, count))
        return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)

    jaw, brows = arc(0.5, 0.45, 0.3, 0.42, 180, 0, 17), [arc(x, 0.38, 0.1, 0.05, 190, 350, 5) for x in (0.36, 0.64)]
    nose = [np.stack([np.full(4, 0.5), np.linspace(0.42, 0.56, 4)], axis=1), arc(0.5, 0.58, 0.06, 0.03, 180, 0, 5)]
    eyes = [arc(x, 0.44, 0.06, 0.03, 180, 480, 6) for x in (0.37, 0.63)]
    mouth = [arc(0.5, 0.7, 0.12, 0.06, 180, 510, 12), arc(0.5, 0.7, 0.09, 0.02, 180, 495, 8)]
    return np.concatenate([jaw, *brows, *nose, *eyes, *mouth]).astype(np.float32) * size


def make_explanation(layers: int | None, grid_size: int = 7, seed: int = 0) -> Explanation:
    rng = np.random.default_rng(seed)
    heat = rng.random((grid_size, grid_size), dtype=np.float32)
    return Explanation(heat / heat.sum(), None if layers is None else rng.random((layers, 12), dtype=np.float32))


def draw(
    path: Path, explanation: Explanation, shift: float | None = 0, size: int = 112, title: str = "fake, P(fake) = 0.97"
) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    draw_explanation(image, None if shift is None else make_landmarks(size) + shift, explanation, title, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (WIDTH, HEIGHT)
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("without", ABLATIONS, ids=lambda settings: " ".join(settings) or "full")
def test_the_attention_is_that_of_the_fused_model(without):
    model, (images, masks) = make_model(**without), make_inputs()
    images, seen = images / 255, []
    hooks = [
        block.attn.register_forward_hook(lambda attn, inputs, output: seen.append((attn, *inputs, output)))
        for block in model.blocks
    ]
    with torch.inference_mode():
        model(images, masks)
        for hook in hooks:
            hook.remove()
        maps, weights = attention_maps(model, images, masks)
        maps = list(maps)
        assert len(maps) == len(seen) == 3 and (weights is None) == ("lamm" in without)
        for layer, (attn, x, gates, w, _, _, output) in enumerate(seen):
            assert (gates is None) == ("region_guidance" in without)
            assert maps[layer].shape == (2, 12, 17, 17)
            torch.testing.assert_close(maps[layer].sum(dim=-1), torch.ones(2, 12, 17))
            values = attn.qkv(x).view(2, 17, 3, 12, 4)[:, :, 2].transpose(1, 2)  # (B, H, N, Dh)
            heads = maps[layer] @ values
            if w is not None:
                torch.testing.assert_close(weights[layer], w)
                heads = heads * w[..., None, None]
            torch.testing.assert_close(attn.proj(heads.transpose(1, 2).reshape(2, 17, 48)), output, atol=1e-5, rtol=0)
    assert (maps[0][:, :, 0] - maps[1][:, :, 0]).abs().max() > 1e-3, (
        "layers differ, or the comparison would prove nothing"
    )


def test_the_model_is_left_as_it_was():
    model, (images, masks) = make_model(), make_inputs()
    model.train()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        before = model.eval()(images / 255, masks)["logits"]
        model.train()
        explain.explain(model, images, masks)
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        torch.testing.assert_close(model.eval()(images / 255, masks)["logits"], before, atol=0, rtol=0)
    with pytest.raises(ValueError, match="region_masks are"):
        attention_maps(model.train(), images / 255, masks[:, :5])
    assert model.training and not any(module._forward_pre_hooks for module in model.modules()), (
        "also where the model refuses"
    )


def test_dropout_of_a_model_in_training_leaves_no_trace():
    model, (images, masks) = make_model(dropout=0.5), make_inputs()
    expected, seen = explain.explain(model, images, masks), explain.explain(model.train(), images, masks)
    np.testing.assert_array_equal(seen[1].heat, expected[1].heat)


def test_rollout_of_uniform_attention_is_uniform():
    uniform = torch.full((2, 12, 17, 17), 1 / 17)
    for weights in (None, torch.rand(3, 2, 12)):
        torch.testing.assert_close(rollout([uniform] * 3, weights), torch.full((2, 4, 4), 1 / 16))


def test_rollout_peaks_where_all_attention_goes_and_by_the_weights_of_heads():
    to_one = torch.zeros(1, 12, 17, 17)
    to_one[..., 1 + 4 * 2 + 3] = 1  # row 2, column 3, after the class token
    heat = rollout(iter([to_one] * 2), None)
    assert heat[0, 2, 3] == pytest.approx(1)

    two = to_one.clone()
    two[:, 1:] = 0
    two[:, 1:, :, 1] = 1  # head 0 still looks there, the eleven others at the first patch
    weights = torch.full((1, 1, 12), 0.1)
    weights[0, 0, 0] = 3 * 1.1  # three times as much as the others together
    heat = rollout([two], weights)
    assert heat[0, 2, 3].item() == pytest.approx(0.75) and heat[0, 0, 0].item() == pytest.approx(0.25)


def test_rollout_of_two_layers_by_hand():
    """Two tokens would be too few to see the order of the layers: class token and four patches."""
    first, second = torch.rand(2, 1, 12, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    joint = (second.mean(dim=1)[0] + torch.eye(5)) / 2 @ ((first.mean(dim=1)[0] + torch.eye(5)) / 2)
    expected = joint[0, 1:] / joint[0, 1:].sum()
    torch.testing.assert_close(rollout([first, second], None)[0], expected.view(2, 2))


@pytest.mark.parametrize("pool", [("class", "patches"), ("patches",), ("regions",)])
def test_who_looks_is_what_the_head_reads(pool):
    """The class token, where the head reads it; else all patches: the mean of their rows. The picture says which."""
    model, (images, masks) = make_model(pool=pool), make_inputs()
    with torch.inference_mode():
        maps, weights = attention_maps(model, model.normalize(images), masks)
    rolled = torch.eye(17)
    for attention, w in zip(maps, weights):
        heads = (w[0] / w[0].sum())[:, None, None] * attention[0]
        rolled = (heads.sum(dim=0) + torch.eye(17)) / 2 @ rolled
    row = rolled[0, 1:] if "class" in pool else rolled[1:, 1:].mean(dim=0)
    explanation = explain.explain(model, images, masks)[0]
    np.testing.assert_allclose(explanation.heat.ravel(), row / row.sum(), atol=1e-6)
    axes = Figure().subplots()
    draw_heat(axes, np.zeros((64, 64, 3), np.uint8), explanation.heat, explanation.of_class)
    said = [axes.get_title(loc="left"), axes.figure.axes[1].get_ylabel()]
    assert all(
        (("class token's" in text), ("all patches'" in text)) == ("class" in pool, "class" not in pool) for text in said
    )


def test_explanations_come_for_each_image_by_itself():
    model, (images, masks) = make_model(), make_inputs(3)
    together = explain.explain(model, images, masks)
    for i, one in enumerate(together):
        alone = explain.explain(model, images[i : i + 1], masks[i : i + 1])[0]
        assert (
            one.heat.shape == (4, 4)
            and one.heat.sum() == pytest.approx(1, abs=1e-5)
            and one.lamm_weights.shape == (3, 12)
        )
        np.testing.assert_allclose(one.heat, alone.heat, atol=1e-5)
        np.testing.assert_allclose(one.lamm_weights, alone.lamm_weights, atol=1e-5)
    assert np.abs(together[0].heat - together[1].heat).max() > 1e-5
    with torch.no_grad():
        last = model(model.normalize(images), masks)["mask_weights"][-1]
    np.testing.assert_allclose([one.lamm_weights[-1] for one in together], last, atol=1e-6)
    assert explain.explain(make_model(lamm=False), images, masks)[2].lamm_weights is None


def test_the_outlines_are_those_of_the_masks():
    """Drawn with a cell a pixel, the masks are what the eight outlines enclose."""
    landmarks = make_landmarks(448)
    masks, outlines = draw_region_masks(landmarks, (448, 448), 448), region_outlines(landmarks)
    pixels = np.stack(np.meshgrid(np.arange(448), np.arange(448)), axis=-1).reshape(-1, 2)  # x and y
    assert list(outlines) == list(REGIONS)
    for mask, (name, shapes) in zip(masks, outlines.items()):
        inside = [shape.get_path().transformed(shape.get_patch_transform()).contains_points(pixels) for shape in shapes]
        inside, mask = np.any(inside, axis=0), mask.ravel() > 0.5
        assert (inside & mask).sum() / (inside | mask).sum() > 0.9, name


def test_all_eight_regions_are_drawn_and_told_apart():
    axes = Figure().subplots()
    draw_regions(axes, np.zeros((112, 112, 3), np.uint8), make_landmarks(112))
    drawn = [shape.get_label() for shape in axes.patches]
    assert sorted(drawn) == sorted([*REGIONS, "mouth_corners", "eyebrows"])
    colours = {shape.get_label(): shape.get_edgecolor() for shape in axes.patches}
    assert len(set(colours.values())) == 8
    legend = axes.get_legend()
    named = {
        text.get_text().replace(" ", "_"): line.get_color()
        for text, line in zip(legend.get_texts(), legend.get_lines())
    }
    assert {name: explain.to_rgb(colour) for name, colour in named.items()} == {
        name: colour[:3] for name, colour in colours.items()
    }


def test_a_patch_that_gets_nothing_has_the_last_colour_of_the_scale():
    axes = Figure().subplots()
    draw_heat(axes, np.full((112, 112, 3), 255, np.uint8), np.eye(1, 16, 5).reshape(4, 4))
    shown = np.asarray(axes.images[0].get_array())[14::28, 14::28]  # the centre of each patch
    below, _, above = map(explain.to_rgb, explain.BELOW_EVEN_ABOVE)
    np.testing.assert_allclose(shown.reshape(16, 3), [above if i == 5 else below for i in range(16)], atol=0.01)


@pytest.mark.slow
def test_the_picture_shows_what_differs(tmp_path):
    base, path = make_explanation(2, 14), tmp_path / "why.png"
    plain = draw(path, base, size=224)
    np.testing.assert_array_equal(draw(path, base, size=224), plain)
    other_heat = draw(path, base._replace(heat=base.heat[::-1]), size=224) != plain
    assert other_heat[:700, 750:].any() and not other_heat[700:].any() and not other_heat[:, :700].any()
    other_weights = draw(path, base._replace(lamm_weights=base.lamm_weights[::-1]), size=224) != plain
    assert other_weights[700:].any() and not other_weights[:680].any()
    outside = draw(path, base, shift=120, size=224) != plain  # in part; clipped to the panel
    assert outside[:, :565].any() and not outside[:, 565:].any() and not outside[680:].any()
    draw(path, base, shift=1e5, size=224)
    unguided = draw(path, base, shift=None, size=224) != plain  # no regions, and no list of them
    assert (
        unguided[60:680, :565].any()
        and unguided[60:680, 565:740].any()
        and not unguided[:60, 760:].any()
        and not unguided[700:].any()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "title"),
    [(1, "長" * 240), (2, "W" * 90 + " real"), (12, "a $x^$ \udce9\n" * 30 + "real"), (None, "")],
    ids=("boxes", "wide", "odd", "empty"),
)
def test_nothing_is_clipped(layers, title, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: (figures.append(figure), save(figure, *args, **options))
    )
    draw(tmp_path / "why.png", make_explanation(layers), title=title)
    figures[0].draw_without_rendering()  # extents in pixels of the figure, not of the file
    texts = [text for text in figures[0].findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert len(texts) > 20 or layers is None
    for text in texts:
        extent = text.get_window_extent()
        assert (
            extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= figures[0].bbox.x1 and extent.y1 <= figures[0].bbox.y1
        ), text


def test_a_long_title_keeps_the_verdict():
    title = fit_title("a" * 250 + ".png: fake, P(fake) = 0.9731, fake from 0.5123 on")
    assert title.count("\n") == 1 and title.startswith("aaa") and " … " in title.replace("\n", " ")
    assert title.replace("\n", " ").endswith("fake, P(fake) = 0.9731, fake from 0.5123 on")
    assert fit_title("a.png: real") == "a.png: real" and fit_title("\n長 \udce9 é") == "□□ □ é", (
        "a box for what the font lacks"
    )
