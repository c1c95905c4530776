"""What the model reads of all images before a training starts, kept in parts: a start that is stopped goes on.

    output_model/readings/<what>_<first image>.npz: told, values

For a frozen CLIP on two cores these are half an hour. They are there until the run has its first checkpoint.
"""

import contextlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dataset import FaceDataset
from evaluation.scoring import predict
from runtime.files import save_arrays
from runtime.processes import gather
from training.run import Run

BATCHES = 32  # of each process in a part: a minute or so


def read_all(run: Run, dataset: FaceDataset, compute: Callable, what: str, told: str) -> np.ndarray:
    """compute, as evaluation.scoring.predict takes it, of all samples (N, ...). Parts that are there are not read anew.

    Args:
        what: of the name of a part, and of the progress bar.
        told: what the values depend on. Parts of which another thing is told are read anew.
    """
    size = BATCHES * run.args.batch_size * run.world  # whole batches: the same as in one go
    parts = []
    for start in range(0, len(dataset), size):
        indices = np.arange(start, min(start + size, len(dataset)))
        path = run.path("readings") / f"{what.replace(' ', '_')}_{start}.npz"
        values = gather(kept(path, told) if run.rank == 0 else None)[0]
        if values is None:
            title = f"{what}, images {start + 1} to {indices[-1] + 1} of {len(dataset)}"
            with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
                values = predict(run.fed, dataset, compute, run.args.batch_size, run.args.num_workers, title, indices)
            if run.rank == 0:
                with contextlib.suppress(OSError):  # what cannot be kept is read again
                    save_arrays(path, told=np.array(told), values=values)
        parts.append(values)
    return np.concatenate(parts) if parts else np.empty(0)


def kept(path: Path, told: str) -> np.ndarray | None:
    """The values of a part, if it is there, whole, and of the same thing."""
    # What is damaged is read again
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path) as part:
            return part["values"] if part["told"] == told else None
    return None


def forget(run: Run) -> None:
    if run.rank == 0:
        shutil.rmtree(run.path("readings"), ignore_errors=True)
