"""model.py: agreement with the authors' code, the configuration's limits, every parameter learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import v2

from attention import region_gated_attention
from model import LAMM, LAMMLoss, LAMMViT, LAMMViTConfig, MaskProcessor
from runtime.pretrained import interpolate_positions, load_trunk, translate
from runtime.trunk_files import Read

GOLDEN = Path(__file__).parent / "data" / "parity_small.npz"
SMALL = LAMMViTConfig(img_size=64, patch_size=16, embed_dim=48, depth=4, mlp_ratio=2.0)


def sample(config: LAMMViTConfig, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, config.img_size, config.img_size, generator=generator)
    masks = torch.rand(size, 8, config.grid_size, config.grid_size, generator=generator)
    return images, masks, torch.arange(size) % 2


@pytest.fixture(scope="module")
def golden() -> tuple[dict, LAMMViT, dict, dict]:
    """The golden file, its model after a backward pass, the outputs and the losses."""
    values = dict(np.load(GOLDEN))
    config = LAMMViTConfig(
        img_size=int(values["config_img_size"]),
        patch_size=int(values["config_patch_size"]),
        embed_dim=int(values["config_dim"]),
        depth=int(values["config_num_layers"]),
        num_heads=int(values["config_num_heads"]),
        num_classes=int(values["config_num_classes"]),
        mlp_ratio=int(values["config_mlp_dim"]) / int(values["config_dim"]),
    )
    model = LAMMViT(config).eval()
    model.load_state_dict(
        {key.removeprefix("state/"): torch.from_numpy(values[key]) for key in values if key.startswith("state/")},
        strict=True,
    )
    outputs = model(torch.from_numpy(values["images"]), torch.from_numpy(values["region_masks"]))
    losses = LAMMLoss(diversity_weight=0.2)(outputs, torch.from_numpy(values["labels"]))
    losses["total"].backward()
    return values, model, outputs, losses


def test_agrees_with_the_authors_outputs_and_losses(golden):
    values, _, outputs, losses = golden
    np.testing.assert_allclose(outputs["logits"].detach(), values["logits"], atol=1e-5)
    np.testing.assert_allclose(torch.stack(outputs["mask_weights"]).detach(), values["mask_weights"], atol=1e-5)
    for name in ("total", "ce", "diversity"):
        assert losses[name].item() == pytest.approx(float(values[f"loss_{name}"]), abs=1e-5)


def test_agrees_with_all_of_the_authors_gradients(golden):
    values, model, _, _ = golden
    gradients = {key.removeprefix("grad/"): values[key] for key in values if key.startswith("grad/")}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, gradients[name], atol=1e-5, err_msg=name)


def textbook(
    state: dict, config: LAMMViTConfig, images: torch.Tensor, region_masks: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The model written down a second time, from the formulas alone: one head after the other, nothing shared with
    model.py.
    """
    B, D, p, G, Dh = len(images), config.embed_dim, config.patch_size, config.grid_size, config.embed_dim // 12

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def mlp(x, name, activation):
        return linear(activation(linear(x, f"{name}.0")), f"{name}.2")

    patches = images.view(B, 3, G, p, G, p).permute(0, 2, 4, 1, 3, 5).reshape(B, G * G, -1)
    x = patches @ state["patch_embed.weight"].reshape(D, -1).T + state["patch_embed.bias"]
    x = torch.cat([state["cls_token"].repeat(B, 1, 1), x], 1) + state["pos_embed"]
    regions = [linear(region_masks[:, r].reshape(B, -1), f"mask_processor.mask_projection.{r}") for r in range(8)]
    mixtures = [("eye_forehead", (0, 1, 7)), ("mouth_chin", (3, 4, 5)), ("nose_contour", (2, 6))]
    heads = regions + [
        sum(w * regions[r] for w, r in zip(state[f"mask_processor.combine_weights_{name}"], members))
        for name, members in mixtures
    ]
    heads.append(sum(w * region for w, region in zip(state["mask_processor.combine_weights_all"].softmax(0), regions)))
    M = torch.cat([torch.zeros(B, 12, 1), torch.stack(heads, 1)], 2)

    w, history = torch.full((B, 12), 1 / 12), []
    for layer in range(config.depth):
        g = linear(torch.cat([x.mean(1), x.max(1)[0]], -1), "lamm.global_feature_fusion")
        c = torch.cat([g, state["lamm.layer_embeddings"][layer].repeat(B, 1)], -1)
        c = layer_norm(gelu(linear(c, "lamm.context_mlp.0")), "lamm.context_mlp.2")
        alpha = mlp(torch.cat([c, w], -1), "lamm.region_importance_mlp", gelu).softmax(-1)
        w = linear(c, "lamm.new_info_gate").sigmoid() * alpha + linear(c, "lamm.memory_gate").sigmoid() * w
        history.append(w)
        lam = torch.log1p(torch.exp(mlp(torch.cat([c, w], -1), "lamm.lambda_generator", torch.tanh)))
        theta = state["lamm.base_theta"] + mlp(torch.cat([c, w], -1), "lamm.theta_generator", torch.tanh).tanh()

        name, outputs = f"blocks.{layer}", []
        q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(D, -1)
        for h in range(12):
            part = slice(h * Dh, (h + 1) * Dh)
            gate = (lam[:, h, None, None] * (M[:, h, :, None] * M[:, h, None, :] - theta[:, h, None, None])).sigmoid()
            scores = q[..., part] @ k[..., part].transpose(1, 2) / Dh**0.5
            outputs.append(w[:, h, None, None] * ((scores * gate).softmax(-1) @ v[..., part]))
        y = linear(torch.cat(outputs, -1), f"{name}.attn.proj")
        hq, hk, hv = linear(y.reshape(B, -1, 12, Dh).mean(1), f"{name}.head_interaction.qkv_heads").split(Dh, -1)
        mixed = (hq @ hk.transpose(1, 2) / Dh**0.5).softmax(-1) @ hv
        x = x + y + linear(mixed.reshape(B, 1, D), f"{name}.head_interaction.proj")
        x = x + linear(gelu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.3")
    return linear(layer_norm(x[:, 0], "norm"), "head"), history[-3:]


def test_agrees_with_the_formulas_at_another_size():
    config = LAMMViTConfig(img_size=224, embed_dim=96, depth=4)
    torch.manual_seed(0)
    model = LAMMViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no bias stays 0
    images, masks, labels = sample(config, 3)
    outputs = model(images, masks)
    losses = LAMMLoss(0.2)(outputs, labels)
    losses["total"].backward()

    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    logits, weights = textbook(state, config, images, masks)
    unit = [w / w.norm(dim=1, keepdim=True) for w in weights]
    diversity = sum((u @ u.T - torch.eye(3)).square().mean() for u in unit) / 3
    total = 0.2 * diversity - logits.log_softmax(-1)[range(3), labels].mean()
    total.backward()
    torch.testing.assert_close(outputs["logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(outputs["mask_weights"]), torch.stack(weights), atol=1e-5, rtol=0)
    assert losses["total"].item() == pytest.approx(total.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_every_parameter_gets_a_gradient():
    model = LAMMViT(SMALL)
    images, masks, labels = sample(SMALL)
    LAMMLoss()(model(images, masks), labels)["total"].backward()
    assert [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 8}, "num_heads is 8"),
        ({"num_heads": 16, "embed_dim": 768}, "num_heads is 16"),
        ({"embed_dim": 100}, "embed_dim is 100"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"img_size": 225}, "img_size is 225"),
        ({"depth": 0}, "depth 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LAMMViTConfig(**change)


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        LAMMViTConfig().depth = 3


def test_inputs_of_other_sizes_are_refused():
    model = LAMMViT(SMALL)
    images, masks, _ = sample(SMALL)
    with pytest.raises(ValueError, match="images are"):
        model(images[..., :48], masks)
    with pytest.raises(ValueError, match="region_masks are"):
        model(images, masks[:2])


def test_a_closed_gate_makes_scores_zero_and_excludes_no_key():
    q, k, v = torch.randn(3, 2, 12, 5, 4)
    masks, theta = torch.zeros(2, 12, 5), torch.ones(2, 12)
    closed = region_gated_attention(q, k, v, masks, torch.full((2, 12), 1e4), theta)  # σ(1e4 · (0 − 1)) = 0
    torch.testing.assert_close(closed, v.mean(dim=2, keepdim=True).expand_as(v))
    opened = region_gated_attention(q, k, v, masks, torch.full((2, 12), 1e4), -theta)
    torch.testing.assert_close(opened, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_mask_processor_mixes_the_documented_regions():
    processor = MaskProcessor(num_patches=4)
    with torch.no_grad():
        for project in processor.mask_projection:
            project.weight.copy_(torch.eye(4))
            project.bias.zero_()
    regions = torch.rand(1, 8, 2, 2)
    masks, flat = processor(regions), regions.flatten(2)
    assert masks.shape == (1, 12, 5) and not masks[:, :, 0].any()  # nothing for the class token
    torch.testing.assert_close(masks[:, :8, 1:], flat)
    for head, members in ((8, [0, 1, 7]), (9, [3, 4, 5]), (10, [2, 6])):
        torch.testing.assert_close(masks[:, head, 1:], flat[:, members].sum(dim=1))
    torch.testing.assert_close(masks[:, 11, 1:], flat.mean(dim=1))


def test_lamm_memory_carries_the_weights_from_layer_to_layer():
    lamm = LAMM(48, 3)
    x = torch.randn(2, 17, 48)
    with torch.no_grad():
        lamm.memory_gate.bias.fill_(100)  # β = 1
        lamm.memory_gate.weight.zero_()
        lamm.new_info_gate.bias.fill_(-100)  # γ = 0
        lamm.new_info_gate.weight.zero_()
    previous = torch.rand(2, 12)
    torch.testing.assert_close(lamm(x, 1, previous)[0], previous)


def test_mask_weights_are_those_of_the_last_three_layers():
    images, masks, _ = sample(SMALL)
    for depth, expected in ((1, 1), (3, 3), (4, 3)):
        model = LAMMViT(LAMMViTConfig(img_size=64, embed_dim=48, depth=depth)).eval()
        assert [tuple(w.shape) for w in model(images, masks)["mask_weights"]] == [(4, 12)] * expected


def test_diversity_by_hand():
    assert LAMMLoss.diversity(torch.rand(1, 12)) == 0  # a batch of one
    assert LAMMLoss.diversity(torch.eye(2, 12)) == 0  # nothing in common
    # all alike: 1 everywhere off the diagonal
    assert LAMMLoss.diversity(torch.ones(4, 12)).item() == pytest.approx(12 / 16)


def test_initial_values():
    torch.manual_seed(0)
    model = LAMMViT(LAMMViTConfig(depth=2))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            fan_out, fan_in = module.weight.shape
            assert module.weight.abs().max() <= (6 / (fan_in + fan_out)) ** 0.5, name
            assert not module.bias.any(), name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lamm.layer_embeddings.std().item() == pytest.approx(1, rel=0.3)
    assert not model.lamm.base_theta.any() and (model.mask_processor.combine_weights_all == 1).all()


def test_head_interaction_is_the_same_for_every_token_and_computed_once(monkeypatch):
    model = LAMMViT(SMALL).eval()
    block, x = model.blocks[0], torch.randn(2, 17, 48)
    sizes = []
    block.head_interaction.proj.register_forward_hook(
        lambda module, inputs, output: sizes.append(tuple(inputs[0].shape))
    )
    added = block.head_interaction(x) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-5, rtol=0)
    assert sizes == [(2, 1, 48)]


def test_samples_of_a_batch_do_not_see_each_other():
    model = LAMMViT(SMALL).eval()
    images, masks, _ = sample(SMALL)
    together = model(images, masks)["logits"]
    alone = torch.cat([model(images[i : i + 1], masks[i : i + 1])["logits"] for i in range(len(images))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone():
    model = LAMMViT(SMALL)
    images, masks, _ = sample(SMALL)
    first, second = (model(images, masks)["logits"] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(images, masks)["logits"] for _ in range(2))
    assert torch.equal(first, second)


def test_masks_change_the_answer():
    model = LAMMViT(SMALL).eval()
    images, masks, _ = sample(SMALL)
    for region in range(8):
        changed = masks.clone()
        changed[:, region] += 1
        assert not torch.allclose(model(images, masks)["logits"], model(images, changed)["logits"], atol=1e-6)


# --------------------------------------------------------------------------------------------- without parts, plain ViT

NOTHING = {"region_guidance": False, "lamm": False, "head_interaction": False}


@pytest.mark.parametrize(
    "without",
    [("region_guidance",), ("lamm",), ("head_interaction",), ("region_guidance", "head_interaction"), tuple(NOTHING)],
)
def test_without_a_part_every_parameter_that_is_left_gets_a_gradient(without):
    model = LAMMViT(replace(SMALL, **{part: False for part in without}))
    images, masks, labels = sample(SMALL)
    LAMMLoss()(model(images, masks), labels)["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    names = {name.split(".")[0] for name in model.state_dict()}
    assert ("mask_processor" in names) == ("region_guidance" not in without) and ("lamm" in names) == (
        "lamm" not in without
    )


def test_what_each_part_is_responsible_for():
    images, masks, labels = sample(SMALL)
    other = masks.flip(0)

    def logits(masks: torch.Tensor, **parts: bool) -> torch.Tensor:
        torch.manual_seed(0)
        return LAMMViT(replace(SMALL, **parts)).eval()(images, masks)["logits"]

    assert not torch.equal(logits(masks, lamm=False), logits(other, lamm=False)), "masks count without LAMM"
    assert torch.equal(logits(masks, region_guidance=False), logits(other, region_guidance=False)), (
        "and not without guidance"
    )
    outputs = LAMMViT(replace(SMALL, lamm=False))(images, masks)
    assert outputs["mask_weights"] == [] and LAMMLoss()(outputs, labels)["diversity"] == 0
    model = LAMMViT(replace(SMALL, lamm=False)).eval()
    with torch.no_grad():  # the fixed gate: λ = 1, θ = 0, w = 1
        x = torch.randn(2, SMALL.grid_size**2 + 1, 48)
        gate = model.mask_processor(masks[:2])
        q, k, v = (part.transpose(1, 2) for part in model.blocks[0].attn.qkv(x).view(2, -1, 3, 12, 4).unbind(2))
        scores = q @ k.transpose(-1, -2) / 2 * (gate[..., :, None] * gate[..., None, :]).sigmoid()
        expected = model.blocks[0].attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        torch.testing.assert_close(model.blocks[0].attn(x, gate, None, torch.ones(2, 12), torch.zeros(2, 12)), expected)


def random_vit(**size) -> torch.nn.Module:
    torch.manual_seed(1)
    vit = torchvision.models.VisionTransformer(**size).eval()
    torch.nn.init.normal_(vit.heads.head.weight)  # torchvision's are 0
    torch.nn.init.normal_(vit.class_token)
    return vit


@pytest.mark.slow
def test_without_all_parts_it_is_torchvisions_vit_b_16():
    vit = random_vit(
        image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=2
    )
    trunk = translate("vit", Read(vit.state_dict(), {}, "vit"))
    model = LAMMViT(LAMMViTConfig(**NOTHING, **trunk.config)).eval()
    assert load_trunk(model, trunk) == [] and trunk.unused == ["heads.head.weight", "heads.head.bias"]
    model.head.load_state_dict(vit.heads.head.state_dict())
    images, masks, _ = sample(model.config, size=2)
    with torch.no_grad():
        torch.testing.assert_close(model(images, masks)["logits"], vit(images), atol=1e-4, rtol=0)
    assert (
        sum(map(torch.numel, model.parameters())) == sum(map(torch.numel, vit.parameters()))
        and model.config.norm_eps == 1e-6
    )


def test_what_has_a_counterpart_is_mapped_and_the_rest_told():
    vit = random_vit(image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10)
    state = vit.state_dict()
    old_names = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): values for name, values in state.items()
    }
    for weights in (state, old_names):
        trunk = translate("vit", Read(weights, {}, "vit"))
        model = LAMMViT(replace(SMALL, depth=2, **trunk.config))
        lamm = {name: values.clone() for name, values in model.lamm.state_dict().items()}
        unused = load_trunk(model, trunk)
        assert {name.split(".")[1] for name in unused} == {"2"} and "heads.head.weight" in trunk.unused
        mapped = model.state_dict()
        for ours, theirs in (
            ("patch_embed.weight", "conv_proj.weight"),
            ("cls_token", "class_token"),
            ("pos_embed", "encoder.pos_embedding"),
            ("norm.bias", "encoder.ln.bias"),
            ("blocks.1.attn.proj.weight", "encoder.layers.encoder_layer_1.self_attention.out_proj.weight"),
            ("blocks.0.mlp.3.bias", "encoder.layers.encoder_layer_0.mlp.3.bias"),
        ):
            assert torch.equal(mapped[ours], state[theirs]), ours
        assert all(torch.equal(values, lamm[name]) for name, values in model.lamm.state_dict().items())


def test_positions_are_interpolated_to_another_grid():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    field = torch.stack([rows, columns], dim=-1).view(1, 64, 2)
    positions = torch.cat([torch.full((1, 1, 2), -5.0), field], dim=1)
    assert interpolate_positions(positions, 8) is positions
    for grid in (4, 16):
        scaled = interpolate_positions(positions, grid)
        assert scaled.shape == (1, grid * grid + 1, 2) and (scaled[0, 0] == -5).all()
        expected = (torch.arange(grid) + 0.5) * 8 / grid - 0.5  # centres of the new patches in the old grid
        inner = slice(grid // 4, -grid // 4)  # a border bends
        torch.testing.assert_close(
            scaled[0, 1:].view(grid, grid, 2)[inner, inner, 0],
            expected[inner, None].expand(-1, grid // 2),
            atol=0.06,
            rtol=0,
        )
        torch.testing.assert_close(
            scaled[0, 1:].view(grid, grid, 2)[inner, inner, 1],
            expected[None, inner].expand(grid // 2, -1),
            atol=0.06,
            rtol=0,
        )


def test_the_head_reads_the_blocks_it_is_told():
    """Each of read_blocks gives what a model of that depth would read."""
    config = replace(SMALL, pool=("class", "patches", "face", "regions"), read_blocks=(1, 3, 4))
    torch.manual_seed(0)
    model = LAMMViT(config).eval()
    images, masks, _ = sample(config)
    seen = []
    model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    model(images, masks)
    assert seen[0].shape == (4, config.head_inputs) == (4, 3 * 48 * 11)
    for place, depth in enumerate(config.read_blocks):
        shallow = LAMMViT(replace(config, depth=depth, read_blocks=())).eval()
        state = model.state_dict()
        own = {name: state[name][:depth] if "layer_emb" in name else state[name] for name in shallow.state_dict()}
        shallow.load_state_dict({name: own[name] for name in own if not name.startswith("head.")}, strict=False)
        shallow.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
        shallow(images, masks)
        torch.testing.assert_close(seen[0][:, place * 528 : (place + 1) * 528], seen[-1])
    for blocks in ((1, 3), (3, 1, 4), (0, 4), (4, 4)):
        with pytest.raises(ValueError, match="read_blocks are"):
            LAMMViTConfig(depth=4, read_blocks=blocks)


def test_the_head_reads_the_patches_of_the_face():
    """Those that a region covers by more than a quarter; all of them where there is none, or no face in the image."""
    config = replace(SMALL, region_guidance=False, pool=("patches", "face"))
    assert config.uses_masks and replace(config, pool=("patches",)).uses_masks is False
    model = LAMMViT(config)
    x, masks = torch.randn(2, 1 + config.grid_size**2, 48), torch.zeros(2, 8, config.grid_size, config.grid_size)
    masks[0, 2].view(-1)[:3] = torch.tensor([0.25, 0.3, 0.1])
    masks[0, 5].view(-1)[:3] = torch.tensor([0.2, 0.0, 1.0])
    seen, patches = model.read_out(x, masks), model.norm(x)[:, 1:]
    torch.testing.assert_close(seen[:, :48], patches.mean(dim=1))
    torch.testing.assert_close(seen[0, 48:], patches[0, 1:3].mean(dim=0))
    torch.testing.assert_close(seen[1, 48:], patches[1].mean(dim=0))


def test_normalizes_as_torchvision_does():
    """To the bit, all 256 values in each channel."""
    model = LAMMViT(LAMMViTConfig(img_size=32, patch_size=16, embed_dim=24, depth=1, image_mean=(0.48, 0.46, 0.41)))
    images = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    pixels = v2.functional.to_dtype(images, torch.float32, scale=True)
    theirs = v2.functional.normalize(pixels, list(model.config.image_mean), list(model.config.image_std))
    assert torch.equal(model.normalize(images), theirs)
