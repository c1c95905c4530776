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
    """So many frames, at the middles of equal parts of the video's time; all of a shorter one. One is held at a time.

    Of a file that is cut off, of what can be decoded. Numbers count frames; where they are so far apart that those
    between are not read, they count at the mean rate.

    Raises:
        Rejected: none can.
    """
    capture = open_video(path)
    total, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    near_the_end = (total - 1 - min(total // 20, 300)) / rate if total > 0 and rate > 0 else -1
    if near_the_end < 0 or not is_near(seek(capture, near_the_end), near_the_end, rate):
        total, rate = count_frames(path, rate)  # cut off, or it does not say how long it is, or wrongly
    if not total:
        raise Rejected(NO_FRAME)
    numbers = sorted({int((i + 0.5) * total / count) for i in range(count)})
    found = seek_frames if total > STEP * count else read_all if len(numbers) == total else read_on
    given = False
    for number, capture in found(path, numbers, rate):
        decoded, pixels = capture.retrieve()
        if not decoded:
            continue
        image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))  # BGR -> RGB
        image.info = {ORIGINAL: f"{path.suffix[1:].upper()} {image.width}x{image.height}", TREATMENT: ""}
        given = True
        yield Frame(number, round(seconds_of(capture) or number / rate, 3), image)
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


def seek(capture: cv2.VideoCapture, seconds: float) -> float | None:
    """Grabs a frame of that time, at the mean rate. Returns when it is shown, None where there is none."""
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * seconds)
    return seconds_of(capture) if capture.grab() else None


def is_near(seconds: float | None, wanted: float, rate: float) -> bool:
    return seconds is not None and abs(seconds - wanted) <= max(0.5, 2 / rate)


def read_all(path: Path, numbers: list[int], rate: float) -> Iterator[tuple[int, cv2.VideoCapture]]:
    """Each frame, grabbed: the numbers are all from 0 on."""
    capture = open_video(path)
    for number in numbers:
        if not capture.grab():
            return
        yield number, capture


def read_on(path: Path, numbers: list[int], rate: float, after: float = -1.0) -> Iterator[tuple[int, cv2.VideoCapture]]:
    """The first frame at the time of each of these, grabbed, by reading all before it; no frame twice.

    Args:
        after: seconds; nothing up to there.
    """
    capture, position, last = open_video(path), -1, after
    for number in numbers:
        wanted = (number - 0.5) / rate
        while last < wanted:
            if not capture.grab():
                return
            position += 1
            last = max(last, seconds_of(capture) or position / rate)
            if last >= wanted:
                yield position, capture


def seek_frames(path: Path, numbers: list[int], rate: float) -> Iterator[tuple[int, cv2.VideoCapture]]:
    """Frames at these times, grabbed; those between are not read. Each is later than the one before.

    A frame of another time shows that the rate changes, or that the file is broken there. Then all is read, as far as
    that goes.
    """
    capture, last, has_read = open_video(path), -1.0, False
    for i, number in enumerate(numbers):
        if (number - 0.5) / rate <= last:  # has been read
            continue
        seconds = seek(capture, number / rate)
        if not has_read and seconds is not None and not is_near(seconds, number / rate, rate):
            has_read = True
            for _, reading in read_on(path, numbers[i:], rate, after=last):
                last = seconds_of(reading)
                yield round(last * rate), reading
        elif seconds is not None and seconds > last:
            last = seconds
            yield number, capture


def count_frames(path: Path, rate: float) -> tuple[int, float]:
    """How many frames can be read, by reading them, and how many a second they are."""
    capture, found, last = open_video(path), 0, 0.0
    while found < MOST_FRAMES and capture.grab():
        found += 1
        last = seconds_of(capture)
    return found, (found - 1) / last if last > 0 else max(rate, 1.0)


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
