"""The PNGs that preprocess.py makes: their names, their notes, and how they are known again."""

import os
import re
import struct
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from faces.images import FACE_NOTE_PATTERN, LANDMARKS, ORIGINAL, TREATMENT, face_note, turn_upright
from runtime.files import free_path, replacing


def is_prepared(path: Path, size: tuple[int, int]) -> bool:
    """Whether the header says that the file is what write_png writes for a (width, height); it stays as it is then."""
    with open(path, "rb") as file:
        header = file.read(29)  # signature, then the IHDR chunk: width, height, bits, colour type, ..., interlace
        if (
            len(header) < 29
            or header[:8] != b"\x89PNG\r\n\x1a\n"
            or struct.unpack(">IIBB2xB", header[16:29]) != (*size, 8, 2, 0)
        ):
            return False
        file.seek(-8, os.SEEK_END)
        if file.read(4) != b"IEND":  # cut off
            return False
    with Image.open(path) as image:
        return (
            turn_upright(image) is image
            and not image.has_transparency_data
            and not getattr(image, "is_animated", False)
        )


def filled_of(path: Path) -> float:
    """The share of an aligned crop that was filled, as its PNG says."""
    with Image.open(path) as image:
        note = re.fullmatch(FACE_NOTE_PATTERN, str(image.info.get(LANDMARKS, "")))
    return float(note[2]) if note else 0.0


def write_png(image: Image.Image, path: Path, sync: bool) -> None:
    """Writes the image and what travels with it. Under `path` there is never half a file.

    Args:
        sync: the content is on the disk before it gets its name.
    """
    text = PngInfo()
    if image.info[ORIGINAL] != f"PNG {image.width}x{image.height}":  # else the file says so itself
        text.add_text(ORIGINAL, image.info[ORIGINAL])
    if image.info[TREATMENT]:
        text.add_text(TREATMENT, image.info[TREATMENT])
    if LANDMARKS in image.info:
        text.add_text(LANDMARKS, face_note(image))
    with replacing(path, sync=sync) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def plan_names(images: list[Path], taken: set[Path]) -> dict[Path, Path]:
    """Each image's name as a PNG. Those that are PNGs keep theirs; a.jpg becomes a.png, or a_jpg.png where that is
    taken.

    Given the sorted images and the names in use, the plan for what is left is the same at every moment of a run: one
    that was stopped goes on to the same names. Names that differ in case alone count as the same, as some file systems
    have it.
    """
    used = {str(path).casefold() for path in taken}
    plan: dict[Path, Path] = {}

    def is_used(path: Path) -> bool:
        return str(path).casefold() in used

    for image in images:
        if image.suffix.lower() == ".png":
            plan[image] = image
        elif not is_used(bare := image.with_name(f"{image.stem}.png")):
            plan[image] = bare
        else:
            plan[image] = free_path(image.parent, f"{image.stem}_{image.suffix[1:].lower()}", ".png", is_used)
        used.add(str(plan[image]).casefold())
    return plan


def plan_outputs(directory: Path, images: list[Path]) -> dict[Path, Path]:
    """{image of list_images(directory): path of its PNG below the output folder}."""
    names = plan_names(
        images, taken={path for folder in {image.parent for image in images} for path in folder.iterdir()}
    )
    return {image: names[image].relative_to(directory) for image in images}
