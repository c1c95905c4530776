"""Scores pictures of any kind: finds the faces in each, brings them into the frame of the training images, asks the model.

    pictures  ->  a row for each face, or for each picture without one, in CSV or JSON lines

This is what `python inference.py --images` runs. A picture that is framed as the training images were, a face that fills it,
is taken whole, as feature_extraction.py takes it: it gets the score that it has by way of the features. Of any other picture,
each face is cut out with the margin that the training images have. Nothing is filled up: a cut that would reach over the
border is moved inside, or made smaller.
"""

import csv
import glob
import json
import math
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import draw_region_masks, face_size
from feature_extraction import FaceFinder, detect_face, find_predictor, predict_landmarks
from model import LAMMViT
from preprocess import NO_IMAGE_BY_NAME, Rejected, end_with, list_files, load_rgb, map_ahead

COLUMNS = ("path", "left", "top", "right", "bottom", "probability", "verdict", "face", "reason")
SEARCH_SIDE = 1600  # longer side of the copy in which the faces of a large picture are searched: those from a twentieth of it on
UPSAMPLED_SIDE = 800  # longer side of a picture that is doubled before the search
SMALLER = 0.75  # a face this much smaller than nearly all in training is cut out
NO_FACE = "no face found; --whole_image scores it all the same"


class Face(NamedTuple):
    """A face as the model sees it, and where it was."""

    box: tuple[int, int, int, int] | None  # left, top, right, bottom in pixels of the upright picture; None: no face, the whole picture
    image: np.ndarray  # (h, w, 3) uint8 RGB
    landmarks: np.ndarray  # (68, 2) in pixels of the image
    region_masks: np.ndarray  # (8, G, G)
    found_by: str  # one of dataset.FOUND_BY


class Framing(NamedTuple):
    """How the model wants its faces; from the checkpoint."""

    side: int  # of the model's input in pixels
    grid_size: int
    mask_style: str
    mean_landmarks: np.ndarray  # (68, 2) in pixels of the input
    smallest: np.ndarray  # (2,) of face_size, in pixels of the input
    whole_image: bool  # score pictures without a face


def framing_of(model: LAMMViT, checkpoint: dict, whole_image: bool) -> Framing:
    side = model.config.img_size
    mean, smallest = (checkpoint["framing"][name].double().numpy() * side for name in ("mean_landmarks", "smallest"))
    return Framing(side, model.config.grid_size, checkpoint["mask_style"], mean, smallest, whole_image)


# --------------------------------------------------------------------------------------------------------- faces of a picture


def find_faces(image: Image.Image, finder: FaceFinder, framing: Framing) -> list[Face]:
    """All faces of an upright RGB picture of any size, the largest first; of a picture framed as the training images, the one."""
    stored, detection = detect_face(image, finder, framing.side)
    unit = np.array(image.size) / framing.side  # pixels of the picture in one of the stored image
    if detection:
        landmarks = predict_landmarks(detection, finder)
        corners = np.array([(detection.box.left(), detection.box.top()), (detection.box.right(), detection.box.bottom())], float)
        box = as_box((detection.to_stored(corners) + 0.5) * unit, image.size)
        if (face_size(landmarks) >= SMALLER * framing.smallest).all():
            return [as_face(box, stored, landmarks, detection.found_by, framing)]
    faces = [cut_out(image, points, of_face, finder, framing) for points, of_face in search(image, finder)]
    if not faces and detection:
        faces = [cut_out(image, (landmarks + 0.5) * unit, box, finder, framing)]
    if not faces and framing.whole_image:
        faces = [as_face(None, stored, framing.mean_landmarks.astype(np.float32), "mean", framing)]
    return faces


def as_box(corners: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Two corners (2, 2) in pixels of a picture of this (width, height) -> whole pixels within it."""
    return tuple(np.clip(np.rint(corners), 0, size).astype(int).ravel().tolist())


def as_face(box: tuple | None, stored: np.ndarray, landmarks: np.ndarray, found_by: str, framing: Framing) -> Face:
    return Face(box, stored, landmarks, draw_region_masks(landmarks, stored.shape[:2], framing.grid_size, framing.mask_style), found_by)


def search(image: Image.Image, finder: FaceFinder) -> list[tuple[np.ndarray, tuple]]:
    """(landmarks (68, 2), box) of all faces in a picture, both in its pixels, the largest first."""
    copy = image.copy()
    copy.thumbnail((SEARCH_SIDE, SEARCH_SIDE))
    picture, unit = np.asarray(copy), np.array(image.size) / copy.size
    found = finder.detector(picture, int(max(copy.size) <= UPSAMPLED_SIDE)) or finder.detector(picture, 1)
    faces = []
    for box in sorted(found, key=lambda box: -box.area()):
        corners = np.array([(box.left(), box.top()), (box.right(), box.bottom())])
        faces.append(((finder.predict(picture, box) + 0.5) * unit, as_box((corners + 0.5) * unit, image.size)))
    return faces


def cut_out(image: Image.Image, landmarks: np.ndarray, box: tuple, finder: FaceFinder, framing: Framing) -> Face:
    """One face of a picture, with the margin around that the training images have. landmarks (68, 2) in pixels of the picture."""
    mean = framing.mean_landmarks + 0.5
    scale = math.sqrt((face_size(landmarks) ** 2).sum() / (face_size(mean) ** 2).sum())  # pixels of the picture in one of the input
    side = min(scale * framing.side, *image.size)
    corner = np.clip(landmarks.mean(axis=0) - mean.mean(axis=0) * side / framing.side, 0, np.array(image.size) - side)
    cut = image.resize((framing.side, framing.side), Image.Resampling.LANCZOS, box=(*corner, *(corner + side)))
    expected = (landmarks - corner) * framing.side / side - 0.5
    stored, detection = detect_face(cut, finder, framing.side)  # as for the features, so that the landmarks are of the same kind
    if detection:
        seen = predict_landmarks(detection, finder)
        if (np.abs(seen.mean(axis=0) - expected.mean(axis=0)) < face_size(expected)).all():  # this face, not its neighbour
            return as_face(box, stored, seen, detection.found_by, framing)
    return as_face(box, stored, expected.astype(np.float32), "original", framing)


# ------------------------------------------------------------------------------------------------------------ worker processes

_work: tuple[FaceFinder, Framing] | None = None  # of a worker process


def start_worker(predictor: Path, framing: Framing, parent: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    _work = FaceFinder(predictor), framing
    end_with(parent)


def faces_in_file(path: Path) -> list[Face] | str:
    """The faces of an image file, or the reason why there is none."""
    try:
        return find_faces(load_rgb(path), *_work) or NO_FACE
    except (Rejected, OSError) as reason:
        return str(reason)


# --------------------------------------------------------------------------------------------------------------- the pictures


def list_pictures(given: list[str]) -> Iterator[tuple[Path, str]]:
    """Each file that is meant by paths, folders (any depth) and patterns, once, and why it is no picture ("": it may be one)."""
    seen = set()
    for name in given:
        path = Path(name)
        if path.is_dir():
            images, others = list_files(path)
            files = sorted([(image, "") for image in images] + [(other, NO_IMAGE_BY_NAME) for other in others])
        elif not os.path.lexists(path) and glob.has_magic(name):
            matches = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
            files = [(Path(match), "") for match in matches] or [(path, "no such file")]
        else:
            files = [(path, "" if os.path.lexists(path) else "no such file")]
        for file, reason in files:
            if file not in seen:
                seen.add(file)
                yield file, reason


class Row(NamedTuple):
    """A row of the output: of a face, or of a file that got no score."""

    path: Path
    face: Face | None = None
    probability: float = math.nan
    verdict: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = dict.fromkeys(COLUMNS) | {"path": str(self.path), "reason": self.reason or None}
        if self.face:
            values |= dict(zip(("left", "top", "right", "bottom"), self.face.box or (None,) * 4))
            values |= {"probability": self.probability, "verdict": self.verdict, "face": self.face.found_by}
        return values


def score_pictures(model: LAMMViT, checkpoint: dict, pictures: list[tuple[Path, str]], args: Any) -> Iterator[Row]:
    """The rows of all pictures, in their order. Worker processes look for faces, a few pictures ahead of the model.

    Raises:
        BrokenProcessPool: a worker was killed, by the system when memory is short.
    """
    from inference import fake_probability

    framing, threshold = framing_of(model, checkpoint, args.whole_image), checkpoint["val_threshold"]
    workers = min(args.workers, max(1, len(pictures)))
    waiting: list[tuple[Path, Face | None, str]] = []

    def flush() -> Iterator[Row]:
        faces = [face for _, face, _ in waiting if face]
        scores = iter(())
        if faces:
            images = torch.from_numpy(np.stack([face.image for face in faces])).permute(0, 3, 1, 2)  # (B, h, w, 3) -> (B, 3, h, w)
            with torch.inference_mode():
                scores = iter(fake_probability(model, images, torch.from_numpy(np.stack([face.region_masks for face in faces]))).tolist())
        for path, face, reason in waiting:
            score = next(scores) if face else math.nan
            yield Row(path, face, score, ("fake" if score >= threshold else "real") if face else "", reason)
        waiting.clear()

    # Forked workers start at once and share what is loaded; they never use torch. macOS and Windows have to start them anew.
    method = "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"
    with ProcessPoolExecutor(workers, get_context(method), start_worker, (find_predictor(args.predictor), framing, os.getpid())) as pool:

        def found(picture: tuple[Path, str]) -> list[Face] | str:
            path, reason = picture
            return reason or pool.submit(faces_in_file, path).result()

        for (path, _), faces in zip(pictures, map_ahead(found, pictures, 2 * workers, ahead=4 * workers)):
            waiting += [(path, None, faces)] if isinstance(faces, str) else [(path, face, "") for face in faces]
            if len(waiting) >= args.batch_size:
                yield from flush()
        yield from flush()


def write_rows(rows: Iterator[Row], stream: Any, as_json: bool) -> Iterator[Row]:
    """Passes the rows on, each after it was written."""
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    if not as_json:
        writer.writeheader()
    for row in rows:
        values = row.as_dict()
        if as_json:
            stream.write(json.dumps(values) + "\n")
        else:
            writer.writerow(values)
        yield row


def score_images(model: LAMMViT, checkpoint: dict, args: Any) -> int:
    """Writes the rows to --output or to standard output, the summary to standard error. Returns how many files got no score.

    Raises:
        FileNotFoundError: there is not one file.
    """
    pictures = list(list_pictures(args.images))
    if not pictures:
        raise FileNotFoundError(f"{', '.join(args.images)}: no images there")
    counts = {"real": 0, "fake": 0, "": 0}
    stream = open(args.output, "w", newline="", encoding="utf-8", errors="surrogateescape") if args.output else sys.stdout
    as_json = args.output is not None and args.output.suffix in (".jsonl", ".json")
    done, names = None, Counter()
    try:
        with tqdm(total=len(pictures), unit="picture", disable=not sys.stderr.isatty() or (not args.output and sys.stdout.isatty())) as bar:
            for row in write_rows(score_pictures(model, checkpoint, pictures, args), stream, as_json):
                counts[row.verdict] += 1
                if row.path != done:  # rows come picture by picture
                    done = row.path
                    bar.update()
                    stream.flush()
                if args.explain and row.face:
                    names[row.path.name] += 1
                    name = f"{row.path.name}{f'_{names[row.path.name]}' if names[row.path.name] > 1 else ''}.png"
                    explain_face(model, row, checkpoint["val_threshold"], args.explain / name)
    finally:
        if args.output:
            stream.close()
    threshold = f"fake from {checkpoint['val_threshold']:.4f} on, the threshold chosen on validation"
    print(f"{len(pictures)} files: {counts['fake']} fake and {counts['real']} real faces, {counts['']} files without a score ({threshold})", file=sys.stderr)
    return counts[""]


def explain_face(model: LAMMViT, row: Row, threshold: float, path: Path) -> None:
    from explain import draw_explanation, explain

    face = row.face
    images, masks = torch.from_numpy(face.image.copy()).permute(2, 0, 1)[None], torch.from_numpy(face.region_masks)[None]
    title = f"{row.path.name}: {row.verdict}, P(fake) = {row.probability:.4f}, fake from {threshold:.4f} on"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_explanation(face.image, face.landmarks, explain(model, images, masks)[0], title, path)
