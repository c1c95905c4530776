"""A model and samples to probabilities of a fake, alone or with the processes of torchrun."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataset import FaceDataset
from model import LAMMViT
from runtime.processes import map_ahead


def load_batches(
    dataset: FaceDataset, batches: Iterable[tuple], num_workers: int, pin_memory: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """What dataset.read makes of each of `batches`, (indices,) or (indices, draws), in order, as tensors, read by
    `num_workers` threads ahead of their use.

    Threads, since what takes time (reading, JPEG, blur, noise) runs outside of Python's lock, and since processes would
    have
    to send every batch through shared memory: benchmarks/data_speed.py measures torch's DataLoader beside this.
    """

    def read(batch: tuple) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(values) for name, values in dataset.read(*batch).items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors

    return map_ahead(read, batches, num_workers, ahead=num_workers) if num_workers else map(read, batches)


def fake_probability(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> (B,) float64.

    In double precision from the logits on: in single precision all confident scores would be 1 and tie.
    """
    return scores_and_log_odds(model, images, region_masks)[:, 0]


def scores_and_log_odds(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """(B, 2) float64: fake_probability, and its log odds, which tell scores apart where that is 1. Arguments alike."""
    device = next(model.parameters()).device
    outputs = model(model.normalize(images.to(device, non_blocking=True)), region_masks.to(device, non_blocking=True))
    logits = outputs["logits"].double()
    return torch.stack([logits.softmax(dim=-1)[:, 1], logits[:, 1] - logits[:, 0]], dim=-1).cpu().numpy()


def predict_scores(
    model: LAMMViT,
    dataset: FaceDataset,
    batch_size: int = 64,
    num_workers: int = 0,
    title: str = "",
    indices: np.ndarray | None = None,
) -> np.ndarray:
    """The probability of a fake for the samples of a dataset with these indices, all if None; (N,) float64 in their
    order.
    """
    return predict(model, dataset, fake_probability, batch_size, num_workers, title, indices)


@torch.inference_mode()
def predict(
    model: LAMMViT,
    dataset: FaceDataset,
    compute: Callable[[LAMMViT, torch.Tensor, torch.Tensor], np.ndarray],
    batch_size: int = 64,
    num_workers: int = 0,
    title: str = "",
    indices: np.ndarray | None = None,
) -> np.ndarray:
    """compute(model, images, region_masks), as fake_probability takes them, of the samples with these indices, all if
    None: (N, ...) in their order.

    In a process group, every process returns all scores. Batches, not samples, are divided among the processes: each
    batch is the same as in a single process, so nobody's score depends on the number of processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = np.arange(len(dataset)) if indices is None else indices
    size = len(indices)
    starts = range(rank * batch_size, size, world * batch_size)
    loader = load_batches(
        dataset, ((indices[start : start + batch_size],) for start in starts), num_workers, torch.cuda.is_available()
    )
    was_training = model.training
    model.eval()
    bar = tqdm(
        loader,
        desc=title,
        unit="batch",
        total=len(starts),
        leave=False,
        disable=True if rank > 0 or not title else None,
    )
    mine = [(start, compute(model, batch["image"], batch["region_masks"])) for start, batch in zip(starts, bar)]
    model.train(was_training)

    everyone = [mine]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    parts = sorted((part for parts in everyone for part in parts), key=lambda part: part[0])
    return np.concatenate([values for _, values in parts]) if parts else np.empty(0)
