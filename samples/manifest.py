"""A list of images instead of folders: a CSV with path, label and dataset, and whatever else is known of them.

    path,label,dataset,split,group,skin
    photos/0001.jpg,real,FFHQ,train,person 17,dark
    fakes/a.png,1,StyleGAN3,,,

split and group are optional, and may be empty in a row. Further columns are kept: `inference.py --by skin`.
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path

from faces.rejection import REJECTED_SUFFIX
from samples.feature_files import CLASSES, SPLITS
from samples.sources import Source, state

NEEDED = ("path", "label", "dataset")
OPTIONAL = ("split", "group")
LABELS = {"0": "real", "1": "fake", "real": "real", "fake": "fake"}


def read_manifest(manifest: Path, data_root: Path) -> list[Source]:
    """The images of a manifest, in the order in which they stand in folders: data sets, real first, then paths.

    Args:
        data_root: where relative paths begin.

    Raises:
        FileNotFoundError: no such manifest, or no such image.
        ValueError: a column is missing or a row cannot be meant so; the message names the line.
    """
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no such list")
    sources, lines = [], {}
    try:
        with open(manifest, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, strict=True)
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            if missing := [name for name in NEEDED if name not in (rows.fieldnames or ())]:
                raise ValueError(
                    f"{manifest}: has no column {', '.join(missing)}; its first line has to name"
                    f" {', '.join(NEEDED)}, and may name {', '.join(OPTIONAL)} and others"
                )
            if double := [name for name, count in Counter(rows.fieldnames).items() if count > 1]:
                raise ValueError(f"{manifest}: has two columns {double[0]}")
            for row in rows:
                place = f"{manifest}, line {rows.line_num}"
                source = read_row(row, data_root, place)
                if source.path in lines:
                    raise ValueError(f"{place}: {row['path']} is there already, in line {lines[source.path]}")
                lines[source.path] = rows.line_num
                sources.append(source)
    except csv.Error as error:
        place = f"{manifest}, after line {rows.line_num}"
        raise ValueError(f"{place}: not a table of comma-separated values ({error})") from error
    if not sources:
        raise ValueError(f"{manifest}: lists no images")
    return sorted(sources, key=lambda one: (CLASSES.index(one.data_set.split("/")[0]), one.data_set, Path(one.path)))


def read_row(row: dict, data_root: Path, place: str) -> Source:
    """place: of the row, for messages."""
    if None in row or None in row.values():
        raise ValueError(f"{place}: has more or fewer columns than the first line")
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: is not in UTF-8; save the list with this encoding") from None
    path, label, dataset = (row[name].strip() for name in NEEDED)
    if not path or "\0" in path:
        raise ValueError(f"{place}: {'the path holds a NUL' if path else 'without a path'}")
    path = one_spelling(path, data_root)
    if label not in LABELS:
        raise ValueError(f"{place}: the label is {label!r}, it has to be real or fake, 0 or 1")
    odd = not dataset.isprintable() or len(dataset.encode()) > 255
    if not dataset or odd or dataset[0] == "." or set("/\\") & set(dataset) or dataset.endswith(REJECTED_SUFFIX):
        raise ValueError(f"{place}: the data set {dataset!r} cannot be the name of a folder of features; give another")
    split = (row.get("split") or "").strip()
    if split and split not in SPLITS:
        raise ValueError(f"{place}: the split is {split!r}, it has to be {', '.join(SPLITS)} or empty")
    group = (row.get("group") or "").strip() or None
    further = {name: " ".join(value.split()) for name, value in row.items() if name not in (*NEEDED, *OPTIONAL)}
    stat = state(data_root / path)
    if stat == (-1, -1) and not os.path.exists(data_root / path):
        raise FileNotFoundError(f"{place}: {data_root / path}: no such file")
    return Source(f"{LABELS[label]}/{dataset}", path, stat, split, group, json.dumps(further) if further else "")


def one_spelling(path: str, data_root: Path) -> str:
    """The path below the data root, where it lies there; "a/../b" is "b", unless a is a link to elsewhere."""
    root = os.path.abspath(data_root)
    named = os.path.join(root, path)
    short = os.path.normpath(named)
    if os.path.realpath(named) != os.path.realpath(short):
        return path
    return os.path.relpath(short, root) if Path(short).is_relative_to(root) else os.path.normpath(path)
