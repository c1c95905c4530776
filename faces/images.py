"""Files to pixels: which files of a folder are images, and what people see in them."""

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from faces.rejection import ORIGINALS_NOTE, REJECTED_LIST, Rejected, is_set_aside

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
VIDEO_EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
# A video's frame that preprocess.py stores: clip.mp4.frame000123.png; the first part names the video
FRAME_PATTERN = r"((?s:.+)\.(?i:mp4|mov|mkv|webm|avi|gif))\.frame\d{6,}\.png"
VIDEO = "left alone: a video, of whose frames --output_dir makes images"  # a reason
NO_IMAGE_BY_NAME = f"left alone: its name ends in none of {', '.join(IMAGE_EXTENSIONS)}"  # a reason

# What Pillow raises on files that are not, or not all, there: its own errors are OSError, broken PNG chunks
# SyntaxError.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# System errors that are about one file. Any other (a bad disk, a server that is away) may be gone tomorrow: it stops
# the run.
ABOUT_THE_FILE = (
    None,
    errno.ENOENT,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)

# In image.info, and as text chunks in the PNGs that preprocess.py writes: what the file was at first, and what was done
# to it. Those PNGs are all alike, and the formats and sizes that they came from may name the class:
# feature_extraction.py keeps them, inference.py warns.
ORIGINAL = "Original"  # "JPEG 1024x768", width x height
ENLARGED = "enlarged"  # in image.info alone: an aligned crop had fewer pixels than the result
TREATMENT = "Treatment"  # "aligned 0.6 on grey, JPEG 75-95, 224x224"; faces/treatment.py
# Of aligned crops: the share that lies beyond the border of the picture, and was filled; which of finder.FOUND_BY; the
# landmarks, (68, 2) in pixels of the crop. The PNG holds all three, with a checksum of its pixels.
FILLED = "Filled"
FOUND = "Found"
LANDMARKS = "Landmarks"
STALE = "stale"  # in image.info alone: the pixels are not those whose landmarks the PNG holds
ORIGINAL_PATTERN = r"\w+ \d+x\d+"
NUMBER_PATTERN = r"-?\d{1,5}\.\d\d"
FACE_NOTE_PATTERN = (
    r"(frontal|upsampled|cnn|padded) (0\.\d{4}|1\.0000) ([0-9a-f]{16})"
    rf" ((?:{NUMBER_PATTERN} ){{135}}{NUMBER_PATTERN})"
)
TREATMENT_PATTERN = r"(?=aligned|JPEG)(?:aligned ([\d.]+)( on grey)?, )?(?:JPEG (\d+)(?:-(\d+))?, )?(\d+)x(\d+)"

# Chunks that may hold an orientation, after the pixels too
TURNING = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
ORIENTATION = 0x0112  # EXIF tag; what to do to see the picture upright, by its value
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def list_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """All files below the directory: those with an image's extension, and the others, each sorted.

    Follows links to folders, each folder once; skips hidden names, and what preprocess.py has set aside. A folder that
    cannot be read is an error: its images would be missed without a word.
    """

    def stop(error: OSError) -> None:
        raise error

    def aside(folder: str, name: str) -> bool:  # by a run over a part of the directory
        path = Path(folder, name)
        return is_set_aside(path) and any((path / listing).is_file() for listing in (REJECTED_LIST, ORIGINALS_NOTE))

    images, others, seen = [], [], set()
    for folder, subfolders, names in os.walk(directory, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and not aside(folder, name))
        for name in names:
            if not name.startswith("."):
                (images if name.lower().endswith(IMAGE_EXTENSIONS) else others).append(Path(folder, name))
    return sorted(images), sorted(others)


def list_images(directory: Path) -> list[Path]:
    return list_files(directory)[0]


def is_video(path: Path) -> bool:
    return path.name.lower().endswith(VIDEO_EXTENSIONS)


def frame_name(video: Path, number: int) -> str:
    return f"{video.name}.frame{number:06}.png"


def video_of(frame: Path) -> Path | None:
    """The video beside which frame_name would put this file; None where it is no frame."""
    match = re.fullmatch(FRAME_PATTERN, frame.name)
    return frame.with_name(match[1]) if match else None


def turn_upright(image: Image.Image) -> Image.Image:
    """Undoes the EXIF orientation. Metadata that cannot be read is no reason to do without the picture."""
    try:
        return image.transpose(UPRIGHT[image.getexif()[ORIENTATION]])
    except (*UNREADABLE, AttributeError, TypeError):  # KeyError among them: upright already
        return image


def scaled_landmarks(landmarks: np.ndarray, size: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Landmarks (68, 2) of an image of one (width, height), in pixels of its copy in another; float32."""
    if size == to:
        return landmarks
    scale = np.array(to, np.float32) / np.array(size, np.float32)
    return (landmarks + np.float32(0.5)) * scale - np.float32(0.5)  # between centres of pixels


def face_note(image: Image.Image) -> str:
    """What the PNG of an aligned crop says of its face: "frontal 0.0312 <checksum of the pixels> 61.02 103.48 ..."."""
    points = " ".join(f"{value:.2f}" for value in np.ravel(image.info[LANDMARKS]).tolist())
    return f"{image.info[FOUND]} {image.info[FILLED]:.4f} {pixel_checksum(image)} {points}"


def pixel_checksum(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def read_face_note(note: object, image: Image.Image) -> dict[str, object]:
    """For image.info: FILLED, FOUND and LANDMARKS of face_note; FILLED and STALE where the pixels changed since."""
    if not isinstance(note, str) or not (parts := re.fullmatch(FACE_NOTE_PATTERN, note)):
        return {}
    found_by, filled, checksum, points = parts.groups()
    if checksum != pixel_checksum(image):
        return {FILLED: float(filled), STALE: True}
    return known_face(found_by, filled, points)


class Noted(NamedTuple):
    """An aligned PNG of preprocess.py, as it wrote it."""

    pixels: np.ndarray  # (h, w, 3) uint8 RGB
    sha256: bytes  # of the pixels
    info: dict[str, object]  # as load_rgb's


def load_noted(path: Path) -> Noted | None:
    """The pixels of an aligned PNG and what it says of its face; None of any other file, and of one that was changed:
    load_rgb tells what it is.

    A third faster than load_rgb: OpenCV decodes, and the note's checksum proves that the pixels are the right ones.
    """
    import cv2  # where it is needed

    try:
        content = path.read_bytes() if path.suffix == ".png" and stat.S_ISREG(os.stat(path).st_mode) else b""
        if any(word in content for word in TURNING):
            return None
        with Image.open(io.BytesIO(content)) as file:
            of_face = re.fullmatch(FACE_NOTE_PATTERN, str(file.info.get(LANDMARKS)))
            original, treatment = (str(file.info.get(name)) for name in (ORIGINAL, TREATMENT))
            if not of_face or file.mode != "RGB" or "transparency" in file.info:
                return None
    except UNREADABLE:
        return None
    if not re.fullmatch(ORIGINAL_PATTERN, original) or not re.fullmatch(TREATMENT_PATTERN, treatment):
        return None
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        return None
    sha256 = hashlib.sha256(pixels).digest()
    found_by, filled, checksum, points = of_face.groups()
    if checksum != sha256.hex()[: len(checksum)]:
        return None
    return Noted(pixels, sha256, {ORIGINAL: original, TREATMENT: treatment, **known_face(found_by, filled, points)})


def known_face(found_by: str, filled: str, points: str) -> dict[str, object]:
    """For image.info, from the parts of a face note."""
    landmarks = np.array(points.split(), np.float32).reshape(68, 2)
    return {FILLED: float(filled), FOUND: found_by, LANDMARKS: landmarks}


def load_rgb(path: Path) -> Image.Image:
    """Decodes a file as people see it: upright (EXIF orientation), 8-bit RGB, transparent parts on white, first frame
    only.

    image.info[ORIGINAL] tells what it was before preprocess.py, "JPEG 1024x768", and image.info[TREATMENT] how that
    treated it; of an aligned crop also FILLED, and FOUND and LANDMARKS, or STALE.

    Raises:
        Rejected: the file is not an image, or not a whole one.
    """
    with rejecting(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Rejected("is not a file")  # a pipe, say, on which a read would wait for ever
        with Image.open(path) as file:
            return as_rgb(file)


def rgb_of(picture: Image.Image | bytes) -> Image.Image:
    """load_rgb for a picture in memory: one of Pillow's, which stays as it is, or the bytes of a file.

    Raises:
        Rejected: it is not an image, or not a whole one.
    """
    with rejecting():
        if isinstance(picture, Image.Image):
            return as_rgb(picture, keep=True)
        with Image.open(io.BytesIO(picture)) as file:
            return as_rgb(file)


def as_rgb(picture: Image.Image, keep: bool = False) -> Image.Image:
    """A picture of Pillow's, opened or made, as load_rgb gives it. Raises what Pillow does, and Rejected.

    Args:
        keep: leaves the picture as it is, at the price of a copy where it is RGB already.
    """
    picture.load()
    if not all(picture.size):  # of a file Pillow says so itself
        raise Rejected(f"has no pixels: {picture.width}x{picture.height}")
    image = turn_upright(picture)
    original, treatment = picture.info.get(ORIGINAL), str(picture.info.get(TREATMENT, ""))
    if not isinstance(original, str) or not re.fullmatch(ORIGINAL_PATTERN, original):
        original = f"{picture.format or 'pixels'} {image.width}x{image.height}"
    treatment = treatment if re.fullmatch(TREATMENT_PATTERN, treatment) else ""
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip at 255
        deep, rounded = np.asarray(image), np.empty(image.size[::-1], np.uint8)
        for row in range(0, len(deep), 256):  # in bands: these numbers take eight bytes
            rounded[row : row + 256] = (deep[row : row + 256].clip(0, 65535) / 257).round()
        image = Image.fromarray(rounded)
    if image.has_transparency_data:
        glass, image = image, Image.new("RGBA", image.size, "white")
        image.alpha_composite(glass.convert("RGBA"))
    image = image.convert("RGB") if keep or image.mode != "RGB" else image  # convert() copies
    others = {key: value for key, value in image.info.items() if key not in (FILLED, FOUND, LANDMARKS, STALE)}
    of_face = read_face_note(picture.info.get(LANDMARKS), image)
    image.info = {**others, ORIGINAL: original, TREATMENT: treatment, **of_face}
    return image


@contextlib.contextmanager
def rejecting(path: Path | None = None) -> Iterator[None]:
    """Turns what Pillow raises on a picture that is not, or not all, there into Rejected.

    Args:
        path: of the picture, which the reason does not name: it would make two runs' lists differ.
    """
    try:
        yield
    except MemoryError as error:
        raise Rejected("has more pixels than there is memory for") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in ABOUT_THE_FILE:
            raise
        message = re.sub(" <_io.BytesIO object at 0x[0-9a-f]+>", "", str(error))
        if path:
            for text in (repr(str(path)), str(path)):
                message = message.replace(text, path.name)
        raise Rejected(f"cannot be read as an image ({type(error).__name__}: {message})") from error
