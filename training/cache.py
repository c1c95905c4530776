"""What the frozen part of a model makes of each image, computed once and kept on the disk: --cache_blocks.

    images, region masks  ->  the frozen part  ->  a row of a file in --output_dir  ->  BehindCache, which is trained

It is sound where the frozen part sees the same image each time (--augment none) and depends on nothing that is trained.
With --tune head, that part is all of the model but the head: a row is what the head reads, and LAMM's w of each layer.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import FaceDataset
from evaluation.scoring import load_batches
from model import NUM_HEADS, LAMMViT
from runtime.files import check_space
from runtime.processes import gather
from training.run import Run


class BehindCache(nn.Module):
    """The part of a model behind the cache. It takes rows where the model takes images."""

    def __init__(self, model: LAMMViT):
        super().__init__()
        self.model = model
        self.layers = model.config.depth if model.lamm else 0

    @property
    def head(self) -> nn.Linear:
        return self.model.head

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.model.config.head_inputs + self.layers * NUM_HEADS

    def normalize(self, rows: Tensor) -> Tensor:
        return rows.float()

    def weights(self, rows: Tensor) -> Tensor:
        """LAMM's w (B, L, H) of rows (B, width); L is 0 without LAMM."""
        return rows[:, self.model.config.head_inputs :].reshape(len(rows), self.layers, NUM_HEADS)

    def forward(self, rows: Tensor, region_masks: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """rows (B, width) -> as LAMMViT's; region_masks are not looked at, they are in the rows."""
        logits = self.head(rows[:, : self.model.config.head_inputs])
        return {"logits": logits, "mask_weights": list(self.weights(rows).unbind(1)[-3:])}

    def make_rows(self, images: Tensor, region_masks: Tensor) -> Tensor:
        """images (B, 3, h, w) from model.normalize, region_masks (B, 8, G, G) -> rows (B, width)."""
        parts = []
        hooks = [self.head.register_forward_pre_hook(lambda head, inputs: parts.append(inputs[0]))]
        if self.layers:
            hooks.append(self.model.lamm.register_forward_hook(lambda lamm, inputs, outputs: parts.append(outputs[0])))
        try:
            self.model(images, region_masks)
        finally:
            for hook in hooks:
                hook.remove()
        *weights, read = parts  # each layer's w, then what the head reads
        return torch.cat([read, *weights], dim=-1)


def use_cache(run: Run) -> None:
    """From here on the run's samples are rows, and it trains what is behind them. All processes call it.

    Raises:
        OSError: no room for the file.
        ValueError: a file that is not whole.
    """
    behind = BehindCache(run.model)
    path = run.path(f"cache_{fingerprint(run)}.npy")
    if not gather(path.exists() if run.rank == 0 else None)[0]:
        write_rows(run, behind, path)
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not whole ({error}); delete it, and it is written anew") from error
    run.train_set.stand_in, run.val_set.stand_in = np.split(rows, [len(run.train_set)])
    run.fed = run.trained = behind


def fingerprint(run: Run, only_frozen: bool = True) -> str:
    """Of all that the rows depend on: the weights, frozen or all of them, the images, the precision."""
    model = run.model
    told = (str(model.config), run.args.mask_style, run.train_set.fingerprint, str(run.dtype), run.device.type)
    if run.dtype != torch.float32:
        told += ("validation in float32",)  # it was not, in caches of before
    digest = hashlib.sha256(json.dumps(told).encode() + run.images.numpy().tobytes())
    for name, values in model.named_parameters():
        if not (only_frozen and values.requires_grad):
            digest.update(name.encode() + values.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_rows(run: Run, behind: BehindCache, path: Path) -> None:
    """Writes the file: the rows of the training images, then those of the validation images.

    Files of other frozen parts in the folder are removed. Batches are divided among the processes, each writes its own.
    """
    partial, count = path.with_name(f".{path.name}.partial"), len(run.train_set) + len(run.val_set)
    header = None
    if run.rank == 0:
        needed = count * behind.width * np.dtype(np.float32).itemsize
        print(f"cache  {count} rows of {behind.width} numbers, {needed / 1e9:.3f} GB in {path}", flush=True)
        for other in (*path.parent.glob("cache_*.npy"), *path.parent.glob(".cache_*.partial")):
            other.unlink()
        check_space(path, needed)
        header = np.lib.format.open_memmap(partial, "w+", np.float32, (count, behind.width)).offset
    header = gather(header)[0]
    with open(partial, "rb+", buffering=0) as file:
        for dataset, first in ((run.train_set, 0), (run.val_set, len(run.train_set))):
            for start, rows in rows_of(run, behind, dataset):
                # Not by way of memory: several machines may write to one page
                os.pwrite(file.fileno(), rows.data, header + (first + start) * rows[0].nbytes)
        os.fsync(file.fileno())
    gather(None)  # all have written
    if run.rank == 0:
        os.replace(partial, path)
    gather(None)  # it has its name


@torch.inference_mode()
def rows_of(run: Run, behind: BehindCache, dataset: FaceDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Of each of this process's batches, the number of its first sample and the rows (B, width) float32."""
    size = run.args.batch_size
    starts = range(run.rank * size, len(dataset), run.world * size)
    batches = ((np.arange(start, min(start + size, len(dataset))),) for start in starts)
    loader = load_batches(dataset, batches, run.args.num_workers)
    run.model.eval()
    for start, batch in zip(starts, tqdm(loader, "cache", len(starts), leave=False, disable=run.rank > 0)):
        images, masks = batch["image"].to(run.device), batch["region_masks"].to(run.device)
        # Validation is in single precision, as without the cache
        in_half = run.dtype != torch.float32 and dataset is run.train_set
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=in_half):
            yield start, behind.make_rows(run.model.normalize(images), masks).float().cpu().numpy()
