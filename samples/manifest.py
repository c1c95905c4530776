"""A list of images instead of folders: a CSV with path, label and dataset, and whatever else is known of them.

    path,label,dataset,split,group,skin
    photos/0001.jpg,real,FFHQ,train,person 17,dark
    fakes/a.png,1,StyleGAN3,,,

split and group are optional, and may be empty in a row. Further columns are kept: `inference.py --by skin`.
"""

import csv
import functools
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

from faces.rejection import REJECTED_SUFFIX
from runtime.files import why_away
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
    sources, lines = [], {}
    real_folder = functools.cache(os.path.realpath)
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
                folder, name = os.path.split(data_root / source.path)
                file = real_folder(folder), name  # one, whatever its spelling
                if file in lines:
                    raise ValueError(f"{place}: {row['path']} is there already, in line {lines[file]}")
                lines[file] = rows.line_num
                sources.append(source)
    except (FileNotFoundError, IsADirectoryError) as error:
        if error.errno is None:  # of a row
            raise
        raise FileNotFoundError(
            f"{manifest}: {'is a folder, not a list' if manifest.is_dir() else 'no such list'}"
        ) from None
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
    path = shortened(path, data_root)
    if label not in LABELS:
        raise ValueError(f"{place}: the label is {label!r}, it has to be real or fake, 0 or 1")
    odd = len(dataset.encode()) > 255 or any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in dataset)
    if not dataset or odd or dataset[0] == "." or set("/\\") & set(dataset) or dataset.endswith(REJECTED_SUFFIX):
        raise ValueError(f"{place}: the data set {dataset!r} cannot be the name of a folder of features; give another")
    split = (row.get("split") or "").strip()
    if split and split not in SPLITS:
        raise ValueError(f"{place}: the split is {split!r}, it has to be {', '.join(SPLITS)} or empty")
    group = (row.get("group") or "").strip() or None
    further = {name: " ".join(value.split()) for name, value in row.items() if name not in (*NEEDED, *OPTIONAL)}
    stat = state(data_root / path)
    if stat == (-1, -1) and (reason := why_away(data_root / path)):
        raise FileNotFoundError(f"{place}: {data_root / path}: {reason}")
    return Source(f"{LABELS[label]}/{dataset}", path, stat, split, group, json.dumps(further) if further else "")


def shortened(path: str, data_root: Path) -> str:
    """The same file's path: "a/../b" is "b", unless a is a link to elsewhere."""
    short = os.path.normpath(path)
    if ".." in Path(path).parts:
        one, other = (os.path.realpath(os.path.dirname(data_root / spelling)) for spelling in (path, short))
        return short if one == other else path
    return short
