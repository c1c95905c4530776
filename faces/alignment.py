"""The crop in which eyes and mouth stand in the same place, as in FFHQ.

align_face    an image of any size  ->  the square around its face, turned upright, in one resampling
"""

import math

import cv2
import numpy as np
from PIL import Image

from faces.finder import SEARCH_SIDE, FaceFinder, search_copy
from faces.images import ENLARGED
from faces.rejection import BEYOND, NO_FACE

CORNERS = "corners"  # in image.info: (4, 2) of the aligned crop in pixels of the image, from the top left one clockwise


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


def align_face(image: Image.Image, finder: FaceFinder, side: int, crop: float) -> Image.Image | str:
    """Cuts out the largest face, turned so that the eyes are level. One antialiased resampling, nothing is filled up.

    The face is searched in a copy whose longer side is SEARCH_SIDE at the most: larger images are not aligned better.

    Args:
        image: RGB, upright, of any size.
        side: of the result in pixels.
        crop: side of the square in parts of FFHQ's.

    Returns:
        RGB image, side x side, with CORNERS and ENLARGED in its info; or the reason why there is none.
    """
    search = search_copy(image, SEARCH_SIDE)
    picture = np.asarray(search)
    box = next((box for upsampling in (0, 1) if (box := finder.detect(picture, upsampling)) is not None), None)
    if box is None:
        return NO_FACE
    unit = np.array(image.size) / search.size  # pixels of the image in one of the copy
    centre, right = alignment_square((finder.predict(picture, box) + 0.5) * unit)
    right = right * crop
    down = np.array([-right[1], right[0]])
    corners = centre + np.array([-right - down, right - down, right + down, down - right])
    beyond = max(0.0, *(-corners).ravel(), *(corners - image.size).ravel())
    if beyond > 0.5:
        return f"{BEYOND} {beyond:.0f} pixels beyond the border"

    # Sampled more finely than the pixels of the image and of the result, then averaged over each pixel of the result.
    # Where that is made smaller by a half or more, the filter does not depend on the scale; nothing makes up for pixels
    # that are not there.
    fine = max(2, math.ceil(2 * np.linalg.norm(right) / side))
    step = 2 * np.array([right, down]).T / (side * fine)  # of the fine grid, in pixels of the image
    first = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 2, 0)  # of what is needed of the image
    part = np.asarray(image.crop((*first, *np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 2, image.size))))
    # middle of the grid's first cell, counted from the middle of the first pixel
    origin = corners[0] - first + step.sum(axis=1) / 2 - 0.5
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    grid = cv2.warpAffine(
        part, np.column_stack([step, origin]), (side * fine, side * fine), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    aligned = Image.fromarray(cv2.resize(grid, (side, side), interpolation=cv2.INTER_AREA))
    aligned.info |= {CORNERS: corners, ENLARGED: bool(2 * np.linalg.norm(right) < side)}
    return aligned
