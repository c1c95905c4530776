"""What a frozen trunk says of all images, read once and shared by all folds; and linear models on it.

    features/  ->  trunk/<which>/<real|fake>_<Name>.npz: class_token, patches (n, L, D) float16  ->  log odds

After each of the L blocks: the class token, and the mean of the patches, both after the trunk's last LayerNorm, as the
head of a model reads them. Of the two probes one is UniversalFakeDetect's recipe (Ojha et al., CVPR 2023, arXiv
2302.10174), a linear model on the last class token; the other starts the head of train.py --head probe.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.comparison.folds import TRAIN, VAL, Fold, Stock
from evaluation.scoring import predict
from model import LAMMViT, LAMMViTConfig
from runtime.devices import pick_device, pick_precision
from runtime.files import replacing
from runtime.pretrained import load_trunk, read_trunk
from training.options import PARTS
from training.probe import balance, fit

LAST_CLASS_TOKEN, PROBE = "probe, last class token", "probe"
PROBES = (LAST_CLASS_TOKEN, PROBE)


def build_trunk(train_args: argparse.Namespace, img_size: int) -> tuple[LAMMViT, str]:
    """The trunk of --init_from with all of its blocks and nothing of the method, and the digest of its weights."""
    trunk = read_trunk(train_args.init_from)
    config = LAMMViTConfig(
        img_size=img_size,
        patch_size=train_args.patch_size,
        embed_dim=train_args.embed_dim,
        depth=trunk.depth,
        mlp_ratio=train_args.mlp_ratio,
        dropout=0.0,
        **dict.fromkeys(PARTS, False),
        **trunk.config,
    )
    model = LAMMViT(config)
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
    device = pick_device(args.device)
    dtype = pick_precision(train_args.precision, device, model.config.embed_dim)
    told = (stock.fingerprint, digest, str(model.config), str(dtype))
    folder = args.output_dir / "trunk" / hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace('/', '_')}.npz" for name in stock.files if name in stock.names}
    missing = [name for name, path in files.items() if not path.exists()]
    model.to(device)
    for name in (bar := tqdm(missing, desc="trunk", unit="data set", disable=not missing)):
        bar.set_postfix_str(name)
        dataset = stock.dataset([name], model.config.grid_size)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            read = predict(model, dataset, read_blocks, num_workers=train_args.num_workers, title=name)
        save_arrays(files[name], class_token=read[:, :, 0], patches=read[:, :, 1])
    parts = [np.load(path) for path in files.values()]
    return tuple(np.concatenate([part[key] for part in parts]) for key in ("class_token", "patches"))


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def probe_inputs(name: str, frozen: tuple[np.ndarray, np.ndarray], train_args: argparse.Namespace) -> np.ndarray:
    """What one of PROBES reads of all images, (N, D')."""
    class_tokens, patches = frozen
    if name == LAST_CLASS_TOKEN:
        return class_tokens[:, -1]
    blocks = train_args.read_blocks or [train_args.depth]
    return patches[:, [block - 1 for block in blocks]].reshape(len(patches), -1)


def fit_probe(stock: Stock, fold: Fold, inputs: np.ndarray) -> np.ndarray:
    """Log odds (N,) of all images, of a logistic regression on what is left to train on. Data sets of a class weigh
    alike, and its C is the best of validation.

    Args:
        inputs: (N, D).
    """
    inside, outside = stock.known(fold, TRAIN), stock.known(fold, VAL)
    _, sources = np.unique(stock.names[inside], return_inverse=True)
    weight, bias, _ = fit(
        inputs[inside].astype(np.float32),
        stock.labels[inside],
        balance(stock.labels[inside], sources),
        inputs[outside].astype(np.float32),
        stock.labels[outside],
    )
    return inputs.astype(np.float64) @ weight + bias
