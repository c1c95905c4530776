"""The parameters of a drawn face, and what each generator of the demo breaks in them.

    sample_face(rng)  ->  a consistent face        GENERATORS[name](face, rng)  ->  one relation in it is broken

Where the parameters' pictures come from: render.py. Lengths are in units of the distance between the eyes' centres,
angles in radians.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

# Colours are sRGB in [0, 255]; all drawing happens in linear light, where shading and blur are right.
SKIN = [(248, 216, 196), (236, 194, 166), (222, 172, 138), (190, 136, 102), (148, 100, 72), (108, 72, 54)]
HAIR = [(28, 22, 20), (58, 38, 28), (98, 64, 40), (150, 104, 60), (206, 166, 104), (146, 70, 38), (150, 148, 146)]
# Two families: IrisMismatch takes one iris of each.
WARM_IRIS = [(70, 40, 20), (104, 62, 28), (146, 92, 36), (88, 52, 40)]
COOL_IRIS = [(70, 140, 225), (100, 185, 230), (84, 172, 92), (160, 190, 210)]
COOL_SHARE = 0.1  # of the consistent faces have cool irises
SHARP, SOFT = (0.004, 0.009), (0.20, 0.26)  # lens blur of a picture, of a blurred region: σ in eye distances
BLUR_REGIONS = ("eyes", "nose", "mouth")


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
    f.iris = [
        linear((WARM_IRIS, COOL_IRIS)[int(uniform() < COOL_SHARE)][rng.integers(4)])
    ] * 2  # image left, image right
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


# ----------------------------------------------------------------------------------------------------------- generators


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
