"""Draws a face from its parameters: layers of paint in linear light, then a lens and a sensor.

    render(face, size)  ->  (h, w, 3) uint8 RGB

A canvas is (3, h, w) float32 in linear light: planes, because numpy is fastest on whole planes.
"""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image

from drawing.coordinates import HEAD_DEPTH, NOSE_DEPTH, Grid, head_depth, head_radius, make_grid
from drawing.face import GENERATORS, linear, sample_face
from runtime.files import replacing

# Skin lets red light travel furthest beneath the surface, so its shading falls off last in red.
WRAP = (0.30, 0.18, 0.12)


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


def draw_face(rng: np.random.Generator, generator: str | None = None, size: int | tuple[int, int] = 224) -> np.ndarray:
    """Draw one face, consistent (generator None) or broken by one of GENERATORS: uint8 (h, w, 3), RGB.

    size is the side of a square or (w, h) in pixels; the face keeps its proportions and scales with the
    shorter side.
    """
    face = sample_face(rng)
    if generator is not None:
        GENERATORS[generator](face, rng)
    return render(face, size)


def draw_file(job: tuple[Path, str | None, list[int]], size: int) -> None:
    """Draw and store one picture; job is its path, its generator and the seed of its random numbers."""
    path, generator, seed = job
    image = draw_face(np.random.default_rng(seed), generator, size)
    with replacing(path) as partial:
        # Level 1: noise hardly compresses, however long one tries.
        Image.fromarray(image).save(partial, format="PNG", compress_level=1)
