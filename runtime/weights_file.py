"""Weights as they are shipped: one safetensors file of what was trained, with the settings that a checkpoint has.

    output_model/best_model.pth  ->  weights/lamm_vit.safetensors  ->  the same dict as a checkpoint's

The trunk is not in it: the file names it, with its SHA-256, as a checkpoint of `train.py --tune norms` does. A
safetensors file holds numbers and text alone, so nothing in it is ever executed.
"""

import json
from pathlib import Path

import torch

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "lamm_vit.safetensors"
# Parts of a checkpoint that are tensors, or hold some; all others go into the text
TENSORS = ("model", "framing")
# What a model is used without: the record of a run
LEFT_OUT = ("lamm_weights", "features", "sizes", "window", "device", "samples", "epoch")


def write_weights(checkpoint: dict, path: Path) -> None:
    """A checkpoint's weights and settings as one safetensors file, matrices in half precision.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {"images": checkpoint["images"]}
    settings = {"framing": {}}
    for name, values in checkpoint["model"].items():
        tensors[f"model.{name}"] = values.half() if values.ndim > 1 and values.is_floating_point() else values
    for name, value in checkpoint["framing"].items():
        if torch.is_tensor(value):
            tensors[f"framing.{name}"] = value
        else:
            settings["framing"][name] = value
    settings |= {
        name: value for name, value in checkpoint.items() if name not in (*TENSORS, *LEFT_OUT) and name != "images"
    }
    contiguous = {name: values.contiguous().cpu() for name, values in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(contiguous, path, metadata={"settings": json.dumps(settings, sort_keys=True)})


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict:
    """The checkpoint that write_weights was given, all of its floating-point numbers in single precision or more.

    Raises:
        ValueError: not such a file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole file of weights ({type(error).__name__}: {error})") from error
    checkpoint = {name: value for name, value in settings.items() if name != "framing"}
    checkpoint["images"] = tensors.pop("images", torch.zeros(0, dtype=torch.int64))
    checkpoint["framing"] = dict(settings["framing"])
    checkpoint["model"] = {}
    for name, values in tensors.items():
        part, _, rest = name.partition(".")
        checkpoint[part][rest] = values.float() if values.dtype == torch.float16 else values
    return checkpoint
