"""Draw a small labelled data set of procedural faces: a first run with no download.

Every picture is computed, none is a photograph. A *real* face is consistent: two eyes of one colour, one
light, a mouth on the face's axis, one sharpness. Each *generator* breaks exactly one of these relations
between regions and draws the rest alike, which is the paper's idea of a fake in its simplest form: broken
so plainly that a small model can learn it in minutes. The set proves that the pipeline runs and learns; it
says nothing about real fakes.

Input:   nothing
Output:  OUTPUT_DIR/real/Consistent/00000.png ...  and  OUTPUT_DIR/fake/<Generator>/00000.png ...
         (8-bit RGB PNG, the same format for every class)

    python demo.py                                             # 1200 real + 4 x 300 fake, 224 px
    python demo.py --real 2000 --fake 500 --workers 8          # more, in parallel; the same bytes
    python demo.py --output_dir /tmp/faces --size 448          # larger pictures of the same faces

Pictures that are there already are kept, so an interrupted run goes on where it stopped.
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

# Lengths are in units of the distance between the eyes' centres, angles in radians. The face plane has its
# origin between the eyes, u to the image's right, v down, z towards the viewer. The proportions below are
# the common ones of a frontal adult face, framed as in FFHQ (face box about 0.54 of the image).
EYE_DISTANCE = 0.240  # of the image's shorter side
EYE_LEVEL = -0.092  # eyes above the image's centre, of the shorter side
HEAD_DEPTH = 0.85  # how far the middle of the face stands before its outline
NOSE_DEPTH = 0.27  # how far the tip of the nose stands before the face

# Colours are sRGB in [0, 255]; all drawing happens in linear light, where shading and blur are right.
SKIN = [(248, 216, 196), (236, 194, 166), (222, 172, 138), (190, 136, 102), (148, 100, 72), (108, 72, 54)]
HAIR = [(28, 22, 20), (58, 38, 28), (98, 64, 40), (150, 104, 60), (206, 166, 104), (146, 70, 38), (150, 148, 146)]
# Two families: IrisMismatch takes one iris of each.
WARM_IRIS = [(70, 40, 20), (104, 62, 28), (146, 92, 36), (88, 52, 40)]
COOL_IRIS = [(70, 140, 225), (100, 185, 230), (84, 172, 92), (160, 190, 210)]
# Skin lets red light travel furthest beneath the surface, so its shading falls off last in red.
WRAP = (0.30, 0.18, 0.12)
COOL_SHARE = 0.1  # of the consistent faces have cool irises
SHARP, SOFT = (0.004, 0.009), (0.20, 0.26)  # lens blur of a picture, of a blurred region: σ in eye distances
BLUR_REGIONS = ("eyes", "nose", "mouth")


# ------------------------------------------------------------------------------------------------- the face


def linear(colour: tuple[int, int, int]) -> np.ndarray:
    """sRGB in [0, 255] -> linear light in [0, 1], (3,) float32 in RGB order."""
    return (np.asarray(colour, np.float32) / 255) ** 2.2


def pick(rng: np.random.Generator, palette: list) -> np.ndarray:
    """A colour between two neighbours of the palette, linear light."""
    i, t = rng.integers(len(palette) - 1), rng.uniform()
    return (1 - np.float32(t)) * linear(palette[i]) + np.float32(t) * linear(palette[i + 1])


def muted(rng: np.random.Generator) -> np.ndarray:
    """Any colour for cloth and background, not too loud."""
    return linear(rng.uniform(40, 225) * 0.6 + 0.4 * rng.uniform(20, 235, 3))


def sample_face(rng: np.random.Generator) -> SimpleNamespace:
    """Draw the parameters of one consistent face; none of them depends on the size of the picture.

    Lengths in eye distances, angles in radians, colours in linear light.
    """
    f, uniform = SimpleNamespace(), rng.uniform
    # pose: in the image plane, and turned out of it
    f.scale, f.roll = uniform(0.97, 1.03), uniform(-0.04, 0.04)
    f.shift_x, f.shift_y = uniform(-0.04, 0.04), uniform(-0.03, 0.03)
    f.yaw, f.pitch = uniform(-0.06, 0.06), uniform(-0.03, 0.03)
    # proportions
    f.head_w, f.skull, f.chin = uniform(0.93, 1.02), uniform(1.26, 1.42), uniform(1.58, 1.74)
    f.jaw = uniform(1.95, 2.35)  # exponent of the outline: 2 is an ellipse, more is squarer
    f.eye_w, f.eye_h, f.eye_tilt = uniform(0.240, 0.270), uniform(0.125, 0.16), uniform(-0.10, 0.06)
    f.iris_r, f.gaze_x, f.gaze_y = uniform(0.130, 0.145), uniform(-0.035, 0.035), uniform(-0.015, 0.015)
    f.brow_y, f.brow_t, f.brow_arch = uniform(-0.40, -0.33), uniform(0.035, 0.065), uniform(0.02, 0.09)
    f.nose_y, f.nose_w = uniform(0.68, 0.78), uniform(0.165, 0.215)
    f.mouth_x, f.mouth_y, f.mouth_w = 0.0, uniform(1.04, 1.12), uniform(0.37, 0.45)
    f.lip_up, f.lip_low = uniform(0.07, 0.11), uniform(0.10, 0.15)
    # expression
    f.smile = uniform(0.0, 0.14)
    f.gap = uniform(0.04, 0.10) if uniform() < 0.35 else 0.0
    # colours
    f.skin, f.hair = pick(rng, SKIN), pick(rng, HAIR)
    f.lip = f.skin * linear((255, uniform(120, 175), uniform(130, 180)))
    f.iris = [linear((WARM_IRIS, COOL_IRIS)[int(uniform() < COOL_SHARE)][rng.integers(4)])] * 2  # image left, image right
    f.cloth, f.collar, f.blush = muted(rng), uniform(0.3, 0.6), uniform(0.0, 0.25)
    f.back = [muted(rng) for _ in range(2)]
    f.back_angle = uniform(0, 2 * np.pi)
    f.discs = [(*uniform(-2.4, 2.4, 2).tolist(), uniform(0.2, 0.9), muted(rng)) for _ in range(5)]
    # hair
    f.hair_t, f.hair_end = uniform(0.08, 0.36), float(rng.choice([0.0, 0.2, 1.2, 1.8, 3.0])) + uniform(-0.1, 0.2)
    f.hairline, f.hair_power, f.part = uniform(-1.0, -0.62), uniform(3.0, 7.0), uniform(-0.6, 0.6)
    f.sweep, f.wave = uniform(-0.10, 0.22), uniform(0.0, 0.12)
    f.strands = rng.random(257, np.float32)
    f.texture = rng.normal(size=(128, 128)).astype(np.float32)  # skin: one value per 0.02 eye distances
    # light: always clearly from one side, from above
    f.light = np.array([rng.choice([-1, 1]) * uniform(0.5, 0.8), -uniform(0.15, 0.4), 0.6], np.float32)
    f.light /= np.linalg.norm(f.light)
    f.nose_light = f.light
    f.light_colour = np.array([1 + uniform(-0.08, 0.12), 1.0, 1 + uniform(-0.12, 0.08)], np.float32)
    f.ambient, f.gain = uniform(0.18, 0.26), uniform(1.0, 1.15)
    # camera
    f.blur = uniform(*SHARP)
    f.region_blur = None  # (one of BLUR_REGIONS, blur)
    f.noise, f.noise_seed = uniform(1.0, 3.0), int(rng.integers(2**32))  # in grey levels of 255
    return f


def iris_mismatch(f: SimpleNamespace, rng: np.random.Generator) -> None:
    """One iris warm (brown, amber), the other cool (blue, green, grey)."""
    pair = [linear(WARM_IRIS[rng.integers(4)]), linear(COOL_IRIS[rng.integers(4)])]
    f.iris = pair if rng.uniform() < 0.5 else pair[::-1]


def nose_light(f: SimpleNamespace, rng: np.random.Generator) -> None:
    """The nose is lit from below and from the side opposite to the one that lights the face."""
    f.nose_light = np.array([-1.0 * np.sign(f.light[0]), 0.9, 0.35], np.float32)
    f.nose_light /= np.linalg.norm(f.nose_light)


def off_axis_mouth(f: SimpleNamespace, rng: np.random.Generator) -> None:
    """The mouth, with its relief, sits beside the face's axis: by 16 to 19 px of 224."""
    f.mouth_x = float(rng.choice([-1, 1])) * rng.uniform(0.30, 0.36)


def blurred_region(f: SimpleNamespace, rng: np.random.Generator) -> None:
    """One region is out of focus, the rest is sharp."""
    f.region_blur = (BLUR_REGIONS[rng.integers(len(BLUR_REGIONS))], rng.uniform(*SOFT))


GENERATORS: dict[str, Callable[[SimpleNamespace, np.random.Generator], None]] = {
    "IrisMismatch": iris_mismatch,
    "NoseLight": nose_light,
    "OffAxisMouth": off_axis_mouth,
    "BlurredRegion": blurred_region,
}


# ---------------------------------------------------------------------------------------------- coordinates


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


# -------------------------------------------------------------------------------------------------- drawing
# A canvas is (3, h, w) float32 in linear light: planes, because numpy is fastest on whole planes.


def cover(distance, width: float):
    """Coverage in [0, 1] of a shape by signed distance (positive inside), its edge `width` wide."""
    return np.clip(0.5 + distance / width, 0, 1)


def bump(x, y, cx: float, cy: float, sx: float, sy: float):
    """A Gaussian hill of height 1 around (cx, cy)."""
    return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)


def paint(canvas: np.ndarray, colour, alpha: np.ndarray) -> None:
    """Lay a colour, three numbers or a (3, h, w) array, over the canvas in place."""
    for plane, c in zip(canvas, colour):
        plane += alpha * (c - plane)


def relief(f: SimpleNamespace, g: Grid) -> np.ndarray:
    """Height of the face's surface above its outline, (h, w), in eye distances."""
    x, y, side = g.x, g.y, np.abs(g.x)
    z = HEAD_DEPTH * head_depth(f, g.u, g.v)
    z -= 0.11 * bump(side, y, 0.46, -0.04, 0.30, 0.17)  # eye sockets
    z += (0.05 + 0.3 * f.smile) * bump(side, y, 0.56, 0.52, 0.24, 0.22)  # cheeks
    z += 0.07 * bump(x, y, 0, f.chin - 0.22, 0.22, 0.16)
    z += 0.05 * bump(x, y, f.mouth_x, f.mouth_y - f.gap / 2 - 0.04, 0.7 * f.mouth_w, 0.08)
    z += 0.07 * bump(x, y, f.mouth_x, f.mouth_y + f.gap / 2 + 0.07, 0.6 * f.mouth_w, 0.07)
    z -= 0.03 * bump(x, y, f.mouth_x, f.mouth_y + f.gap / 2 + 0.22, 0.6 * f.mouth_w, 0.06)
    along = np.clip(y / (f.nose_y - 0.18), 0, 1)  # 0 between the eyes, 1 at the tip
    xn = x - f.yaw * NOSE_DEPTH * along  # the nose stands out, so a turn moves it further
    ends = cover(f.nose_y - 0.08 - y, 0.20) * cover(y + 0.12, 0.4)
    z += (0.07 + (NOSE_DEPTH - 0.14) * along**1.5) * ends * np.exp(-((xn / (0.11 + 0.06 * along)) ** 2))
    z += 0.09 * bump(xn, y, 0, f.nose_y - 0.16, 0.13, 0.12)
    z += 0.09 * bump(np.abs(xn), y, f.nose_w - 0.03, f.nose_y - 0.10, 0.075, 0.085)  # wings
    return z


def shade(f: SimpleNamespace, normal: np.ndarray, light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light reflected by a surface with these normals (3, h, w): diffuse (3, h, w), gloss (h, w)."""
    cosine = np.tensordot(light, normal, 1)
    diffuse = np.stack([f.ambient + c * np.maximum(cosine + w, 0) / (1 + w) for c, w in zip(f.light_colour, WRAP)])
    half = light + np.array([0, 0, 1], np.float32)
    gloss = np.maximum(np.tensordot(half / np.linalg.norm(half), normal, 1), 0) ** 2
    return f.gain * diffuse, gloss**16


def nose_area(f: SimpleNamespace, g: Grid, soft: float) -> np.ndarray:
    """Soft mask of the nose: a triangle from between the eyes to the wings."""
    along = np.clip(g.y / f.nose_y, 0, 1)
    xn = np.abs(g.x - f.yaw * NOSE_DEPTH * along)
    width = 0.10 + (f.nose_w - 0.04) * along
    return cover(np.minimum(width - xn, f.nose_y + 0.06 - g.y), soft) * cover(g.y - 0.12, 0.3)


def draw_background(f: SimpleNamespace, g: Grid) -> np.ndarray:
    """A fresh canvas: a gradient between two colours, with discs of light far behind."""
    t = cover(g.u * np.cos(f.back_angle) + g.v * np.sin(f.back_angle), 5.0)
    canvas = np.stack([a + t * (b - a) for a, b in zip(*f.back)])
    for cu, cv, radius, colour in f.discs:
        paint(canvas, colour, 0.5 * cover(radius - np.hypot(g.u - cu, g.v - cv), 0.12))
    return canvas


def draw_hair(f: SimpleNamespace, g: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Hair that runs down from the parting, with a band of gloss: colour (3, h, w), strands (h, w) in [0, 1]."""
    angle = np.arctan2(g.u - f.part + f.wave * np.sin(3 * g.v), g.v + f.skull + 0.8)
    strand = np.interp((angle * 40) % 256, np.arange(257), f.strands).astype(np.float32)
    lit = f.ambient + 0.55 * np.maximum(0.6 + f.light[0] * g.u / 1.2 - 0.25 * g.v, 0.1)
    band = np.exp(-(((head_radius(f, g.u, g.v) - 0.88) / 0.13) ** 2)) * cover(-g.v - 0.3, 0.6)
    return f.hair[:, None, None] * (lit * (0.55 + 0.6 * strand)) + 0.05 * band * strand, strand


def draw_body(f: SimpleNamespace, g: Grid, canvas: np.ndarray) -> None:
    """Ears, neck and shoulders, all behind the head."""
    side, edge = np.abs(g.u), g.px
    lit = f.gain * (f.ambient + 0.5 + 0.25 * f.light[0] * np.clip(g.u, -2, 2))
    if f.hair_end < 1:  # long hair covers the ears
        ear = np.hypot((side - f.head_w) / 0.13, (g.v - 0.20 + 0.3 * (side - f.head_w)) / 0.30)
        paint(canvas, f.skin[:, None, None] * lit * (0.55 + 0.35 * ear), cover((1 - ear) * 0.13, edge))
    under_chin = 1 - 0.65 * bump(g.u, g.v, 0, 1.45, 0.9, 0.55)
    neck = 0.50 + 0.5 * np.maximum(g.v - 1.9, 0) ** 2 - side
    paint(canvas, f.skin[:, None, None] * (lit * under_chin), cover(neck, edge) * (g.v > 0.8))
    collar = np.hypot(g.u / 0.62, (g.v - 1.75) / f.collar) - 1
    cloth = np.minimum(g.v - 1.78 - 0.24 * side**1.5, 0.5 * collar)
    fold = 1 - 0.35 * np.exp(-np.maximum(collar, 0) / 0.06)
    paint(canvas, f.cloth[:, None, None] * (lit * fold), cover(cloth, edge))


def draw_skin(f: SimpleNamespace, g: Grid, canvas: np.ndarray) -> np.ndarray:
    """The lit surface of the head; returns the diffuse light (3, h, w) for what lies on it."""
    dv, du = np.gradient(relief(f, g), g.px)
    normal = np.stack([-du, -dv, np.ones_like(du)])
    normal /= np.sqrt((normal**2).sum(0))
    diffuse, gloss = shade(f, normal, f.light)
    if f.nose_light is not f.light:
        other_diffuse, other_gloss = shade(f, normal, f.nose_light)
        nose = nose_area(f, g, 0.10)
        diffuse, gloss = diffuse + nose * (other_diffuse - diffuse), gloss + nose * (other_gloss - gloss)
    # The nose throws a shadow to the side away from its light.
    diffuse *= 1 - 0.35 * bump(g.x, g.y, -0.42 * f.nose_light[0] + f.yaw * NOSE_DEPTH, f.nose_y - 0.06, 0.14, 0.10)
    texture = cv2.remap(f.texture, (g.x + 1.28) * 50, (g.y + 1.0) * 40, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    albedo = f.skin[:, None, None] * (1 + 0.06 * texture)
    blush = f.blush * bump(np.abs(g.x), g.y, 0.56, 0.52, 0.26, 0.22)
    albedo = albedo * (1 - blush * np.array([0.0, 0.55, 0.45], np.float32)[:, None, None])
    paint(canvas, albedo * diffuse + 0.10 * gloss, cover(g.inside, g.px))
    xn, wide = np.abs(g.x - f.yaw * NOSE_DEPTH), 0.5 * f.nose_w
    paint(canvas, 0.12 * f.skin, 0.85 * bump(xn, g.y, wide, f.nose_y - 0.02, 0.055, 0.026))  # nostrils
    return diffuse


def draw_eye(f: SimpleNamespace, g: Grid, canvas: np.ndarray, diffuse: np.ndarray, side: int) -> None:
    """One eye with its brow, under the light on the skin (3, h, w); side -1 is the image's left."""
    x = side * g.x - 0.5  # grows towards the temple
    y = g.y - f.eye_tilt * x
    arch = 1 - (x / f.eye_w) ** 2
    lid, low = f.eye_h * arch + 0.05 * x * arch, 0.55 * f.eye_h * arch
    opening = np.minimum(np.minimum(y + lid, low - y), f.eye_w - np.abs(x))
    inside = cover(opening, g.px)
    near = cover(f.eye_w * 1.06 - np.abs(x), 0.06)
    paint(canvas, 0.35 * f.skin, 0.40 * near * np.exp(-(((y + lid + 0.07) / 0.025) ** 2)))  # crease
    lit = diffuse * (1 - 0.5 * np.exp(-np.maximum(y + lid, 0) / 0.045))  # the upper lid shades the eyeball
    paint(canvas, linear((224, 216, 210))[:, None, None] * lit, inside)
    ix, iy = g.x - side * 0.5 - f.gaze_x, y - f.gaze_y + 0.02
    r = np.hypot(ix, iy) / f.iris_r
    glow = 1.15 - 0.75 * cover(r - 0.92, 0.3) + 1.2 * np.maximum(iy, 0) / f.iris_r  # dark rim, bright below
    iris = f.iris[(side + 1) // 2][:, None, None] * glow
    paint(canvas, iris * (0.35 + 0.65 * lit), inside * cover((1 - r) * f.iris_r, g.px))
    paint(canvas, (0.004, 0.004, 0.004), inside * cover((0.40 - r) * f.iris_r, g.px))
    spark = np.hypot(ix - 0.4 * f.light[0] * f.iris_r, iy - 0.9 * f.light[1] * f.iris_r)
    paint(canvas, (1, 1, 1), inside * 0.95 * cover(0.26 * f.iris_r - spark, g.px))
    lash = 0.022 + 0.03 * cover(x, 0.5)
    paint(canvas, 0.25 * f.hair, 0.9 * near * cover(lash - np.abs(y + np.maximum(lid, 0)) * 1.2, 0.03))
    paint(canvas, 0.30 * f.skin, 0.45 * near * cover(0.010 - np.abs(y - np.maximum(low, 0)), 0.03))
    t = np.clip((x + 0.33) / 0.75, 0, 1)  # along the brow, 0 at the nose
    mid = f.brow_y + 0.03 - f.brow_arch * np.sin(np.pi * t) + 0.08 * t**3
    brow = np.minimum(f.brow_t * (1 - t**2) - np.abs(y - mid), np.minimum(x + 0.34, 0.40 - x))
    hairs = 0.85 + 0.15 * np.sin(75 * x + 110 * (y - mid))
    paint(canvas, 0.6 * f.hair[:, None, None] * diffuse, 0.9 * cover(brow - 0.01, 0.03) * hairs)


def draw_mouth(f: SimpleNamespace, g: Grid, canvas: np.ndarray, diffuse: np.ndarray) -> None:
    """Two lips under the light on the skin (3, h, w), closed or open over the upper teeth."""
    x = (g.x - f.mouth_x) / f.mouth_w
    y = g.y - f.mouth_y + f.smile * (x**2 - 0.3)  # distance below the line between the lips
    arch = np.maximum(1 - x**2, 0)
    ends = (1 - np.abs(x)) * f.mouth_w
    top = 0.5 * f.gap * arch + f.lip_up * arch**0.8 * (1 - 0.22 * np.exp(-((x / 0.16) ** 2)))
    bottom = 0.5 * f.gap * arch + f.lip_low * arch**0.7
    lips = cover(np.minimum(np.minimum(y + top, bottom - y), ends), 1.5 * g.px)
    rim = np.where(y < 0, 0.78, 1.0) * (1 + 0.05 * np.sin(60 * x))
    paint(canvas, f.lip[:, None, None] * (diffuse * rim), lips)
    gloss = bump(x, y, 0.3 * f.light[0], 0.5 * f.gap + 0.45 * f.lip_low, 0.35, 0.022)
    paint(canvas, (1, 0.95, 0.95), 0.22 * gloss * lips)
    if f.gap:
        hole = np.minimum(np.minimum(y + 0.5 * f.gap * arch, 0.5 * f.gap * arch - y), ends)
        paint(canvas, (0.05, 0.012, 0.012), cover(hole, g.px))
        teeth = np.minimum(hole - 0.006, 0.2 * f.gap - y)
        paint(canvas, 0.7 * diffuse * (1 - 0.5 * np.minimum(x**2, 1)), cover(teeth, g.px))
    else:
        line = cover(0.014 * (0.6 + arch) - np.abs(y), 0.02) * cover(ends + 0.02, 0.04)
        paint(canvas, 0.15 * f.lip, 0.85 * line)


def hair_outline(f: SimpleNamespace, g: Grid, strand: np.ndarray) -> np.ndarray:
    """Distance to the hair's outer outline, positive inside; strands fray its lower end."""
    # Short hair thins out towards its end, long hair hangs straight down or widens.
    thick = f.hair_t * (cover(f.hair_end - g.v - 0.6, 1.6) if f.hair_end < 1 else 1)
    cap = 1 - (np.abs(g.u / (f.head_w + thick)) ** 2.3 + np.maximum(-g.v / (f.skull + f.hair_t), 0) ** 2.3) ** (1 / 2.3)
    ends = f.hair_end - 0.25 * (np.abs(g.u) - 0.8) - g.v + 0.16 * (strand - 0.5)
    return np.minimum(cap * f.head_w, ends)


def draw_front_hair(f: SimpleNamespace, g: Grid, canvas: np.ndarray, hair: tuple[np.ndarray, np.ndarray]) -> None:
    """The hair over forehead and temples, with what draw_hair() gave."""
    colour, strand = hair
    away = np.abs(g.x - f.part)  # the hair falls to either side of the parting
    line = f.hairline + f.sweep * away + 0.85 * np.abs(g.x / f.head_w) ** f.hair_power
    line -= 0.08 * np.exp(-((away / 0.10) ** 2)) - 0.07 * (strand - 0.5)
    front = np.minimum(hair_outline(f, g, strand), np.minimum(line, 0.15) - g.y)
    paint(canvas, 0.1 * f.skin, 0.35 * cover(front + 0.06, 0.12) * cover(g.inside, g.px))  # shadow on the forehead
    paint(canvas, colour, cover(front, 0.03))


def expose(f: SimpleNamespace, g: Grid, canvas: np.ndarray) -> np.ndarray:
    """Lens blur, gamma, sensor noise: linear canvas (3, h, w) -> uint8 picture (h, w, 3), RGB."""
    image = np.ascontiguousarray(canvas.transpose(1, 2, 0))
    sharp = cv2.GaussianBlur(image, (0, 0), max(f.blur / g.px, 0.2))
    if f.region_blur:
        region, blur = f.region_blur
        mask = {
            "eyes": lambda: cover(np.minimum(g.y + 0.52, 0.26 - g.y), 0.10) * cover(0.9 - np.abs(g.x), 0.10),
            "nose": lambda: nose_area(f, g, 0.12),
            "mouth": lambda: cover(1 - np.hypot((g.x - f.mouth_x) / 0.6, (g.y - f.mouth_y) / 0.3), 0.2),
        }[region]()
        sharp += mask[..., None] * (cv2.GaussianBlur(image, (0, 0), blur / g.px) - sharp)
    noise = np.random.default_rng(f.noise_seed).standard_normal(image.shape, np.float32)
    return np.clip(255 * np.clip(sharp, 0, 1) ** (1 / 2.2) + f.noise * noise + 0.5, 0, 255).astype(np.uint8)


def render(f: SimpleNamespace, size: int | tuple[int, int] = 224) -> np.ndarray:
    """Draw a face: uint8 (h, w, 3), RGB. size is the side of a square or (w, h), in pixels."""
    w, h = (size, size) if isinstance(size, int) else size
    g = make_grid(f, h, w)
    canvas, hair = draw_background(f, g), draw_hair(f, g)
    behind = 1 - 0.6 * bump(g.u, g.v, 0, 1.2, 0.95, 0.75)  # hair behind the neck lies in shadow
    paint(canvas, hair[0] * behind, cover(hair_outline(f, g, hair[1]), 0.04))
    draw_body(f, g, canvas)
    diffuse = draw_skin(f, g, canvas)
    for side in (-1, 1):
        draw_eye(f, g, canvas, diffuse, side)
    draw_mouth(f, g, canvas, diffuse)
    draw_front_hair(f, g, canvas, hair)
    return expose(f, g, canvas)


def draw_face(
    rng: np.random.Generator, generator: str | None = None, size: int | tuple[int, int] = 224
) -> np.ndarray:
    """Draw one face, consistent (generator None) or broken by one of GENERATORS: uint8 (h, w, 3), RGB.

    size is the side of a square or (w, h) in pixels; the face keeps its proportions and scales with the
    shorter side.
    """
    face = sample_face(rng)
    if generator is not None:
        GENERATORS[generator](face, rng)
    return render(face, size)


# -------------------------------------------------------------------------------------------------- the set


def draw_file(job: tuple[Path, str | None, list[int]], size: int) -> None:
    """Draw and store one picture; job is its path, its generator and the seed of its random numbers."""
    path, generator, seed = job
    image = draw_face(np.random.default_rng(seed), generator, size)
    part = path.with_name(path.name + ".part")  # a killed run leaves no half-written picture behind
    # Level 1: noise hardly compresses, however long one tries.
    Image.fromarray(image).save(part, format="PNG", compress_level=1)
    os.replace(part, path)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_run/datasets"), help="data root to write (default: %(default)s)")
    parser.add_argument("--real", type=int, default=1200, help="number of consistent faces (default: %(default)s)")
    parser.add_argument("--fake", type=int, default=300, help="number of faces per generator (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> None:
    classes = [("real/Consistent", None, args.real)]
    classes += [(f"fake/{name}", name, args.fake) for name in GENERATORS]
    jobs = []
    for index, (folder, generator, number) in enumerate(classes):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            path = args.output_dir / folder / f"{i:05d}.png"
            if not path.exists():
                jobs.append((path, generator, [args.seed, index, i]))
    # One thread a process: the processes already fill the machine.
    with ProcessPoolExecutor(args.workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        done = pool.map(partial(draw_file, size=args.size), jobs, chunksize=8)
        for _ in tqdm(done, total=len(jobs), desc="drawing", unit="face"):
            pass
    print(f"{args.output_dir}: {args.real} real, {len(GENERATORS)} x {args.fake} fake ({len(jobs)} drawn now)")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
