"""Trains LAMM-ViT on the feature files and keeps the model with the best validation AUC.

    features/<real|fake>/<Name>/{train,val}_features.h5  ->  output_model/best_model.pth, last.pth, log.jsonl

    python train.py                                                         one GPU, or the CPU where there is none
    torchrun --nproc_per_node=4 train.py                                    four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py      two machines
    python train.py --resume                                                goes on after the last whole epoch

The defaults are the paper's recipe. --batch_size is per process, as there: with W processes a step of the optimizer sees
W · batch_size · accum_steps images. Without a GPU, torchrun trains on the CPU (gloo).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import MASK_STYLES, FaceDataset, FeatureFileError, TrainTransform, find_feature_files
from inference import (
    CHECKPOINT_VERSION,
    CheckpointError,
    binary_metrics,
    choose_threshold,
    load_batches,
    load_checkpoint,
    normalize,
    pick_device,
    predict_scores,
)  # fmt: skip
from model import LAMMLoss, LAMMViT, LAMMViTConfig

MIN_LR = 1e-6  # floor of the plateau schedule; the authors'
MAY_CHANGE = ("features", "output_dir", "resume", "epochs", "stop_patience", "device", "num_workers")  # between a run and its resumption


# ------------------------------------------------------------------------------------------------------------- processes


def join_processes(device_name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device. Under torchrun, a process group: nccl with one GPU a process, gloo on the CPU."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, pick_device(device_name)
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


class EpochBatches(Sequence):
    """This process's batches of one epoch, arrays of indices, drawn from (seed, epoch) alone.

    Batch t of all processes together is batch t of one process with world · batch_size. The shuffled list is filled up from
    its beginning to a multiple of `world`, so that all processes have as many batches, of the same lengths.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world: int, seed: int, epoch: int):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(hash((seed, epoch)))).numpy()
        self.order = np.resize(order, -(-size // world) * world)
        self.joint, self.rank, self.world = batch_size * world, rank, world

    def __len__(self) -> int:
        return -(-len(self.order) // self.joint)

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(step)
        return self.order[step * self.joint : (step + 1) * self.joint][self.rank :: self.world]


# -------------------------------------------------------------------------------------------------------------------- data


def load_split(args: argparse.Namespace, split: str, grid_size: int | None, transform: TrainTransform | None) -> tuple[FaceDataset, list[str]]:
    """One split of the chosen data sets, and their names. Both classes have to be there."""
    files = find_feature_files(args.features, split, args.datasets)
    dataset = FaceDataset(list(files.values()), grid_size, args.mask_style, transform, args.seed)
    counts = [int((dataset.labels == label).sum()) for label in (0, 1)]
    if not all(counts):
        raise FeatureFileError(f"{args.features}: the {split} split of {', '.join(files)} has {counts[0]} real and {counts[1]} fake images; both are needed")
    return dataset, list(files)


# ---------------------------------------------------------------------------------------------------------------- training


def train_one_epoch(
    model: nn.Module, dataset: FaceDataset, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, criterion: LAMMLoss,
    batches: Sequence[Sequence[int]], epoch: int, args: argparse.Namespace, device: torch.device, rank: int,
) -> dict[str, float]:  # fmt: skip
    """One pass over this process's batches. Returns the mean losses per sample, over all processes."""
    model.train()
    dataset.set_epoch(epoch)
    loader = load_batches(dataset, batches, args.num_workers, pin_memory=device.type == "cuda")
    sums = torch.zeros(4, dtype=torch.float64)  # total, ce, diversity, samples
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch", total=len(batches), leave=False, disable=rank > 0)
    for step, batch in enumerate(bar):
        # A window of accumulation is divided by the samples that it has: the last one may be short.
        window_start = step - step % args.accum_steps
        window = range(window_start, min(window_start + args.accum_steps, len(batches)))
        is_last = step == window[-1]
        share = len(batches[step]) / sum(len(batches[i]) for i in window)

        images, masks = batch["image"].to(device, non_blocking=True), batch["region_masks"].to(device, non_blocking=True)
        labels = batch["label"].to(device, non_blocking=True)
        sync = contextlib.nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with sync:  # gradients are averaged over processes once a window
            with torch.autocast(device.type, dtype=args.dtype, enabled=args.dtype != torch.float32):
                outputs = model(normalize(images), masks)
            losses = criterion(outputs, labels)
            scaler.scale(losses["total"] * share).backward()
        values = torch.stack([losses[name].detach() for name in ("total", "ce", "diversity")]).double().cpu()
        if not values.isfinite().all():
            raise FloatingPointError(f"epoch {epoch}, batch {step}: the loss is {values[0].item()}; lower --lr, or train with --precision fp32")
        sums += torch.cat([values, torch.ones(1)]) * len(labels)
        if is_last:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{sums[0] / sums[3]:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}")
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    total, ce, diversity, samples = sums.tolist()
    return {"train_loss": total / samples, "train_ce": ce / samples, "train_diversity": diversity / samples}


def validate(model: LAMMViT, dataset: FaceDataset, args: argparse.Namespace) -> dict[str, float]:
    """Metrics over the whole validation set, the same numbers in every process, hence the same decisions."""
    scores = predict_scores(model, dataset, args.batch_size, args.num_workers, title="validation")
    threshold = choose_threshold(dataset.labels, scores)
    metrics = binary_metrics(dataset.labels, scores, threshold)
    loss = log_loss(dataset.labels, scores.clip(1e-12, 1 - 1e-12), labels=[0, 1])
    return {"val_auc": metrics["auc"], "val_ap": metrics["ap"], "val_accuracy": metrics["accuracy"], "val_loss": float(loss), "val_threshold": threshold}


def save(checkpoint: dict, path: Path) -> None:
    """Under `path` there is a whole checkpoint at every moment."""
    partial = path.with_name(f".{path.name}.partial")
    torch.save(checkpoint, partial)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)")
    files.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    files.add_argument("--output_dir", type=Path, default=Path("output_model"), help="(default: output_model)")
    files.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR/last.pth, with the same options")
    model = parser.add_argument_group("model", "the input's size is that of the features")
    model.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    model.add_argument("--embed_dim", type=int, default=768, help="width, a multiple of 12 (default: 768)")
    model.add_argument("--depth", type=int, default=12, help="number of blocks (default: 12)")
    model.add_argument("--mlp_ratio", type=float, default=4.0, help="width of the MLP over embed_dim (default: 4)")
    model.add_argument("--dropout", type=float, default=0.1, help="in attention and MLP (default: 0.1)")
    model.add_argument("--mask_style", default="polygon", choices=MASK_STYLES, help="filled areas or a Gaussian fall-off (default: polygon)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=100, help="at most (default: 100)")
    recipe.add_argument("--batch_size", type=int, default=32, help="images per process and forward pass (default: 32)")
    recipe.add_argument("--accum_steps", type=int, default=4, help="forward passes per step of the optimizer (default: 4)")
    recipe.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW (default: 1e-4)")
    recipe.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW (default: 0.05)")
    recipe.add_argument("--diversity_weight", type=float, default=0.2, help="of the diversity loss (default: 0.2)")
    recipe.add_argument("--lr_patience", type=int, default=3, help="epochs without a better AUC before the rate is halved (default: 3)")
    recipe.add_argument("--stop_patience", type=int, default=10, help="epochs without a better AUC before the end (default: 10)")
    recipe.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu or cuda (default: the GPU where there is one)")
    machine.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="(default: bf16 on a GPU that has it, else fp16; fp32 on the CPU)")
    machine.add_argument("--num_workers", type=int, default=2, help="threads that read features, per process (default: 2)")
    return parser


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def main(args: argparse.Namespace) -> None:
    if min(args.epochs, args.batch_size, args.accum_steps) < 1:
        raise ValueError("--epochs, --batch_size and --accum_steps have to be at least 1")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    rank, world, device = join_processes(args.device)
    args.dtype = pick_precision(args.precision, device)

    # data, and a model of their size
    train_set, names = load_split(args, "train", None, TrainTransform())
    config = LAMMViTConfig(
        img_size=train_set.img_size, patch_size=args.patch_size, embed_dim=args.embed_dim, depth=args.depth,
        mlp_ratio=args.mlp_ratio, dropout=args.dropout,
    )  # fmt: skip
    train_set.grid_size = config.grid_size
    val_set, _ = load_split(args, "val", config.grid_size, None)
    torch.manual_seed(args.seed)
    model = LAMMViT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=args.lr_patience, min_lr=MIN_LR)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == torch.float16)
    criterion = LAMMLoss(args.diversity_weight)

    # where a stopped run goes on
    best, last, log = args.output_dir / "best_model.pth", args.output_dir / "last.pth", args.output_dir / "log.jsonl"
    first_epoch, best_auc, epochs_since_best, lines = 1, -math.inf, 0, []
    if args.resume:
        resumed, checkpoint = load_checkpoint(last, device)
        changed = [name for name in options if name not in MAY_CHANGE and checkpoint["arguments"].get(name) != options[name]]
        if changed or resumed.config != config or checkpoint["features"] != train_set.fingerprint:
            what = ", ".join(f"--{name} {checkpoint['arguments'].get(name)}" for name in changed) or "other features"
            raise CheckpointError(f"{last}: trained with {what}; resume with the same options and features")
        model.load_state_dict(resumed.state_dict())
        for part, name in ((optimizer, "optimizer"), (schedule, "schedule"), (scaler, "scaler")):
            part.load_state_dict(checkpoint[name])
        first_epoch, best_auc, epochs_since_best = checkpoint["epoch"] + 1, checkpoint["best_auc"], checkpoint["epochs_since_best"]
        lines = log.read_text().splitlines()[: checkpoint["epoch"]]
    elif rank == 0:
        if best.exists() or last.exists():  # days of work, maybe: never written over
            earlier = next(path for n in itertools.count(1) if not (path := args.output_dir / f"earlier_{n}").exists())
            earlier.mkdir()
            for path in (best, last, log):
                if path.exists():
                    path.rename(earlier / path.name)
            print(f"the model of an earlier run is kept in {earlier}")
        args.output_dir.mkdir(parents=True, exist_ok=True)

    if rank == 0:
        for split, dataset in (("train", train_set), ("val", val_set)):
            print(f"{split:<6}{(dataset.labels == 0).sum():>8} real {(dataset.labels == 1).sum():>8} fake")
        print(f"data   {', '.join(names)}")
        print(f"model  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config}")
        print(f"step   {args.batch_size * world * args.accum_steps} images = {args.batch_size} x {world} processes x {args.accum_steps} accumulated; lr {args.lr:g}")
        print(f"device {device}, {str(args.dtype).removeprefix('torch.')}")

    # training
    trained = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model
    for epoch in range(first_epoch, args.epochs + 1):
        if epochs_since_best >= args.stop_patience:
            print(f"rank {rank}: no better AUC for {args.stop_patience} epochs, stopped after epoch {epoch - 1}", flush=True)
            break
        torch.manual_seed(hash((args.seed, epoch, rank)))  # dropout; drawn by epoch, so that a resumed run draws the same
        started = time.perf_counter()
        batches = EpochBatches(len(train_set), args.batch_size, rank, world, args.seed, epoch)
        line = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        line |= train_one_epoch(trained, train_set, optimizer, scaler, criterion, batches, epoch, args, device, rank)
        seconds = time.perf_counter() - started
        line |= validate(model, val_set, args)
        schedule.step(line["val_auc"])
        is_best = line["val_auc"] > best_auc
        best_auc, epochs_since_best = (line["val_auc"], 0) if is_best else (best_auc, epochs_since_best + 1)

        if rank == 0:
            line |= {"images_per_second": round(len(train_set) / seconds, 1), "seconds": round(time.perf_counter() - started, 1)}
            lines.append(json.dumps(line))
            log.write_text("\n".join(lines) + "\n")
            print(f"epoch {epoch:>3}  loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  val ACC {line['val_accuracy']:.2f} %"
                  f"  val AUC {line['val_auc']:.4f}{' *' if is_best else '  '}  {line['images_per_second']:.0f} images/s", flush=True)  # fmt: skip
            checkpoint = {"version": CHECKPOINT_VERSION, "config": dataclasses.asdict(config), "model": model.state_dict()}
            checkpoint |= {"mask_style": args.mask_style, "datasets": names, "features": train_set.fingerprint, "arguments": options} | line
            if is_best:
                save(checkpoint, best)
            checkpoint |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": scaler.state_dict()}
            save(checkpoint | {"best_auc": best_auc, "epochs_since_best": epochs_since_best}, last)

    if rank == 0:
        print(f"best validation AUC {best_auc:.4f}; model in {best}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, FloatingPointError, OSError) as error:  # FeatureFileError and CheckpointError among them
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; python train.py --resume goes on after the last whole epoch")
