"""What is done to a sample when it is read: the corruptions of the protocol, and the transforms of the training.

OpenCV's operations on uint8: torchvision's blur of 31 x 31 takes 14 ms of a core where a separable one takes 0.6.
"""

import zlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from faces.alignment import GREY
from faces.regions import MIRROR_LANDMARKS, MIRROR_REGIONS, draw_region_masks


def horizontal_flip(
    image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mirrors a sample: image (h, w, 3), landmarks (68, 2) in its pixels, region_masks (8, G, G). Left and right change
    places.
    """
    landmarks = landmarks[MIRROR_LANDMARKS]  # a copy
    landmarks[:, 0] = image.shape[1] - 1 - landmarks[:, 0]
    return cv2.flip(image, 1), landmarks, region_masks[MIRROR_REGIONS, :, ::-1]


# ---------------------------------------------------------------------------------------------------------- corruptions


def gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds independent noise to (h, w, 3) uint8; sigma in units of the full scale."""
    cv2.setRNGSeed(int(rng.integers(2**31)))  # of this thread
    # a number alone is for the first channel
    noise = cv2.randn(np.empty(image.shape, np.int16), (0,) * 3, (255 * sigma,) * 3)
    return cv2.add(image, noise, dtype=cv2.CV_8U)  # saturates


def jpeg_compression(image: np.ndarray, quality: int) -> np.ndarray:
    """(h, w, 3) uint8 RGB through a JPEG of this quality, 1 to 100, its chroma at half resolution."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs (h, w, 3) uint8; sigma in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)  # the kernel reaches to ±3 sigma


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(h, w, 3) uint8 in other light: brightness and contrast times up to exp(±strength), white balance a third of
    that.
    """
    brightness, contrast = np.exp(rng.uniform(-strength, strength, 2))
    balance = np.exp(rng.uniform(-strength / 3, strength / 3, 3))
    mean = image.mean(axis=(0, 1))  # (3,)
    table = (np.arange(256)[:, None] - mean) * contrast + mean * brightness * balance  # (256, 3)
    return cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8)[None])


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """Shrinks (h, w, 3) uint8 to this part of its sides and brings it back to its size."""
    h, w = image.shape[:2]
    small = cv2.resize(image, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


# As programs do it, each in its own way
ENLARGING = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
SHRINKING = (cv2.INTER_AREA, *ENLARGING)
CORRUPTIONS = {"jpeg": jpeg_compression, "blur": gaussian_blur, "noise": gaussian_noise, "resize": rescale}


# ----------------------------------------------------------------------------------------------------------- transforms


class TestTransform:
    """Corruptions one after another, each of a given strength, in every image alike.

    What is random of them (noise) depends on the image's content alone: not on the file's name, the order or the
    readers.

    Args:
        corruptions: (name of CORRUPTIONS, level): JPEG quality, blur in pixels, noise in units of the full scale,
            resize factor.
        find_again: called with the corrupted image (h, w, 3), returns (landmarks, region_masks); None: those of the
            clean image are kept.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, corruptions: Sequence[tuple[str, float]], find_again: Callable | None = None):
        cv2.setNumThreads(1)  # FaceDataset's readers are the parallelism
        self.corruptions, self.find_again = tuple(corruptions), find_again

    def __call__(
        self, image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image (h, w, 3) uint8 RGB, landmarks (68, 2), region_masks (8, G, G) -> the same."""
        for name, level in self.corruptions:
            if name == "noise":
                image = gaussian_noise(image, level, np.random.default_rng(zlib.crc32(image.tobytes())))
            else:
                image = CORRUPTIONS[name](image, level)
        if self.find_again:
            landmarks, region_masks = self.find_again(image)
        return image, landmarks, region_masks


def resized_crop(
    image: np.ndarray, landmarks: np.ndarray, corner: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The square of this side at a corner (left, top) of (h, h, 3) uint8, brought to its size; the landmarks (68, 2)
    likewise.
    """
    h = image.shape[0]
    left, top = corner
    cut = image[top : top + side, left : left + side]
    landmarks = (landmarks - np.array(corner, np.float32) + np.float32(0.5)) * np.float32(h / side) - np.float32(0.5)
    return cv2.resize(cut, (h, h), interpolation=cv2.INTER_CUBIC), landmarks


def tighter_frame(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(h, h, 3) uint8 as faces.alignment makes it of a picture that ends nearer to the face: the rest is grey.

    The frame's edges are at random 28 to 60 % of the side from the middle of the landmarks (68, 2), each by itself.
    """
    h = image.shape[0]
    reach = rng.uniform(0.28, 0.6, (2, 2)) * h  # (before and after, x and y)
    left, top = np.maximum(landmarks.mean(axis=0) - reach[0], 0).astype(int).tolist()
    right, bottom = np.minimum(landmarks.mean(axis=0) + reach[1], h).astype(int).tolist()
    if right <= left or bottom <= top:  # a face outside of its picture
        return image
    filled = np.full_like(image, GREY)
    filled[top:bottom, left:right] = image[top:bottom, left:right]
    return filled


def in_the_wild(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What pictures meet on their way, alike in both classes. (h, h, 3) uint8, landmarks (68, 2).

    A quarter is cut tighter, all are as if they had had 30 to 100 % of the pixels a side, and go through one JPEG or
    two. How many pixels and how much of a head a picture has is a trait of its collection, and would pass for one of
    photographs or of fakes.
    """
    if rng.random() < 0.25:
        image = tighter_frame(image, landmarks, rng)
    h = image.shape[0]
    side = max(1, round(h * 0.3 ** rng.random()))
    image = cv2.resize(image, (side, side), interpolation=SHRINKING[rng.integers(len(SHRINKING))])
    if rng.random() < 0.5:
        image = jpeg_compression(image, int(rng.integers(60, 96)))
    image = cv2.resize(image, (h, h), interpolation=ENLARGING[rng.integers(len(ENLARGING))])
    return jpeg_compression(image, int(rng.integers(60, 96)))


class TrainTransform:
    """The paper's corruptions, each with probability 0.1, and a mirror with probability 0.5.

    Differs from the authors' code, which draws them once before extraction and so trains on the same ones in every
    epoch.

    Args:
        color_jitter: strength of color_jitter in every image; 0, the paper's: none.
        augment: "paper"; or "field", what detectors of generated images are trained with: a crop of 60 to 100 % of the
            area in every image, resizing, blur and JPEG with probability 0.5 each (Wang et al., CVPR 2020, and those
            after them), no noise; or "wild", what pictures of aligned faces meet on their way, for a trunk that is
            hardly trained: fewer pixels and JPEG in all, a tighter frame in a quarter; or "none": neither a corruption
            nor a mirror.
        mask_style: in which the masks of a crop are drawn again.
    """

    def __init__(self, color_jitter: float = 0.0, augment: str = "paper", mask_style: str = "polygon"):
        cv2.setNumThreads(1)  # FaceDataset's readers are the parallelism
        self.color_jitter, self.augment, self.mask_style = color_jitter, augment, mask_style

    def __call__(
        self, image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image (h, w, 3) uint8 RGB, landmarks (68, 2), region_masks (8, G, G) -> the same."""
        if self.augment == "none":
            if self.color_jitter:
                image = color_jitter(image, self.color_jitter, rng)
            return image, landmarks, region_masks
        mirror, noise, jpeg, blur = rng.random(4) < (0.5, 0.1, 0.1, 0.1)
        if mirror:
            image, landmarks, region_masks = horizontal_flip(image, landmarks, region_masks)
        if self.color_jitter:
            image = color_jitter(image, self.color_jitter, rng)
        if self.augment == "field":
            return self.of_the_field(image, landmarks, region_masks.shape[-1], rng)
        if self.augment == "wild":
            return in_the_wild(image, landmarks, rng), landmarks, region_masks
        if noise:
            image = gaussian_noise(image, rng.uniform(0.05, 0.25), rng)
        if jpeg:
            image = jpeg_compression(image, int(rng.integers(50, 91)))
        if blur:
            image = gaussian_blur(image, rng.uniform(1.0, 5.0))
        return image, landmarks, region_masks

    def of_the_field(
        self, image: np.ndarray, landmarks: np.ndarray, grid_size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        h = image.shape[0]
        side = round(h * rng.uniform(0.6, 1.0) ** 0.5)
        corner = tuple(rng.integers(0, h - side + 1, 2).tolist())
        image, landmarks = resized_crop(image, landmarks, corner, side)
        resize, blur, jpeg = rng.random(3) < 0.5
        if resize:
            image = rescale(image, rng.uniform(0.4, 1.0))
        if blur:
            image = gaussian_blur(image, rng.uniform(0.1, 3.0))
        if jpeg:
            image = jpeg_compression(image, int(rng.integers(30, 101)))
        return image, landmarks, draw_region_masks(landmarks, image.shape[:2], grid_size, self.mask_style)
