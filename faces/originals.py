"""The originals of images that preprocess.py replaces in place: kept in a folder beside, and found again there.

    datasets/fake/GAN/a/1.jpg  ->  datasets/fake/GAN/a/1.png  and  datasets/fake/GAN_originals/a/1.jpg

A hard link first, so that no moment is without a whole original; the PNG then takes the place of the other name.
"""

import contextlib
import filecmp
import functools
import os
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

from faces.images import IMAGE_EXTENSIONS, ORIGINAL, TREATMENT, load_rgb
from faces.prepared import is_prepared
from faces.rejection import ORIGINALS_NOTE, ORIGINALS_SUFFIX, Rejected
from runtime.files import free_path, replacing

NOTE = """Originals of the folder beside, where preprocess.py replaced them by images of one size. Leave this one there:
images of another size or crop are made of these. Without this file it would be taken for a data set.
"""


def originals_folder(directory: Path) -> Path:
    return directory.with_name(directory.name + ORIGINALS_SUFFIX)


def check_originals(directory: Path) -> None:
    """Ends the program where the place of the originals is taken by something else."""
    folder = originals_folder(directory)
    if os.path.lexists(folder) and not (folder.is_dir() and ((folder / ORIGINALS_NOTE).is_file() or is_empty(folder))):
        sys.exit(
            f"{folder}: is not of preprocess.py, and the originals of {directory} would go there; rename it, or leave"
            " the originals where they are with --output_dir"
        )


def check_links(directory: Path, images: list[Path]) -> dict[Path, Path]:
    """Of images below a directory, in which each would be replaced: the links to others of them, and what these are.

    A link to a file elsewhere is none of these: it is replaced itself, and the file stays. Ends the program where a
    link leads to a folder elsewhere.
    """
    for folder in sorted({image.parent for image in images}):
        if not (real := folder.resolve()).is_relative_to(directory):
            sys.exit(
                f"{folder}: lies in {real}, to which a link leads out of {directory}, and its images would be replaced"
                " there; remove the link and prepare that folder itself, or leave all as it is with --output_dir"
            )
    links = {image: Path(os.path.realpath(image)) for image in images if image.is_symlink()}
    others = {os.path.realpath(image) for image in images if image not in links} if links else set()
    return {link: real for link, real in links.items() if str(real) in others}


def is_alone(folder: Path) -> bool:
    """Whether it holds originals of a directory that is no longer beside it."""
    return folder.name.endswith(ORIGINALS_SUFFIX) and not os.path.lexists(
        folder.with_name(folder.name.removesuffix(ORIGINALS_SUFFIX))
    )


def is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def keep_original(source: Path, directory: Path) -> Path:
    """Gives a file below the directory a second name in the folder of originals, whole or not at all, and returns it.

    A file that is there under that name stays: it is this one, of a run that was stopped, or the new one gets a number.
    """
    folder = originals_folder(directory)
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError), open(folder / ORIGINALS_NOTE, "x", encoding="utf-8") as note:
        note.write(NOTE)  # before the first original: it tells what the folder is
    place = (folder / source.relative_to(directory)).parent
    place.mkdir(parents=True, exist_ok=True)

    def is_taken(path: Path) -> bool:
        if path.name != source.name and os.path.lexists(source.with_name(path.name)):
            return True  # by a file that another thread or process may be about to keep
        return os.path.lexists(path) and not (path.is_file() and filecmp.cmp(source, path, shallow=False))

    kept = free_path(place, source.stem, source.suffix, is_taken)
    if not os.path.lexists(kept):
        try:
            os.link(source.resolve(), kept)  # of a symbolic link, what it stands for: it would not lead there from here
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links, another one, a file of somebody else
            with replacing(kept, sync=True) as partial:
                shutil.copy2(source, partial)
    return kept


def is_made(source: Path, image: Image.Image) -> bool:
    """Whether an earlier run made it of something else, an image of load_rgb(source)."""
    return image.info[ORIGINAL] != f"PNG {image.width}x{image.height}" and is_prepared(source, image.size)


def find_original(source: Path, image: Image.Image) -> tuple[Path, Image.Image] | None:
    """The kept original of an image that an earlier run made, and its pixels as load_rgb's; else None.

    The name leads to it, and the pixels prove it: in the size of the image they are the same. That run may have been
    over a folder above or below.

    Args:
        image: of load_rgb(source).
    """
    if not is_made(source, image):
        return None
    places = [originals_folder(folder) / source.parent.relative_to(folder) for folder in source.parents[:-1]]
    stems = {source.stem.lower(), re.sub(r"_(jpe?g|png|bmp|webp)(_\d+)?$", "", source.stem.lower())}  # of plan_names
    for path in (path for place in places for stem in sorted(stems) for path in kept_by_stem(place).get(stem, ())):
        try:
            original = load_rgb(path)
        except Rejected:
            continue
        if any(original.info[key] != image.info[key] for key in (ORIGINAL, TREATMENT)):
            continue
        if original.resize(image.size, Image.Resampling.LANCZOS).tobytes() == image.tobytes():
            return path, original
    return None


@functools.lru_cache(maxsize=1024)
def kept_by_stem(place: Path) -> dict[str, list[Path]]:
    """{lower-case stem: kept originals}; one that got a number stands under its name without it, too.

    Read once: what is looked for was made by an earlier run, so its original was there before this one began.
    """
    found: dict[str, list[Path]] = {}
    readable = os.path.isdir(place) and os.access(place, os.R_OK)  # above the data sets, a folder may be anybody's
    for path in sorted(place.iterdir()) if readable else ():
        if path.name.lower().endswith(IMAGE_EXTENSIONS):
            for stem in {path.stem.lower(), re.sub(r"_\d+$", "", path.stem.lower())}:
                found.setdefault(stem, []).append(path)
    return found
