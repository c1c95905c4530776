"""A trained model that judges pictures, in one process: for programs of one's own, and for the page.

    Detector()("photo.jpg").faces[0].verdict        "fake", "real" or "uncertain"

Scores and reasons are those of `python inference.py --images`, by the same functions: faces/loose.py finds the faces
and frames them, evaluation/pictures.py has the rows.
"""

import io
import os
import threading
from collections.abc import Iterable
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.operating import thresholds_of, verdict_of
from evaluation.pictures import (
    Row,
    explain_row,
    framing_of,
    probabilities_of,
    score_faces,
    with_summaries,
    with_verdicts,
)
from faces.finder import FaceFinder, finder_files
from faces.loose import Face, faces_in_file
from runtime.arguments import naming_arguments
from runtime.checkpoint import load_checkpoint
from runtime.devices import pick_process_device
from runtime.weights_file import choose_checkpoint

Picture = str | os.PathLike | bytes | Image.Image
NO_COLLECTION = bytearray | memoryview | io.IOBase | np.ndarray  # one may iterate over them, but not over pictures


class Judged(NamedTuple):
    """What came of one picture or video."""

    path: Path | None  # None: it was in memory
    faces: list[
        Row
    ]  # each with face, probability, verdict; the framed one first, the others by size; of a video, by frame
    reason: str  # why there is none; "" where there are some
    followed: list[Row]  # of a video, for each face that was followed in it: the mean over its frames


class Detector:
    """A trained model that judges pictures in memory or on disk, the same as `inference.py --images`.

    Threads may share one: they take turns.

    Args:
        checkpoint: of train.py, export.py --weights or --hub. None: output_model/best_model.pth, else the weights that
            ship.
        device: "cpu", "cuda", "cuda:1", ...; "auto": the GPU where there is one.
        fpr: judge at this rate of false alarms alone: fake or real, nothing is uncertain.
        frames: of each video, evenly spread.
        whole_image: score pictures without a face, too, with mean landmarks.
        without_cnn: do not look with dlib's CNN for faces that its frontal detector misses.
        predictor: dlib's 68-point predictor, as for faces.finder.find_predictor.

    Raises:
        ValueError: no checkpoint, or one that cannot be used (CheckpointError); no threshold for fpr; frames under 1.
        TypeError: fpr is no number, checkpoint no path.
        FileNotFoundError: no predictor.
    """

    def __init__(
        self,
        checkpoint: Path | str | None = None,
        device: str = "auto",
        fpr: float | None = None,
        frames: int = 16,
        whole_image: bool = False,
        without_cnn: bool = False,
        predictor: Path | None = None,
    ):
        if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
            raise TypeError(f"checkpoint is {checkpoint!r}, but has to be a path, or None")
        if fpr is not None and not isinstance(fpr, Real):
            raise TypeError(f"fpr is {fpr!r}, but has to be a number such as 0.01, or None")
        if not isinstance(frames, Integral) or frames < 1:
            raise ValueError(f"frames is {frames!r}, but has to be a whole number from 1 on")
        with naming_arguments():
            self.path = choose_checkpoint(Path(checkpoint) if checkpoint is not None else None)
            self.model, self.checkpoint = load_checkpoint(self.path, pick_process_device(device))
            self.thresholds = thresholds_of(self.checkpoint, fpr, self.path)
            self._finder = FaceFinder(finder_files(predictor and Path(predictor), not without_cnn))
        self.framing = framing_of(self.model, self.checkpoint, whole_image)
        self.frames = frames
        self._lock = threading.Lock()  # dlib's detectors, and the hooks of explain

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Judged | list[Judged]:
        """One picture, or many: each the path of an image or a video, the bytes of an image file, or one of Pillow's.

        Returns:
            of one picture a Judged; of many a list of them, in their order. What cannot be read has its reason there.

        Raises:
            TypeError: something else than a picture.
        """
        if isinstance(pictures, Picture):
            return self([pictures])[0]
        if isinstance(pictures, NO_COLLECTION) or not isinstance(pictures, Iterable):
            raise TypeError(no_picture(pictures))
        sources = [as_source(picture) for picture in pictures]
        with self._lock:
            # The number of a picture is in the place of its path: one may be there twice, or have none
            found = ((number, self._search(source)) for number, source in enumerate(sources))
            rows = list(with_verdicts(with_summaries(score_faces(self.model, found)), self.thresholds))
        by_picture = (list(of_one) for _, of_one in groupby(rows, key=lambda row: row.path))
        return [as_judged(source, of_one) for source, of_one in zip(sources, by_picture)]

    def explain(self, face: Row | Face, path: Path | str | None = None) -> Image.Image:
        """The picture that --explain draws of a face: what the model looked at.

        Args:
            face: one of Judged.faces, or its `face` alone, which is scored again.
            path: also writes it there, a PNG.

        Raises:
            ValueError: a row without a face, as those of Judged.followed are.
            TypeError: no row and no face.
        """
        if not isinstance(face, Row | Face):
            raise TypeError(f"a face is one of Judged.faces, or its face, not {type(face).__name__}")
        stream = io.BytesIO()
        with self._lock:
            if isinstance(face, Face):
                (probability,) = probabilities_of(self.model, [face])
                face = Row(None, face, probability, verdict_of(probability, self.thresholds))
            if face.face is None:
                raise ValueError("this row has no face of which a picture could be drawn")
            explain_row(self.model, self.thresholds, face, stream)
        if path is not None:
            Path(path).write_bytes(stream.getvalue())
        return Image.open(stream).convert("RGB")

    def _search(self, source: Path | bytes | Image.Image) -> list[Face] | str:
        if isinstance(source, Path) and not os.path.lexists(source):
            return "no such file"
        return faces_in_file(source, self.framing, self.frames, self._finder)


def as_source(picture: Picture) -> Path | bytes | Image.Image:
    if isinstance(picture, bytes | Image.Image):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture)
    raise TypeError(no_picture(picture))


def no_picture(given: object) -> str:
    """What to give in its place. An array may be BGR, as OpenCV's are, or RGB: so none is taken."""
    way_out = "; PIL.Image.fromarray(array) makes one of RGB in uint8" if isinstance(given, np.ndarray) else ""
    return f"a picture is a path, the bytes of a file or an image of Pillow's, not {type(given).__name__}{way_out}"


def as_judged(source: Path | bytes | Image.Image, rows: list[Row]) -> Judged:
    path = source if isinstance(source, Path) else None
    rows = [row._replace(path=path) for row in rows]
    faces = [row for row in rows if row.face]
    return Judged(path, faces, "" if faces else rows[0].reason, [row for row in rows if row.frames is not None])
