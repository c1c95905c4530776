"""An answer as HTML: the picture with its faces boxed, the verdicts, the table as CSV. Nothing of it is on the disk.

All pictures are in the page itself, as data: addresses. Names of files are a stranger's text, and escaped.
"""

import base64
import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from evaluation.detector import Judged
from evaluation.operating import VERDICTS, describe_verdict
from evaluation.pictures import COLUMNS, Row
from faces.images import ORIENTATION, UNREADABLE, is_video, turn_upright
from serving.desk import Kept, rows_of

SHOWN_SIDE = 1200  # of a picture in the page, in pixels
FACE_SIDE = 96  # of a face beside its verdict
FILL_COLOUR = (230, 0, 150)
HOW_FRAMED = {
    "whole": "the picture was taken whole",
    "cut": "cut out of the picture",
    "aligned": "turned upright and cut out",
}


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return data_url(stream.getvalue(), "image/jpeg")


def png_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return data_url(stream.getvalue(), "image/png")


def small_picture(path: Path) -> tuple[str, tuple[int, int]] | None:
    """A copy for the page and the (width, height) of the upright original; None where it is no picture of one piece."""
    if is_video(path):
        return None
    try:
        with Image.open(path) as file:
            size = file.size
            if file.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
                size = size[::-1]
            file.draft("RGB", (SHOWN_SIDE, SHOWN_SIDE))  # a large JPEG is decoded at a fraction of its size
            image = turn_upright(file)
            image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            if image.has_transparency_data:
                glass = image.convert("RGBA")
                image = Image.new("RGBA", image.size, "white")
                image.alpha_composite(glass)
            return jpeg_url(image.convert("RGB")), size
    except UNREADABLE:
        return None


def chance(row: Row) -> str:
    """The probability, with no more certainty than four digits have."""
    bounded = min(max(row.probability, 0.0001), 0.9999)
    sign = "over " if row.probability > 0.99995 else "under " if row.probability < 0.00005 else ""
    return f"P(fake)\N{NO-BREAK SPACE}{sign}{bounded:.4f}"


def as_csv(answers: Sequence[Judged]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for judged in answers for row in rows_of(judged))
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------- the page


def show_picture(
    judged: Judged,
    picture: tuple[str, tuple[int, int]] | None,
    token: str,
    first: int,
    thresholds: Mapping[str, float],
) -> str:
    """One file of an answer.

    Args:
        picture: of small_picture.
        token, first: of desk.keep, and the number there of the file's first face: what a click asks for.
        thresholds: by which the verdicts came about.
    """
    name = escape(judged.path.name)
    asked = [f"{token}:{first + i}" for i in range(len(judged.faces))]
    parts = [f'<h3 class="name">{name}</h3>']
    if judged.reason:
        parts.append(f'<p class="refused">{escape(judged.reason)}</p>')
    if picture:
        source, size = picture
        boxes = "".join(show_box(row, i, asked[i], size) for i, row in enumerate(judged.faces) if row.face.box)
        parts.append(f'<div class="frame"><img src="{source}" alt="{name}">{boxes}</div>')
    for row in judged.followed:
        spread = f" ± {row.spread:.4f}" if row.frames > 1 else ""
        parts.append(
            f'<p class="followed {row.verdict}">Face {row.number}, in {row.frames} frames:'
            f" <strong>{row.verdict}</strong>, in the mean {chance(row)}{spread}"
            f" ({describe_verdict(row.verdict, thresholds)})</p>"
        )
    parts.append('<ul class="faces">')
    parts += [show_face(row, i, asked[i], thresholds) for i, row in enumerate(judged.faces)]
    return f'<section class="picture">{"".join(parts)}</ul></section>'


def show_box(row: Row, i: int, asked: str, size: tuple[int, int]) -> str:
    """A button around a face, with its verdict."""
    left, top, right, bottom = row.face.box
    x, y, w, h = left / size[0], top / size[1], (right - left) / size[0], (bottom - top) / size[1]
    sides = ("inside " if y < 0.08 else "") + ("rightwards" if x < 0.5 else "leftwards")
    return (
        f'<button type="button" class="box {row.verdict} {sides}" data-ask="{asked}"'
        f' style="left:{100 * x:.2f}%;top:{100 * y:.2f}%;width:{100 * w:.2f}%;height:{100 * h:.2f}%"'
        f' aria-label="Face {i + 1}: {row.verdict}, {chance(row)}. Why?">'
        f"<span>{i + 1}<b> {row.verdict}</b><i> {chance(row)}</i></span></button>"
    )


def show_face(row: Row, i: int, asked: str, thresholds: Mapping[str, float]) -> str:
    face = row.face
    crop = Image.fromarray(face.image).resize((FACE_SIDE, FACE_SIDE))
    notes = [HOW_FRAMED[face.framing]]
    if face.seconds is not None:
        notes = [f"face {face.number} at {face.seconds:.1f} s"]
    if face.filled:
        notes.append(f"{100 * face.filled:.0f} % of the cut lies beyond the picture, and was filled")
    return (
        f'<li class="{row.verdict}"><img src="{jpeg_url(crop)}" alt="" width="{FACE_SIDE}" height="{FACE_SIDE}">'
        f'<div><strong>{i + 1} {row.verdict}</strong> <span class="share">{chance(row)}</span>'
        f"<small>{describe_verdict(row.verdict, thresholds)}; {'; '.join(notes)}</small></div>"
        f'<button type="button" class="why" data-ask="{asked}">Why?</button></li>'
    )


def show_answer(answers: Sequence[Judged], sections: Sequence[str], legend: str) -> str:
    """All of it, a sentence about it, and the table."""
    table = data_url(as_csv(answers).encode("utf-8", "surrogateescape"), "text/csv")
    counts = Counter(row.verdict for judged in answers for row in judged.followed or judged.faces)
    faces = counts.total()
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    summary = f"{faces} face{'s' if faces != 1 else ''}: {verdicts}" if faces else "No face has a score"
    return (
        f'<div class="answer"><p class="summary" role="status">{summary}. '
        f'<a download="faces.csv" href="{table}">The table (CSV)</a></p>'
        f'{"".join(sections)}<p class="legend">{escape(legend)}</p></div>'
    )


def show_refusal(sentence: str) -> str:
    return f'<div class="answer"><p class="refused" role="alert">{escape(sentence)}</p></div>'


def show_examples(pictures: Sequence[tuple[str, Path]]) -> str:
    """Buttons with drawn faces, each (what it is, its file)."""
    buttons = []
    for i, (title, path) in enumerate(pictures):
        with Image.open(path) as image:
            source = jpeg_url(image.convert("RGB").resize((FACE_SIDE, FACE_SIDE)))
        buttons.append(
            f'<button type="button" data-ask="{i}"><img src="{source}" alt="" width="{FACE_SIDE}"'
            f' height="{FACE_SIDE}"><span>{escape(title)}</span></button>'
        )
    return f'<p>Examples: drawn faces, none is of a person.</p><div class="examples">{"".join(buttons)}</div>'


# ------------------------------------------------------------------------------------------------------- an explanation


def show_explanation(kept: Kept, drawn: Image.Image) -> str:
    """The picture of Detector.explain, and what of the face was filled."""
    row, filled = kept.row, ""
    if row.face.filled:
        text = f"{100 * row.face.filled:.0f} % of the cut lies beyond the border of the picture, and was filled."
        marked = mark_filled(kept)
        image = f'<img src="{png_url(marked)}" alt="the filled part, tinted" width="192">' if marked else ""
        where = ": tinted." if image else "."
        filled = f'<div class="filled">{image}<p><strong>What was filled</strong>{where} {text}</p></div>'
    else:
        filled = "<p>Nothing was filled: all that the model saw is in the picture.</p>"
    return (
        f'<div class="explanation"><h3>Why {row.verdict}, {chance(row)}:'
        f" {escape(row.path.name)}</h3>"
        f'<div class="wide" tabindex="0"><img src="{png_url(drawn)}" alt="The face with its eight regions, the'
        ' attention over it, and the weight of each head in each layer"></div>'
        f"{filled}<p>A hint at where the model looked, and no proof: a bright patch is no fault in it.</p></div>"
    )


def mark_filled(kept: Kept) -> Image.Image | None:
    """The face as the model saw it, tinted where its square lies beyond the border of the picture."""
    face, size = kept.row.face, kept.size
    if face.place is None or size is None:
        return None
    to_picture, _ = cv2.estimateAffinePartial2D(face.landmarks.astype(np.float64), face.place.astype(np.float64))
    if to_picture is None:
        return None
    side = face.image.shape[0]
    y, x = np.mgrid[:side, : face.image.shape[1]]
    places = np.stack([x, y, np.ones_like(x)], axis=-1) @ to_picture.T  # (h, w, 2) in pixels of the picture
    beyond = ((places < 0) | (places > np.array(size))).any(axis=-1)
    image = face.image.astype(np.float32)
    image[beyond] = 0.55 * image[beyond] + 0.45 * np.array(FILL_COLOUR, np.float32)
    return Image.fromarray(image.astype(np.uint8))
