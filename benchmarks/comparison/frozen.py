"""What a frozen trunk says of all images, read once and shared by all folds; and linear models on it.

    features/  ->  trunk/<which>/<real|fake>_<Name>.npz: class_token, patches (n, L, D) float16  ->  log odds

After each of the L blocks: the class token, and the mean of the patches, both after the trunk's last LayerNorm, as the
head of a model reads them. Of the two probes on it one is UniversalFakeDetect's recipe (Ojha et al., CVPR 2023, arXiv
2302.10174), a linear model on the last class token; the other starts the head of train.py --head probe. HEADS are such
probes, too, of what the head of a whole model reads.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.comparison.folds import TRAIN, Fold, Stock
from evaluation.scoring import predict
from model import LAMMViT
from runtime.devices import pick_device, pick_precision
from runtime.files import save_arrays
from runtime.pretrained import load_trunk, read_trunk
from samples.transforms import TrainTransform
from training.options import PARTS
from training.probe import Known, left_out, read_features
from training.setup import build_model, config_of

LAST_CLASS_TOKEN, PROBE = "probe, last class token", "probe"
# As train.py --tune head --epochs 0 makes them, with --probe_views; the first is what ships. Their operating points are
# of data sets left out
HEAD_ALONE, PLAIN_HEAD = "LAMM-ViT, head alone", "plain ViT, head alone"
HEADS = {HEAD_ALONE: "LAMM-ViT", PLAIN_HEAD: "plain ViT"}  # of which of VARIANTS
PROBES = (LAST_CLASS_TOKEN, PROBE, PLAIN_HEAD, HEAD_ALONE)


def build_trunk(train_args: argparse.Namespace, img_size: int) -> tuple[LAMMViT, str]:
    """The trunk of --init_from with all of its blocks and nothing of the method, and the digest of its weights."""
    trunk = read_trunk(train_args.init_from)
    nothing_else = {"dropout": 0.0, "scale_weights": False, "pool": ("class",), "read_blocks": ()}
    config = config_of(train_args, img_size, trunk)
    model = LAMMViT(replace(config, depth=trunk.depth, **dict.fromkeys(PARTS, False), **nothing_else))
    load_trunk(model, trunk)
    return model.eval(), trunk.digest(trunk.depth)


def read_blocks(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB -> (B, L, 2, D) float16: after each block the class token, the mean of the
    patches."""
    seen = []

    def watch(block: torch.nn.Module, inputs: tuple, x: torch.Tensor) -> None:
        tokens = model.norm(x.float())  # (B, N, D)
        seen.append(torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))

    hooks = [block.register_forward_hook(watch) for block in model.blocks]
    try:
        device = model.head.weight.device
        model(model.normalize(images.to(device)), region_masks.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen, dim=1).half().cpu().numpy()


def read_frozen(
    args: argparse.Namespace, stock: Stock, train_args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Class tokens and means of patches of all images, each (N, L, D) float16; read from the files where they are
    there."""
    model, digest = build_trunk(train_args, stock.img_size)
    read = read_all(args, stock, train_args, model, (digest,), read_blocks)
    return read[:, :, 0], read[:, :, 1]


def read_head_inputs(
    args: argparse.Namespace, stock: Stock, train_args: argparse.Namespace, without: Sequence[str], seed: int
) -> np.ndarray:
    """What the head of the untrained model of these options, but --without these parts, reads of all images, as they
    are and in --probe_views: (V, N, D) float16.

    Args:
        seed: of the views, which are drawn anew. The model's initial values are those of train.py's own --seed: what
            the head reads does not depend on them, but for --start paper.
    """
    trunk = read_trunk(train_args.init_from)
    train_args = argparse.Namespace(**vars(train_args) | {"without": list(without)})
    model = build_model(train_args, stock.img_size, trunk).eval()
    start = train_args.start, str(train_args.gates), train_args.seed, train_args.mask_style
    digest = trunk.digest(train_args.depth), *start
    transform = TrainTransform(train_args.color_jitter, train_args.augment, train_args.mask_style)

    def compute(*of_batch: object) -> np.ndarray:
        return read_features(*of_batch).astype(np.float16)

    views = [read_all(args, stock, train_args, model, digest, compute)]
    for view in range(seed * train_args.probe_views, (seed + 1) * train_args.probe_views):
        told = (*digest, train_args.augment, train_args.color_jitter, view)
        views.append(read_all(args, stock, train_args, model, told, compute, transform, view))
    return np.stack(views)


def read_all(
    args: argparse.Namespace,
    stock: Stock,
    train_args: argparse.Namespace,
    model: LAMMViT,
    told: tuple,
    compute: Callable,
    transform: TrainTransform | None = None,
    view: int = 0,
) -> np.ndarray:
    """compute, as evaluation.scoring.predict takes it, of all images (N, ...); read from files where they are there.

    Args:
        told: what tells these files from others, beside the images, the model's config and the precision.
        view: which draw of the transform.
    """
    device = pick_device(args.device)
    dtype = pick_precision(train_args.precision, device, model.config.embed_dim)
    told = (stock.fingerprint, *told, str(model.config), str(dtype))
    folder = args.output_dir / "trunk" / hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace('/', '_')}.npz" for name in stock.files if name in stock.names}
    missing = [name for name, path in files.items() if not path.exists()]
    model.to(device)
    for name in (bar := tqdm(missing, desc="trunk", unit="data set", disable=not missing)):
        bar.set_postfix_str(name)
        dataset = stock.dataset([name], model.config.grid_size, train_args.mask_style)
        dataset.transform, dataset.seed = transform, train_args.seed
        dataset.set_epoch(view)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            read = predict(model, dataset, compute, num_workers=train_args.num_workers, title=name)
        save_arrays(files[name], read=read)
    return np.concatenate([np.load(path)["read"] for path in files.values()])


def probe_inputs(name: str, frozen: tuple[np.ndarray, np.ndarray], train_args: argparse.Namespace) -> np.ndarray:
    """What one of the two probes of the trunk alone reads of all images, of read_frozen: (1, N, D')."""
    class_tokens, patches = frozen
    if name == LAST_CLASS_TOKEN:
        return class_tokens[None, :, -1]
    blocks = train_args.read_blocks or [train_args.depth]
    return patches[:, [block - 1 for block in blocks]].reshape(1, len(patches), -1)


def learn(stock: Stock, views: np.ndarray) -> Known:
    """The training images of all data sets, from which the probes of all folds learn.

    Args:
        views: (V, N, D), of all images as they are first.
    """
    inside = stock.splits == TRAIN
    return Known(views[:, inside].astype(np.float32), stock.labels[inside], stock.names[inside], by_source=True)


def fit_probe(known: Known, fold: Fold, features: np.ndarray, for_others: bool) -> tuple[np.ndarray, dict]:
    """A linear discriminant of what the fold leaves to train on. Data sets of a class weigh alike.

    Args:
        features: (N, D) of all images as they are.
        for_others: also what training.probe.left_out gives for each known data set in turn.

    Returns:
        log odds (N,) of all images; {data set: log odds of its training images, by what has not seen it}.
    """
    others = left_out(known, fold.left_out) if for_others else {}
    return known.fit(fold.left_out).log_odds(features.astype(np.float64)), others
