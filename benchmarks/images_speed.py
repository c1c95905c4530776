"""How fast `inference.py --images` is beside bare face detection and a bare forward pass of the model.

    python benchmarks/images_speed.py                      300 drawn pictures, hostile ones among them; three minutes
    python benchmarks/images_speed.py --checkpoint FILE    with a trained model; without, a random one of full size

Beside it stand as many bare processes as it has workers, which decode each picture and run dlib's detector and
predictor at the sizes at which its faces are found, and then the model over as many ready batches. Ours is timed as a
user runs it, on a fifth of
the pictures and on all: images/s is the difference of pictures over the difference of seconds. Rounds are interleaved,
figures are medians. Memory is the largest resident set of any one process.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from drawing.face import sample_face
from drawing.render import render
from evaluation.scoring import fake_probability
from faces.finder import FaceFinder, finder_files
from faces.loose import SEARCH_SIDE, UPSAMPLED_SIDE
from model import LAMMViT, LAMMViTConfig
from runtime.checkpoint import CHECKPOINT_VERSION, load_checkpoint


def draw_pictures(folder: Path, count: int) -> None:
    """Portraits of 224 to 1,200 pixels, one in ten with three faces, one in ten not a picture with a face; one 8,000
    wide.
    """
    folder.mkdir()
    for i in range(count):
        rng, kind, path = np.random.default_rng(i), i % 10, folder / f"{i:04}.jpg"
        if kind == 8:
            group = Image.new("RGB", (8000 if i == 8 else 1500, 1600 if i == 8 else 420), (120, 130, 140))
            for k in range(3):
                group.paste(Image.fromarray(render(sample_face(rng), group.height)), (k * group.width // 3, 0))
            group.save(path, quality=92)
        elif i % 30 == 9:
            path.write_text("not an image")
        elif i % 30 == 19:
            Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(path)
        else:
            Image.fromarray(render(sample_face(rng), (224, 500, 1200)[i % 3])).save(path, quality=92)
        if i % 30 == 29:
            path.write_bytes(path.read_bytes()[:2000])


_finder = None


def bare_detection(path: str) -> int:
    """Number of faces, found and with landmarks."""
    global _finder
    _finder = _finder or FaceFinder(finder_files())
    try:
        image = Image.open(path).convert("RGB")
    except OSError:
        return 0
    small = image.copy()
    picture = np.asarray(image.resize((224, 224), Image.Resampling.LANCZOS))
    found = _finder.detector(picture, 0) if max(image.size) < 1.4 * min(image.size) else ()
    for box in found:
        _finder.predict(picture, box)
    if not found or max(image.size) > 336:  # others may stand beside
        small.thumbnail((SEARCH_SIDE, SEARCH_SIDE))
        picture = np.asarray(small)
        found = _finder.detector(picture, int(max(small.size) <= UPSAMPLED_SIDE))
    for box in found:
        _finder.predict(picture, box)
    return len(found)


def bare_seconds(paths: list[Path], model: LAMMViT, workers: int, batch_size: int) -> tuple[float, float]:
    """Seconds of detection in all of these, and of the model over the faces found; without what starting takes."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(bare_detection, map(str, paths[: 4 * workers])))  # loads dlib
        started = time.perf_counter()
        faces = sum(pool.map(bare_detection, map(str, paths), chunksize=4))
        detection = time.perf_counter() - started
    side, grid = model.config.img_size, model.config.grid_size
    images, masks = (
        torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8),
        torch.rand(batch_size, 8, grid, grid),
    )
    with torch.inference_mode():
        fake_probability(model, images, masks)
        started = time.perf_counter()
        for start in range(0, faces, batch_size):
            count = min(batch_size, faces - start)
            fake_probability(model, images[:count], masks[:count])
    return detection, time.perf_counter() - started


def our_seconds(paths: list[Path], checkpoint: Path, args: argparse.Namespace) -> tuple[float, int, int]:
    """Seconds of a whole run, its largest resident set in bytes, and its rows."""
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--checkpoint",
        str(checkpoint),
        "--workers",
        str(args.workers),
        "--batch_size",
        str(args.batch_size),
        "--images",
        *map(str, paths),
    ]
    started, largest = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as rows:
        process = subprocess.Popen(command, stdout=rows, stderr=subprocess.DEVNULL)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            for one in [watched, *watched.children(recursive=True)] if watched.is_running() else []:
                try:
                    largest = max(largest, one.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        rows.seek(0)
        return seconds, largest, len(rows.readlines()) - 1


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of train.py (default: the paper's size, random weights)")
    parser.add_argument("--pictures", type=int, default=300, help="(default: 300)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: one a core)")
    parser.add_argument("--batch_size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    return parser


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if not checkpoint:
            checkpoint, config = Path(folder, "random.pth"), LAMMViTConfig()
            framing = {
                "mean_landmarks": torch.rand(68, 2) * 0.3 + 0.35,
                "usual": torch.tensor([[0.15, 0.5], [0.4, 1.5]]),
            }
            torch.save(
                {
                    "version": CHECKPOINT_VERSION,
                    "config": dataclasses.asdict(config),
                    "model": LAMMViT(config).state_dict(),
                    "mask_style": "polygon",
                    "val_threshold": 0.5,
                    "framing": framing,
                    "datasets": [],
                    "arguments": {},
                },
                checkpoint,
            )
        model, _ = load_checkpoint(checkpoint)
        draw_pictures(Path(folder, "pictures"), args.pictures)
        paths = sorted(Path(folder, "pictures").iterdir())
        paths = [path for offset in range(5) for path in paths[offset::5]]  # a fifth of them is like all
        part, ours, bare, memory = len(paths) // 5, [], [], []
        for number in range(args.rounds):
            small, large = our_seconds(paths[:part], checkpoint, args), our_seconds(paths, checkpoint, args)
            ours.append(large[0] - small[0])
            memory.append((small[1], large[1]))
            detection, forward = bare_seconds(paths[part:], model, args.workers, args.batch_size)
            bare.append(detection + forward)
            print(
                f"round {number + 1}: ours {ours[-1]:.1f} s, bare {detection:.1f} + {forward:.1f} s; start-up and a"
                f" fifth {small[0]:.1f} s",
                flush=True,
            )
    count, our_median, bare_median = len(paths) - part, statistics.median(ours), statistics.median(bare)
    print(
        "\n| | images/s | bare | ratio | rows | peak memory of a process, a fifth and all |\n|---|--:|--:|--:|--:|--:|"
    )
    peak = [statistics.median(column) / 2**20 for column in zip(*memory)]
    print(
        f"| loose images | {count / our_median:.1f} | {count / bare_median:.1f} | **{bare_median / our_median:.2f}** |"
        f" {large[2]} | {peak[0]:.0f} MB, {peak[1]:.0f} MB ({peak[1] / peak[0]:.2f}) |"
    )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
