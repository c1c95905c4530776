"""Why a file was not used: every reason, where it is raised, and the lists that are written of them.

    cannot be read as an image …                 faces/images.py     load_rgb: damaged, cut off, no image at all
    is not a file, more pixels than memory       faces/images.py     load_rgb
    has no pixels                                faces/images.py     as_rgb
    left alone: its name ends in none of …       faces/images.py     NO_IMAGE_BY_NAME; VIDEO: a video, in place
    cannot be read as a video: …                 faces/videos.py     NO_STREAM, NO_FRAME
    its name is no text                          faces/videos.py     open_video
    under the minimum of 12x12                   faces/prepare.py    --min_width, --min_height
    no face found                                faces/treatment.py  treat, with --align; faces/loose.py, --images
    is …, and the training images are not        faces/loose.py      faces_in_picture, --images
    … of the crop lies beyond the border …       faces/treatment.py  treat, with --align and --max_filled
    was changed or away while it was to be read  feature_extraction.py

preprocess.py lists them in <folder>_rejected/rejected.csv, feature_extraction.py in features/skipped.csv.
"""

import csv
from pathlib import Path

from runtime.files import replacing

REJECTED_SUFFIX, ORIGINALS_SUFFIX = "_rejected", "_originals"  # of the folders beside a data set
REJECTED_LIST, ORIGINALS_NOTE = "rejected.csv", "originals.txt"  # what lies in them, besides files that were set aside
NO_FACE, BEYOND = "no face found", "too much of the crop lies beyond the border"  # of --align, by their beginnings


class Rejected(Exception):
    """A file that cannot be used as an image. The message is the reason."""


def is_set_aside(folder: Path) -> bool:
    """Whether it has what preprocess.py put aside. A data set may be called something_originals, too."""
    if folder.name.endswith(ORIGINALS_SUFFIX):
        return (folder / ORIGINALS_NOTE).is_file()
    return folder.name.endswith(REJECTED_SUFFIX)


def read_reasons(listing: Path) -> dict[str, str]:
    """{path: reason} of a list that write_reasons wrote; empty where there is none."""
    if not listing.exists():
        return {}
    with open(listing, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file) if row.keys() >= {"path", "reason"}}


def write_reasons(listing: Path, reasons: dict[str, str]) -> None:
    """Writes {path: reason} as a table, in the order of paths, under its name when it is complete."""
    with (
        replacing(listing) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([("path", "reason"), *sorted(reasons.items())])
