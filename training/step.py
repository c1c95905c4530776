"""A step of the optimizer, over --accum_steps batches of each process, and what to say where it goes wrong."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from dataset import FaceDataset
from model import NUM_REGIONS, LAMMLoss
from runtime.processes import agree, gather
from runtime.tuning import held_state, in_half
from training.run import LAST, PREVIOUS, Run

SHOWN_PATHS = 32  # of the samples of a step that went wrong


class GatherRows(torch.autograd.Function):
    """Rows of this process -> rows of all, (..., B, H) -> (..., W · B, H), in the order of ranks.

    Each process computes the same loss from all rows. DistributedDataParallel takes the mean of the processes'
    gradients, so that each one's part, the gradient by its own rows, counts `world` times.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()] * dist.get_world_size()


def backward(run: Run, batch: dict[str, torch.Tensor], is_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient of one batch, one of --accum_steps.

    Returns:
        its losses (3,), total, ce and diversity; its logits (B, 2).
    """
    images, masks, labels = (
        batch[name].to(run.device, non_blocking=True) for name in ("image", "region_masks", "label")
    )
    # Gradients are averaged over processes once a step.
    with contextlib.nullcontext() if is_last or run.world == 1 else run.trained.no_sync():
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            outputs = run.trained(run.fed.normalize(images), masks)
        if run.world > 1 and outputs["mask_weights"]:  # diversity is among the samples of all processes
            outputs["mask_weights"] = GatherRows.apply(torch.stack(outputs["mask_weights"]).float()).unbind()
        losses = LAMMLoss(run.args.diversity_weight, run.args.label_smoothing)(outputs, labels)
        run.scaler.scale(losses["total"] / run.args.accum_steps).backward()
    of_batch = torch.stack([losses[name].detach() for name in ("total", "ce", "diversity")])
    return of_batch.double(), outputs["logits"].detach().clone()  # the next batch's lie there, with CUDA graphs


def rehearse(run: Run) -> None:
    """A step that changes nothing.

    In its first one, DistributedDataParallel finds out in which order to send gradients; with three processes or more
    the order tells in the last bit of their sum, and a run that goes on would differ in one step.
    """
    side, grid, count = run.model.config.img_size, run.model.config.grid_size, run.args.batch_size
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if run.device.type == "cuda" else None
    stands_in = run.train_set.stand_in
    shape = (3, side, side) if stands_in is None else stands_in.shape[1:]
    images = torch.zeros(count, *shape, device=run.device)
    masks = torch.zeros(count, NUM_REGIONS, grid, grid, device=run.device)
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        outputs = run.trained(images, masks)
    sum(rows.sum() for rows in (outputs["logits"], *outputs["mask_weights"])).backward()
    run.optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


def start_training_mode(run: Run) -> None:
    """Dropout is on, but in blocks that are wholly frozen: they compute what a cache holds of them."""
    run.trained.train()
    for block in run.model.blocks:
        block.train(any(parameter.requires_grad for parameter in block.parameters()))


def one_step(run: Run, loader: Iterator[dict[str, torch.Tensor]], bar: tqdm, is_due: bool) -> tuple[float, bool, bool]:
    """A step of the optimizer, over --accum_steps batches of each process.

    Returns:
        The seconds that it waited for data; whether any process was asked to end; whether a checkpoint is due (is_due
        is rank 0's).
    """
    waited, seen, values, logits = 0.0, [], [], []
    for part in range(run.args.accum_steps):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        of_batch, of_logits = backward(run, batch, is_last=part == run.args.accum_steps - 1)
        seen.append(batch["index"])
        values.append(of_batch)
        logits.append(of_logits)
        bar.update()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip_grad or math.inf)
    values = torch.stack(values)  # (accum_steps, 3)
    # The step's only wait for a GPU
    *finite, finite_norm = torch.cat([values.isfinite().all(dim=1), norm.isfinite()[None]]).tolist()
    # Of a gradient alone that is not finite, a scaler makes nothing: it leaves the step out and goes lower, unless it
    # is low already.
    is_bad = not all(finite) or not (finite_norm or run.scaler.is_enabled() and run.scaler.get_scale() >= 1)
    is_bad, is_stopped, is_due = agree(is_bad, bool(run.stop), is_due)
    if is_bad:
        raise FloatingPointError(describe_failure(run, seen, logits, finite))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    average_weights(run)
    run.optimizer.zero_grad(set_to_none=not run.is_captured)
    run.samples += run.window
    count = run.args.batch_size * run.args.accum_steps
    run.sums += torch.cat([values.sum(dim=0).cpu() * run.args.batch_size, torch.tensor([count])])
    return waited, is_stopped, is_due


@torch.no_grad()
def average_weights(run: Run) -> None:
    """Takes the step's weights into the average of --ema. Its decay is lower in the first steps."""
    if not run.args.ema:
        return
    step = run.samples // run.window  # from 0 on
    decay = min(run.args.ema, (1 + step) / (10 + step))
    weights = {name: values for name, values in run.model.named_parameters() if values.requires_grad}
    if run.ema is None:
        run.ema = {name: values.detach().clone() for name, values in weights.items()}
    torch._foreach_lerp_([run.ema[name] for name in weights], list(weights.values()), 1 - decay)


def kept_weights(run: Run) -> dict[str, torch.Tensor]:
    """What best_model.pth gets: the average of --ema, if there is one; beside a trunk, matrices in half precision."""
    state = held_state(run.model, run.args.tune) | (run.ema or {})
    return in_half(state) if run.trunk else state


@contextlib.contextmanager
def as_kept(run: Run) -> Iterator[None]:
    """Within this context the model has the weights of kept_weights: what validation measures, the threshold among it,
    holds for what is stored, to the last bit."""
    if run.ema is None and not run.trunk:
        yield
        return
    kept, parameters = kept_weights(run), run.model.state_dict()
    own = {name: parameters[name].clone() for name in kept}
    for name, values in kept.items():
        parameters[name].copy_(values)
    try:
        yield
    finally:
        for name, values in own.items():
            parameters[name].copy_(values)


def describe_failure(run: Run, seen: list[torch.Tensor], logits: list[torch.Tensor], finite: list[bool]) -> str:
    """What to tell of a step without a finite loss or gradient: where, and with which samples of all processes.

    Args:
        seen, logits, finite: of each batch the indices (B,), the logits (B, 2) and whether the losses were finite.
    """
    of_logits = [indices[~rows.isfinite().all(dim=1).cpu()] for indices, rows in zip(seen, logits)]
    of_losses = [indices for indices, is_finite in zip(seen, finite) if not is_finite]
    # The samples whose own logits are broken; else the batches whose losses are; else all of the step
    processes = gather([torch.cat([*indices, seen[0][:0]]) for indices in (of_logits, of_losses, seen)])
    levels = [torch.cat(parts) for parts in zip(*processes)]
    suspects = next(level for level in levels if len(level))
    what = "the loss" if len(levels[0]) or len(levels[1]) else "the gradient"
    return (
        f"epoch {run.epoch}, after {run.samples} samples: {what} is not finite with"
        f" {listed(run.train_set, suspects.unique())}; the last good checkpoint is kept in {run.path(LAST)}, the one"
        f" before it in {PREVIOUS}; look at these images, or start anew with a lower --lr or --precision fp32"
    )


def listed(dataset: FaceDataset, indices: torch.Tensor) -> str:
    """The paths of these samples, the first of them."""
    paths = dataset.column("paths")[indices.numpy()]
    more = f" and {len(paths) - SHOWN_PATHS} more" if len(paths) > SHOWN_PATHS else ""
    return ", ".join(paths[:SHOWN_PATHS]) + more
