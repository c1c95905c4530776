"""Trains LAMM-ViT on the feature files and keeps the model with the best validation AUC.

    features/<real|fake>/<Name>/{train,val}_features.h5  ->  output_model/: best_model.pth, last.pth, log.jsonl, pictures

    python train.py                                                         one GPU, or the CPU where there is none
    torchrun --nproc_per_node=4 train.py                                    four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py      two machines
    python train.py --resume                                                goes on where it stopped, however it stopped
    python train.py --without region_guidance                               one of the paper's ablations

The defaults are the paper's recipe, but for docs/differences.md. --batch_size is per process, as there: with W processes a
step of the optimizer sees W · batch_size · accum_steps images. Without a GPU, torchrun trains on the CPU (gloo).

A run that is stopped, by Ctrl-C, SIGTERM, kill -9 or a power cut, and goes on, ends on a CPU with the weights and the log of
one that was never stopped, to the bit.
"""

import argparse
import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ViT_B_16_Weights
from tqdm import tqdm

import figures
from dataset import FOUND_BY, MASK_STYLES, FaceDataset, FeatureFileError, TrainSampler, TrainTransform, face_frame, find_feature_files
from inference import (
    CHECKPOINT_VERSION,
    CheckpointError,
    image_ids,
    load_batches,
    load_checkpoint,
    normalize,
    pick_process_device,
    predict_scores,
)  # fmt: skip
from metrics import binary_metrics, choose_threshold
from model import NUM_HEADS, NUM_REGIONS, TORCHVISION_NORM_EPS, LAMMLoss, LAMMViT, LAMMViTConfig, load_torchvision_vit
from preprocess import describe_treatment, gather, join_processes, lock

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # not installed
    SummaryWriter = None

MIN_LR = 1e-6  # floor of both schedules; the authors'
PARTS = ("region_guidance", "lamm", "head_interaction")  # of the model, which LAMMViTConfig can do without
# Options that may change between a run and its resumption. The schedule "cosine" depends on --epochs.
MAY_CHANGE = ("features", "epochs", "stop_patience", "device", "num_workers", "save_minutes")
BEST, LAST, PREVIOUS, LOG, TIMES = "best_model.pth", "last.pth", "previous.pth", "log.jsonl", "timing.jsonl"
CURVES, WEIGHTS, BOARD = "training_curves.png", "lamm_weights.png", "tensorboard"
FILES = (BEST, LAST, PREVIOUS, LOG, TIMES, CURVES, WEIGHTS, BOARD)  # of a run, in --output_dir
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")  # what gloo and nccl say of one
SHOWN_PATHS = 32  # of the samples of a step that went wrong


class Stopped(Exception):
    """The run was asked to end, and can go on."""


class OtherRun(CheckpointError):
    """A checkpoint of a run with other options or features."""


@dataclasses.dataclass
class Run:
    """A training run: what it consists of, and where it stands."""

    args: argparse.Namespace
    device: torch.device
    rank: int
    world: int
    datasets: list[str]
    framing: dict  # of the faces in the training images, for inference.py --images
    images: torch.Tensor  # image_ids of training and validation, so that inference.py does not test on them
    train_set: FaceDataset
    val_set: FaceDataset
    model: LAMMViT
    trained: nn.Module  # the same model as training calls it: compiled, distributed
    optimizer: torch.optim.Optimizer
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    sampler: TrainSampler
    # where it stands
    epoch: int = 1  # begun, not finished
    samples: int = 0  # seen so far, by all processes; the place in the sampler's order
    sums: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))  # this process's losses in this epoch: total, ce, diversity; samples
    best_auc: float = -math.inf
    epochs_since_best: int = 0
    val_threshold: float = 0.5  # of the last validation
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)  # a line each finished epoch
    stop: str = ""  # the signal that asked this process to end

    @property
    def window(self) -> int:
        """Samples in a step of the optimizer."""
        return self.args.batch_size * self.world * self.args.accum_steps

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch: as many as there are training images, but a step at the least."""
        return max(len(self.train_set), self.window)

    def path(self, name: str) -> Path:
        return self.args.output_dir / name


# ------------------------------------------------------------------------------------------------------------- processes


def agree(*flags: bool) -> list[bool]:
    """Whether any process says so, for each flag; the same answer in all of them."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.uint8)  # on the CPU, gloo's: no waiting for the GPU
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()


class GatherRows(torch.autograd.Function):
    """Rows of this process -> rows of all, (..., B, H) -> (..., W · B, H), in the order of ranks.

    Each process computes the same loss from all rows. DistributedDataParallel takes the mean of the processes' gradients, so
    that each one's part, the gradient by its own rows, counts `world` times.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()] * dist.get_world_size()


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """SIGTERM (Slurm, torchrun) and Ctrl-C end the run after the step at hand, a second Ctrl-C at once."""

    def note(number: int, frame: object) -> None:
        if run.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------------------- data


def load_split(args: argparse.Namespace, split: str, grid_size: int | None, transform: TrainTransform | None) -> tuple[FaceDataset, list[str]]:
    """One split of the chosen data sets, and their names. Both classes have to be there."""
    files = find_feature_files(args.features, split, args.datasets)
    dataset = FaceDataset(list(files.values()), grid_size, args.mask_style, transform, args.seed)
    counts = [int((dataset.labels == label).sum()) for label in (0, 1)]
    if not all(counts):
        raise FeatureFileError(f"{args.features}: the {split} split of {', '.join(files)} has {counts[0]} real and {counts[1]} fake images; both are needed")
    sizes = np.diff(dataset.ends, prepend=0)  # none where a data set is kept for the test
    return dataset, [name for name, size in zip(files, sizes) if size]


def load_data(args: argparse.Namespace) -> tuple[FaceDataset, FaceDataset, list[str]]:
    """The training and validation splits, made for each other, and the names of the data sets."""
    train_set, names = load_split(args, "train", None, TrainTransform(args.color_jitter))
    grid_size = LAMMViTConfig(img_size=train_set.img_size, patch_size=args.patch_size).grid_size
    val_set, _ = load_split(args, "val", grid_size, None)
    train_set.grid_size = grid_size
    if (train_set.img_size, train_set.fingerprint) != (val_set.img_size, val_set.fingerprint):
        raise FeatureFileError(
            f"{args.features}: train and val are of different runs of feature_extraction.py ({train_set.img_size} and {val_set.img_size} px); run it again over all"
        )
    return train_set, val_set, names


def measure_framing(train_set: FaceDataset) -> dict:
    """How the faces stand in the training images: mean landmarks (68, 2), and the 1st and 99th percentile of face_frame (2, 2), in
    units of the image's side; and what preprocess.py did to the images.

    Raises:
        FeatureFileError: not the same to all.
    """
    treatments = sorted(set(train_set.column("treatments")))
    if len(treatments) > 1:
        raise FeatureFileError(f"the training images are not treated alike ({'; '.join(map(describe_treatment, treatments))}): that may tell the class; run preprocess.py with the same --align, --recompress and size over all")
    stored = FaceDataset(train_set.files, mapped=False)  # without the transform
    some = np.unique(np.linspace(0, len(stored) - 1, 1000).astype(int))
    found = some[stored.column("found_by")[some] != FOUND_BY.index("mean")]
    frames = [face_frame(landmarks) for landmarks in stored.read(found)["landmarks"] / stored.img_size] or [face_frame(stored.mean_landmarks / stored.img_size)]
    return {"treatment": treatments[0], "mean_landmarks": torch.from_numpy(stored.mean_landmarks / stored.img_size), "usual": torch.from_numpy(np.percentile(frames, (1, 99), axis=0))}


# -------------------------------------------------------------------------------------------------------------- the model


def build_model(args: argparse.Namespace, img_size: int) -> LAMMViT:
    """The model of these options with its initial weights, the same in all processes."""
    config = LAMMViTConfig(
        img_size=img_size, patch_size=args.patch_size, embed_dim=args.embed_dim, depth=args.depth, mlp_ratio=args.mlp_ratio, dropout=args.dropout,
        **{part: part not in args.without for part in PARTS}, **({"norm_eps": TORCHVISION_NORM_EPS} if args.init_from else {}),
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return LAMMViT(config)


def init_from(model: LAMMViT, source: str, rank: int) -> None:
    """Starts from a Vision Transformer of torchvision: a file with its state dict, or its ImageNet weights."""
    try:
        if source == "imagenet":
            weights = ViT_B_16_Weights.IMAGENET1K_V1
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                weights.get_state_dict(progress=rank == 0, check_hash=True)  # one process of each machine downloads it
            if dist.is_initialized():
                dist.barrier()
            state = weights.get_state_dict(progress=False, check_hash=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "; download it where there is a network, and name the file" if source == "imagenet" else ""
        raise ValueError(f"--init_from {source}: {error}{hint}") from error
    except Exception as error:  # whatever torch.load makes of a foreign file
        raise ValueError(f"--init_from {source}: not a file of torch.save with tensors alone ({type(error).__name__}); save model.state_dict()") from error
    try:
        unused = load_torchvision_vit(model, state)
    except ValueError as error:
        raise ValueError(f"--init_from {source}: {error}") from error
    if rank == 0:
        print(f"init   {len(state) - len(unused)} tensors of {source}; not used: {', '.join(unused) or 'none'}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of linear and convolution layers alone: not for biases, norms, tokens and positions."""
    matrices = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---------------------------------------------------------------------------------------------------------------- training


def cosine_lr(run: Run) -> float:
    """Learning rate of the step to come: a linear warm-up, then half a cosine down to MIN_LR at the end of --epochs."""
    warmup, end, floor = run.args.warmup_epochs * run.epoch_size, run.args.epochs * run.epoch_size, min(MIN_LR, run.args.lr)
    if run.samples < warmup:
        return run.args.lr * min(1, (run.samples + run.window) / warmup)
    done = min(1, (run.samples - warmup) / max(1, end - warmup))
    return floor + (run.args.lr - floor) * 0.5 * (1 + math.cos(math.pi * done))


def backward(run: Run, batch: dict[str, torch.Tensor], is_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient of one batch, one of --accum_steps. Returns its losses (total, ce, diversity) and its logits (B, 2)."""
    images, masks, labels = (batch[name].to(run.device, non_blocking=True) for name in ("image", "region_masks", "label"))
    # Gradients are averaged over processes once a step.
    with contextlib.nullcontext() if is_last or run.world == 1 else run.trained.no_sync():
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            outputs = run.trained(normalize(images), masks)
        if run.world > 1 and outputs["mask_weights"]:  # diversity is among the samples of all processes
            outputs["mask_weights"] = GatherRows.apply(torch.stack(outputs["mask_weights"]).float()).unbind()
        losses = LAMMLoss(run.args.diversity_weight)(outputs, labels)
        run.scaler.scale(losses["total"] / run.args.accum_steps).backward()
    return torch.stack([losses[name].detach() for name in ("total", "ce", "diversity")]).double(), outputs["logits"].detach()


def rehearse(run: Run) -> None:
    """A step that changes nothing. In its first one, DistributedDataParallel finds out in which order to send gradients; with
    three processes or more the order tells in the last bit of their sum, and a run that goes on would differ in one step."""
    config, states = run.model.config, (torch.get_rng_state(), torch.cuda.get_rng_state() if run.device.type == "cuda" else None)
    images = torch.zeros(run.args.batch_size, 3, config.img_size, config.img_size, device=run.device)
    masks = torch.zeros(run.args.batch_size, NUM_REGIONS, config.grid_size, config.grid_size, device=run.device)
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        outputs = run.trained(images, masks)
    sum(rows.sum() for rows in (outputs["logits"], *outputs["mask_weights"])).backward()
    run.optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


def one_step(run: Run, loader: Iterator[dict[str, torch.Tensor]], bar: tqdm, is_due: bool) -> tuple[float, bool, bool]:
    """A step of the optimizer, over --accum_steps batches of each process.

    Returns:
        The seconds that it waited for data; whether any process was asked to end; whether a checkpoint is due (is_due is rank 0's).
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
    *finite, finite_norm = torch.cat([values.isfinite().all(dim=1), norm.isfinite()[None]]).tolist()  # the step's only wait for a GPU
    # Of a gradient alone that is not finite, a scaler makes nothing: it leaves the step out and goes lower, unless it is low already.
    is_bad = not all(finite) or not (finite_norm or run.scaler.is_enabled() and run.scaler.get_scale() >= 1)
    is_bad, is_stopped, is_due = agree(is_bad, bool(run.stop), is_due)
    if is_bad:
        raise FloatingPointError(describe_failure(run, seen, logits, finite))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.samples += run.window
    count = run.args.batch_size * run.args.accum_steps
    run.sums += torch.cat([values.sum(dim=0).cpu() * run.args.batch_size, torch.tensor([count])])
    return waited, is_stopped, is_due


def train_one_epoch(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Trains to the end of the run's epoch. Returns the mean losses per sample of the epoch, over all processes, and the timing.

    Epoch e ends with the first step at which e times epoch_size samples were seen; the next one goes on in the sampler's order.
    So every step is a full one.

    Raises:
        Stopped: somebody asked for it. The run can go on from last.pth.
        FloatingPointError: a loss or gradient that is not finite. The weights are those before it.
    """
    args, rank = run.args, run.rank
    steps = max(0, math.ceil((run.epoch * run.epoch_size - run.samples) / run.window))  # 0 where a run was stopped in its validation
    firsts = range(run.samples + rank * args.batch_size, run.samples + steps * run.window, args.batch_size * run.world)
    batches = (run.sampler.draw(first, args.batch_size) for first in firsts)
    loader = load_batches(run.train_set, batches, args.num_workers, pin_memory=run.device.type == "cuda")
    run.trained.train()
    started, waited, saved = time.perf_counter(), 0.0, time.monotonic()
    with tqdm(desc=f"epoch {run.epoch}", total=steps * args.accum_steps, unit="batch", leave=False, disable=rank > 0) as bar:
        for step in range(steps):
            if args.schedule == "cosine":
                for group in run.optimizer.param_groups:
                    group["lr"] = cosine_lr(run)
            is_due = rank == 0 and time.monotonic() - saved >= 60 * args.save_minutes
            seconds, is_stopped, is_due = one_step(run, loader, bar, is_due)
            waited += seconds
            lr, per_second = run.optimizer.param_groups[0]["lr"], (step + 1) * run.window / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {run.sums[0] / run.sums[3]:.4f}, lr {lr:.1e}, {per_second:.0f} images/s, {memory_gb(run.device):.1f} GB")
            if is_stopped or is_due:
                save_state(run)
                saved = time.monotonic()
            if is_stopped:
                raise Stopped
    seconds = time.perf_counter() - started
    sums = run.sums.to(run.device)
    if run.world > 1:
        dist.all_reduce(sums)
    total, ce, diversity = (sums[:3] / sums[3].clamp(min=1)).tolist()
    timing = {"seconds": seconds, "images_per_second": steps * run.window / seconds, "data_wait": waited / seconds, "memory_gb": memory_gb(run.device)}
    return {"train_loss": total, "train_ce": ce, "train_diversity": diversity}, timing


def memory_gb(device: torch.device) -> float:
    """The most that this process took of the GPU, or what it has now of the machine's memory; in 10⁹ bytes."""
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss) / 1e9


def describe_failure(run: Run, seen: list[torch.Tensor], logits: list[torch.Tensor], finite: list[bool]) -> str:
    """What to tell of a step without a finite loss or gradient: where, and with which samples. Asks the other processes.

    seen, logits and finite are the indices (B,), the logits (B, 2) and whether the losses were finite, of each batch.
    """
    of_logits = [indices[~rows.isfinite().all(dim=1).cpu()] for indices, rows in zip(seen, logits)]
    of_losses = [indices for indices, is_finite in zip(seen, finite) if not is_finite]
    # The samples whose own logits are broken; else the batches whose losses are; else all of the step, for its gradient.
    processes = gather([torch.cat([*indices, seen[0][:0]]) for indices in (of_logits, of_losses, seen)])
    levels = [torch.cat(parts) for parts in zip(*processes)]
    suspects = next(level for level in levels if len(level))
    what = "the loss" if len(levels[0]) or len(levels[1]) else "the gradient"
    return (
        f"epoch {run.epoch}, after {run.samples} samples: {what} is not finite with {listed(run.train_set, suspects.unique())}; the last good checkpoint"
        f" is kept in {run.path(LAST)}, the one before it in {PREVIOUS}; look at these images, or start anew with a lower --lr or --precision fp32"
    )


def listed(dataset: FaceDataset, indices: torch.Tensor) -> str:
    """The paths of these samples, the first of them."""
    paths = dataset.column("paths")[indices.numpy()]
    return ", ".join(paths[:SHOWN_PATHS]) + (f" and {len(paths) - SHOWN_PATHS} more" if len(paths) > SHOWN_PATHS else "")


def validate(run: Run) -> tuple[dict[str, float], np.ndarray, torch.Tensor | None]:
    """Metrics over the whole validation set, the same numbers in every process, hence the same decisions; the scores (N,); and
    LAMM's w (L, H), the mean over the images."""
    sums = torch.zeros(run.args.depth, NUM_HEADS, dtype=torch.float64, device=run.device)

    def watch(lamm: nn.Module, inputs: tuple, outputs: tuple) -> None:
        sums[inputs[1]] += outputs[0].sum(dim=0)

    handle = run.model.lamm.register_forward_hook(watch) if run.model.lamm else None
    scores = predict_scores(run.model, run.val_set, run.args.batch_size, run.args.num_workers, title="validation")
    if handle:
        handle.remove()
        if run.world > 1:
            dist.all_reduce(sums)
    labels = run.val_set.labels
    if not np.isfinite(scores).all():
        bad = torch.from_numpy(np.flatnonzero(~np.isfinite(scores)))
        raise FloatingPointError(f"epoch {run.epoch}: in validation, no finite score for {listed(run.val_set, bad)}; {run.path(LAST)} holds the weights that fail, {BEST} and {PREVIOUS} are of before; start anew with a lower --lr or --precision fp32")
    threshold = choose_threshold(labels, scores)
    metrics = binary_metrics(labels, scores, threshold)
    loss = log_loss(labels, scores.clip(1e-12, 1 - 1e-12), labels=[0, 1])
    line = {"val_auc": metrics["auc"], "val_ap": metrics["ap"], "val_accuracy": metrics["accuracy"], "val_loss": float(loss), "val_threshold": threshold}
    return line, scores, (sums / len(labels)).float().cpu() if handle else None


# ------------------------------------------------------------------------------------------------------------- checkpoints


def describe(run: Run) -> dict:
    """What every checkpoint holds: the weights, and what is needed to use them and to tell where they come from."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.args).items() if name not in ("resume", "output_dir")}
    return {
        "version": CHECKPOINT_VERSION, "config": dataclasses.asdict(run.model.config), "model": run.model.state_dict(), "mask_style": run.args.mask_style,
        "datasets": run.datasets, "framing": run.framing, "images": run.images, "features": run.train_set.fingerprint, "arguments": arguments, "val_threshold": run.val_threshold,
        "sizes": [len(run.train_set), len(run.val_set)], "window": run.window, "dtype": str(run.dtype).removeprefix("torch."),
        "epoch": run.epoch, "samples": run.samples, "best_auc": run.best_auc,
    }  # fmt: skip


def save_state(run: Run) -> None:
    """Writes last.pth, from which the run can go on. All processes call it; the checkpoint before stays, as previous.pth."""
    own = {"sums": run.sums.clone(), "cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(run.device)
    processes = gather(own)
    if run.rank == 0:
        parts = {"optimizer": run.optimizer.state_dict(), "schedule": run.plateau.state_dict(), "scaler": run.scaler.state_dict()}
        parts |= {"processes": processes, "epochs_since_best": run.epochs_since_best, "log": run.log, "launch": os.environ.get("TORCHELASTIC_RUN_ID")}
        save(describe(run) | parts, run.path(LAST), run.path(PREVIOUS))


def save(checkpoint: dict, path: Path, previous: Path | None = None) -> None:
    """Under `path` there is a whole checkpoint at every moment; what was there goes to `previous`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
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
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch puts the second in the place of the first
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({str(error).splitlines()[0]}); the one before is still there. Make room, then go on with --resume") from error


def load_state(run: Run, path: Path, is_restart: bool) -> None:
    """Puts the run where the checkpoint's stood. After a restart by torchrun, it has to be of the same start of torchrun.

    Raises:
        CheckpointError: damaged, foreign, without its best model; OtherRun: of a run with other options or features.
    """
    try:
        resumed, checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        older, found = path.with_name(PREVIOUS), None
        with contextlib.suppress(CheckpointError):
            found = load_checkpoint(older)[1] if path != older else None
        if found is None:
            raise
        raise CheckpointError(f"{error}\n{older} is whole, from epoch {found['epoch']}: to go on from it, --resume {older}") from error
    if not {"optimizer", "schedule", "scaler", "processes", "log", "launch", "sizes", "window", "dtype"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: holds a model, not a run; {LAST} and {PREVIOUS} are what --resume goes on from")
    if is_restart and checkpoint["launch"] != os.environ["TORCHELASTIC_RUN_ID"]:
        raise OtherRun(f"{path}: of an earlier start of torchrun")
    now = describe(run)
    may_change = {*MAY_CHANGE, *(("batch_size", "accum_steps") if checkpoint["window"] == now["window"] else ())} - ({"epochs"} if run.args.schedule == "cosine" else set())
    changed = [f"--{name} {checkpoint['arguments'].get(name)}" for name in now["arguments"] if name not in may_change and checkpoint["arguments"].get(name) != now["arguments"][name]]
    changed += [f"{what} {checkpoint[what]}" for what in ("datasets", "sizes", "dtype", "config") if checkpoint[what] != now[what] and not changed]
    if changed or checkpoint["features"] != now["features"]:
        raise OtherRun(f"{path}: trained with {', '.join(changed) or 'other features'}; resume with the same options and features")
    if checkpoint["log"] and not run.path(BEST).exists():
        raise CheckpointError(f"{run.path(BEST)}: is gone, and it is the best of this run; put it back, or start anew without --resume")
    run.model.load_state_dict(resumed.state_dict())
    for part, name in ((run.optimizer, "optimizer"), (run.plateau, "schedule"), (run.scaler, "scaler")):
        part.load_state_dict(checkpoint[name])
    for name in ("epoch", "samples", "best_auc", "epochs_since_best", "val_threshold", "log"):
        setattr(run, name, checkpoint[name])
    processes = checkpoint["processes"]
    if len(processes) == run.world:
        run.sums = processes[run.rank]["sums"]
        torch.set_rng_state(processes[run.rank]["cpu"])
        if run.device.type == "cuda" and "cuda" in processes[run.rank]:
            torch.cuda.set_rng_state(processes[run.rank]["cuda"], run.device)
    else:
        torch.manual_seed(hash((run.args.seed, run.samples, run.rank)))
        if run.rank == 0:
            run.sums = sum(process["sums"] for process in processes)
            print(f"{path} is of {len(processes)} processes, these are {run.world}: goes on with another number of images a step, and not to the bit")


def begin(run: Run, restarts: int) -> None:
    """Puts the run at its beginning; or where it stopped, with --resume, or if torchrun has started it again.

    All processes read the checkpoint; rank 0 says which, since machines may see a file at different moments.
    """
    asked = run.args.resume is not None
    gone_on = False
    if asked or restarts:
        path = gather(checkpoint_to_go_on_from(run) if run.rank == 0 else None)[0]
        with contextlib.suppress(OtherRun) if not asked else contextlib.nullcontext():
            if path:
                load_state(run, path, is_restart=not asked)
                gone_on = True
        if len(set(gather((gone_on, run.epoch, run.samples)))) > 1:
            raise CheckpointError(f"{path}: not the same on all machines; they have to share {run.args.output_dir}")
    if gone_on:
        if run.rank == 0:
            print(f"goes on from {path}: epoch {run.epoch}, {run.samples} samples seen")
            write_log(run)
        return
    if run.args.init_from:
        init_from(run.model, run.args.init_from, run.rank)
    if run.rank == 0:
        keep_earlier(run.args.output_dir)
    torch.manual_seed((run.args.seed << 16) + run.rank)  # dropout
    save_state(run)


def checkpoint_to_go_on_from(run: Run) -> Path | None:
    """The one named; else the last, or the one before where there is no last one; None: none at all."""
    if not run.args.resume:
        return next((path for path in (run.path(LAST), run.path(PREVIOUS)) if path.exists()), None)
    path = Path(run.args.resume)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint to go on from")
    if path.resolve().parent != run.args.output_dir.resolve():
        raise CheckpointError(f"{path}: of a run in another folder; go on with --output_dir {path.parent}")
    return path


def keep_earlier(output_dir: Path) -> None:
    """A model is days of work, maybe: never written over."""
    if any((output_dir / name).exists() for name in (BEST, LAST, PREVIOUS)):
        earlier = next(path for n in itertools.count(1) if not (path := output_dir / f"earlier_{n}").exists())
        earlier.mkdir()
        for name in FILES:
            if (output_dir / name).exists():
                (output_dir / name).rename(earlier / name)
        print(f"the model of an earlier run is kept in {earlier}")


def check_disk(run: Run, goes_on: bool) -> None:
    """Raises OSError where the disk has no room for the run's checkpoints."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    needed = weights + 3 * 3 * weights  # the best, and the last twice and in writing, with AdamW's two moments
    there = sum(path.stat().st_size for name in (BEST, LAST, PREVIOUS) if (path := run.path(name)).exists()) if goes_on else 0
    free = shutil.disk_usage(run.args.output_dir).free
    if needed - there > free:
        raise OSError(errno.ENOSPC, f"the checkpoints need {(needed - there) / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; make room or choose another --output_dir", str(run.args.output_dir))


# -------------------------------------------------------------------------------------------------------------- the record


def write_log(run: Run) -> None:
    """log.jsonl holds what the computation determines, so that a resumed run's is the same; timing.jsonl the rest."""
    partial = run.path(f".{LOG}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in run.log))
    os.replace(partial, run.path(LOG))


def write_board(board: "SummaryWriter", line: dict, labels: np.ndarray, scores: np.ndarray, weights: torch.Tensor | None) -> None:
    """A finished epoch for TensorBoard."""
    for name, value in line.items():
        kind, _, rest = name.partition("_")
        board.add_scalar(f"{kind}/{rest}" if kind in ("train", "val") else name, value, line["epoch"])
    board.add_pr_curve("val/precision_recall", labels, scores, line["epoch"])
    if weights is not None:  # (L, H) -> an image with a square of 16 pixels for each head of each layer
        board.add_image("lamm_weights", np.kron(weights / weights.max(), np.ones((16, 16))), line["epoch"], dataformats="HW")
    board.flush()


def draw_pictures(run: Run) -> None:
    figures.training_curves(run.log, run.path(CURVES))
    weights = torch.load(run.path(BEST), map_location="cpu", weights_only=True)["lamm_weights"]
    if weights is not None:
        figures.lamm_weights(weights.numpy(), run.path(WEIGHTS))


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)")
    files.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    files.add_argument("--output_dir", type=Path, default=Path("output_model"), help="(default: output_model)")
    files.add_argument("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on from OUTPUT_DIR/last.pth, or the one named, with the same options; from the beginning where there is none")
    files.add_argument("--save_minutes", type=float, default=10, help="between two checkpoints within an epoch; there is one after each epoch, too (default: 10)")
    model = parser.add_argument_group("model", "the input's size is that of the features")
    model.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    model.add_argument("--embed_dim", type=int, default=768, help="width, a multiple of 12 (default: 768)")
    model.add_argument("--depth", type=int, default=12, help="number of blocks (default: 12)")
    model.add_argument("--mlp_ratio", type=float, default=4.0, help="width of the MLP over embed_dim (default: 4)")
    model.add_argument("--dropout", type=float, default=0.1, help="in attention and MLP (default: 0.1)")
    model.add_argument("--mask_style", default="polygon", choices=MASK_STYLES, help="filled areas or a Gaussian fall-off (default: polygon)")
    model.add_argument("--without", nargs="+", default=[], choices=(*PARTS, "diversity"), metavar="PART", help=f"ablations: leave out {', '.join(PARTS)}, diversity (the loss), or several; all of them: a plain ViT (default: nothing)")
    model.add_argument("--init_from", metavar="FILE", help="start from the state dict of a torchvision vit_b_16; imagenet: its weights, downloaded")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=100, help="at most (default: 100)")
    recipe.add_argument("--batch_size", type=int, default=32, help="images per process and forward pass (default: 32)")
    recipe.add_argument("--accum_steps", type=int, default=4, help="forward passes per step of the optimizer (default: 4)")
    recipe.add_argument("--sampling", default="balanced", choices=("balanced", "natural"), help="as many real as fake images, or as they come (default: balanced)")
    recipe.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW (default: 1e-4)")
    recipe.add_argument("--schedule", default="plateau", choices=("plateau", "cosine"), help="halve the rate where the AUC stands still, or warm-up and cosine over --epochs (default: plateau)")
    recipe.add_argument("--warmup_epochs", type=float, help="of cosine (default: a twentieth of --epochs)")
    recipe.add_argument("--lr_patience", type=int, default=3, help="epochs without a better AUC before plateau halves the rate (default: 3)")
    recipe.add_argument("--stop_patience", type=int, default=10, help="epochs without a better AUC before the end (default: 10)")
    recipe.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW, on matrices alone (default: 0.05)")
    recipe.add_argument("--clip_grad", type=float, default=1.0, help="largest norm of a gradient, 0: none (default: 1)")
    recipe.add_argument("--diversity_weight", type=float, default=0.2, help="of the diversity loss (default: 0.2)")
    recipe.add_argument("--color_jitter", type=float, default=0.0, help="other light in every training image: brightness and contrast times up to exp(±this), as 0.25; for small data sets (default: 0, the paper's)")
    recipe.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu or cuda (default: the GPU where there is one)")
    machine.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="(default: bf16 on a GPU that has it, else fp16; fp32 on the CPU)")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps after")
    machine.add_argument("--num_workers", type=int, default=2, help="threads that read features, per process (default: 2)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Completes the options. Raises ValueError where they make no sense."""
    if min(args.epochs, args.batch_size, args.accum_steps, args.stop_patience) < 1:
        raise ValueError("--epochs, --batch_size, --accum_steps and --stop_patience have to be at least 1")
    if min(args.lr, args.weight_decay, args.clip_grad, args.diversity_weight, args.lr_patience, args.num_workers, args.save_minutes, args.warmup_epochs or 0) < 0:
        raise ValueError("--lr, --weight_decay, --clip_grad, --diversity_weight, --lr_patience, --num_workers, --save_minutes and --warmup_epochs cannot be negative")
    if not 0 <= args.color_jitter <= 2:
        raise ValueError(f"--color_jitter {args.color_jitter}: has to be from 0 to 2")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: has to be from 0 to {2**32 - 1}")
    if args.warmup_epochs is not None and (args.schedule != "cosine" or args.warmup_epochs > args.epochs):
        raise ValueError("--warmup_epochs goes with --schedule cosine, and is no more than --epochs")
    if args.schedule == "cosine" and args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20
    if "diversity" in args.without:
        args.diversity_weight = 0.0
    args.without = sorted(set(args.without))


def build_run(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    train_set, val_set, datasets = load_data(args)
    model = build_model(args, train_set.img_size).to(device)
    dtype = pick_precision(args.precision, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    images = torch.from_numpy(np.concatenate([image_ids(train_set), image_ids(val_set)]))
    return Run(
        args, device, rank, world, datasets, measure_framing(train_set), images, train_set, val_set, model, model, optimizer,
        plateau=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=args.lr_patience, min_lr=MIN_LR),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        dtype=dtype,
        sampler=TrainSampler(train_set.labels, args.sampling == "balanced", args.seed),
    )  # fmt: skip


def print_plan(run: Run) -> None:
    args, config = run.args, run.model.config
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        note = f"   {args.sampling}{', as many of both in a step' if args.sampling == 'balanced' and run.window % 2 == 0 else ''}" if split == "train" else ""
        print(f"{split:<7}{(dataset.labels == 0).sum()} real, {(dataset.labels == 1).sum()} fake{note}")
    print(f"data   {', '.join(run.datasets)}")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    left_out = f", without {', '.join(args.without)}" if args.without else ""
    print(f"model  {parameters / 1e6:.2f} M parameters: {config.img_size} px in patches of {config.patch_size}, width {config.embed_dim}, depth {config.depth}, {args.mask_style} masks{left_out}")
    schedule = f"cosine over {args.epochs} epochs, {args.warmup_epochs:g} of warm-up" if args.schedule == "cosine" else f"halved after {args.lr_patience + 1} epochs without a better AUC"
    print(f"step   {run.window} images = {args.batch_size} x {run.world} process{'es' if run.world > 1 else ''} x {args.accum_steps} accumulated; lr {args.lr:g}, {schedule}")
    print(f"device {run.device}, {str(run.dtype).removeprefix('torch.')}{', compiled' if args.compile else ''}", flush=True)


def train(run: Run) -> None:
    """Epoch after epoch, each with its validation, until the last one or until the AUC stands still."""
    args = run.args
    is_finished = run.epoch > args.epochs or run.epochs_since_best >= args.stop_patience
    board = SummaryWriter(run.path(BOARD), purge_step=run.epoch) if SummaryWriter and run.rank == 0 and not is_finished else None
    while run.epoch <= args.epochs and run.epochs_since_best < args.stop_patience:
        losses, timing = train_one_epoch(run)
        save_state(run)  # validation may take longer than Slurm waits
        if agree(bool(run.stop))[0]:
            raise Stopped
        metrics, scores, weights = validate(run)
        line = {"epoch": run.epoch, "samples": run.samples, "lr": run.optimizer.param_groups[0]["lr"], **losses, **metrics}
        if args.schedule == "plateau":
            run.plateau.step(metrics["val_auc"])
        is_best = metrics["val_auc"] > run.best_auc
        run.epochs_since_best = 0 if is_best else run.epochs_since_best + 1
        run.best_auc, run.val_threshold = max(run.best_auc, metrics["val_auc"]), metrics["val_threshold"]
        run.log.append(line)
        run.sums.zero_()
        if run.rank == 0:
            write_log(run)
            if is_best:
                save(describe(run) | line | {"lamm_weights": weights}, run.path(BEST))
            print(f"epoch {run.epoch:>3}  loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  val ACC {line['val_accuracy']:.2f} %"
                  f"  val AUC {line['val_auc']:.4f}{' *' if is_best else '  '}  {timing['images_per_second']:.0f} images/s, {100 * timing['data_wait']:.0f} % waiting for data", flush=True)  # fmt: skip
            with open(run.path(TIMES), "a") as file:
                file.write(json.dumps({"epoch": run.epoch} | timing) + "\n")
            if board:
                write_board(board, line | timing, run.val_set.labels, scores, weights)
        run.epoch += 1
        save_state(run)
        if agree(bool(run.stop))[0] and run.epoch <= args.epochs:
            raise Stopped
    if run.rank == 0:
        draw_pictures(run)
        if run.epoch <= args.epochs:
            print(f"no better AUC for {args.stop_patience} epochs, stopped after epoch {run.epoch - 1}")
        print(f"best validation AUC {run.best_auc:.4f}; model in {run.path(BEST)}")


def main(args: argparse.Namespace) -> None:
    check_options(args)
    device = pick_process_device(args.device)
    rank, world, restarts = join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(minutes=30))
    run = build_run(args, rank, world, device)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir}: {error.strerror}") from error
    with lock(args.output_dir) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            check_disk(run, goes_on=args.resume is not None or restarts > 0)
            print_plan(run)
        begin(run, restarts)
        if args.compile:
            run.trained = torch.compile(run.model)
        if world > 1:
            run.trained = DistributedDataParallel(run.trained, device_ids=[device.index] if device.type == "cuda" else None)
            rehearse(run)
        try:
            with stopping_on_signals(run):
                train(run)
        except Stopped:
            if rank == 0:
                print(f"stopped by {run.stop or 'a signal to another process'} in epoch {run.epoch}, {run.samples} samples seen; --resume goes on from there")
        gather(None)  # nobody leaves while others need it


def guarded_main() -> None:
    """main, with one line for what its user can mend."""
    try:
        main(get_args_parser().parse_args())
    except (ValueError, FloatingPointError, OSError) as error:  # FeatureFileError and CheckpointError among them
        sys.exit(f"{error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{str(error).splitlines()[0]}; lower --batch_size, and raise --accum_steps as much")
    except RuntimeError as error:
        if not dist.is_initialized() or not any(words in str(error) for words in LOST):
            raise
        sys.exit(f"another process of this run has ended ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint")


if __name__ == "__main__":
    guarded_main()
