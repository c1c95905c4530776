"""Loose pictures to rows: each face's probability of a fake and verdict, or the reason why a file has none.

    pictures  ->  a row for each face, or for each picture without one, in CSV or JSON lines

This is what `python inference.py --images` runs. faces/loose.py finds the faces and frames them.
"""

import csv
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluation.operating import FAKE, REAL, UNCERTAIN, describe_rates, describe_thresholds, thresholds_of, verdict_of
from evaluation.scoring import fake_probability
from faces.finder import finder_files
from faces.loose import Face, Framing, faces_in_file, list_pictures
from faces.workers import face_workers
from model import LAMMViT
from runtime.files import free_path
from runtime.processes import map_ahead
from runtime.weights_file import is_shipped, shown_card

COLUMNS = (
    "path",
    "frame",
    "seconds",
    "number",
    "left",
    "top",
    "right",
    "bottom",
    "probability",
    "verdict",
    "face",
    "framing",
    "filled",
    "frames",
    "spread",
    "explanation",
    "reason",
)
BATCH_SIZE = 64  # of inference.py's --batch_size, and where none is given


def framing_of(model: LAMMViT, checkpoint: dict, whole_image: bool) -> Framing:
    side = model.config.img_size
    mean, usual = (checkpoint["framing"][name].cpu().double().numpy() for name in ("mean_landmarks", "usual"))
    return Framing(
        side,
        model.config.grid_size,
        checkpoint["mask_style"],
        mean * side,
        usual,
        whole_image,
        checkpoint["framing"]["treatment"],
    )


class Row(NamedTuple):
    """A row of the output: of a face, or of a file that got no score."""

    path: Path | None  # None: it was in memory
    face: Face | None = None
    probability: float = math.nan
    verdict: str = ""
    reason: str = ""
    explanation: str = ""  # file of --explain
    # Of a face that was followed through a video, in the row of all its frames
    number: int | None = None
    frames: int | None = None  # in how many it was
    spread: float | None = None  # standard deviation of its probabilities

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = dict.fromkeys(COLUMNS) | {
            "path": None if self.path is None else str(self.path),
            "probability": None if math.isnan(self.probability) else self.probability,
            "verdict": self.verdict or None,
            "number": self.number,
            "frames": self.frames,
            "spread": self.spread,
            "reason": self.reason or None,
            "explanation": self.explanation or None,
        }
        if self.face:
            values |= dict(zip(("left", "top", "right", "bottom"), self.face.box or (None,) * 4))
            values |= {
                "frame": self.face.frame,
                "seconds": self.face.seconds,
                "number": self.face.number,
                "face": self.face.found_by,
                "framing": self.face.framing,
                "filled": self.face.filled,
            }
        return values


def score_pictures(model: LAMMViT, checkpoint: dict, pictures: list[tuple[Path, str]], args: Any) -> Iterator[Row]:
    """The rows of all pictures, in their order, without verdicts. Worker processes look for faces, a few pictures ahead
    of the model.

    Raises:
        BrokenProcessPool: a worker was killed, by the system when memory is short.
    """
    framing = framing_of(model, checkpoint, args.whole_image)
    workers = min(args.workers, max(1, len(pictures)))
    # The workers never use torch, but what is on a GPU cannot be shared with them
    may_fork = not torch.cuda.is_initialized()
    with face_workers(finder_files(args.predictor, not args.without_cnn), workers, may_fork) as pool:

        def found(picture: tuple[Path, str]) -> list[Face] | str:
            path, reason = picture
            return reason or pool.submit(faces_in_file, path, framing, args.frames).result()

        faces = map_ahead(found, pictures, 2 * workers, ahead=4 * workers)
        yield from score_faces(model, zip((path for path, _ in pictures), faces), args.batch_size)


def score_faces(
    model: LAMMViT, found: Iterable[tuple[Path, list[Face] | str]], batch_size: int = BATCH_SIZE
) -> Iterator[Row]:
    """The rows of pictures, in their order, without verdicts. So many rows, or a few more, go into a batch.

    Args:
        found: of each picture its path and what faces.loose.faces_in_file gives.
    """
    waiting: list[tuple[Path, Face | None, str]] = []

    def flush() -> Iterator[Row]:
        scores = iter(probabilities_of(model, [face for _, face, _ in waiting if face]))
        for path, face, reason in waiting:
            yield Row(path, face, next(scores) if face else math.nan, reason=reason)
        waiting.clear()

    for path, faces in found:
        waiting += [(path, None, faces)] if isinstance(faces, str) else [(path, face, "") for face in faces]
        if len(waiting) >= batch_size:
            yield from flush()
    yield from flush()


def probabilities_of(model: LAMMViT, faces: list[Face]) -> list[float]:
    if not faces:
        return []
    images = torch.from_numpy(np.stack([face.image for face in faces])).permute(0, 3, 1, 2)  # -> (B, 3, h, w)
    with torch.inference_mode():
        masks = torch.from_numpy(np.stack([face.region_masks for face in faces]))
        return fake_probability(model, images, masks).tolist()


def with_verdicts(rows: Iterator[Row], thresholds: dict[str, float]) -> Iterator[Row]:
    """Rows that have a score get their verdict by these thresholds of operating.thresholds_of."""
    for row in rows:
        yield row if math.isnan(row.probability) else row._replace(verdict=verdict_of(row.probability, thresholds))


def with_summaries(rows: Iterator[Row]) -> Iterator[Row]:
    """After the rows of a video one for each face that was followed in it: the mean over its frames."""
    scores: dict[int, list[float]] = {}
    path = None

    def summaries() -> Iterator[Row]:
        for number, of_face in sorted(scores.items()):
            mean, spread = float(np.mean(of_face)), float(np.std(of_face))
            yield Row(path, None, mean, number=number, frames=len(of_face), spread=spread)
        scores.clear()

    for row in rows:
        if row.path != path:
            yield from summaries()
            path = row.path
        if row.face and row.face.number is not None:
            scores.setdefault(row.face.number, []).append(row.probability)
        yield row
    yield from summaries()


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
    """Writes the rows to --output or to standard output, the summary to standard error. Returns how many files got no
    score.

    Raises:
        FileNotFoundError: there is not one file.
        ValueError: nowhere to write the rows to; no threshold for --fpr.
    """
    thresholds = thresholds_of(checkpoint, args.fpr, args.checkpoint)
    pictures = list(list_pictures(args.images))
    if not pictures:
        raise FileNotFoundError(f"{', '.join(args.images)}: no images there")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        stream = open(args.output, "w", newline="", encoding="utf-8", errors="surrogateescape")
    elif sys.stdout is None:
        raise ValueError("there is no standard output for the rows; name a file with --output")
    else:
        stream = sys.stdout
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")  # a path is written with the bytes that it has
    if args.explain:
        args.explain.mkdir(parents=True, exist_ok=True)
    counts, last = Counter(), None
    rows = with_verdicts(with_summaries(score_pictures(model, checkpoint, pictures, args)), thresholds)
    if args.explain:
        rows = explain_rows(model, thresholds, rows, args.explain)
    try:
        with tqdm(
            total=len(pictures),
            unit="picture",
            disable=not sys.stderr.isatty() or (not args.output and sys.stdout.isatty()),
        ) as bar:
            for row in write_rows(rows, stream, args.format == "jsonl"):
                if row.frames is None:
                    counts[row.verdict] += 1
                if row.path != last:  # rows come picture by picture
                    last = row.path
                    bar.update()
                    stream.flush()
    finally:
        if args.output:
            stream.close()
    caution = f". A score is no proof: see {shown_card()}" if is_shipped(args.checkpoint) else ""
    print(
        f"files: {len(pictures)}, without a score: {counts['']}; faces: {counts[FAKE]} fake, {counts[REAL]} real,"
        f" {counts[UNCERTAIN]} uncertain ({describe_thresholds(thresholds)}: {describe_rates(thresholds)}){caution}",
        file=sys.stderr,
    )
    return counts[""]


def explain_rows(model: LAMMViT, thresholds: dict[str, float], rows: Iterator[Row], folder: Path) -> Iterator[Row]:
    """Draws a picture for each face and passes the rows on, with its name. A picture that cannot be written ends
    nothing.
    """
    times, taken = Counter(), set()
    for row in rows:
        if row.face:
            name = os.fsencode(row.path.name).decode("utf-8", "replace")[:80]
            times[name] += 1  # where to begin, lest the thousandth face of one name try all numbers before
            path = free_path(folder, name, ".png", taken.__contains__, first=times[name])
            taken.add(path)
            try:
                explain_row(model, thresholds, row, path)
                row = row._replace(explanation=str(path))
            except OSError as error:
                print(f"WARNING: {path}: not written ({error})", file=sys.stderr)
        yield row


def explain_row(model: LAMMViT, thresholds: dict[str, float], row: Row, target: Path | BinaryIO) -> None:
    """Draws the picture of a row that has a face, as a PNG."""
    from evaluation.explain import draw_explanation, explain  # matplotlib, where it is needed

    face = row.face
    images, masks = (
        torch.from_numpy(face.image.copy()).permute(2, 0, 1)[None],
        torch.from_numpy(face.region_masks)[None],
    )
    doubt = ", mean landmarks: dlib found none" if face.found_by == "mean" else ""
    name = f"{row.path.name}: " if row.path else ""
    verdict = f"{row.verdict}, P(fake) = {row.probability:.4f}, {describe_thresholds(thresholds)}"
    landmarks = face.landmarks if model.config.uses_masks else None
    draw_explanation(face.image, landmarks, explain(model, images, masks)[0], f"{name}{verdict}{doubt}", target)
