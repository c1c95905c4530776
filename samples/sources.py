"""What lies in a data root: its data sets, and the images of each as they are on the disk now.

datasets/<real|fake>/<Name>/...  any depth
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from faces.images import IMAGE_EXTENSIONS, list_files
from faces.rejection import is_set_aside
from samples.feature_files import CLASSES


class Source(NamedTuple):
    """An image as it is on the disk now. Extracted again when any of it changes."""

    data_set: str  # "fake/StyleGAN3"
    path: str  # below the data root
    # size in bytes, time of the last change in ns; (-1, -1): nothing there that this program may read
    stat: tuple[int, int]
    # What a manifest says
    split: str = ""  # that it has to be in; "": dealt
    group: str | None = None  # whose images share a split
    about: str = ""  # further columns, JSON


def state(path: Path) -> tuple[int, int]:
    """Source.stat of a file, now."""
    try:
        stat = os.stat(path)
        return (stat.st_size, stat.st_mtime_ns) if os.access(path, os.R_OK) else (-1, -1)
    except OSError:
        return -1, -1


def data_set_folders(data_root: Path, kind: str) -> list[Path]:
    """The folders of the "real" or "fake" data sets, by name; not hidden ones, nor what preprocess.py has set aside."""
    folders = sorted(path for path in (data_root / kind).glob("*") if path.is_dir() and not path.name.startswith("."))
    return [folder for folder in folders if not is_set_aside(folder)]


def is_named(data_set: str, names: Sequence[str]) -> bool:
    """Whether "fake/StyleGAN3" is among names as users write them: "StyleGAN3", "fake/StyleGAN3"."""
    return data_set in names or data_set.split("/")[1] in names


def find_sources(data_root: Path) -> tuple[list[Source], list[Path]]:
    """All images in the order of data sets, real first, and paths; and the files that are no images by their names.

    Raises:
        FileNotFoundError: the layout is another one, or a data set is without images.
    """
    layout = f"the layout is {data_root}/<real|fake>/<Name>/..., any depth below"
    if not data_root.is_dir():
        raise FileNotFoundError(f"{data_root}: no such folder; {layout}")
    sources, others = [], []
    for kind in CLASSES:
        loose = sorted(
            path
            for path in (data_root / kind).glob("*.*")
            if path.is_file() and path.suffix.lower() in IMAGE_EXTENSIONS
        )
        if loose:
            raise FileNotFoundError(f"{loose[0]}: {len(loose)} images lie in no data set's folder; {layout}")
        for folder in data_set_folders(data_root, kind):
            if folder.name != os.fsencode(folder.name).decode("utf-8", "replace"):
                raise FileNotFoundError(f"{folder}: its name is no text; rename it")
            images, rest = list_files(folder)
            if not images:
                raise FileNotFoundError(f"{folder}: no images in it; add some or remove the folder")
            sources += [
                Source(f"{kind}/{folder.name}", str(path.relative_to(data_root)), state(path)) for path in images
            ]
            others += [path.relative_to(data_root) for path in rest]
    if not sources:
        raise FileNotFoundError(f"{data_root}: no data set in it; {layout}")
    return sources, others
