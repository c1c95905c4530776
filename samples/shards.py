"""Images to shards: worker processes decode, find the face, predict its 68 landmarks, draw the masks.

A shard is a feature file of some images, of any data sets. A run that was stopped goes on with the images in none.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from faces.finder import FOUND_BY, Detection, FinderFiles, as_stored, detect_face, predict_landmarks
from faces.images import FILLED, FOUND, LANDMARKS, ORIGINAL, STALE, TREATMENT, load_noted, load_rgb, scaled_landmarks
from faces.regions import REGIONS, draw_region_masks
from faces.rejection import Rejected
from faces.workers import face_workers, load_finder, this_finder
from samples.extracted import CHECKSUM, SHARDS
from samples.feature_files import CLASSES, checksum, write_features
from samples.plan import sample_bytes
from samples.sources import Source, state

SHARD_SIZE = 128  # images between two points that a stopped run can go on from, fewer where memory is short
CHANGED = "was changed or away while it was to be read; run the same command again"  # a reason


class Known(NamedTuple):
    """A face that preprocess.py has found."""

    landmarks: np.ndarray  # (68, 2) float32 in pixels of the stored image
    found_by: str


class Look(NamedTuple):
    """An image as it is stored, and its face: where preprocess.py found it, else searched."""

    stored: np.ndarray  # (img_size, img_size, 3) uint8 RGB
    face: Known | Detection | None
    info: dict[str, object]  # of faces/images.py
    sha256: bytes  # of what is stored


def look_at(path: Path, img_size: int, search_again: bool) -> Look:
    """
    Raises:
        Rejected: no image.
    """
    size, noted = (img_size, img_size), None if search_again else load_noted(path)
    if noted and noted.pixels.shape[:2] == size:
        return Look(noted.pixels, Known(noted.info[LANDMARKS], noted.info[FOUND]), noted.info, noted.sha256)
    image = Image.fromarray(noted.pixels) if noted else load_rgb(path)
    info = noted.info if noted else image.info
    if search_again or LANDMARKS not in info:
        stored, face = detect_face(image, this_finder(), img_size)
    else:
        known = Known(scaled_landmarks(info[LANDMARKS], image.size, size), info[FOUND])
        stored, face = as_stored(image, img_size), known
    return Look(stored, face, info, hashlib.sha256(stored).digest())


def extract_shard(sources: list[Source], settings: dict, data_root: Path, output_dir: Path) -> dict[str, str]:
    """Writes one shard, a feature file whose samples without a face have NaN for landmarks.

    Returns:
        {path: reason} of the files that are no images, or changed meanwhile: not in the shard.
    """
    img_size, grid_size = settings["img_size"], settings["img_size"] // settings["patch_size"]
    images = np.empty((len(sources), img_size, img_size, 3), np.uint8)
    used, looks, skipped = [], [], {}
    for source in sources:
        try:
            look = look_at(data_root / source.path, img_size, settings["search_again"])
        except Rejected as reason:
            there = state(data_root / source.path) == source.stat
            skipped[source.path] = str(reason) if there else CHANGED
            continue
        images[len(used)] = look.stored
        used.append(source)
        looks.append(look._replace(stored=None))  # it is in images
    if not used:
        return skipped
    faces = [look.face for look in looks]
    # All predictions in a row: the predictor's 100 MB are slow to come back into the cache after each detection.
    landmarks = [
        np.full((68, 2), np.nan)
        if face is None
        else face.landmarks
        if isinstance(face, Known)
        else predict_landmarks(face, this_finder())
        for face in faces
    ]
    no_masks = np.zeros((len(REGIONS), grid_size, grid_size), np.float32)
    masks = [
        no_masks if face is None else draw_region_masks(points, (img_size, img_size), grid_size)
        for face, points in zip(faces, landmarks)
    ]
    images, found = images[: len(used)], {"landmarks": landmarks, "region_masks": masks}
    table = {
        "labels": [CLASSES.index(source.data_set.split("/")[0]) for source in used],
        "paths": [source.path.encode("utf-8", "surrogateescape") for source in used],
        "originals": [look.info[ORIGINAL] for look in looks],
        "treatments": [look.info[TREATMENT] for look in looks],
        "filled": [look.info.get(FILLED, 0.0) for look in looks],
        "about": [""] * len(used),  # may change without a new extraction: written with the feature files
        "found_by": [FOUND_BY.index("mean" if face is None else face.found_by) for face in faces],
        "sha256": [np.frombuffer(look.sha256, np.uint8) for look in looks],
    }
    name = hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()
    attributes = {
        "settings": json.dumps(settings),
        "source_stats": np.array([source.stat for source in used]),
        STALE: np.array([STALE in look.info for look in looks]),
    }
    # A run that was stopped may find that a power cut has left a part of this: the disk is not waited for
    attributes[CHECKSUM] = checksum(table | found)
    blocks = [found | {"images": images}]
    path = output_dir / SHARDS / f"{name}.h5"
    write_features(path, img_size, grid_size, attributes, table, blocks, sync=False)
    return skipped


def extract(
    sources: list[Source], settings: dict, files: FinderFiles, show: bool, args: argparse.Namespace
) -> dict[str, str]:
    """Makes shards of these images, in worker processes, or here if one is enough. Returns what extract_shard does."""
    skipped = {}
    if not sources:
        return skipped
    load_finder(files)
    cv2.setNumThreads(1)
    memory = psutil.virtual_memory().available // 10 // args.workers  # for the pixels of a shard
    size = int(np.clip(memory // sample_bytes(args), 1, SHARD_SIZE))
    count = -(-len(sources) // (size * args.workers)) * args.workers  # as many for each worker, all of one size
    shards = [sources[i * len(sources) // count : (i + 1) * len(sources) // count] for i in range(count)]
    shards = [shard for shard in shards if shard]

    def collect(results: Iterable[dict[str, str]]) -> None:
        with tqdm(total=len(sources), desc="faces", unit="image", smoothing=0.05, disable=not show) as bar:
            for shard, result in zip(shards, results):
                skipped.update(result)
                bar.update(len(shard))

    if args.workers == 1:
        collect(extract_shard(shard, settings, args.data_root, args.output_dir) for shard in shards)
        return skipped
    with face_workers(files, args.workers) as pool:
        futures = [pool.submit(extract_shard, shard, settings, args.data_root, args.output_dir) for shard in shards]
        collect(future.result() for future in futures)
    return skipped
