"""The originals of images that preprocess.py replaces in place: kept in a folder beside, and found again there.

    datasets/fake/GAN/a/1.jpg  ->  datasets/fake/GAN/a/1.png  and  datasets/fake/GAN_originals/a/1.jpg

A hard link first, so that no moment is without a whole original; the PNG then takes the place of the other name.
"""

import filecmp
import itertools
import os
import re
import shutil
from pathlib import Path

from PIL import Image

from faces.images import IMAGE_EXTENSIONS, ORIGINAL, TREATMENT, load_rgb
from faces.prepared import is_prepared
from faces.rejection import ORIGINALS_SUFFIX, Rejected
from runtime.files import free_path, replacing


def originals_folder(directory: Path) -> Path:
    return directory.with_name(directory.name + ORIGINALS_SUFFIX)


def keep_original(source: Path, directory: Path) -> Path:
    """Gives a file below the directory a second name in the folder of originals, whole or not at all, and returns it.

    A file that is there under that name stays: it is this one, of a run that was stopped, or the new one gets a number.
    """
    place = (originals_folder(directory) / source.relative_to(directory)).parent
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


def find_original(source: Path, image: Image.Image, directory: Path) -> tuple[Path, Image.Image] | None:
    """The kept original of an image that an earlier run made in the directory, and its pixels as load_rgb's; else None.

    The name leads to it, and the pixels prove it: in the size of the image they are the same.

    Args:
        image: of load_rgb(source).
    """
    if image.info[ORIGINAL] == f"PNG {image.width}x{image.height}" or not is_prepared(source, image.size):
        return None  # an original itself
    place = (originals_folder(directory) / source.relative_to(directory)).parent
    stems = dict.fromkeys((source.stem, re.sub(r"_(jpe?g|bmp|webp)(_\d+)?$", "", source.stem)))  # of plan_names
    suffixes = [case(suffix) for suffix in IMAGE_EXTENSIONS for case in (str.lower, str.upper)]
    for stem, suffix in itertools.product(stems, suffixes):
        path = place / f"{stem}{suffix}"
        if not path.is_file():
            continue
        try:
            original = load_rgb(path)
        except Rejected:
            continue
        if any(original.info[key] != image.info[key] for key in (ORIGINAL, TREATMENT)):
            continue
        if original.resize(image.size, Image.Resampling.LANCZOS).tobytes() == image.tobytes():
            return path, original
    return None
