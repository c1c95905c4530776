"""Weights as they ship: one safetensors file of what was trained, with the settings that a checkpoint has.

    output_model/best_model.pth  ->  weights/lamm_vit.safetensors  ->  the same dict as a checkpoint's

A trunk is not in it: the file names it, with its SHA-256, as a checkpoint of `train.py --tune norms` does. A
safetensors file holds numbers and text alone, so nothing in it is ever executed. Of the machine and the run it has
what a user needs, and no folder's name.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.files import check_space, replacing
from runtime.pretrained import split_source
from runtime.tuning import in_half

TRAINED = Path("output_model/best_model.pth")  # what train.py leaves
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "lamm_vit.safetensors"
CARD = "MODEL_CARD.md"  # of the weights that ship, beside them
SUFFIX = ".safetensors"
# What is text, of a checkpoint; its model, framing and images are tensors, the rest is a run's record
SETTINGS = (
    "version",
    "config",
    "trunk",
    "mask_style",
    "datasets",
    "arguments",
    "val_threshold",
    "thresholds",
    "temperature",
    "unknown",
    "val_auc",
    "val_ap",
    "val_accuracy",
    "val_loss",
)
OF_THE_MACHINE = ("features", "device", "num_workers", "save_minutes")  # of the arguments


# ------------------------------------------------------------------------------------------------------------- the file


def write_weights(checkpoint: dict, path: Path, exact: bool = False) -> None:
    """A checkpoint of load_checkpoint as one file, whole or not at all.

    Args:
        exact: each number as it is; without, matrices in half precision, see in_half.

    Raises:
        OSError: the file cannot be written.
    """
    weights = checkpoint["model"] if exact else in_half(checkpoint["model"])
    tensors = {f"model.{name}": values for name, values in weights.items()}
    if "images" in checkpoint:
        tensors["images"] = checkpoint["images"]
    framing = checkpoint.get("framing", {})
    tensors |= {f"framing.{name}": value for name, value in framing.items() if isinstance(value, Tensor)}
    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    text = json.dumps(settings_of(checkpoint), sort_keys=True)
    content = save(tensors, {"format": "pt", "settings": text, "sha256": digest_of(text, tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path, len(content))
    with replacing(path, sync=True) as partial:
        partial.write_bytes(content)


def settings_of(checkpoint: dict) -> dict:
    """What of a checkpoint is text, as the file has it."""
    settings = {name: checkpoint[name] for name in SETTINGS if name in checkpoint}
    if framing := checkpoint.get("framing"):
        settings["framing"] = {name: value for name, value in framing.items() if not isinstance(value, Tensor)}
    if "arguments" in settings:
        settings["arguments"] = portable(settings["arguments"])
    if settings.get("trunk"):
        settings["trunk"] = settings["trunk"] | {"source": without_folder(settings["trunk"]["source"])}
    return settings


def read_weights(path: Path, exact: bool = False, writer: str = "export.py --weights") -> dict:
    """The checkpoint that write_weights was given, on the CPU.

    Args:
        exact: its numbers as they are; without, in single precision or more.
        writer: the command that writes such a file again, for messages.

    It lacks what is not in SETTINGS, and of files the folder.

    Raises:
        ValueError: not such a file, or damaged. The message names it and the way out.
    """
    again = f"take another copy, or write it again: python {writer}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a whole safetensors file ({cause}); {again}") from error
    if not {"settings", "sha256"} <= metadata.keys():
        raise ValueError(
            f"{path}: a safetensors file, but not of {writer}; a trunk's goes to train.py --init_from; else {again}"
        )
    text = metadata["settings"]
    if digest_of(text, tensors) != metadata["sha256"]:  # the format has no checksum of its own
        raise ValueError(f"{path}: damaged, its SHA-256 is another one; {again}")
    try:
        return as_checkpoint(json.loads(text), tensors, exact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: lacks what a model needs ({type(error).__name__}: {error}); {again}") from error


def as_checkpoint(settings: dict, tensors: dict[str, Tensor], exact: bool = False) -> dict:
    """What was taken apart for the file, together again."""
    checkpoint = settings | {"model": {}}
    if "framing" in settings:
        checkpoint["framing"] = dict(settings["framing"])
    for name, values in tensors.items():
        part, dot, rest = name.partition(".")
        if dot:
            checkpoint[part][rest] = values.float() if values.dtype == torch.float16 and not exact else values
        else:
            checkpoint[part] = values
    # JSON has lists alone; LAMMViTConfig has tuples
    config = settings["config"].items()
    checkpoint["config"] = {name: tuple(value) if isinstance(value, list) else value for name, value in config}
    return checkpoint


def digest_of(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the settings and of each tensor: name, dtype, shape, bytes."""
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"\n{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def portable(arguments: dict) -> dict:
    """The options of a training without those of the machine that it ran on."""
    kept = {name: value for name, value in arguments.items() if name not in OF_THE_MACHINE}
    return kept | {name: without_folder(kept[name]) for name in ("init_from",) if kept.get(name)}


def without_folder(source: str) -> str:
    """A trunk as --init_from takes it, of a file the name alone: load_checkpoint looks beside the weights.

    There "model.safetensors", as Hugging Face calls every model's file, is often taken.
    """
    prefix, file = split_source(source)
    if not file:
        return source
    return prefix + (f"trunk_{file.name}" if file.name == "model.safetensors" else file.name)


# ---------------------------------------------------------------------------------------------- which file is meant


def choose_checkpoint(named: Path | None, rank: int = 0) -> Path:
    """The checkpoint that was named; else what train.py left here; else the weights that ship, which is said once.

    Args:
        rank: of this process; the first one says it, on standard error.

    Raises:
        ValueError: there is none.
    """
    if named or TRAINED.exists():
        return named or TRAINED
    if not SHIPPED.exists():
        raise ValueError(
            f"{TRAINED}: no such checkpoint, and no {shown(SHIPPED)}; run train.py first, or name one with --checkpoint"
        )
    if rank == 0:
        print(
            f"{TRAINED} is not there: takes {shown(SHIPPED)}; read {shown_card()}",
            file=sys.stderr,
        )
    return shown(SHIPPED)


def is_shipped(path: Path) -> bool:
    return Path(path).resolve() == SHIPPED.resolve()


def shown_card() -> Path:
    """Where what has to be known of the weights that ship is written."""
    return shown(SHIPPED.with_name(CARD))


def shown(path: Path) -> Path:
    """As people see it: from the current folder on, where it is below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
