"""Builds a run from its options: samples, model, optimizer, schedule."""

import argparse

import numpy as np
import torch

from attention import try_kernels
from dataset import TrainSampler, image_ids, source_numbers
from evaluation.operating import RATES, allowed_alarms
from model import LAMMViT, LAMMViTConfig
from runtime.devices import pick_precision
from runtime.pretrained import Trunk, load_trunk, read_trunk
from runtime.processes import gather
from runtime.start import GATES, Gate, start_method
from runtime.tuning import choose_trained
from training.data import check_views, load_data, measure_framing
from training.options import PARTS
from training.run import Run
from training.schedule import MIN_LR, parameter_groups

OTHER_PARTS = ("transformer.", "text_model.", "token_embedding.", "decoder")  # of CLIP's text, of MAE's decoder


def config_of(args: argparse.Namespace, img_size: int, trunk: Trunk | None = None) -> LAMMViTConfig:
    """What these options make of the model. Raises ValueError where they do not fit together."""
    return LAMMViTConfig(
        img_size=img_size,
        patch_size=args.patch_size,
        embed_dim=args.embed_dim,
        depth=args.depth,
        mlp_ratio=args.mlp_ratio,
        dropout=args.dropout,
        **{part: part not in args.without for part in PARTS},
        pool=tuple(args.pool),
        read_blocks=tuple(args.read_blocks),
        scale_weights=args.scale_weights,
        **(trunk.config if trunk else {}),
    )


def build_model(args: argparse.Namespace, img_size: int, trunk: Trunk | None) -> LAMMViT:
    """The model of these options with its initial weights, the same in all processes."""
    config = config_of(args, img_size, trunk)
    torch.manual_seed(args.seed)
    model = LAMMViT(config)
    if trunk:
        load_trunk(model, trunk)
    start_method(model, args.start, gate_of(args))
    choose_trained(model, args.tune)
    return model


def gate_of(args: argparse.Namespace) -> Gate | None:
    """Of the start; None: the authors'."""
    return Gate(*args.gates) if args.gates else GATES.get(args.start)


def describe_trunk(trunk: Trunk, args: argparse.Namespace) -> dict:
    """What a checkpoint that holds a part of the model says of the rest."""
    told = {"source": trunk.source, "sha256": trunk.digest(args.depth), "start": args.start}
    return told | {"gate": list(gate_of(args) or ())}


def build_run(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    """A run at its beginning; training/state.py takes it to where an earlier one stopped."""
    train_set, val_set, datasets = load_data(args)
    framing = measure_framing(train_set)
    check_views(args, framing)
    trunk = None if args.init_from is None else read_trunk(args.init_from, rank)
    if trunk and rank == 0:
        print_trunk(trunk, args.depth)
    model = build_model(args, train_set.img_size, trunk).to(device)
    dtype = gather(pick_precision(args.precision, device, args.embed_dim))[0]  # one for all
    if device.type == "cuda":
        try_kernels(device, dtype)  # before --compile takes them without a trial
    groups = parameter_groups(model, args.weight_decay, args.lr, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda" or None)
    sources = source_numbers(train_set) if args.sampling == "sources" else None
    images = torch.from_numpy(np.concatenate([image_ids(train_set), image_ids(val_set)]))
    return Run(
        args=args,
        device=device,
        rank=rank,
        world=world,
        datasets=datasets,
        framing=framing,
        images=images,
        train_set=train_set,
        val_set=val_set,
        model=model,
        fed=model,
        trained=model,
        trunk=describe_trunk(trunk, args) if args.tune != "all" else None,
        optimizer=optimizer,
        plateau=torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            mode="max",
            factor=0.5,
            patience=args.lr_patience,
            min_lr=[MIN_LR * group.get("scale", 1) for group in groups],
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        dtype=dtype,
        sampler=TrainSampler(train_set.labels, args.sampling, args.seed, sources),
    )


def print_trunk(trunk: Trunk, depth: int) -> None:
    """What was taken of a trunk, and what not."""
    used = trunk.first(depth)
    config = ", ".join(f"{name} {value}" for name, value in sorted(trunk.config.items()))
    print(f"trunk  {len(used)} tensors of {trunk.source} by {trunk.naming} names, {depth} of {trunk.depth} blocks")
    print(f"       {config}")
    unused = [name for name in trunk.unused if not name.startswith(OTHER_PARTS)]
    print(
        f"       not used: {', '.join(unused[:8]) or 'none'}{f' and {len(unused) - 8} more' if len(unused) > 8 else ''}"
    )


def print_plan(run: Run) -> None:
    """What is about to be trained on what, before the first step."""
    args, config = run.args, run.model.config
    is_even = args.sampling != "natural" and run.window % 2 == 0
    few = [f"{100 * rate:g} %" for rate in RATES if allowed_alarms(int((run.val_set.labels == 0).sum()), rate) < 0]
    notes = {
        "train": f"   {args.sampling}{', as many of both in a step' if is_even else ''}",
        "val": f"   too few real for a threshold at {' and '.join(few)} of false alarms" if few else "",
    }
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        print(f"{split:<7}{(dataset.labels == 0).sum()} real, {(dataset.labels == 1).sum()} fake{notes[split]}")
    print(f"data   {', '.join(run.datasets)}")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    left_out = f", without {', '.join(args.without)}" if args.without else ""
    print(
        f"model  {parameters / 1e6:.2f} M parameters: {config.img_size} px in patches of {config.patch_size}, width"
        f" {config.embed_dim}, depth {config.depth}, {args.mask_style} masks{left_out}"
    )
    if args.init_from or args.start == "paper":
        print(f"start  {args.start}, head {args.head}; {trained / 1e6:.2f} M parameters trained ({args.tune})")
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
