"""Feature files and what is read from them: the HDF5 schema, the facial regions, their masks, the train-time transforms.

    features/<real|fake>/<Name>/{train,val,test}_features.h5  ->  samples for train.py and inference.py

This module is the one owner of
    the schema         write_features writes it, open_features checks it, FaceDataset reads it
    the region order   REGIONS and what a mirror does to it
    the masks          draw_region_masks, from 68 landmarks to (8, G, G)

Everything here is NumPy: feature_extraction.py runs many processes of it, and none of them has to load torch.

Coordinates are pixels of the stored image, x to the right and y down, with the centre of the first pixel at (0, 0).
"""

import errno
import mmap
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np

SCHEMA_VERSION = 4
SPARE = 4 * 2**20  # bytes on the disk for what HDF5 writes of itself
CLASSES = ("real", "fake")  # the label is the index
SPLITS = ("train", "val", "test")
FOUND_BY = ("frontal", "upsampled", "original", "padded", "mean")  # how a face was found, with growing effort; mean: not at all
MASK_STYLES = ("polygon", "gaussian")

# iBUG 300-W landmarks of each region, in the order of the file format. "Left" is the left of the image.
REGIONS: dict[str, tuple[int, ...]] = {
    "left_eye": tuple(range(36, 42)),
    "right_eye": tuple(range(42, 48)),
    "nose": tuple(range(27, 36)),
    "upper_lip": (*range(48, 55), *range(60, 65)),
    "lower_lip": (*range(54, 60), 48, 60, *range(64, 68)),
    "mouth_corners": (48, 54),
    "face_outline": tuple(range(17)),
    "eyebrows": tuple(range(17, 27)),
}

# Outlines to fill. Differs from the authors' code, which fills the landmarks in the order of their numbers: lips and
# eyebrows cross themselves there. Nose and eyebrows are convex hulls, their landmarks being lines, not outlines.
OUTLINES: dict[str, tuple[tuple[int, ...], ...]] = {
    "left_eye": (REGIONS["left_eye"],),
    "right_eye": (REGIONS["right_eye"],),
    "nose": (REGIONS["nose"],),
    "upper_lip": ((48, 49, 50, 51, 52, 53, 54, 64, 63, 62, 61, 60),),  # outer line to the right, inner line back
    "lower_lip": ((54, 55, 56, 57, 58, 59, 48, 60, 67, 66, 65, 64),),  # outer line to the left, inner line back
    "face_outline": (REGIONS["face_outline"],),
    "eyebrows": (tuple(range(17, 22)), tuple(range(22, 27))),
}
CONVEX_HULLS = ("nose", "eyebrows")

# Widths in units of the inter-ocular distance, so that masks scale with the face. Both chosen here: the paper gives none.
CORNER_RADIUS = 0.15  # disc around a corner of the mouth; polygon style
GAUSSIAN_SIGMA = 0.2  # gaussian style

# Landmark i of a mirrored face is landmark MIRROR_LANDMARKS[i] of the original: jaw, brows, nose, eyes, outer and inner lip.
MIRROR_LANDMARKS = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)
MIRROR_REGIONS = [1, 0, 2, 3, 4, 5, 6, 7]  # left and right eye change places

MAX_OPEN_FILES = 64  # of a FaceDataset at a time, two handles each; the system allows 1,024 a process, mostly


class FeatureFileError(ValueError):
    """A features folder or file that cannot be used. The message names it and the way out."""


# ---------------------------------------------------------------------------------------------------------------- masks


def draw_region_masks(landmarks: np.ndarray, image_size: tuple[int, int], grid_size: int, style: str = "polygon") -> np.ndarray:
    """The eight region masks of one face.

    Args:
        landmarks: (68, 2) x and y in pixels of the image; may lie outside of it.
        image_size: (h, w) of the image in pixels.
        grid_size: G, patches along a side.
        style: "polygon", filled areas as in the authors' code, or "gaussian", the continuous masks of the paper's text.

    Returns:
        (8, G, G) float32 in [0, 1], in the order of REGIONS, averaged over each patch's area.
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    if landmarks.shape != (68, 2) or not np.isfinite(landmarks).all():
        raise ValueError(f"landmarks have to be 68 finite points (68, 2), not {landmarks.shape}")
    if style not in MASK_STYLES:
        raise ValueError(f"mask style {style!r} is none of {', '.join(MASK_STYLES)}")
    eye_distance = np.linalg.norm(landmarks[36:42].mean(axis=0) - landmarks[42:48].mean(axis=0))
    draw = _draw_polygons if style == "polygon" else _draw_gaussians
    return draw(landmarks, max(eye_distance, 1.0), image_size, grid_size)


def _draw_polygons(landmarks: np.ndarray, eye_distance: float, image_size: tuple[int, int], grid_size: int) -> np.ndarray:
    fraction_bits = 4  # cv2 draws at sixteenths of a pixel
    points = np.round(landmarks * (1 << fraction_bits)).astype(np.int32)
    radius = round(CORNER_RADIUS * eye_distance * (1 << fraction_bits))
    h, w = image_size
    masks, plane = np.zeros((len(REGIONS), grid_size, grid_size), np.float32), np.empty((h, w), np.uint8)
    for region, (name, members) in enumerate(REGIONS.items()):
        plane[:] = 0
        if name == "mouth_corners":  # two points have no area
            for corner in members:
                cv2.circle(plane, points[corner].tolist(), radius, 255, cv2.FILLED, shift=fraction_bits)
        else:
            for outline in OUTLINES[name]:
                corners = points[list(outline)]
                cv2.fillPoly(plane, [cv2.convexHull(corners) if name in CONVEX_HULLS else corners], 255, shift=fraction_bits)
        first, end = 0, grid_size  # rows of patches to average; most regions are a narrow band
        if h % grid_size == 0:
            _, top, _, height = cv2.boundingRect(plane)
            first, end = top * grid_size // h, -(-(top + height) * grid_size // h)
        if first < end:
            band = plane[first * h // grid_size : end * h // grid_size].astype(np.float32)
            masks[region, first:end] = cv2.resize(band, (grid_size, end - first), interpolation=cv2.INTER_AREA) / 255
    return masks


def _draw_gaussians(landmarks: np.ndarray, eye_distance: float, image_size: tuple[int, int], grid_size: int) -> np.ndarray:
    """exp(−d² / 2σ²), d the distance to the nearest landmark of the region."""
    steps = 4  # samples along a patch's side; at σ near a patch's side their mean is the area's mean to 1e-3
    h, w = image_size
    landmarks = landmarks.astype(np.float32)
    ticks = (np.arange(grid_size * steps, dtype=np.float32) + 0.5) / (grid_size * steps)  # centres of the samples, in units of the side
    # A two-dimensional Gaussian is the product of two one-dimensional ones: 68 · 2 rows of exponentials instead of an image each.
    sigma = np.float32(GAUSSIAN_SIGMA * eye_distance)
    falloff_x = np.exp(-0.5 * ((ticks * w - 0.5 - landmarks[:, :1]) / sigma) ** 2)  # (68, G * steps)
    falloff_y = np.exp(-0.5 * ((ticks * h - 0.5 - landmarks[:, 1:]) / sigma) ** 2)  # (68, G * steps)
    masks = np.empty((len(REGIONS), grid_size, grid_size), np.float32)
    for region, members in enumerate(REGIONS.values()):
        members = list(members)
        nearest = (falloff_y[members][:, :, None] * falloff_x[members][:, None, :]).max(axis=0)  # (G * steps, G * steps)
        masks[region] = nearest.reshape(grid_size, steps, grid_size, steps).mean(axis=(1, 3))
    return masks


def face_size(landmarks: np.ndarray) -> np.ndarray:
    """Width and height of a face, (2,): the spread (standard deviation) of its landmarks (68, 2) in x and y, in their unit."""
    return landmarks.std(axis=0)


def face_frame(landmarks: np.ndarray) -> np.ndarray:
    """How a face stands in its picture, (2,): its size, the length of face_size, in the unit of the landmarks (68, 2), and its width over
    its height."""
    width, height = face_size(landmarks)
    return np.array([np.hypot(width, height), width / max(height, 1e-9)])


# --------------------------------------------------------------------------------------------------------- feature files

PER_SAMPLE = ("images", "landmarks", "region_masks", "labels", "paths", "originals", "treatments", "found_by", "sha256")
TEXTS = ("paths", "originals", "treatments")


def write_features(
    path: Path, img_size: int, grid_size: int, attributes: dict[str, object], table: dict[str, Sequence], blocks: Iterable[dict[str, np.ndarray]],
    compress: bool = False,
) -> None:  # fmt: skip
    """Writes one feature file. It appears under its name when it is complete and on the disk. Datasets, one row a sample:

        images        uint8 (N, h, w, 3) RGB             one chunk a sample, so that shuffled reading reads no more than it needs
        landmarks     float32 (N, 68, 2)                 x and y in pixels of the stored image
        region_masks  float32 (N, 8, G, G)               polygon style; the gaussian style is drawn from landmarks when read
        labels        uint8 (N,)                         0 real, 1 fake
        paths         str (N,)                           of the source image, below the data root
        originals     str (N,)                           format and size of the source before preprocess.py, "JPEG 1024x768"
        treatments    str (N,)                           what preprocess.py did to it: "aligned 0.6, JPEG 75-95, 224x224"; "" for resized alone
        found_by      enum (N,)                          index into FOUND_BY
        sha256        uint8 (N, 32)                      of the stored image

    Args:
        attributes: of the file, beside schema_version, regions and mask_style.
        table: labels, paths, originals, treatments, found_by and sha256, whole.
        blocks: images, landmarks and region_masks, some samples at a time.
        compress: images in gzip, which any HDF5 library reads.

    Raises:
        OSError: no space left, or another failure of the disk; nothing is left behind.
        ValueError: columns of different lengths.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = len(table["labels"])
    found_by = h5py.enum_dtype({name: code for code, name in enumerate(FOUND_BY)}, basetype="u1")
    columns = {"images": ((img_size, img_size, 3), "u1", 1), "landmarks": ((68, 2), "f4", 64)}
    columns |= {"region_masks": ((len(REGIONS), grid_size, grid_size), "f4", 1), "labels": ((), "u1", 4096)}
    columns |= {**{name: ((), h5py.string_dtype(), 1024) for name in TEXTS}, "found_by": ((), found_by, 4096), "sha256": ((32,), "u1", 1024)}
    if not compress:
        check_space(path, count * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype, _ in columns.values()))
    try:
        with h5py.File(partial, "w", libver="v110") as file:
            file.attrs.update({"schema_version": SCHEMA_VERSION, "regions": list(REGIONS), "mask_style": "polygon", **attributes})
            for name, (shape, dtype, per_chunk) in columns.items():
                options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                options.set_chunk((max(1, min(per_chunk, count)), *shape))
                if compress and name == "images":
                    options.set_deflate(1)  # higher levels take longer and save no more than half a percent of a photograph
                else:  # all chunks at once, hence one after another in the order of samples
                    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                if name not in TEXTS:
                    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                space, kind = h5py.h5s.create_simple((count, *shape)), h5py.h5t.py_create(np.dtype(dtype), logical=True)
                h5py.h5d.create(file.id, name.encode(), kind, space, options)
            for name, values in table.items():
                if count:
                    file[name][:] = values
            offsets = {name: rows_offset(file[name]) for name in set(columns) - set(table)}
            if compress:

                def write_through_hdf5(name: str, start: int, rows: np.ndarray) -> None:
                    check_space(path, np.asarray(rows).nbytes + SPARE)
                    file[name][start : start + len(rows)] = rows

                written = write_blocks(blocks, write_through_hdf5)
        if not compress:  # not through HDF5, which cannot let go of a file when the disk is full, and takes twice as long
            with open(partial, "rb+") as raw:

                def write(name: str, start: int, rows: np.ndarray) -> None:
                    shape, dtype, _ = columns[name]
                    rows = np.ascontiguousarray(rows, dtype).reshape(-1, *shape)
                    raw.seek(offsets[name] + start * rows[0].nbytes)
                    raw.write(rows)

                written = write_blocks(blocks, write)
        if written != count:
            raise ValueError(f"{path}: {written} of {count} samples were given")
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_space(path: Path, needed: int) -> None:
    """HDF5 must not run into a full disk: it cannot let go of the file then, and may take the process down with it."""
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, f"no space left on the disk, {needed} bytes needed and {free} free", str(path))


def write_blocks(blocks: Iterable[dict[str, np.ndarray]], write: Callable[[str, int, np.ndarray], None]) -> int:
    """Writes block after block; returns the number of samples."""
    start = 0
    for block in blocks:
        if len({len(rows) for rows in block.values()}) != 1:
            raise ValueError(f"a block's columns are of different lengths: { {name: len(rows) for name, rows in block.items()} }")
        for name, rows in block.items():
            write(name, start, rows)
        start += len(rows)
    return start


def open_features(path: Path) -> h5py.File:
    """Opens a feature file for reading.

    Raises:
        FeatureFileError: missing, cut off, foreign, or of another schema version.
    """
    again = "run feature_extraction.py again"
    if not Path(path).is_file():
        raise FeatureFileError(f"{path}: no such file; {again}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise FeatureFileError(f"{path}: not a complete HDF5 file, it may have been cut off ({error}); delete it and {again}") from error
    version = file.attrs.get("schema_version")
    problem = None
    if version != SCHEMA_VERSION:
        problem = f"schema {version}, this program reads {SCHEMA_VERSION}" if version is not None else "not a feature file of this program"
    elif missing := [name for name in PER_SAMPLE if name not in file]:
        problem = f"has no {', '.join(missing)}"
    elif len({len(file[name]) for name in PER_SAMPLE}) != 1:
        problem = "its datasets have different lengths"
    elif list(file.attrs["regions"]) != list(REGIONS):
        problem = "its regions are in another order than this program's"
    if problem:
        file.close()
        raise FeatureFileError(f"{path}: {problem}; {again}")
    return file


def find_feature_files(root: Path, split: str, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The files of one split, {"real/FFHQ": path, "fake/StyleGAN3": path, ...}, in the order of their names, real first.

    Args:
        names: data sets to take, "FFHQ" or "real/FFHQ"; all that are there if None.

    Raises:
        FeatureFileError: no features folder, nothing in it, a name in `names` that is not there, or files of different
            runs: their splits do not fit together, a copy of an image could be in train here and in test there.
    """
    root = Path(root)
    there = {}
    for kind in CLASSES:
        for path in sorted(root.glob(f"{kind}/*/{split}_features.h5")):
            there[f"{kind}/{path.parent.name}"] = path
    if not there:
        raise FeatureFileError(f"{root}: no {split} features in it (<real|fake>/<Name>/{split}_features.h5); run feature_extraction.py --output_dir {root}")
    unknown = [name for name in names or () if not any(name in (key, key.split("/")[1]) for key in there)]
    if unknown:
        raise FeatureFileError(f"{root}: no data set {', '.join(unknown)}; there are {', '.join(there)}")
    chosen = {key: path for key, path in there.items() if not names or key in names or key.split("/")[1] in names}
    runs = {}
    for key, path in chosen.items():
        with open_features(path) as file:
            runs.setdefault(file.attrs.get("fingerprint"), []).append(key)
    if len(runs) > 1:
        parts = " | ".join(", ".join(keys) for keys in runs.values())
        raise FeatureFileError(f"{root}: made by different runs of feature_extraction.py: {parts}; run it again over all, or name those of one run with --datasets")
    return chosen


# -------------------------------------------------------------------------------------------------------------- transforms


def horizontal_flip(image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mirrors a sample: image (h, w, 3), landmarks (68, 2) in its pixels, region_masks (8, G, G). Left and right change places."""
    landmarks = landmarks[MIRROR_LANDMARKS]  # a copy
    landmarks[:, 0] = image.shape[1] - 1 - landmarks[:, 0]
    return cv2.flip(image, 1), landmarks, region_masks[MIRROR_REGIONS, :, ::-1]


# OpenCV's operations on uint8: torchvision's blur of 31 x 31 takes 14 ms of a core where a separable one takes 0.6.


def gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds independent noise to (h, w, 3) uint8; sigma in units of the full scale."""
    cv2.setRNGSeed(int(rng.integers(2**31)))  # of this thread
    noise = cv2.randn(np.empty(image.shape, np.int16), (0,) * 3, (255 * sigma,) * 3)  # a number alone is for the first channel
    return cv2.add(image, noise, dtype=cv2.CV_8U)  # saturates


def jpeg_compression(image: np.ndarray, quality: int) -> np.ndarray:
    """(h, w, 3) uint8 RGB through a JPEG of this quality, 1 to 100, its chroma at half resolution."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs (h, w, 3) uint8; sigma in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)  # the kernel reaches to ±3 sigma


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(h, w, 3) uint8 in other light: brightness and contrast times up to exp(±strength), white balance a third of that."""
    brightness, contrast = np.exp(rng.uniform(-strength, strength, 2))
    balance = np.exp(rng.uniform(-strength / 3, strength / 3, 3))
    mean = image.mean(axis=(0, 1))  # (3,)
    table = (np.arange(256)[:, None] - mean) * contrast + mean * brightness * balance  # (256, 3)
    return cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8)[None])


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """Shrinks (h, w, 3) uint8 to this part of its sides and brings it back to its size."""
    h, w = image.shape[:2]
    small = cv2.resize(image, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


CORRUPTIONS = {"jpeg": jpeg_compression, "blur": gaussian_blur, "noise": gaussian_noise, "resize": rescale}


class TestTransform:
    """Corruptions one after another, each of a given strength, in every image alike.

    What is random of them (noise) depends on the image's content alone: not on the file's name, the order or the readers.

    Args:
        corruptions: (name of CORRUPTIONS, level): JPEG quality, blur in pixels, noise in units of the full scale, resize factor.
        find_again: called with the corrupted image (h, w, 3), returns (landmarks, region_masks); None: those of the clean
            image are kept.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, corruptions: Sequence[tuple[str, float]], find_again: Callable | None = None):
        cv2.setNumThreads(1)  # FaceDataset's readers are the parallelism
        self.corruptions, self.find_again = tuple(corruptions), find_again

    def __call__(
        self, image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image (h, w, 3) uint8 RGB, landmarks (68, 2), region_masks (8, G, G) -> the same."""
        for name, level in self.corruptions:
            if name == "noise":
                image = gaussian_noise(image, level, np.random.default_rng(zlib.crc32(image.tobytes())))
            else:
                image = CORRUPTIONS[name](image, level)
        if self.find_again:
            landmarks, region_masks = self.find_again(image)
        return image, landmarks, region_masks


class TrainTransform:
    """The paper's corruptions, each with probability 0.1, and a mirror with probability 0.5.

    Differs from the authors' code, which draws them once before extraction and so trains on the same ones in every epoch.

    Args:
        color_jitter: strength of color_jitter in every image; 0, the paper's: none.
    """

    def __init__(self, color_jitter: float = 0.0):
        cv2.setNumThreads(1)  # FaceDataset's readers are the parallelism
        self.color_jitter = color_jitter

    def __call__(
        self, image: np.ndarray, landmarks: np.ndarray, region_masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image (h, w, 3) uint8 RGB, landmarks (68, 2), region_masks (8, G, G) -> the same."""
        mirror, noise, jpeg, blur = rng.random(4) < (0.5, 0.1, 0.1, 0.1)
        if mirror:
            image, landmarks, region_masks = horizontal_flip(image, landmarks, region_masks)
        if self.color_jitter:
            image = color_jitter(image, self.color_jitter, rng)
        if noise:
            image = gaussian_noise(image, rng.uniform(0.05, 0.25), rng)
        if jpeg:
            image = jpeg_compression(image, int(rng.integers(50, 91)))
        if blur:
            image = gaussian_blur(image, rng.uniform(1.0, 5.0))
        return image, landmarks, region_masks


# ----------------------------------------------------------------------------------------------------------------- samples


def rows_offset(dataset: h5py.Dataset) -> int | None:
    """Where in the file a dataset's rows begin, if they lie one after another as write_features lays them out; else None."""
    options, rows = dataset.id.get_create_plist(), len(dataset)
    if not rows or options.get_nfilters() or options.get_alloc_time() != h5py.h5d.ALLOC_TIME_EARLY or not dataset.dtype.isnative:
        return None
    per_chunk, inner = dataset.chunks[0], (0,) * (dataset.ndim - 1)
    first, last = (dataset.id.get_chunk_info_by_coord((row, *inner)).byte_offset for row in (0, (rows - 1) // per_chunk * per_chunk))
    row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    in_order = dataset.chunks[1:] == dataset.shape[1:] and last - first == (rows - 1) // per_chunk * per_chunk * row_bytes
    return first if in_order else None


class _OpenFile:
    """Reads rows of one feature file. Many threads may do so at a time; it is closed when the last one lets go of it.

    HDF5 lets one thread in at a time, so it is used only where rows have no known place in the file. Elsewhere each row is
    read there with one call, outside of Python's lock; but the small columns, if `mapped`, by way of memory: with a call for
    each of their rows, and a wait for the lock after it, two threads take longer than one.
    """

    def __init__(self, path: str, layout: dict[str, tuple], state: tuple[int, int, int], mapped: bool):
        self.path, self.layout, self.file, self.maps = path, layout, None, {}
        self.raw = open(path, "rb", buffering=0)
        if file_state(self.raw.fileno()) != state:
            raise FeatureFileError(f"{path}: was written anew while it was read; start again")
        if any(offset is None for offset, _ in layout.values()):
            self.file = open_features(path)
        elif mapped:
            whole = mmap.mmap(self.raw.fileno(), 0, access=mmap.ACCESS_READ)
            for name in ("landmarks", "region_masks"):
                offset, shape = layout[name]
                self.maps[name] = np.frombuffer(whole, np.float32, int(np.prod(shape)), offset).reshape(shape)

    def read(self, name: str, rows: np.ndarray, into: np.ndarray, places: np.ndarray) -> None:
        """into[places] = the rows of this column."""
        if name in self.maps:
            into[places] = self.maps[name][rows]
            return
        offset, _ = self.layout[name]
        for row, place in zip(rows.tolist(), places.tolist()):
            target = into[place]
            if offset is not None:
                if os.preadv(self.raw.fileno(), [target], offset + row * target.nbytes) != target.nbytes:
                    raise FeatureFileError(f"{self.path}: has been cut off; delete it and run feature_extraction.py again")
            elif self.file[name].compression == "gzip":  # taken out of HDF5 compressed, so that threads inflate side by side
                _, chunk = self.file[name].id.read_direct_chunk((row, *(0,) * target.ndim))
                target[...] = np.frombuffer(zlib.decompress(chunk), target.dtype).reshape(target.shape)
            else:
                target[...] = self.file[name][row]


def file_state(file: str | int) -> tuple[int, int, int]:
    stat = os.stat(file)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class FaceDataset:
    """Samples of several feature files, one after another. A map-style dataset, in NumPy, for any number of threads.

    A sample: image (3, h, w) uint8 RGB, region_masks (8, G, G) float32, landmarks (68, 2) float32 in pixels, label 0 or 1,
    index of the sample. `read` gives a batch of them, which inference.load_batches turns into tensors; torch's DataLoader
    works as well, with fork and spawn. In memory there are the labels, one byte a sample, and the layout of each file; no
    more than MAX_OPEN_FILES are open.

    Args:
        files: feature files; those without a sample are passed over.
        grid_size: G of the masks; None: as stored.
        mask_style: "polygon" or "gaussian".
        transform: called with (image (h, w, 3), landmarks, region_masks, rng), returns the first three. The rng depends on
            (seed, draw, index) alone, not on the number of readers or processes. The draw is given to `read`, or is set_epoch's.
        mapped: read landmarks and masks by way of memory maps: faster with several threads. What has been read of them, 7 KB
            a sample, then counts as this process's memory until the system needs it.

    Raises:
        FeatureFileError: a file that cannot be used, files of different image sizes, or no sample at all.
    """

    def __init__(
        self, files: Sequence[Path], grid_size: int | None = None, mask_style: str = "polygon", transform: Callable | None = None, seed: int = 0,
        mapped: bool = True,
    ):  # fmt: skip
        self.files, self._mapped = [str(path) for path in files], mapped
        self.grid_size, self.mask_style, self.transform, self.seed, self.epoch = grid_size, mask_style, transform, seed, 0
        labels, counts, shapes, self._layouts = [], [], {}, []
        for path in self.files:
            with open_features(path) as file:
                labels.append(file["labels"][:])
                counts.append(len(labels[-1]))
                shapes[path] = (*file["images"].shape[1:3], file["region_masks"].shape[-1])
                columns = {name: file[name] for name in ("images", "landmarks", "region_masks")}
                layout = {name: (rows_offset(column) if hasattr(os, "preadv") else None, column.shape) for name, column in columns.items()}
                self._layouts.append((layout, file_state(path)))
                self.fingerprint = file.attrs.get("fingerprint")  # of the run that made the files
                self.mean_landmarks = file.attrs.get("mean_landmarks")  # (68, 2), what images without a face got
                self._stored_style = file.attrs["mask_style"]
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.uint8)  # (N,) uint8
        self.ends = np.cumsum(counts, dtype=np.int64)  # of each file, in samples
        self.starts = self.ends - np.array(counts, np.int64)
        if not len(self.labels):
            raise FeatureFileError(f"{', '.join(self.files) or 'no feature file'}: not one sample; add images and run feature_extraction.py again")
        if len(set(shapes.values())) != 1:
            listed = "; ".join(f"{path}: {h}x{w}, {grid}x{grid} masks" for path, (h, w, grid) in shapes.items())
            raise FeatureFileError(f"images or masks of different sizes ({listed}); run feature_extraction.py again with one --img_size and --patch_size for all")
        self.img_size, _, self._stored_grid = next(iter(shapes.values()))
        self._forget_open_files()

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """New draws of the transform from here on, where `read` is not told which."""
        self.epoch = epoch

    def _forget_open_files(self) -> None:
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()  # the one used last is at the end
        self._lock, self._owner = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock", "_owner")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_open_files()

    def _file(self, number: int) -> _OpenFile:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file handles
            self._forget_open_files()
        with self._lock:
            if number not in self._open:
                self._open[number] = _OpenFile(self.files[number], *self._layouts[number], self._mapped)
            self._open.move_to_end(number)
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
            return self._open[number]

    def column(self, name: str) -> np.ndarray:
        """One of the small per-sample datasets (labels, paths, originals, treatments, found_by, sha256) over all files, in the order of samples."""
        columns = []
        for path in self.files:
            with open_features(path) as file:
                columns.append(file[name].asstr("utf-8", "surrogateescape")[:] if name in TEXTS else file[name][:])
        return np.concatenate(columns)

    def read(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """A batch: the arrays of a sample, each with an axis B in front. draws (B,): which draw of the transform each one gets."""
        indices = np.array(indices)  # a copy: what is returned is the caller's
        if len(indices) and (indices.dtype.kind not in "iu" or indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"indices have to be whole numbers from 0 to {len(self) - 1}")
        indices = indices.astype(np.int64, copy=False)
        count, grid_size = len(indices), self.grid_size or self._stored_grid
        images = np.empty((count, self.img_size, self.img_size, 3), np.uint8)
        landmarks = np.empty((count, 68, 2), np.float32)
        masks = np.empty((count, len(REGIONS), grid_size, grid_size), np.float32)
        stored_masks = (self.mask_style, grid_size) == (self._stored_style, self._stored_grid)
        numbers = np.searchsorted(self.ends, indices, side="right")
        rows = indices - self.starts[numbers]
        for number in np.unique(numbers).tolist():
            file, of_file = self._file(number), np.flatnonzero(numbers == number)
            file.read("images", rows[of_file], images, of_file)
            file.read("landmarks", rows[of_file], landmarks, of_file)
            if stored_masks:
                file.read("region_masks", rows[of_file], masks, of_file)
        for k in range(count):
            if not stored_masks:
                masks[k] = draw_region_masks(landmarks[k], images.shape[1:3], grid_size, self.mask_style)
            if self.transform is not None:
                rng = np.random.default_rng((self.seed, self.epoch if draws is None else int(draws[k]), int(indices[k])))
                images[k], landmarks[k], masks[k] = self.transform(images[k], landmarks[k], masks[k], rng)
        # (B, h, w, 3) -> (B, 3, h, w), the same memory: torch's channels_last
        return {"image": images.transpose(0, 3, 1, 2), "region_masks": masks, "landmarks": landmarks, "label": self.labels[indices].astype(np.int64), "index": indices}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.read([index]).items()}


class TrainSampler:
    """The endless order in which training sees the samples, in shuffled passes that are drawn from the seed alone.

    If balanced, real and fake take turns, each class in passes of its own: both are seen equally often, whatever their numbers,
    and all images of a class as often as each other. Else, all samples are shuffled together. Sample t of a run is the same for
    any batch size and number of processes, and nothing is left over at the end of an epoch.

    Args:
        labels: (N,) 0 or 1, both present.
    """

    def __init__(self, labels: np.ndarray, balanced: bool, seed: int):
        self.seed = seed
        # int32: an order of ten million samples takes 40 MB
        self.groups = [np.flatnonzero(group).astype(np.int32) for group in ((labels == 0, labels == 1) if balanced else (labels >= 0,))]
        self._orders: list[tuple[int, np.ndarray]] = [(-1, group) for group in self.groups]  # of each group: the pass last used

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first, first + 1, ... of the run -> their indices and the passes that they belong to, both (count,) int64."""
        places = np.arange(first, first + count)
        indices, passes = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, group in enumerate(self.groups):
            mine = places % len(self.groups) == number
            passes[mine], within = np.divmod(places[mine] // len(self.groups), len(group))
            for one in np.unique(passes[mine]).tolist():
                if self._orders[number][0] != one:
                    self._orders[number] = one, np.random.default_rng((self.seed, number, one)).permutation(group)
                in_pass = passes[mine] == one
                indices[np.flatnonzero(mine)[in_pass]] = self._orders[number][1][within[in_pass]]
        return indices, passes
