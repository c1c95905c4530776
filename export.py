"""Writes a trained model into files to hand on: ONNX and PyTorch's own export, which need nothing of this repository;
or its weights, alone or as a folder for the Hub.

    output_model/best_model.pth  ->  output_model/model.onnx, for onnxruntime and the like; weights inside
                                     output_model/model.pt2, for torch.export.load
                                     or, with --weights, mine.safetensors, for inference.py --checkpoint
                                     or, with --hub, a folder with weights, settings and a card (docs/hub.md)

    python export.py
    python export.py --checkpoint run_7/best_model.pth --output_dir deployed
    python export.py --weights mine.safetensors              instead of these two, the weights alone
    python export.py --hub mine                              likewise, a folder: inference.py --checkpoint mine

The file of --weights holds what was trained, matrices in half precision, and all settings. A frozen trunk (train.py
--tune norms, lora:R or head) is not in it, but its name and SHA-256 are. The folder of --hub holds the same, each
number as it is in the checkpoint. A README.md that is there stays as it is.

The other two need three packages more: pip install onnx onnxscript onnxruntime

Both files hold the same function, for any number of images B:

    images        (B, 3, h, w) uint8, RGB, of the metadata's img_size; normalised inside
    region_masks  (B, 8, G, G) float32, of faces.regions.draw_region_masks in the metadata's mask_style, G = img_size /
    patch_size
    probability   (B,) float32, of a fake

Models that use no masks take region_masks, too, and do not look at them. The metadata are text, numbers, lists and
objects in JSON: val_threshold, thresholds (by rate of false alarms, {"0.01": ..., "0.05": ...}: fake from the first on,
real below the second), temperature (which is in the weights already), img_size, patch_size, mask_style, treatment (what
preprocess.py did to the training images, and has to do to others: "aligned 0.6 on grey, JPEG 75-95, 224x224"; "":
resized alone), regions, datasets (what the model was trained on), checkpoint_sha256.

    session.get_modelmeta().custom_metadata_map                     in onnxruntime
    metadata = {"val_threshold": ""}                                in PyTorch: all of them, but only if asked for one
    program = torch.export.load("model.pt2", extra_files=metadata)

Before the files get their names they are loaded again, and have to agree with the model that inference.py runs.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from attention import force_path
from evaluation.scoring import fake_probability
from faces.regions import REGIONS
from model import NUM_REGIONS, LAMMViT
from runtime.card import README, card_path, read_card, write_card
from runtime.checkpoint import load_checkpoint, model_of
from runtime.files import check_space
from runtime.hub_folder import FILES, read_folder, weights_in, write_folder
from runtime.pretrained import split_source
from runtime.weights_file import (
    SUFFIX,
    TRAINED,
    choose_checkpoint,
    is_shipped,
    read_weights,
    without_folder,
    write_weights,
)

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the oldest that torch writes; onnxruntime reads it from 1.14 on, and is no faster with 20 or 23
MAX_ONNX_BYTES = 2**31 - 1  # of a protobuf message, which a single .onnx file is
GRAPH_BYTES = 16 * 2**20  # room for what is not weights
TOLERANCE = 1e-4  # in probability
TOLERANCE_IN_HALF = 1e-2  # likewise, of --weights


class Detector(nn.Module):
    """From the pixels to the probability of a fake."""

    def __init__(self, model: LAMMViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, region_masks: Tensor) -> Tensor:
        """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) float32 -> (B,) float32."""
        return self.model(self.model.normalize(images), region_masks)["logits"].softmax(dim=-1)[:, 1]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention of three or four dimensions as a formula: torch translates it to ONNX for four
    only.
    """
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def random_batch(model: LAMMViT, size: int) -> tuple[Tensor, Tensor]:
    """Masks that cover most patches little, as real ones do; those of the last image cover none."""
    side, grid = model.config.img_size, model.config.grid_size
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    masks = torch.rand(size, NUM_REGIONS, grid, grid, generator=generator) ** 8
    masks[-1] = 0
    return images, masks


def write_exports(model: LAMMViT, metadata: dict[str, str], onnx_file: Path, pt2_file: Path) -> None:
    """Writes both files of a model that is on the CPU and in eval mode."""
    batch = torch.export.Dim("batch")
    with force_path("textbook"), torch.no_grad():  # operators of PyTorch alone, not attention's own
        program = torch.export.export(
            Detector(model).eval().requires_grad_(False),
            random_batch(model, 2),
            dynamic_shapes=({0: batch}, {0: batch}),
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    torch.export.save(program, pt2_file, extra_files=metadata)

    program = program.run_decompositions({torch.ops.aten.scaled_dot_product_attention.default: plain_attention})
    names = {"input_names": ["images", "region_masks"], "output_names": ["probability"]}
    exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        value.shape[0] = "batch"  # torch has a name of its own for it
    exported.model.metadata_props.update(metadata)
    exported.save(onnx_file, external_data=False)


def compare(model: LAMMViT, onnx_file: Path, pt2_file: Path) -> tuple[float, float]:
    """The largest difference in probability between each file and the model, on another number of images than they were
    made with.
    """
    import onnxruntime

    images, region_masks = random_batch(model, 3)
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = fake_probability(model, images, region_masks)
        by_torch = torch.export.load(pt2_file).module()(images, region_masks).numpy()
    (by_onnx,) = session.run(["probability"], {"images": images.numpy(), "region_masks": region_masks.numpy()})
    return float(abs(by_onnx - expected).max()), float(abs(by_torch - expected).max())


def describe(model: LAMMViT, checkpoint: dict, path: Path) -> dict[str, str]:
    """The metadata: what one has to know to use the file, and where it comes from."""
    facts = {
        "val_threshold": float(checkpoint["val_threshold"]),
        # what checkpoints of before there were any do not have is left out
        **{name: checkpoint[name] for name in ("thresholds", "temperature") if name in checkpoint},
        "img_size": model.config.img_size,
        "patch_size": model.config.patch_size,
        "mask_style": checkpoint["mask_style"],
        "treatment": checkpoint["framing"]["treatment"],
        "regions": list(REGIONS),
        "datasets": checkpoint["datasets"],
        "checkpoint_sha256": hashlib.sha256(weights_in(path).read_bytes()).hexdigest(),
    }
    return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="model to export (default: output_model/best_model.pth; where there is none, the weights that ship)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where model.onnx and model.pt2 go (default: the folder of the checkpoint; output_model for the weights"
        " that ship)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="instead of these two, write one file of weights and settings, and its card, unless you wrote one"
        " (default: none)",
    )
    parser.add_argument(
        "--hub",
        type=str,  # of Path, an empty one would be the current folder
        metavar="FOLDER",
        help="instead of these two, write a folder for the Hub: weights, settings, a card (default: none)",
    )
    return parser


def write_shipped(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> None:
    """Writes --weights, after the model that comes out of it has agreed with that of the checkpoint.

    Raises:
        ValueError: it does not agree; the name is of another format.
    """
    target = args.weights
    if target.suffix != SUFFIX:
        raise ValueError(f"--weights {target}: has to end in {SUFFIX}, by which inference.py knows the file")
    if target.name == trunk_names(checkpoint)[1]:
        raise ValueError(
            f"--weights {target}: has the name of its trunk's file, which has to lie beside it; take another"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as folder:
        file = Path(folder, target.name)
        write_weights(checkpoint, file)
        # The file has no folder of the trunk's; here it is where it was
        again = model_of(read_weights(file) | {"trunk": checkpoint.get("trunk")}, weights_in(args.checkpoint))
        images, region_masks = random_batch(model, 16)
        with torch.inference_mode():
            one, other = (fake_probability(which, images, region_masks) for which in (model, again))
        difference = float(abs(one - other).max())
        if not difference <= TOLERANCE_IN_HALF:  # nan is not
            raise ValueError(
                f"{target}: differs from {args.checkpoint} by {difference:.1e} in probability, more than"
                f" {TOLERANCE_IN_HALF:.0e}: its matrices need more than half precision; not written"
            )
        size = file.stat().st_size / 1e6
        os.replace(file, target)
    keep = write_card(checkpoint, target)
    print(f"{target}: {size:.1f} MB, largest difference from the checkpoint in probability {difference:.1e}")
    print(f"{card_path(target)}: " + ("was there, and stays" if keep else "written"))
    tell_trunk(checkpoint, "beside it")


def trunk_names(checkpoint: dict) -> tuple[str, str]:
    """What a trunk's file is called, and what it has to be called beside the weights; "" twice where there is none."""
    trunk = checkpoint.get("trunk")
    if not trunk or not split_source(trunk["source"])[1]:
        return "", ""
    name, beside = (split_source(source)[1].name for source in (trunk["source"], without_folder(trunk["source"])))
    return name, beside


def tell_trunk(checkpoint: dict, where: str) -> None:
    name, beside = trunk_names(checkpoint)
    if name:
        renamed = f", as {beside}" if beside != name else ""
        print(f"its trunk is not in it: whoever uses it needs {name} {where}{renamed}")


def write_for_hub(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> None:
    """Writes --hub, after the model that comes out of it was found to be that of the checkpoint, bit for bit.

    Raises:
        ValueError: it is not; there is a file of this name.
    """
    if not args.hub:
        raise ValueError("--hub is empty; name a folder")
    target = Path(args.hub)
    if target.exists() and not target.is_dir():
        raise ValueError(f"--hub {target}: is a file; name a folder")

    def check(folder: Path) -> None:
        again = model_of(read_folder(folder) | {"trunk": checkpoint.get("trunk")}, weights_in(args.checkpoint))
        state = again.state_dict()
        if not all(torch.equal(values, state[name]) for name, values in model.state_dict().items()):
            raise ValueError(f"{target}: differs from {args.checkpoint}; not written")

    keep = write_folder(checkpoint, target, read_card(args.checkpoint), check)
    size = weights_in(target).stat().st_size / 1e6
    print(f"{target}: {', '.join(FILES)}; {size:.1f} MB" + (f"; the {README} that was there stays" * keep))
    tell_trunk(checkpoint, "in that folder")


def main(args: argparse.Namespace) -> None:
    if args.weights or args.hub is not None:
        if args.output_dir or (args.weights and args.hub is not None):
            raise ValueError("--output_dir is for model.onnx and model.pt2; --weights names its file, --hub its folder")
        args.checkpoint = choose_checkpoint(args.checkpoint)
        (write_shipped if args.weights else write_for_hub)(*load_checkpoint(args.checkpoint), args)
        return
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{' and '.join(lacking)} not installed; pip install {' '.join(PACKAGES)}")
    args.checkpoint = choose_checkpoint(args.checkpoint)
    model, checkpoint = load_checkpoint(args.checkpoint)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if weights + GRAPH_BYTES > MAX_ONNX_BYTES:
        raise ValueError(
            f"{args.checkpoint}: its weights take {weights / 1e9:.2f} GB, but one .onnx file holds no more than 2.1 GB;"
            " train a smaller model (--embed_dim, --depth)"
        )

    # not beside the weights that ship: that folder is the repository's
    output_dir = args.output_dir or (TRAINED if is_shipped(args.checkpoint) else weights_in(args.checkpoint)).parent
    output_dir.mkdir(parents=True, exist_ok=True)
    check_space(output_dir / "model.onnx", 2 * (weights + GRAPH_BYTES))
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export.") as folder:
        files = [Path(folder, "model.onnx"), Path(folder, "model.pt2")]
        write_exports(model, describe(model, checkpoint, args.checkpoint), *files)
        differences = compare(model, *files)
        for file, difference in zip(files, differences):
            if not difference <= TOLERANCE:  # nan is not
                raise ValueError(
                    f"{file.name}: differs from {args.checkpoint} by {difference:.1e} in probability, more than"
                    f" {TOLERANCE:.0e}; not written. Install the versions in requirements.txt"
                )
        for file, difference in zip(files, differences):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            size = file.stat().st_size / 1e6
            os.replace(file, output_dir / file.name)
            print(
                f"{output_dir / file.name}: {size:.1f} MB, largest difference from the checkpoint in probability"
                f" {difference:.1e}"
            )


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:  # CheckpointError among them
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
