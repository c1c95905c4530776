"""What preprocess.py does to the pixels: resized, or aligned and recompressed; and the note of it that travels along.

Loose images are treated by the same functions, as the note in the checkpoint says.
"""

import argparse
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from faces.images import FILLED, LANDMARKS, ORIGINAL, TREATMENT, TREATMENT_PATTERN, scaled_landmarks
from faces.rejection import BEYOND, NO_FACE, Rejected

# From the brows to the chin; FFHQ's own size reaches over the border of nearly all close-ups
ALIGNED_CROP = 0.6


def treatment_of(args: argparse.Namespace) -> str:
    """What --align and --recompress ask for, as TREATMENT has it; "" for neither."""
    parts = [f"aligned {args.align:g}{'' if getattr(args, 'reflected', False) else ' on grey'}"] if args.align else []
    parts += [f"JPEG {'-'.join(map(str, dict.fromkeys(args.recompress)))}"] if args.recompress else []
    return ", ".join([*parts, f"{args.target_width}x{args.target_height}"]) if parts else ""


def describe_treatment(treatment: str) -> str:
    """For messages."""
    return treatment or "resized alone"


def parse_treatment(treatment: str) -> argparse.Namespace:
    """The options that treatment_of has made it from.

    reflected: earlier versions filled what lies beyond the border of a picture with its mirror image.
    """
    crop, on_grey, low, high, width, height = re.fullmatch(TREATMENT_PATTERN, treatment).groups()
    return argparse.Namespace(
        align=float(crop or 0),
        reflected=bool(crop) and not on_grey,
        recompress=(int(low), int(high or low)) if low else None,
        target_width=int(width),
        target_height=int(height),
        max_filled=1.0,
    )


def check_original(image: Image.Image, source: Path, args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the image is none as it was taken, but resized or treated by an earlier run, and would be again.
    """
    info, treatment = image.info, treatment_of(args)
    if treatment and info[TREATMENT]:
        raise ValueError(f"{source}: is {info[TREATMENT]} already; take the originals for {treatment}")
    if args.align and info[ORIGINAL].split()[1] != f"{image.width}x{image.height}":
        raise ValueError(f"{source}: was resized already, it was a {info[ORIGINAL]}; take the originals for --align")


def treat(
    image: Image.Image, source: Path, args: argparse.Namespace, content: Callable[[], bytes] | None = None
) -> Image.Image:
    """An upright RGB image in its new size, aligned and recompressed where that is asked for.

    Aligning takes a process of faces/workers.py, which holds a finder.

    Args:
        content: gives what a JPEG's quality is drawn from, if not the file.

    Raises:
        Rejected: it cannot be aligned.
        ValueError: it is none as it was taken, but resized or treated by an earlier run.
    """
    size, info, treatment = (args.target_width, args.target_height), image.info, treatment_of(args)
    check_original(image, source, args)
    if args.align:
        from faces.alignment import align_face  # OpenCV and dlib, where they are needed
        from faces.workers import this_finder

        image = align_face(image, this_finder(), args.target_width, args.align)
        if image is None:
            raise Rejected(NO_FACE)
        if image.info[FILLED] > args.max_filled:
            raise Rejected(f"{BEYOND}: {image.info[FILLED]:.1%}, --max_filled {args.max_filled:g}")
    else:
        if LANDMARKS in info:  # of an aligned image in another size
            info = info | {LANDMARKS: np.round(scaled_landmarks(info[LANDMARKS], image.size, size), 2)}
        image = image.resize(size, Image.Resampling.LANCZOS)  # Pillow widens the filter when it shrinks: antialiased
    if treatment:  # comments and colour profiles go: they could name the class
        info = {ORIGINAL: info[ORIGINAL], TREATMENT: treatment} | (image.info if args.align else {})
    image.info = info
    if args.recompress:
        image = recompress(image, (content or source.read_bytes)(), args.recompress)
    return image


def recompress(image: Image.Image, content: bytes, qualities: tuple[int, int]) -> Image.Image:
    """The image after a JPEG of a quality between the two, both included, drawn from the content of its file."""
    low, high = qualities
    drawn = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=low + drawn % (high - low + 1))
    decoded = Image.open(stream).convert("RGB")
    decoded.info = image.info
    return decoded
