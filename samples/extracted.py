"""What has been extracted so far: the feature files of earlier runs, the shards of one that was stopped, and how a
run's feature files appear all at once.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from faces.images import STALE
from samples.feature_files import SPLITS, FeatureFileError, checksum, open_features
from samples.sources import Source

# Folders below output_dir while a run goes on: extracted images, finished feature files
SHARDS, STAGE = ".shards", ".complete"
CHECKSUM = "checksum"  # of a shard: an attribute
SKIPPED = "skipped.csv"  # in output_dir: files that were not used, with the reason


class Plan(NamedTuple):
    sources: list[Source]
    others: list[Path]  # files that are no images by their names
    settings: dict  # all that an extracted image depends on, beside its file
    fingerprint: str  # of everything that the feature files depend on
    published: bool  # the feature files are there
    missing: list[Source]  # to be extracted


class Extracted(NamedTuple):
    """What of the images has been extracted already, in the feature files or in shards of a run that was stopped."""

    files: list[Path]
    rows: np.ndarray  # (N,) of each image, counted through all files; -1 where there is none
    held: set[str]  # paths of all images in the feature files, changed and removed ones too
    unused: list[str]  # files with nothing that can be used, and why


def check_shard(path: Path, file: h5py.File) -> None:
    """
    Raises:
        FeatureFileError: it is not what was written.
    """
    stored = zip(file["images"], file["sha256"][:])
    if file.attrs.get(CHECKSUM) != checksum(file) or any(
        hashlib.sha256(image).digest() != known.tobytes() for image, known in stored
    ):
        raise FeatureFileError(f"{path}: damaged, as a power cut leaves it")


def find_extracted(sources: list[Source], output_dir: Path, settings: dict, check: bool = False) -> Extracted:
    """
    Args:
        check: looks whether shards are what was written, for which it reads all of them.

    Raises:
        FeatureFileError: the feature files are of other settings.
    """
    number = {source.path: i for i, source in enumerate(sources)}
    rows, files, end, held, unused = np.full(len(sources), -1), [], 0, set(), []
    for path in (*sorted(output_dir.glob("*/*/*_features.h5")), *sorted((output_dir / SHARDS).glob("*.h5"))):
        is_shard = path.parent.name == SHARDS
        try:
            with open_features(path) as file:
                there, stats = (
                    file["paths"].asstr("utf-8", "surrogateescape")[:].tolist(),
                    file.attrs["source_stats"].tolist(),
                )
                made_with = json.loads(file.attrs["settings"])
                if is_shard and check:
                    check_shard(path, file)
        except (FeatureFileError, KeyError) as error:  # cut off, or of an earlier version of this program
            unused.append(f"{path}: not used, its images are extracted anew ({error})")
            continue
        if made_with != settings:
            differs = ", ".join(
                f"{name} {made_with.get(name)}" for name in settings if made_with.get(name) != settings[name]
            )
            if is_shard:
                unused.append(f"{path}: not used, it is of a stopped run with {differs}")
                continue
            raise FeatureFileError(
                f"{path}: made with {differs}; name another --output_dir, or remove {output_dir} to make everything"
                " anew"
            )
        if not is_shard:
            held.update(there)
        for row, (name, stat) in enumerate(zip(there, stats)):
            i = number.get(name)
            if i is not None and tuple(stat) == sources[i].stat:
                rows[i] = end + row
        files.append(path)
        end += len(there)
    return Extracted(files, rows, held, unused)


def stale_rows(shard: Path) -> np.ndarray:
    """Which rows are aligned images that were changed since, so that their faces were searched again."""
    with open_features(shard) as file:
        return np.flatnonzero(file.attrs.get(STALE, ()))


def find_all_rows(plan: Plan, skipped: dict[str, str], output_dir: Path) -> tuple[list[Path], np.ndarray]:
    """Files and rows of find_extracted, once every image is there that was not skipped.

    A network file system may show other machines' shards late.

    Raises:
        FeatureFileError: some do not appear in two minutes.
    """
    for _ in range(60):
        files, rows, *_ = find_extracted(plan.sources, output_dir, plan.settings)
        lost = [source.path for source, row in zip(plan.sources, rows) if row < 0 and source.path not in skipped]
        if not lost:
            return files, rows
        time.sleep(2)
    raise FeatureFileError(
        f"{output_dir}: {len(lost)} extracted images do not appear in it, {lost[0]} for one; run the same command again"
    )


def mean_over(files: list[Path], rows: np.ndarray) -> np.ndarray | None:
    """The mean of the landmarks in these rows, counted through all files: (68, 2) float32, None of no rows.

    Summed in whole numbers: from run to run images lie in other files, and no order of them may show in the last bits.
    """
    unit = 2**16  # parts of a pixel
    rows, total, start = np.sort(rows), np.zeros((68, 2), np.int64), 0
    for path in files:
        with open_features(path) as file:
            end = start + len(file["labels"])
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            total += np.rint(file["landmarks"][:][chosen].astype(np.float64) * unit).astype(np.int64).sum(axis=0)
        start = end
    return (total / (unit * len(rows))).astype(np.float32) if len(rows) else None


# ---------------------------------------------------------------------------------------------------- giving them names


def feature_files(plan: Plan, folder: Path) -> list[tuple[Path, str, str]]:
    """(path, data set, split) of all feature files of a run."""
    data_sets = dict.fromkeys(source.data_set for source in plan.sources)
    return [(folder / data_set / f"{split}_features.h5", data_set, split) for data_set in data_sets for split in SPLITS]


def has_fingerprint(path: Path, fingerprint: str) -> bool:
    try:
        with open_features(path) as file:
            return file.attrs.get("fingerprint") == fingerprint
    except FeatureFileError:
        return False


def publish(plan: Plan, output_dir: Path) -> bool:
    """Gives the feature files their names, if all have been written; also those of a run that was stopped at just this.

    Returns:
        whether the feature files of this plan are there now.
    """
    pairs = [
        (staged, path)
        for (staged, *_), (path, *_) in zip(feature_files(plan, output_dir / STAGE), feature_files(plan, output_dir))
    ]
    staged_pairs = [(staged, path) for staged, path in pairs if has_fingerprint(staged, plan.fingerprint)]
    names = {path for _, path in staged_pairs}
    if not all(path in names or has_fingerprint(path, plan.fingerprint) for _, path in pairs):
        return False
    for staged, path in staged_pairs:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, path)
    return True
