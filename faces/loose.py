"""Pictures of any kind: finds the faces in each, and brings them into the frame of the training images.

A picture whose face stands in it as the faces of the training images did is taken whole, as feature_extraction.py takes
it: it gets the score that it has by way of the features. Of any other picture, and for any further face, a square is
cut out with the margin that the training images have. Nothing is filled up: a cut that would reach over the border is
moved inside, or made smaller.

A model that was trained on images of `preprocess.py --align` gets the largest face of each picture, aligned and
recompressed in the same way; a picture with which that cannot be done has no score, as it would not have been trained
on.
"""

import glob
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from faces.alignment import CORNERS
from faces.finder import FaceFinder, detect_face, find_face, predict_landmarks, search_copy
from faces.images import NO_IMAGE_BY_NAME, TREATMENT, list_files, load_rgb
from faces.regions import draw_region_masks, face_frame, face_size
from faces.rejection import NO_FACE, Rejected
from faces.treatment import parse_treatment, recompress, treat
from faces.workers import this_finder

# longer side of the copy in which the faces of a large picture are searched: those from a twentieth of it on
SEARCH_SIDE = 1600
UPSAMPLED_SIDE = 800  # longer side of a picture that is doubled before the search
# by which a face may be out of the range of 98 % of the training faces and still count as framed like them
SLACK = 0.06
SQUARE = 1.02  # longer over shorter side of a picture that counts as square
WITHOUT_FACE = f"{NO_FACE}; --whole_image scores it all the same"  # a reason


class Face(NamedTuple):
    """A face as the model sees it, and where it was."""

    # left, top, right, bottom in pixels of the upright picture; None: no face, the whole picture
    box: tuple[int, int, int, int] | None
    image: np.ndarray  # (h, w, 3) uint8 RGB
    landmarks: np.ndarray  # (68, 2) in pixels of the image
    region_masks: np.ndarray  # (8, G, G)
    found_by: str  # one of finder.FOUND_BY
    framing: str  # "whole", "cut" or "aligned"


class Framing(NamedTuple):
    """How the model wants its faces; from the checkpoint."""

    side: int  # of the model's input in pixels
    grid_size: int
    mask_style: str
    mean_landmarks: np.ndarray  # (68, 2) in pixels of the input
    usual: np.ndarray  # (2, 2) face_frame of training faces, in units of the side: its 1st and 99th percentile
    whole_image: bool  # score pictures without a face
    treatment: str  # what preprocess.py did to the training images


# --------------------------------------------------------------------------------------------------- faces of a picture


def find_faces(image: Image.Image, finder: FaceFinder, framing: Framing) -> list[Face]:
    """All faces of an upright RGB picture of any size, a framed one first, the others by size."""
    stored, detection = detect_face(image, finder, framing.side)
    unit = np.array(image.size) / framing.side  # pixels of the picture in one of the stored image
    faces, boxes, largest = [], [], None
    if detection:
        landmarks = predict_landmarks(detection, finder)
        corners = np.array(
            [(detection.box.left(), detection.box.top()), (detection.box.right(), detection.box.bottom())], float
        )
        largest = (landmarks + 0.5) * unit, as_box((detection.to_stored(corners) + 0.5) * unit, image.size)
        if is_framed(landmarks, image.size, framing):
            faces, boxes = [as_face(largest[1], stored, landmarks, detection.found_by, framing, "whole")], [largest[1]]
    # In a small picture, what stands beside a framed face is too small to be found.
    found = [] if faces and max(image.size) <= 1.5 * framing.side else search(image, finder, thorough=detection is None)
    for points, box in [*found, *([largest] if largest else [])]:
        if not any(same_face(box, other) for other in boxes):
            faces.append(cut_out(image, points, box, finder, framing))
            boxes.append(box)
    if not faces and framing.whole_image:
        faces = [as_face(None, stored, None, "mean", framing, "whole")]
    return faces


def is_framed(landmarks: np.ndarray, size: tuple[int, int], framing: Framing) -> bool:
    """Whether a face, landmarks (68, 2) in pixels of the stored image, stands in its picture as nearly all did in
    training.

    It may not be smaller, and where the picture is not square it may be no more squeezed than they were. A larger one
    has no more margin that a cut could bring.
    """
    (face, aspect), (low, high) = face_frame(landmarks / framing.side), framing.usual
    is_square = max(size) <= SQUARE * min(size)
    return face >= (1 - SLACK) * low[0] and (is_square or (1 - SLACK) * low[1] <= aspect <= (1 + SLACK) * high[1])


def same_face(box: tuple, other: tuple) -> bool:
    """Whether the middle of one box (left, top, right, bottom) is in the other one."""
    return any(
        a[0] <= (b[0] + b[2]) / 2 <= a[2] and a[1] <= (b[1] + b[3]) / 2 <= a[3] for a, b in ((box, other), (other, box))
    )


def as_box(corners: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Two corners (2, 2) in pixels of a picture of this (width, height) -> whole pixels within it."""
    return tuple(np.clip(np.rint(corners), 0, size).astype(int).ravel().tolist())


def as_face(
    box: tuple | None, stored: np.ndarray, landmarks: np.ndarray | None, found_by: str, framing: Framing, how: str
) -> Face:
    """landmarks None: none were found, the mean ones stand in."""
    landmarks = framing.mean_landmarks.astype(np.float32) if landmarks is None else landmarks
    return Face(
        box,
        stored,
        landmarks,
        draw_region_masks(landmarks, stored.shape[:2], framing.grid_size, framing.mask_style),
        found_by,
        how,
    )


def search(image: Image.Image, finder: FaceFinder, thorough: bool) -> list[tuple[np.ndarray, tuple]]:
    """(landmarks (68, 2), box) of all faces in a picture, both in its pixels, the largest first; if thorough, small
    ones, too, where there are no others."""
    copy = search_copy(image, SEARCH_SIDE)
    picture, unit = np.asarray(copy), np.array(image.size) / copy.size
    found = finder.detector(picture, int(max(copy.size) <= UPSAMPLED_SIDE))
    if not found and thorough:
        found = finder.detector(picture, 1)
    faces = []
    for box in sorted(found, key=lambda box: -box.area()):
        corners = np.array([(box.left(), box.top()), (box.right(), box.bottom())])
        faces.append(((finder.predict(picture, box) + 0.5) * unit, as_box((corners + 0.5) * unit, image.size)))
    return faces


def cut_out(image: Image.Image, landmarks: np.ndarray, box: tuple, finder: FaceFinder, framing: Framing) -> Face:
    """One face of a picture, with the margin around that the training images have. landmarks (68, 2) in pixels of the
    picture.
    """
    mean = framing.mean_landmarks + 0.5
    # pixels of the picture in one of the input
    scale = math.sqrt((face_size(landmarks) ** 2).sum() / (face_size(mean) ** 2).sum())
    side = min(scale * framing.side, *image.size)
    corner = np.clip(landmarks.mean(axis=0) - mean.mean(axis=0) * side / framing.side, 0, np.array(image.size) - side)
    cut = image.resize((framing.side, framing.side), Image.Resampling.LANCZOS, box=(*corner, *(corner + side)))
    expected = (landmarks - corner) * framing.side / side - 0.5
    # as for the features, so that the landmarks are of the same kind
    stored, detection = detect_face(cut, finder, framing.side)
    if detection:
        seen = predict_landmarks(detection, finder)
        if (
            np.abs(seen.mean(axis=0) - expected.mean(axis=0)) < face_size(expected)
        ).all():  # this face, not its neighbour
            return as_face(box, stored, seen, detection.found_by, framing, "cut")
    return as_face(box, stored, expected.astype(np.float32), "original", framing, "cut")


def aligned_face(image: Image.Image, finder: FaceFinder, framing: Framing) -> Face:
    """The face of a picture that treat has aligned, as feature_extraction.py takes it."""
    stored, detection = detect_face(image, finder, framing.side)
    first, right, _, below = image.info[CORNERS]
    unit = framing.side
    inside = np.array([(0, 0), (unit, 0), (unit, unit), (0, unit)], float)
    if detection:
        left, top, end, bottom = (
            detection.box.left(),
            detection.box.top(),
            detection.box.right(),
            detection.box.bottom(),
        )
        inside = detection.to_stored(np.array([(left, top), (end, top), (end, bottom), (left, bottom)], float)) + 0.5
    # (4, 2) in pixels of the upright picture
    outside = first + inside / unit @ np.array([right - first, below - first])
    box = tuple(np.rint([*outside.min(axis=0), *outside.max(axis=0)]).astype(int).tolist())
    landmarks = predict_landmarks(detection, finder) if detection else None
    return as_face(box, stored, landmarks, detection.found_by if detection else "mean", framing, "aligned")


# ---------------------------------------------------------------------------------------------------------------- files


def faces_in_file(path: Path, framing: Framing) -> list[Face] | str:
    """The faces of an image file, or the reason why there is none. In a process of faces/workers.py."""
    finder = this_finder()
    try:
        image = load_rgb(path)
        if framing.treatment == image.info[TREATMENT]:
            return find_faces(image, finder, framing) or WITHOUT_FACE
        if not framing.treatment:
            return f"is {image.info[TREATMENT]}, and the training images are not; take the original"
        options = parse_treatment(framing.treatment)
        if options.align:
            try:
                return [aligned_face(treat(image, path, options), finder, framing)]
            except Rejected:  # no face, or one too near to the border
                if not framing.whole_image:
                    raise
            options.align = 0.0
            stored, landmarks, found_by = find_face(treat(image, path, options), finder, framing.side)
            return [as_face(None, stored, landmarks, found_by, framing, "whole")]
        faces = find_faces(image, finder, framing)
        return [
            face._replace(image=np.asarray(recompress(Image.fromarray(face.image), path, options.recompress)))
            for face in faces
        ] or WITHOUT_FACE
    except (Rejected, OSError, ValueError) as reason:
        return str(reason)
    except (MemoryError, RuntimeError, cv2.error) as error:  # of one picture; the others have their rows
        return f"could not be searched ({type(error).__name__}: {error})"


def list_pictures(given: list[str]) -> Iterator[tuple[Path, str]]:
    """Each file that is meant by paths, folders (any depth) and patterns, once, and why it is no picture ("": it may be
    one).

    In folders, names without an image's extension are none; a file that is named itself is tried whatever it is called.
    """
    seen = set()
    for name in given:
        if not name:
            raise ValueError("--images: one of the paths is empty")
        matches = (
            sorted(glob.glob(name, recursive=True)) if not os.path.lexists(name) and glob.has_magic(name) else [name]
        )
        for path in map(Path, matches or [name]):
            if path.is_dir():
                images, others = list_files(path)
                files = sorted([(image, "") for image in images] + [(other, NO_IMAGE_BY_NAME) for other in others])
            else:
                files = [(path, "" if os.path.lexists(path) else "no such file")]
            for file, reason in files:
                if (real := os.path.realpath(file)) not in seen:
                    seen.add(real)
                    yield file, reason
