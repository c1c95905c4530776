"""The crop in which eyes and mouth stand in the same place, as in FFHQ.

find_landmarks    an image of any size  ->  landmarks (68, 2) of its largest face
align_face        an image of any size  ->  the square around its face, turned upright, in one resampling
"""

import math
from typing import Any

import cv2
import numpy as np
from PIL import Image

from faces.finder import PADDING, SEARCH_SIDE, FaceFinder, search_copy
from faces.images import ENLARGED, FILLED, FOUND, LANDMARKS

CORNERS = "corners"  # in image.info: (4, 2) of the aligned crop in pixels of the image, from the top left one clockwise

# The frame in which landmarks are predicted again: FFHQ's square in this many pixels, and dlib's box of a face in it,
# the median over faces. There they do not depend on how much of a picture its face takes, nor on how it is tilted.
FRAME_SIDE = 256
FRAME_BOX = (46, 78, 195, 228)  # left, top, right, bottom
REFINEMENTS = 2
# Beyond the border of a picture: the mean colour by which images are normalised, CLIP's and nearly ImageNet's. A mirror
# image would be a second, real or generated, piece of face
GREY = (123, 117, 104)
SMALL_SIDE = 224  # longer side of the copy to which a border is added, for faces that fill their picture


def alignment_square(landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square of FFHQ's alignment (Karras et al., CVPR 2019), in its usual, wide size.

    Its axes follow the eyes and the mouth; its side is the larger of 4 times the distance of the eyes and 3.6 times
    that from eyes to mouth.

    Args:
        landmarks: (68, 2), x and y in pixels of an image.

    Returns:
        centre (2,), and the vector (2,) from there to the middle of the square's right side, both x and y in these
        pixels.
    """
    left_eye, right_eye, mouth = (
        landmarks[36:42].mean(axis=0),
        landmarks[42:48].mean(axis=0),
        landmarks[[48, 54]].mean(axis=0),
    )
    eyes, eye_to_eye = (left_eye + right_eye) / 2, right_eye - left_eye
    eye_to_mouth = mouth - eyes
    # eye_to_mouth, turned by a quarter, points to the left
    right = eye_to_eye - np.array([-eye_to_mouth[1], eye_to_mouth[0]])
    right *= max(2 * np.linalg.norm(eye_to_eye), 1.8 * np.linalg.norm(eye_to_mouth)) / np.linalg.norm(right)
    return eyes + 0.1 * eye_to_mouth, right


def detect_largest(image: Image.Image, finder: FaceFinder) -> tuple[np.ndarray, Any, str, int] | None:
    """The largest face, searched with growing effort.

    Returns:
        a copy (h, w, 3) of the image, the box in it, which of FOUND_BY, and the width of the border around the copy.
    """
    picture = np.asarray(search_copy(image, SEARCH_SIDE))
    for upsampling, way in enumerate(("frontal", "upsampled")):
        if (box := finder.detect(picture, upsampling)) is not None:
            return picture, box, way, 0
    if (box := finder.detect_cnn(image, SEARCH_SIDE)) is not None:
        return picture, box, "cnn", 0
    small = np.asarray(search_copy(image, SMALL_SIDE))
    border = round(max(small.shape) * PADDING)
    padded = cv2.copyMakeBorder(small, border, border, border, border, cv2.BORDER_REPLICATE)
    if (box := finder.detect(padded, upsampling=1)) is not None:
        return padded, box, "padded", border
    return None


def find_landmarks(image: Image.Image, finder: FaceFinder) -> tuple[np.ndarray, str] | None:
    """The landmarks of the largest face, (68, 2) x and y in pixels of the image from its upper left corner, and which
    of FOUND_BY; None where there is no face.

    The face is searched in a copy whose longer side is SEARCH_SIDE at the most: larger images are not aligned better.
    """
    found = detect_largest(image, finder)
    if found is None:
        return None
    picture, box, way, border = found
    points, size = finder.predict(picture, box) + 0.5 - border, np.array(picture.shape[1::-1]) - 2 * border
    return refine(image, points * image.size / size, finder), way


def refine(image: Image.Image, landmarks: np.ndarray, finder: FaceFinder) -> np.ndarray:
    """The landmarks (68, 2) of a face, predicted again in a frame of its own, from one frame to the next.

    What the detector found depends on the margin around the face, and on the size of the copy; this does not.
    """
    import dlib

    for _ in range(REFINEMENTS):
        centre, right = alignment_square(landmarks)
        shrink = max(1, int(np.linalg.norm(right) / FRAME_SIDE))  # a frame of more than twice its pixels is averaged
        frame, first, step = cut_square(image, centre, right, FRAME_SIDE, shrink)
        seen = finder.predict(frame, dlib.rectangle(*FRAME_BOX))
        again = first + (seen + 0.5) @ step.T
        if np.linalg.norm(again.mean(axis=0) - landmarks.mean(axis=0)) > 0.5 * np.linalg.norm(right):
            break  # off to something else
        landmarks = again
    return landmarks


def cut_square(
    image: Image.Image, centre: np.ndarray, right: np.ndarray, side: int, shrink: int = 1, on_grey: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples a square of an image, cubic.

    Args:
        centre: (2,) in pixels of the image, from its upper left corner.
        right: (2,) from the centre to the middle of the square's right side.
        side: of the result in pixels.
        shrink: the image is averaged over blocks of so many pixels a side before.
        on_grey: what lies beyond the border of the image is GREY; else the image is reflected there.

    Returns:
        (side, side, 3) uint8; the place (2,) of its upper left corner in the image; and (2, 2) whose columns are the
        steps in the image, to the right and down, from pixel to pixel.
    """
    down = np.array([-right[1], right[0]])
    step, corner = 2 * np.array([right, down]).T / side, centre - right - down
    corners = centre + np.array([-right - down, right - down, right + down, down - right])
    first = np.clip(np.floor(corners.min(axis=0)).astype(int) - 2 * shrink, 0, np.array(image.size) - 1)
    last = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2 * shrink, first + 1, image.size)  # of what is needed
    part = image.reduce(shrink, (*first, *last)) if shrink > 1 else image.crop((*first, *last))
    # the middle of the result's first pixel, counted from the middle of the part's first one
    origin = (corner - first + step.sum(axis=1) / 2) / shrink - 0.5
    pixels = cv2.warpAffine(
        np.asarray(part),
        np.column_stack([step / shrink, origin]),
        (side, side),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT if on_grey else cv2.BORDER_REFLECT,
        borderValue=GREY,
    )
    return pixels, corner, step


def align_face(image: Image.Image, finder: FaceFinder, side: int, crop: float) -> Image.Image | None:
    """Cuts out the largest face, turned so that the eyes are level, in one antialiased resampling.

    Args:
        image: RGB, upright, of any size.
        side: of the result in pixels.
        crop: side of the square in parts of FFHQ's.

    Returns:
        RGB image, side x side, with what cut_aligned notes in its info; None where no face is found.
    """
    found = find_landmarks(image, finder)
    return None if found is None else cut_aligned(image, *found, side, crop)


def cut_aligned(
    image: Image.Image, landmarks: np.ndarray, found_by: str, side: int, crop: float, on_grey: bool = True
) -> Image.Image:
    """The aligned square of a face, landmarks (68, 2) in pixels of the image; its rest is GREY, or reflected.

    Its info tells CORNERS; ENLARGED; FILLED, the share of its area beyond the border; FOUND; and LANDMARKS, (68, 2)
    float32 in its own pixels, rounded as the PNG holds them.
    """
    centre, right = alignment_square(landmarks)
    right = right * crop
    # Sampled more finely than the pixels of the image and of the result, then averaged over each pixel of the result.
    # Where that is made smaller by a half or more, the filter does not depend on the scale; nothing makes up for pixels
    # that are not there.
    fine = max(2, math.ceil(2 * np.linalg.norm(right) / side))
    grid, corner, step = cut_square(image, centre, right, side * fine, on_grey=on_grey)
    aligned = Image.fromarray(cv2.resize(grid, (side, side), interpolation=cv2.INTER_AREA))
    down = np.array([-right[1], right[0]])
    unit = 2 * np.array([right, down]).T / side  # of the result's pixels, in those of the image
    points = (landmarks - corner) @ np.linalg.inv(unit).T - 0.5
    aligned.info |= {
        CORNERS: centre + np.array([-right - down, right - down, right + down, down - right]),
        ENLARGED: bool(2 * np.linalg.norm(right) < side),
        FILLED: filled_share(corner, unit * side, image.size),
        FOUND: found_by,
        LANDMARKS: np.round(points, 2).astype(np.float32),
    }
    return aligned


def filled_share(corner: np.ndarray, sides: np.ndarray, size: tuple[int, int]) -> float:
    """The share of a square that lies beyond an image of this (width, height).

    Args:
        corner: (2,) the square's upper left one, in pixels of the image.
        sides: (2, 2) whose columns are its upper side and its left one.
    """
    grid = (np.arange(128) + 0.5) / 128
    points = corner + np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2) @ sides.T
    return round(float(((points < 0) | (points > size)).any(axis=1).mean()), 4)
