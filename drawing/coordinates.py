"""Where the parts of a drawn face lie: pixels of the picture, the plane of the face, the surface of the head.

The face plane has its origin between the eyes, u to the image's right, v down, z towards the viewer. Lengths are in
units of the distance between the eyes' centres.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

# Lengths are in units of the distance between the eyes' centres, angles in radians. The face plane has its
# origin between the eyes, u to the image's right, v down, z towards the viewer. The proportions below are
# the common ones of a frontal adult face, framed as in FFHQ (face box about 0.54 of the image).
EYE_DISTANCE = 0.240  # of the image's shorter side
EYE_LEVEL = -0.092  # eyes above the image's centre, of the shorter side
HEAD_DEPTH = 0.85  # how far the middle of the face stands before its outline
NOSE_DEPTH = 0.27  # how far the tip of the nose stands before the face


class Grid(NamedTuple):
    """Where each pixel lies; every plane is (h, w) float32."""

    u: np.ndarray  # face plane: hair, neck, outline
    v: np.ndarray
    x: np.ndarray  # surface of the turned head: eyes, nose, mouth ride on it
    y: np.ndarray
    inside: np.ndarray  # distance to the head's outline, positive inside
    px: float  # one pixel, in eye distances


def head_radius(f: SimpleNamespace, u, v):
    """0 in the middle of the head, 1 on its outline."""
    down = np.maximum(-v / f.skull, v / f.chin)
    return (np.abs(u / f.head_w) ** f.jaw + down**f.jaw) ** (1 / f.jaw)


def head_depth(f: SimpleNamespace, u, v):
    """1 in the middle of the head, 0 on its outline."""
    return np.sqrt(np.maximum(1 - head_radius(f, u, v) ** 2, 0.004))


def camera(f: SimpleNamespace, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """The affine map pixel = A @ (u, v) + b: A (2, 2), b (2,), pixels of the (h, w) picture."""
    short = min(h, w)
    c, s = np.cos(f.roll), np.sin(f.roll)
    a = EYE_DISTANCE * short * f.scale * np.array([[c, -s], [s, c]])
    eyes = np.array([w / 2, h / 2 + EYE_LEVEL * short])
    return a, eyes + EYE_DISTANCE * short * np.array([f.shift_x, f.shift_y]) - 0.5


def make_grid(f: SimpleNamespace, h: int, w: int) -> Grid:
    """Face coordinates of every pixel of an (h, w) picture."""
    a, b = camera(f, h, w)
    cols, rows = np.meshgrid(np.arange(w) - b[0], np.arange(h) - b[1])
    inverse = np.linalg.inv(a)
    u = (inverse[0, 0] * cols + inverse[0, 1] * rows).astype(np.float32)
    v = (inverse[1, 0] * cols + inverse[1, 1] * rows).astype(np.float32)
    depth = head_depth(f, u, v)
    # A point of the surface that stands `depth` before the outline moves with the turn of the head.
    inside = (1 - head_radius(f, u, v)) * f.head_w
    return Grid(u, v, u - f.yaw * depth, v - f.pitch * depth, inside, 1 / np.hypot(*a[0]))


def true_points(f: SimpleNamespace, size: int | tuple[int, int] = 224) -> dict[str, tuple[float, float]]:
    """Where the features were drawn, as (x, y) in pixels of the picture render(f, size) gives.

    Keys: left_eye, right_eye (image left and right), nose_tip, mouth, chin.
    """
    w, h = (size, size) if isinstance(size, int) else size
    a, b = camera(f, h, w)
    surface = {
        "left_eye": (-0.5, 0.0),
        "right_eye": (0.5, 0.0),
        "nose_tip": (f.yaw * NOSE_DEPTH, f.nose_y - 0.18),
        "mouth": (f.mouth_x, f.mouth_y),
    }
    points = {}
    for name, (x, y) in surface.items():
        u, v = x, y
        for _ in range(10):  # undo the turn of make_grid: a fixed point, reached quickly for small angles
            depth = head_depth(f, u, v)
            u, v = x + f.yaw * depth, y + f.pitch * depth
        points[name] = tuple((a @ (u, v) + b).tolist())
    points["chin"] = tuple((a @ (0.0, f.chin) + b).tolist())
    return points
