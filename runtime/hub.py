"""A model from the Hugging Face Hub, or from a folder, and back.

    from runtime.hub import LAMMViT

    model = LAMMViT.from_pretrained("owner/name")       # or a folder of export.py --hub
    model.save_pretrained("mine")
    model.push_to_hub("owner/mine")

model.py stands below all file formats, so LAMMViT gets these three methods here. huggingface_hub is needed where the
Hub itself is asked, and nowhere else. What from_pretrained read beside the weights (thresholds, framing, ...) stays
with the model as `model.checkpoint`, and goes where it is saved.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from model import LAMMViT
from runtime.checkpoint import CHECKPOINT_VERSION, CheckpointError, load_model, read_shipped
from runtime.hub_folder import FILES, write_folder
from runtime.pretrained import split_source
from runtime.weights_file import SETTINGS

__all__ = ["LAMMViT", "fetch", "from_pretrained", "push_folder", "push_to_hub", "save_pretrained"]


def from_pretrained(name: str | Path, device: torch.device | str = "cpu", **options: Any) -> LAMMViT:
    """A model in eval mode.

    Args:
        name: a folder, or a repository of the Hub, "owner/name".
        options: for the Hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        CheckpointError: no such folder or repository, or one that cannot be used; or its trunk is missing.
    """
    folder = Path(name) if Path(name).is_dir() else fetch(str(name), **options)
    return from_file(folder, device)


def from_file(path: str | Path, device: torch.device | str = "cpu") -> LAMMViT:
    """The model of a checkpoint; its `checkpoint` is what else that holds, for save_pretrained."""
    model, checkpoint = load_model(path, device)
    model.checkpoint = {key: checkpoint[key] for key in (*SETTINGS, "framing", "images") if key in checkpoint}
    return model


def save_pretrained(model: LAMMViT, folder: str | Path, checkpoint: dict | None = None) -> None:
    """Writes a folder that from_pretrained takes, with all weights in it, those of the trunk, too.

    Args:
        checkpoint: what load_checkpoint gave beside the model; None: what from_pretrained read, if it was that. With
            thresholds and framing in it, inference.py takes the folder, too.

    Raises:
        OSError: it cannot be written.
    """
    known = getattr(model, "checkpoint", {}) if checkpoint is None else checkpoint
    alone = {"version": CHECKPOINT_VERSION, "config": dataclasses.asdict(model.config), "model": model.state_dict()}
    write_folder(known | alone | ({"trunk": None} if known else {}), Path(folder))


def push_to_hub(model: LAMMViT, repo_id: str, checkpoint: dict | None = None, **options: Any) -> str:
    """Uploads what save_pretrained writes. Options as for push_folder; returns the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, checkpoint)
        return push_folder(folder, repo_id, **options)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "LAMM-ViT",
) -> str:
    """Uploads a folder of export.py --hub, and nothing else that is in it. Makes the repository where there is none.

    Raises:
        CheckpointError: it is no such folder.
    """
    from huggingface_hub import HfApi

    file = trunk_file(read_shipped(Path(folder)))  # goes along, if it is there
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        revision=branch,
        create_pr=create_pr,
        commit_message=commit_message,
        allow_patterns=[*FILES, *([file] if file else [])],
    )
    return str(done.commit_url)


def fetch(repo_id: str, **options: Any) -> Path:
    """The folder in the Hub's cache with the files of a repository.

    Raises:
        CheckpointError: it is not to be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"{repo_id}: no such folder; for the Hub, pip install huggingface_hub") from error

    def download(*names: str) -> Path:
        try:
            return Path(snapshot_download(repo_id, allow_patterns=[*FILES, *names], **options))
        except Exception as error:  # whatever the Hub's client makes of a name, a network, an answer
            cause = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{repo_id}: no such folder, and not to be had from the Hub ({cause})") from error

    folder = download()
    file = trunk_file(read_shipped(folder))
    return download(file) if file else folder


def trunk_file(checkpoint: dict) -> str:
    """The name of a file that the trunk is in, which belongs beside the weights; "" where there is none."""
    trunk = checkpoint.get("trunk")
    file = split_source(trunk["source"])[1] if trunk else None
    return file.name if file else ""


LAMMViT.from_pretrained = staticmethod(from_pretrained)
LAMMViT.save_pretrained = save_pretrained
LAMMViT.push_to_hub = push_to_hub
