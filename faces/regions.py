"""The eight facial regions: which of dlib's 68 landmarks they are, and their masks on the grid of patches.

    landmarks (68, 2)  ->  draw_region_masks  ->  (8, G, G) in [0, 1]

This module is the one owner of the regions' order, which is part of the file format, and of what a mirror does to it.
Coordinates are pixels of the image, x to the right and y down, with the centre of the first pixel at (0, 0).
"""

import cv2
import numpy as np

MASK_STYLES = ("polygon", "gaussian")

# iBUG 300-W landmarks of each region, in the order of the file format. "Left" is the left of the image.
REGIONS: dict[str, tuple[int, ...]] = {
    "left_eye": tuple(range(36, 42)),
    "right_eye": tuple(range(42, 48)),
    "nose": tuple(range(27, 36)),
    "upper_lip": (*range(48, 55), *range(60, 65)),
    "lower_lip": (*range(54, 60), 48, 60, *range(64, 68)),
    "mouth_corners": (48, 54),
    "face_outline": tuple(range(17)),
    "eyebrows": tuple(range(17, 27)),
}

# Outlines to fill. Differs from the authors' code, which fills the landmarks in the order of their numbers: lips and
# eyebrows cross themselves there. Nose and eyebrows are convex hulls, their landmarks being lines, not outlines.
OUTLINES: dict[str, tuple[tuple[int, ...], ...]] = {
    "left_eye": (REGIONS["left_eye"],),
    "right_eye": (REGIONS["right_eye"],),
    "nose": (REGIONS["nose"],),
    "upper_lip": ((48, 49, 50, 51, 52, 53, 54, 64, 63, 62, 61, 60),),  # outer line to the right, inner line back
    "lower_lip": ((54, 55, 56, 57, 58, 59, 48, 60, 67, 66, 65, 64),),  # outer line to the left, inner line back
    "face_outline": (REGIONS["face_outline"],),
    "eyebrows": (tuple(range(17, 22)), tuple(range(22, 27))),
}
CONVEX_HULLS = ("nose", "eyebrows")

# The landmarks of all regions in a row, and where each region begins in it
_MEMBERS = np.concatenate([np.array(members) for members in REGIONS.values()])
_STARTS = np.cumsum([0, *map(len, REGIONS.values())])[:-1]
_IS_DISC = np.array([name == "mouth_corners" for name in REGIONS])

# Widths in units of the inter-ocular distance, so that masks scale with the face. Both chosen here: the paper gives
# none.
CORNER_RADIUS = 0.15  # disc around a corner of the mouth; polygon style
GAUSSIAN_SIGMA = 0.2  # gaussian style

# Landmark i of a mirrored face is landmark MIRROR_LANDMARKS[i] of the original: jaw, brows, nose, eyes, outer and inner
# lip.
MIRROR_LANDMARKS = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)
MIRROR_REGIONS = [1, 0, 2, 3, 4, 5, 6, 7]  # left and right eye change places


def draw_region_masks(
    landmarks: np.ndarray, image_size: tuple[int, int], grid_size: int, style: str = "polygon"
) -> np.ndarray:
    """The eight region masks of one face.

    Args:
        landmarks: (68, 2) x and y in pixels of the image; may lie outside of it.
        image_size: (h, w) of the image in pixels.
        grid_size: G, patches along a side.
        style: "polygon", filled areas as in the authors' code, or "gaussian", the continuous masks of the paper's text.

    Returns:
        (8, G, G) float32 in [0, 1], in the order of REGIONS, averaged over each patch's area.
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    if landmarks.shape != (68, 2) or not np.isfinite(landmarks).all():
        raise ValueError(f"landmarks have to be 68 finite points (68, 2), not {landmarks.shape}")
    if style not in MASK_STYLES:
        raise ValueError(f"mask style {style!r} is none of {', '.join(MASK_STYLES)}")
    eye_distance = np.linalg.norm(landmarks[36:42].mean(axis=0) - landmarks[42:48].mean(axis=0))
    draw = _draw_polygons if style == "polygon" else _draw_gaussians
    return draw(landmarks, max(eye_distance, 1.0), image_size, grid_size)


def _draw_polygons(
    landmarks: np.ndarray, eye_distance: float, image_size: tuple[int, int], grid_size: int
) -> np.ndarray:
    fraction_bits = 4  # cv2 draws at sixteenths of a pixel
    points = np.round(landmarks * (1 << fraction_bits)).astype(np.int32)
    radius = round(CORNER_RADIUS * eye_distance * (1 << fraction_bits))
    h, w = image_size
    # The rows of pixels between which each region lies, at the least; what is drawn has a border
    rows, reach = points[_MEMBERS, 1], np.where(_IS_DISC, radius, 0)
    tops = ((np.minimum.reduceat(rows, _STARTS) - reach >> fraction_bits) - 1).tolist()
    bottoms = ((np.maximum.reduceat(rows, _STARTS) + reach >> fraction_bits) + 3).tolist()
    masks, plane = np.zeros((len(REGIONS), grid_size, grid_size), np.float32), np.zeros((h, w), np.uint8)
    for region, (name, members) in enumerate(REGIONS.items()):
        if name == "mouth_corners":  # two points have no area
            for corner in members:
                cv2.circle(plane, points[corner].tolist(), radius, 255, cv2.FILLED, shift=fraction_bits)
        else:
            for outline in OUTLINES[name]:
                corners = points[list(outline)]
                cv2.fillPoly(
                    plane, [cv2.convexHull(corners) if name in CONVEX_HULLS else corners], 255, shift=fraction_bits
                )
        first, end = 0, grid_size  # rows of patches to average; most regions are a narrow band
        if h % grid_size == 0:
            first, end = max(0, tops[region] * grid_size // h), min(grid_size, -(-bottoms[region] * grid_size // h))
        if first < end:
            band = plane[first * h // grid_size : end * h // grid_size]
            masks[region, first:end] = cv2.resize(
                band.astype(np.float32), (grid_size, end - first), interpolation=cv2.INTER_AREA
            )
            band[:] = 0
    return masks / 255


def _draw_gaussians(
    landmarks: np.ndarray, eye_distance: float, image_size: tuple[int, int], grid_size: int
) -> np.ndarray:
    """exp(−d² / 2σ²), d the distance to the nearest landmark of the region."""
    steps = 4  # samples along a patch's side; at σ near a patch's side their mean is the area's mean to 1e-3
    h, w = image_size
    landmarks = landmarks.astype(np.float32)
    # centres of the samples, in units of the side
    ticks = (np.arange(grid_size * steps, dtype=np.float32) + 0.5) / (grid_size * steps)
    # A two-dimensional Gaussian is the product of two one-dimensional ones: 68 · 2 rows of exponentials instead of an
    # image each.
    sigma = np.float32(GAUSSIAN_SIGMA * eye_distance)
    falloff_x = np.exp(-0.5 * ((ticks * w - 0.5 - landmarks[:, :1]) / sigma) ** 2)  # (68, G * steps)
    falloff_y = np.exp(-0.5 * ((ticks * h - 0.5 - landmarks[:, 1:]) / sigma) ** 2)  # (68, G * steps)
    masks = np.empty((len(REGIONS), grid_size, grid_size), np.float32)
    for region, members in enumerate(REGIONS.values()):
        members = list(members)
        # (G * steps, G * steps)
        nearest = (falloff_y[members][:, :, None] * falloff_x[members][:, None, :]).max(axis=0)
        masks[region] = nearest.reshape(grid_size, steps, grid_size, steps).mean(axis=(1, 3))
    return masks


# ---------------------------------------------------------------------------------------------------- how a face stands


def face_size(landmarks: np.ndarray) -> np.ndarray:
    """Width and height of a face, (2,): the spread (standard deviation) of its landmarks (68, 2) in x and y, in their
    unit.
    """
    return landmarks.std(axis=0)


def face_frame(landmarks: np.ndarray) -> np.ndarray:
    """How a face stands in its picture, (2,): its size, the length of face_size, in the unit of the landmarks (68, 2),
    and its width over its height."""
    width, height = face_size(landmarks)
    return np.array([np.hypot(width, height), width / max(height, 1e-9)])
