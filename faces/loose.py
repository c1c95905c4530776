"""Pictures of any kind: finds the faces in each, and brings them into the frame of the training images.

A picture whose face is no smaller in it than the mean of the training faces is taken whole, as feature_extraction.py
takes it: it gets the score that it has by way of the features. Of any other picture, and for any further face, a square
is cut out with the margin that the training images have: a cut that would reach over the border is moved inside, or
made smaller.

A model that was trained on images of `preprocess.py --align` gets every face aligned and recompressed in the same way,
the largest one as preprocess.py would; what of the square lies beyond the picture is filled, and the row says how much.
"""

import glob
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from faces.alignment import cut_aligned, find_landmarks, refine
from faces.finder import FaceFinder, as_stored, detect_face, find_face, predict_landmarks, search_copy
from faces.images import (
    FILLED,
    FOUND,
    LANDMARKS,
    NO_IMAGE_BY_NAME,
    TREATMENT,
    is_video,
    list_files,
    load_rgb,
    rgb_of,
    scaled_landmarks,
)
from faces.regions import draw_region_masks, face_frame, face_size
from faces.rejection import NO_FACE, Rejected
from faces.treatment import check_original, parse_treatment, recompress, treat
from faces.videos import follow, sample_frames
from faces.workers import this_finder
from runtime.files import why_away

# longer side of the copy in which the faces of a large picture are searched: those from a twentieth of it on
SEARCH_SIDE = 1600
UPSAMPLED_SIDE = 800  # longer side of a picture that is doubled before the search
# Of the size of the mean training face, at which a picture still counts as framed like those. On the demo's faces a
# border of 5 % cost 0.10 of the AUC where the picture was taken whole, and 0.01 where it was cut; the faces that are
# smaller than that without a border lose 0.003 by the cut.
SMALLEST = 0.93
SLACK = 0.06  # by which a face's width over its height may be out of the range of 98 % of the training faces
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
    filled: float = 0.0  # the share of an aligned square that lies beyond the picture
    place: np.ndarray | None = None  # (68, 2) landmarks in pixels of the upright picture; None: no face
    frame: int | None = None  # of a video, from 0 on
    seconds: float | None = None  # its time
    number: int | None = None  # of the face, followed over the frames


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
            face = as_face(largest[1], stored, landmarks, detection.found_by, framing, "whole")
            faces, boxes = [face._replace(place=largest[0])], [largest[1]]
    # In a small picture, what stands beside a framed face is too small to be found.
    found = [] if faces and max(image.size) <= 1.5 * framing.side else search(image, finder, thorough=detection is None)
    for points, box in [*found, *([largest] if largest else [])]:
        if not any(same_face(box, other) for other in boxes):
            faces.append(cut_out(image, points, box, finder, framing)._replace(place=points))
            boxes.append(box)
    if not faces and framing.whole_image:
        faces = [as_face(None, stored, None, "mean", framing, "whole")]
    return faces


def is_framed(landmarks: np.ndarray, size: tuple[int, int], framing: Framing) -> bool:
    """Whether a face, landmarks (68, 2) in pixels of the stored image, stands in its picture as they did in training.

    It may not be smaller than their mean, and where the picture is not square it may be no more squeezed than nearly
    all of them were. A larger one has no more margin that a cut could bring.
    """
    (face, aspect), (low, high) = face_frame(landmarks / framing.side), framing.usual[:, 1]
    is_square = max(size) <= SQUARE * min(size)
    is_large = face >= SMALLEST * face_frame(framing.mean_landmarks / framing.side)[0]
    return is_large and (is_square or (1 - SLACK) * low <= aspect <= (1 + SLACK) * high)


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


def aligned_faces(
    image: Image.Image, path: Path, content: Callable[[], bytes], finder: FaceFinder, framing: Framing
) -> list[Face]:
    """All faces of a picture, aligned and recompressed as the training images were; the largest, as preprocess.py finds
    it, first.

    Raises:
        ValueError: the picture is no original.
    """
    options = parse_treatment(framing.treatment)
    check_original(image, path, options)
    found = find_landmarks(image, finder)
    places = [(*found, landmarks_box(found[0], image.size))] if found else []
    if max(image.size) > 1.5 * framing.side:  # in a small picture, what stands beside a face is too small to be found
        for points, box in search(image, finder, thorough=False):
            if not any(same_face(box, other) for *_, other in places):
                points = refine(image, points, finder)
                places.append((points, "frontal", landmarks_box(points, image.size)))
    faces = []
    for points, way, box in places:
        crop = cut_aligned(image, points, way, options.target_width, options.align, not options.reflected)
        if options.recompress:
            crop = recompress(crop, content(), options.recompress)
        faces.append(as_known(crop, box, framing, "aligned")._replace(place=points))
    return faces


def landmarks_box(landmarks: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box around landmarks (68, 2) in pixels of a picture of this (width, height), within it."""
    return as_box(np.stack([landmarks.min(axis=0), landmarks.max(axis=0)]), size)


def as_known(crop: Image.Image, box: tuple | None, framing: Framing, how: str) -> Face:
    """An aligned crop whose landmarks are known, as feature_extraction.py takes it."""
    landmarks = scaled_landmarks(crop.info[LANDMARKS], crop.size, (framing.side, framing.side))
    face = as_face(box, as_stored(crop, framing.side), landmarks, crop.info[FOUND], framing, how)
    return face._replace(filled=crop.info[FILLED])


# ---------------------------------------------------------------------------------------------------------------- files


def faces_in_file(
    source: Path | bytes | Image.Image, framing: Framing, frames: int, finder: FaceFinder | None = None
) -> list[Face] | str:
    """The faces of a picture, or of so many frames of a video, or the reason why there is none.

    Args:
        source: an image or video file; or a picture in memory, as faces.images.rgb_of takes it. For a model of
            recompressed images, a JPEG's quality is drawn from the bytes of a file; of Pillow's pictures, which have
            none, from their pixels.
        finder: None: that of a process of faces/workers.py.
    """
    finder = finder or this_finder()
    try:
        if not isinstance(source, Path):
            image = rgb_of(source)
            content = (lambda: source) if isinstance(source, bytes) else image.tobytes
            return faces_in_picture(image, Path("the picture"), content, framing, finder) or WITHOUT_FACE
        if is_video(source):
            return faces_in_video(source, framing, frames, finder) or NO_FACE
        return faces_in_picture(load_rgb(source), source, source.read_bytes, framing, finder) or WITHOUT_FACE
    except (Rejected, OSError, ValueError) as reason:
        return str(reason)
    except (MemoryError, RuntimeError, cv2.error) as error:  # of one picture; the others have their rows
        return f"could not be searched ({type(error).__name__}: {error})"


def faces_in_video(path: Path, framing: Framing, count: int, finder: FaceFinder) -> list[Face]:
    """Those of all its frames, frame by frame. Of a frame no more is kept than its faces."""
    framing, frames = framing._replace(whole_image=False), []
    for number, seconds, image in sample_frames(path, count):
        faces = faces_in_picture(image, path, image.tobytes, framing, finder)
        frames.append([face._replace(frame=number, seconds=seconds) for face in faces])
    numbers = follow([[(face.box, face.place) for face in faces] for faces in frames])
    return [
        face._replace(number=number)
        for faces, of_frame in zip(frames, numbers)
        for face, number in zip(faces, of_frame)
    ]


def faces_in_picture(
    image: Image.Image, path: Path, content: Callable[[], bytes], framing: Framing, finder: FaceFinder
) -> list[Face]:
    """
    Args:
        image: RGB, upright, with the notes of load_rgb in its info.
        path: for messages.
        content: gives what a JPEG's quality is drawn from.

    Raises:
        Rejected, ValueError: it has no score, though it may have a face.
    """
    if framing.treatment == image.info[TREATMENT]:
        if LANDMARKS in image.info:
            place = image.info[LANDMARKS] + 0.5
            face = as_known(image, landmarks_box(place, image.size), framing, "whole")
            return [face._replace(place=place)]
        return find_faces(image, finder, framing)
    if not framing.treatment:
        raise Rejected(f"is {image.info[TREATMENT]}, and the training images are not; take the original")
    options = parse_treatment(framing.treatment)
    if not options.align:
        return [
            face._replace(image=np.asarray(recompress(Image.fromarray(face.image), content(), options.recompress)))
            for face in find_faces(image, finder, framing)
        ]
    faces = aligned_faces(image, path, content, finder, framing)
    if faces or not framing.whole_image:
        return faces
    options.align = 0.0
    stored, landmarks, found_by = find_face(treat(image, path, options), finder, framing.side)
    return [as_face(None, stored, landmarks, found_by, framing, "whole")]


def list_pictures(given: list[str]) -> Iterator[tuple[Path, str]]:
    """Each file that is meant by paths, folders (any depth) and patterns, once, and why it is no picture ("": it may be
    one).

    In folders, names without an extension of images or videos are none; a file that is named itself is tried whatever
    it is called.
    """
    seen = set()
    for name in given:
        if not name:
            raise ValueError("--images: one of the paths is empty")
        matches = (
            sorted(glob.glob(name, recursive=True)) if not os.path.lexists(name) and glob.has_magic(name) else [name]
        )
        for path in map(Path, matches or [name]):
            if os.path.isdir(path):
                images, others = list_files(path)
                others = [(other, "" if is_video(other) else NO_IMAGE_BY_NAME) for other in others]
                files = sorted([(image, "") for image in images] + others)
            else:
                files = [(path, why_away(path, follow_links=False))]
            for file, reason in files:
                if (real := os.path.realpath(file)) not in seen:
                    seen.add(real)
                    yield file, reason
