"""Checkpoints: written whole, read back as a model. What a run leaves in best_model.pth and last.pth."""

import os
import pickle
import zipfile
from collections.abc import Set
from pathlib import Path

import torch

from model import LAMMViT, LAMMViTConfig
from runtime.files import replacing
from runtime.hub_folder import read_folder, weights_in
from runtime.pretrained import load_trunk, read_trunk, split_source
from runtime.start import Gate, start_method
from runtime.trunk_files import INSTALL, PACKAGE, packaged_clip
from runtime.tuning import choose_trained, is_held, merge_lora
from runtime.weights_file import SUFFIX, read_weights

CHECKPOINT_VERSION = 5
OF_A_MODEL = {"version", "config", "model"}  # in every checkpoint
TO_JUDGE = {"mask_style", "val_threshold", "framing", "images"}  # in those that can judge pictures


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names it and the way out."""


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[LAMMViT, dict]:
    """Rebuilds the model that train.py saved, in eval mode, and returns it with everything else in the file.

    Args:
        path: of train.py; or, where it ends in .safetensors, of export.py --weights; or a folder of export.py --hub.

    Raises:
        CheckpointError: missing, damaged, foreign, or of another architecture than it says; or its trunk is missing.
    """
    return load_model(path, device, TO_JUDGE)


def load_model(path: Path, device: torch.device | str = "cpu", needed: Set[str] = frozenset()) -> tuple[LAMMViT, dict]:
    """load_checkpoint for a model alone, too, which says nothing of thresholds and faces.

    Args:
        needed: what the checkpoint has to have beside the model.
    """
    checkpoint = read_model(path, device, needed)
    return model_of(checkpoint, weights_in(Path(path))).to(device), checkpoint


def read_model(path: Path, device: torch.device | str = "cpu", needed: Set[str] = frozenset()) -> dict:
    """What load_model builds the model of. A trunk beside it is not looked at.

    Raises:
        CheckpointError: missing, damaged, or foreign.
    """
    path = Path(path)
    is_old = path.is_file() and path.suffix != SUFFIX
    if not is_old and not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; run train.py first, or name one")
    checkpoint = read_checkpoint(path, device) if is_old else read_shipped(path)
    if not is_old and not needed <= checkpoint.keys():
        raise CheckpointError(
            f"{path}: holds a model alone, and not how it judges pictures; take one of export.py --hub"
        )
    if not isinstance(checkpoint, dict) or not OF_A_MODEL | needed <= checkpoint.keys():
        raise CheckpointError(
            f"{path}: not a checkpoint of train.py: it does not say what model it is; run train.py again"
        )
    if checkpoint["version"] != CHECKPOINT_VERSION:
        way_out = "run train.py again" if is_old else "take weights and code of the same release"
        raise CheckpointError(
            f"{path}: checkpoint version {checkpoint['version']}, this program reads {CHECKPOINT_VERSION}; {way_out}"
        )
    return checkpoint


def read_checkpoint(path: Path, device: torch.device | str) -> object:
    """What torch.save has put into a file, its tensors on the device. Nothing in it is executed.

    Raises:
        CheckpointError: damaged, or more than tensors and settings.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch looks at no checksum
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words are about how to load it all the same
        raise CheckpointError(
            f"{path}: not a checkpoint of train.py: it holds more than tensors and settings; run train.py again"
        ) from error
    except Exception as error:  # whatever torch.load makes of a damaged or foreign file
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({cause}); take another one or run train.py again"
        ) from error


def read_shipped(path: Path) -> dict:
    """read_weights, or read_folder, with the error of a checkpoint."""
    try:
        return read_folder(path) if path.is_dir() else read_weights(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def model_of(checkpoint: dict, path: Path) -> LAMMViT:
    """The model of a checkpoint, in eval mode, on the CPU.

    Args:
        path: of the checkpoint, beside which a trunk is looked for; also for messages.

    Raises:
        CheckpointError: of another architecture than it says; its trunk is missing.
    """
    try:
        model = LAMMViT(LAMMViTConfig(**checkpoint["config"]))
        if checkpoint.get("trunk"):
            load_beside_trunk(model, checkpoint, path)
        else:
            model.load_state_dict(checkpoint["model"])
    except CheckpointError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its weights are of another architecture than its config {checkpoint['config']}: {lines[:400]}"
        ) from error
    return model.eval()


def load_beside_trunk(model: LAMMViT, checkpoint: dict, path: Path) -> None:
    """Gives a model the frozen weights of a trunk and the trained ones of a checkpoint that holds no others.

    Raises:
        CheckpointError: the trunk is not there, or is another one.
    """
    told, tune = checkpoint["trunk"], checkpoint["arguments"]["tune"]
    sources, reasons = [told["source"]], []
    prefix, file = split_source(told["source"])
    if file and (beside := path.parent / file.name).is_file():  # where it has moved with the checkpoint
        sources = list(dict.fromkeys([*sources, f"{prefix}{beside}"]))
    for source in sources:
        try:
            if source == "clip" and packaged_clip() is None:  # no other CLIP has its numbers: none is downloaded
                raise ValueError(f"clip: the package {PACKAGE} is not installed; {INSTALL}")
            trunk = read_trunk(source)
        except ValueError as error:
            reasons.append(str(error).removeprefix("--init_from "))
            continue
        if trunk.digest(model.config.depth) == told["sha256"]:
            break
        reasons.append(f"{source} is another one, its SHA-256 is not {told['sha256'][:16]}...")
    else:
        raise CheckpointError(
            f"{path}: holds what was trained on a trunk, and that trunk is missing: {'; '.join(reasons)}"
            + ("; put its file there or beside the checkpoint" if file else "")
        )
    load_trunk(model, trunk)
    start_method(model, told["start"], Gate(*told["gate"]) if told["gate"] else None)
    choose_trained(model, tune)
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    if unexpected or (lost := [name for name in missing if is_held(name, tune)]):
        raise ValueError(f"has {', '.join(unexpected[:3]) or 'no'} {'' if unexpected else lost[0]}")
    merge_lora(model)
    model.requires_grad_(True)


def save(checkpoint: dict, path: Path, previous: Path | None = None) -> None:
    """Under `path` there is a whole checkpoint at every moment; what was there goes to `previous`."""
    try:
        with replacing(path) as partial:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                link = previous.with_name(f".{previous.name}.partial")
                link.unlink(missing_ok=True)
                try:
                    os.link(path, link)
                except OSError:  # a file system without hard links; for a moment, there is `previous` alone
                    link = path
                os.replace(link, previous)
    except (OSError, RuntimeError) as error:  # torch puts the second in the place of the first
        raise OSError(
            f"{path}: could not be written ({str(error).splitlines()[0]}); the one before is still there. Make room,"
            " then go on with --resume"
        ) from error
