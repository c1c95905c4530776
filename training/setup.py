"""Builds a run from its options: samples, model, optimizer, schedule."""

import argparse

import numpy as np
import torch

from dataset import TrainSampler, image_ids
from model import LAMMViT, LAMMViTConfig
from runtime.devices import pick_precision
from runtime.pretrained import TORCHVISION_NORM_EPS
from training.data import load_data, measure_framing
from training.options import PARTS
from training.run import Run
from training.schedule import MIN_LR, parameter_groups


def build_model(args: argparse.Namespace, img_size: int) -> LAMMViT:
    """The model of these options with its initial weights, the same in all processes."""
    config = LAMMViTConfig(
        img_size=img_size,
        patch_size=args.patch_size,
        embed_dim=args.embed_dim,
        depth=args.depth,
        mlp_ratio=args.mlp_ratio,
        dropout=args.dropout,
        **{part: part not in args.without for part in PARTS},
        **({"norm_eps": TORCHVISION_NORM_EPS} if args.init_from else {}),
    )
    torch.manual_seed(args.seed)
    return LAMMViT(config)


def build_run(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    """A run at its beginning; training/state.py takes it to where an earlier one stopped."""
    train_set, val_set, datasets = load_data(args)
    model = build_model(args, train_set.img_size).to(device)
    dtype = pick_precision(args.precision, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    images = torch.from_numpy(np.concatenate([image_ids(train_set), image_ids(val_set)]))
    return Run(
        args=args,
        device=device,
        rank=rank,
        world=world,
        datasets=datasets,
        framing=measure_framing(train_set),
        images=images,
        train_set=train_set,
        val_set=val_set,
        model=model,
        trained=model,
        optimizer=optimizer,
        plateau=torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=args.lr_patience, min_lr=MIN_LR
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        dtype=dtype,
        sampler=TrainSampler(train_set.labels, args.sampling == "balanced", args.seed),
    )


def print_plan(run: Run) -> None:
    """What is about to be trained on what, before the first step."""
    args, config = run.args, run.model.config
    is_even = args.sampling == "balanced" and run.window % 2 == 0
    notes = {"train": f"   {args.sampling}{', as many of both in a step' if is_even else ''}", "val": ""}
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        print(f"{split:<7}{(dataset.labels == 0).sum()} real, {(dataset.labels == 1).sum()} fake{notes[split]}")
    print(f"data   {', '.join(run.datasets)}")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    left_out = f", without {', '.join(args.without)}" if args.without else ""
    print(
        f"model  {parameters / 1e6:.2f} M parameters: {config.img_size} px in patches of {config.patch_size}, width"
        f" {config.embed_dim}, depth {config.depth}, {args.mask_style} masks{left_out}"
    )
    schedule = (
        f"cosine over {args.epochs} epochs, {args.warmup_epochs:g} of warm-up"
        if args.schedule == "cosine"
        else f"halved after {args.lr_patience + 1} epochs without a better AUC"
    )
    print(
        f"step   {run.window} images = {args.batch_size} x {run.world} process{'es' if run.world > 1 else ''} x"
        f" {args.accum_steps} accumulated; lr {args.lr:g}, {schedule}"
    )
    compiled = ", compiled" if args.compile else ""
    print(f"device {run.device}, {str(run.dtype).removeprefix('torch.')}{compiled}", flush=True)
