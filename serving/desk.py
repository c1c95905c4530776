"""Where pictures are handed in: what is taken, how many wait, and what is kept afterwards.

    a file  ->  Desk.judge  ->  Judged, or Refused with a sentence

The page and POST /score share one desk, and one detector that scores a picture at a time. Of a picture the faces alone
are kept, in memory, for as long as a click may ask why.
"""

import contextlib
import os
import secrets
import shutil
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
from PIL import Image

from evaluation.detector import Detector, Judged
from evaluation.pictures import Row
from faces.images import UNREADABLE, is_video
from faces.rejection import Rejected
from faces.videos import open_video

MEGABYTE = 2**20
MOST_MEGAPIXELS, MOST_OF_A_FRAME = 100, 40  # of a picture; of a frame of a video, of which 8K ones have 33
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # Pillow knows more, some with programs behind them
# How files of faces.images.VIDEO_EXTENSIONS begin: (offset, bytes). FFmpeg also opens lists of other files
VIDEO_STARTS = (
    *((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, b"\x1aE\xdf\xa3"),
    (8, b"AVI "),
    (0, b"GIF8"),
)
KEPT_FACES, KEPT_SECONDS = 512, 600  # at most so many, so long; a face is about 0.2 MB
MORE_ARRIVING = 8  # requests whose body is on its way, beside those that have a place
MOST_FILES = 50  # in one answer
# Of uploads that wait to be scored, as many bytes may lie on the disk as so many answers can be about
STORED_ANSWERS = 2
STALE_SECONDS = 600  # after which an upload that nobody asked about is thrown away

DAMAGED = "The file cannot be read as a picture: it is no JPEG, PNG, BMP or WebP, or it is damaged or cut off."

Result = TypeVar("Result")


class Refused(Exception):
    """A picture that is not taken. The message is a sentence for its sender.

    Args:
        status: of HTTP.
    """

    def __init__(self, sentence: str, status: int = 422):
        super().__init__(sentence)
        self.status = status


class Kept(NamedTuple):
    """A face about which one may still ask."""

    row: Row
    size: tuple[int, int] | None  # of the upright picture; None: of a video


class Desk:
    """
    Args:
        megabytes: of a file, at most.
        places: how many requests to /score are taken at a time, once they have arrived: one is scored, the others wait.
    """

    def __init__(self, detector: Detector, megabytes: int = 50, places: int = 8):
        self.detector, self.megabytes, self.places = detector, megabytes, places
        self._free = threading.BoundedSemaphore(places)
        self._free_arrivals = threading.BoundedSemaphore(places + MORE_ARRIVING)
        # In many threads, each with a heap of its own, the memory of large pictures would add up
        self._worker = ThreadPoolExecutor(1, "desk")
        self._kept: OrderedDict[str, tuple[float, list[Kept]]] = OrderedDict()  # by token: until when, faces
        self._lock = threading.Lock()

    @property
    def most_bytes(self) -> int:
        return self.megabytes * MEGABYTE

    @property
    def too_large(self) -> str:
        return f"The file is larger than {self.megabytes} MB, which is the most that is taken here."

    @contextlib.contextmanager
    def arrival(self) -> Iterator[None]:
        """From the first byte of a request to its answer: bounds what lies in memory and on the disk.

        Raises:
            Refused: too many are arriving.
        """
        with held(self._free_arrivals, "Too many pictures are arriving. Try again in a few seconds."):
            yield

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """For a picture that has arrived.

        Raises:
            Refused: all are taken.
        """
        with held(self._free, f"{self.places} pictures are waiting already. Try again in a few seconds."):
            yield

    def check_room(self, folder: Path) -> None:
        """For what is handed in on the page, and lies in a folder until it is scored or sweep removes it.

        Raises:
            Refused: as much lies there as the disk is given for: files, or bytes.
        """
        sizes = []
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):  # scored meanwhile
                    sizes.append(os.lstat(os.path.join(place, name)).st_size)
        files = MOST_FILES * (self.places + 1)  # of all who wait, and of whom it is the turn
        if len(sizes) >= files or sum(sizes) >= STORED_ANSWERS * MOST_FILES * self.most_bytes:
            raise Refused("Too many files are waiting here already. Try again in a minute.", 503)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Has something done with pictures: one after another, in the order of asking."""
        return self._worker.submit(function, *arguments).result()

    def judge(self, path: Path, name: str) -> Judged:
        """As Detector, for a file that a stranger sent. The rows have its own name instead of the path.

        Raises:
            Refused: it is too large, or nothing that could be scored.
        """
        self.run(self._check, path)
        judged = self.run(self.detector, path)
        faces, followed = ([row._replace(path=Path(name)) for row in rows] for rows in (judged.faces, judged.followed))
        return Judged(Path(name), faces, as_sentence(judged.reason), followed)

    def _check(self, path: Path) -> None:
        size = path.stat().st_size
        if not size:
            raise Refused("The file is empty.")
        if size > self.most_bytes:
            raise Refused(self.too_large, 413)
        if is_video(path):
            with open(path, "rb") as file:
                start = file.read(16)
            if not any(start.startswith(kind, offset) for offset, kind in VIDEO_STARTS):
                raise Refused("The file is called a video, but is none of MP4, MOV, MKV, WebM, AVI and GIF.")
            width, height = frame_size(path, start)
            if width * height > MOST_OF_A_FRAME * 1e6:
                raise Refused(
                    f"The frames of the video have {width * height / 1e6:.0f} megapixels, more than the"
                    f" {MOST_OF_A_FRAME} that are taken here.",
                    413,
                )
            return
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        except (*UNREADABLE, MemoryError) as error:
            if isinstance(error, Image.DecompressionBombError):
                raise Refused(f"The picture has more than {MOST_MEGAPIXELS} megapixels: too many.", 413) from error
            raise Refused(DAMAGED) from error
        if width * height > MOST_MEGAPIXELS * 1e6:
            raise Refused(
                f"The picture has {width * height / 1e6:.0f} megapixels, more than the {MOST_MEGAPIXELS} that are"
                " taken here.",
                413,
            )

    def keep(self, faces: Sequence[Kept]) -> str:
        """Keeps the faces of an answer for KEPT_SECONDS, or until there are too many. Returns what take asks for."""
        token, now = secrets.token_urlsafe(16), time.monotonic()
        with self._lock:
            self._kept[token] = now + KEPT_SECONDS, list(faces)[:KEPT_FACES]
            self._forget(now)
        return token

    def take(self, token: str, number: int) -> Kept:
        """
        Raises:
            Refused: it is no longer there.
        """
        with self._lock:
            self._forget(time.monotonic())
            _, faces = self._kept.get(token, (0, []))
        if not 0 <= number < len(faces):
            raise Refused(
                f"This face is no longer here: faces are kept for {KEPT_SECONDS // 60} minutes. Hand the picture in"
                " again.",
                404,
            )
        return faces[number]

    def forget_old(self) -> None:
        with self._lock:
            self._forget(time.monotonic())

    def _forget(self, now: float) -> None:
        count = sum(len(faces) for _, faces in self._kept.values())
        while self._kept:
            until, faces = next(iter(self._kept.values()))  # the oldest
            if until > now and count <= KEPT_FACES:
                break
            self._kept.popitem(last=False)
            count -= len(faces)


@contextlib.contextmanager
def held(free: threading.BoundedSemaphore, sentence: str) -> Iterator[None]:
    if not free.acquire(blocking=False):
        raise Refused(sentence, 503)
    try:
        yield
    finally:
        free.release()


def frame_size(path: Path, start: bytes) -> tuple[int, int]:
    """The (width, height) of a video's frames, by what it says of itself; (0, 0) where it cannot be opened, and has no
    score either.

    Args:
        start: its first bytes. Of a GIF they are enough: FFmpeg decodes a frame of it only to open it.
    """
    if start.startswith(b"GIF8"):
        return struct.unpack_from("<HH", start.ljust(10, b"\0"), 6)
    try:
        capture = open_video(path)
    except Rejected:
        return 0, 0
    return int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))


def rows_of(judged: Judged) -> list[Row]:
    """All that inference.py --images writes of a file."""
    return [*judged.faces, *judged.followed] or [Row(judged.path, reason=judged.reason)]


def as_text(name: str) -> str:
    """A stranger's name of a file, without the halves of characters that no answer can be written with."""
    return name.encode("utf-8", "replace").decode()


def as_sentence(reason: str) -> str:
    """A reason of a row, for people who have not called inference.py."""
    if not reason:
        return ""
    if reason.startswith("no face found"):
        return "No face was found in it."
    if reason.startswith("cannot be read as an image"):  # and what Pillow said of it
        return DAMAGED
    text = reason if reason.startswith(("no ", "could ")) else f"The file {reason}"
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def sweep(folder: Path, seconds: float = STALE_SECONDS) -> None:
    """Removes what has lain in the folder for longer: uploads whose sender went away."""
    latest = time.time() - seconds
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < latest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
