"""Videos to pictures: some frames, evenly spread; and which faces of them are one, followed from frame to frame."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's complaints; the reasons are ours to give

import cv2
import numpy as np
from PIL import Image

from faces.images import ORIGINAL, TREATMENT
from faces.rejection import Rejected

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # nor OpenCV's warnings

NO_STREAM = "cannot be read as a video: no video stream in it, or cut off before its index"  # reasons
NO_FRAME = "cannot be read as a video: none of its frames can be decoded"
MOST_FRAMES = 10_000_000  # that are counted
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # of a frame, as Pillow has it for pictures
STEP = 250  # frames; what is nearer than that is read on to, what is farther is sought
NEAR = 0.7  # mean distance of landmarks, in face sizes, at which two faces of neighbouring frames may be one
OVERLAP = 0.3  # of their boxes, intersection over union, at which they are


class Frame(NamedTuple):
    number: int  # from 0 on
    seconds: float
    image: Image.Image  # RGB


def sample_frames(path: Path, count: int) -> Iterator[Frame]:
    """So many frames, the middles of equal parts of the video; all of a shorter one. One is held at a time.

    Of a file that is cut off, of what can be decoded. Numbers count frames; in a long video whose rate changes they
    count at the mean rate.

    Raises:
        Rejected: none can.
    """
    capture = open_video(path)
    total, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    steady = total > 0 and rate > 0 and is_near(seek(capture, total - 1), (total - 1) / rate, rate)
    if not steady:  # cut off, or its rate changes, or it does not say how long it is
        total = count_frames(path)
    if not total:
        raise Rejected(NO_FRAME)
    numbers = sorted({int((i + 0.5) * total / count) for i in range(count)})
    far = steady and total > STEP * count
    given = False
    for number, capture in seek_frames(path, numbers, rate) if far else read_on(path, numbers):
        decoded, pixels = capture.retrieve()
        if not decoded:
            continue
        image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))  # BGR -> RGB
        image.info = {ORIGINAL: f"{path.suffix[1:].upper()} {image.width}x{image.height}", TREATMENT: ""}
        given = True
        yield Frame(number, round(seconds_of(capture) or (number / rate if rate > 0 else 0.0), 3), image)
    if not given:
        raise Rejected(NO_FRAME)


def open_video(path: Path) -> cv2.VideoCapture:
    """
    Raises:
        Rejected: it is no video, or cannot be given to FFmpeg.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Rejected("is not a file")  # a pipe, say, on which a read would wait for ever
    try:
        name = os.path.abspath(path)  # "a:b.mp4" alone would be a protocol to FFmpeg
        name.encode()
    except UnicodeEncodeError:
        raise Rejected("its name is no text; rename it") from None  # OpenCV would crash
    with open(path, "rb") as file:
        if file.read(8) == b"ffconcat":  # a list of other files
            raise Rejected(NO_STREAM)
    capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise Rejected(NO_STREAM)
    width, height = (int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > MOST_PIXELS:
        raise Rejected(f"has frames of {width}x{height} pixels, more than the {MOST_PIXELS} that are read")
    return capture


def seconds_of(capture: cv2.VideoCapture) -> float:
    """When the frame that was grabbed last is shown; 0 where the file does not say."""
    return capture.get(cv2.CAP_PROP_POS_MSEC) / 1000


def seek(capture: cv2.VideoCapture, number: int) -> float | None:
    """Grabs a frame where the mean rate has it. Returns when it is shown, None where there is none."""
    capture.set(cv2.CAP_PROP_POS_FRAMES, number)
    return seconds_of(capture) if capture.grab() else None


def is_near(seconds: float | None, wanted: float, rate: float) -> bool:
    return seconds is not None and abs(seconds - wanted) <= max(0.5, 2 / rate)


def read_on(path: Path, numbers: list[int]) -> Iterator[tuple[int, cv2.VideoCapture]]:
    """Each of these frames, grabbed, by reading all before it."""
    capture, position = open_video(path), 0
    for number in numbers:
        while position <= number and capture.grab():
            position += 1
        if position > number:
            yield number, capture


def seek_frames(path: Path, numbers: list[int], rate: float) -> Iterator[tuple[int, cv2.VideoCapture]]:
    """Frames where the mean rate has them, grabbed: those between are left out. Each is later than the one before.

    A frame that is found elsewhere shows that the rate changes, or that the file is broken there. Then all is read, as
    far as that goes.
    """
    capture, reading, last = open_video(path), None, -1.0
    for number in numbers:
        wanted, seconds = number / rate, None
        if reading is None:
            seconds = seek(capture, number)
            if seconds is not None and not is_near(seconds, wanted, rate):
                reading, seconds = open_video(path), None
        if reading is not None and last < wanted:
            while (there := reading.grab()) and seconds_of(reading) < wanted:
                pass
            seconds = seconds_of(reading) if there else seek(capture, number)  # beyond what is broken
        if seconds is not None and seconds > last:
            last = seconds
            yield number, reading if reading is not None and there else capture


def count_frames(path: Path) -> int:
    """How many frames can be read, by reading them."""
    capture, found = open_video(path), 0
    while found < MOST_FRAMES and capture.grab():
        found += 1
    return found


# ---------------------------------------------------------------------------------------------------------- one face


def follow(frames: Sequence[Sequence[tuple[tuple | None, np.ndarray]]]) -> list[list[int]]:
    """Which faces of a video are one: by overlap from frame to frame, and by the distance of their landmarks.

    Args:
        frames: of each frame its faces, box (left, top, right, bottom) and landmarks (68, 2), in pixels.

    Returns:
        for each face the number of the one that it is, from 0 on, in the order in which they first appear.
    """
    last: dict[int, tuple[tuple, np.ndarray]] = {}
    numbers = []
    for faces in frames:
        pairs = sorted((unlikeness(face, other), i, k) for i, face in enumerate(faces) for k, other in last.items())
        given: dict[int, int] = {}
        for cost, i, k in pairs:
            if cost < np.inf and i not in given and k not in given.values():
                given[i] = k
        for i in range(len(faces)):
            given.setdefault(i, max([-1, *last, *given.values()]) + 1)
        last |= {given[i]: face for i, face in enumerate(faces)}
        numbers.append([given[i] for i in range(len(faces))])
    return numbers


def unlikeness(face: tuple, other: tuple) -> float:
    """Of two faces in neighbouring frames: 0 where they are in one place, infinite where they cannot be one."""
    (box, points), (other_box, other_points) = face, other
    size = np.sqrt(np.ptp(points, axis=0).prod() * np.ptp(other_points, axis=0).prod()) ** 0.5
    distance = float(np.linalg.norm(points - other_points, axis=1).mean() / max(size, 1e-6))
    return distance if distance < NEAR or overlap(box, other_box) > OVERLAP else np.inf


def overlap(box: tuple | None, other: tuple | None) -> float:
    """Intersection over union."""
    if box is None or other is None:
        return 0.0
    sides = [min(box[k + 2], other[k + 2]) - max(box[k], other[k]) for k in (0, 1)]
    shared = max(0, sides[0]) * max(0, sides[1])
    both = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (box, other))
    return shared / max(both - shared, 1)
