"""Feature files: the HDF5 schema. This module writes it and checks it; dataset.py reads the samples.

features/<real|fake>/<Name>/{train,val,test}_features.h5
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from faces.finder import FOUND_BY
from faces.regions import REGIONS
from runtime.files import check_space, replacing

SCHEMA_VERSION = 5
SPARE = 4 * 2**20  # bytes on the disk for what HDF5 writes of itself
CLASSES = ("real", "fake")  # the label is the index
SPLITS = ("train", "val", "test")
PER_SAMPLE = (
    "images",
    "landmarks",
    "region_masks",
    "labels",
    "paths",
    "originals",
    "treatments",
    "found_by",
    "filled",
    "about",
    "sha256",
)
ABOUT = {"schema_version": SCHEMA_VERSION, "regions": list(REGIONS), "mask_style": "polygon"}  # attributes of all files
TEXTS = ("paths", "originals", "treatments", "about")


class FeatureFileError(ValueError):
    """A features folder or file that cannot be used. The message names it and the way out."""


# -------------------------------------------------------------------------------------------------------------- writing


def write_features(
    path: Path,
    img_size: int,
    grid_size: int,
    attributes: dict[str, object],
    table: dict[str, Sequence],
    blocks: Iterable[dict[str, np.ndarray]],
    compress: bool = False,
    sync: bool = True,
) -> None:
    """Writes one feature file. It appears under its name when it is complete and on the disk.

    Datasets, one row a sample:

        images        uint8 (N, h, w, 3) RGB    one chunk a sample: shuffled reading reads no more than it needs
        landmarks     float32 (N, 68, 2)        x and y in pixels of the stored image
        region_masks  float32 (N, 8, G, G)      polygon style; the gaussian style is drawn from landmarks when read
        labels        uint8 (N,)                0 real, 1 fake
        paths         str (N,)                  of the source image, below the data root
        originals     str (N,)                  format and size of the source before preprocess.py, "JPEG 1024x768"
        treatments    str (N,)                  what preprocess.py did to it, faces/treatment.py; "" for resized alone
        found_by      enum (N,)                 index into FOUND_BY
        filled        float32 (N,)              share of an aligned crop that lay beyond its picture, and was filled
        about         str (N,)                  further columns of a manifest, JSON; "" without
        sha256        uint8 (N, 32)             of the stored image

    Args:
        attributes: of the file, beside schema_version, regions and mask_style.
        table: labels, paths, originals, treatments, found_by, filled, about and sha256, whole.
        blocks: images, landmarks and region_masks, some samples at a time.
        compress: images in gzip, which any HDF5 library reads.
        sync: without, it may be on its way to the disk yet, where a power cut leaves a part of it.

    Raises:
        OSError: no space left, or another failure of the disk; nothing is left behind.
        ValueError: columns of different lengths.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, columns = len(table["labels"]), schema(img_size, grid_size)
    if not compress:
        sizes = (int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype, _ in columns.values())
        check_space(path, count * sum(sizes))
    with replacing(path, sync=sync, several=True) as partial:
        with h5py.File(partial, "w", libver="v110") as file:
            file.attrs.update({**ABOUT, **attributes})
            create_columns(file, columns, count, compress)
            for name, values in table.items() if count else ():
                file[name][:] = values
            offsets = {name: rows_offset(file[name]) for name in set(columns) - set(table)}
            if compress:

                def write_through_hdf5(name: str, start: int, rows: np.ndarray) -> None:
                    check_space(path, np.asarray(rows).nbytes + SPARE)
                    file[name][start : start + len(rows)] = rows

                written = write_blocks(blocks, write_through_hdf5)
        # Not through HDF5, which cannot let go of a file when the disk is full, and takes twice as long
        if not compress:
            with open(partial, "rb+") as raw:

                def write(name: str, start: int, rows: np.ndarray) -> None:
                    shape, dtype, _ = columns[name]
                    rows = np.ascontiguousarray(rows, dtype).reshape(-1, *shape)
                    raw.seek(offsets[name] + start * rows[0].nbytes)
                    raw.write(rows)

                written = write_blocks(blocks, write)
        if written != count:
            raise ValueError(f"{path}: {written} of {count} samples were given")


def schema(img_size: int, grid_size: int) -> dict[str, tuple[tuple, object, int]]:
    """{dataset: (shape of a row, dtype, rows in a chunk)}."""
    found_by = h5py.enum_dtype({name: code for code, name in enumerate(FOUND_BY)}, basetype="u1")
    return {
        "images": ((img_size, img_size, 3), "u1", 1),
        "landmarks": ((68, 2), "f4", 64),
        "region_masks": ((len(REGIONS), grid_size, grid_size), "f4", 1),
        "labels": ((), "u1", 4096),
        **{name: ((), h5py.string_dtype(), 1024) for name in TEXTS},
        "found_by": ((), found_by, 4096),
        "filled": ((), "f4", 4096),
        "sha256": ((32,), "u1", 1024),
    }


def create_columns(file: h5py.File, columns: dict[str, tuple], count: int, compress: bool) -> None:
    """The datasets of `schema`, for so many rows."""
    for name, (shape, dtype, per_chunk) in columns.items():
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_chunk((max(1, min(per_chunk, count)), *shape))
        if compress and name == "images":
            options.set_deflate(1)  # higher levels take longer and save no more than half a percent of a photograph
        else:  # all chunks at once, hence one after another in the order of samples
            options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        if name not in TEXTS:
            options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((count, *shape))
        kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
        h5py.h5d.create(file.id, name.encode(), kind, space, options)


def write_blocks(blocks: Iterable[dict[str, np.ndarray]], write: Callable[[str, int, np.ndarray], None]) -> int:
    """Writes block after block; returns the number of samples."""
    start = 0
    for block in blocks:
        if len({len(rows) for rows in block.values()}) != 1:
            raise ValueError(
                f"a block's columns are of different lengths: { {name: len(rows) for name, rows in block.items()} }"
            )
        for name, rows in block.items():
            write(name, start, rows)
        start += len(rows)
    return start


# -------------------------------------------------------------------------------------------------------------- reading


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
        raise FeatureFileError(
            f"{path}: not a complete HDF5 file, it may have been cut off ({error}); delete it and {again}"
        ) from error
    version = file.attrs.get("schema_version")
    problem = None
    if version != SCHEMA_VERSION:
        problem = (
            f"schema {version}, this program reads {SCHEMA_VERSION}"
            if version is not None
            else "not a feature file of this program"
        )
    elif missing := sorted(set(PER_SAMPLE) - set(file)):
        problem = f"has no {', '.join(missing)}"
    # Below h5py's objects, which take half a millisecond for all: a stopped run leaves thousands of files
    elif len({h5py.h5d.open(file.id, name.encode()).shape[0] for name in PER_SAMPLE}) != 1:
        problem = "its datasets have different lengths"
    elif list(file.attrs["regions"]) != list(REGIONS):
        problem = "its regions are in another order than this program's"
    if problem:
        file.close()
        raise FeatureFileError(f"{path}: {problem}; {again}")
    return file


def checksum(columns: Mapping[str, Sequence]) -> str:
    """SHA-256 of all that a feature file holds beside the images, as it is given to write_features or lies in the file;
    each image has its own.
    """
    digest = hashlib.sha256()
    for name in PER_SAMPLE[1:]:
        if name in TEXTS:
            texts = (text.encode() if isinstance(text, str) else text for text in columns[name][:])
            digest.update(b"\0".join(texts))
        else:
            digest.update(np.ascontiguousarray(columns[name][:], schema(1, 1)[name][1]))
    return digest.hexdigest()


def rows_offset(dataset: h5py.Dataset) -> int | None:
    """Where in the file a dataset's rows begin, if they lie one after another as write_features lays them out; else
    None.
    """
    options, rows = dataset.id.get_create_plist(), len(dataset)
    if (
        not rows
        or options.get_nfilters()
        or options.get_alloc_time() != h5py.h5d.ALLOC_TIME_EARLY
        or not dataset.dtype.isnative
    ):
        return None
    per_chunk, inner = dataset.chunks[0], (0,) * (dataset.ndim - 1)
    first, last = (
        dataset.id.get_chunk_info_by_coord((row, *inner)).byte_offset
        for row in (0, (rows - 1) // per_chunk * per_chunk)
    )
    row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    in_order = (
        dataset.chunks[1:] == dataset.shape[1:] and last - first == (rows - 1) // per_chunk * per_chunk * row_bytes
    )
    return first if in_order else None


def find_feature_files(root: Path, split: str, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The files of one split, {"real/FFHQ": path, "fake/StyleGAN3": path, ...}, in the order of their names, real
    first.

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
        raise FeatureFileError(
            f"{root}: no {split} features in it (<real|fake>/<Name>/{split}_features.h5); run feature_extraction.py"
            f" --output_dir {root}"
        )
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
        raise FeatureFileError(
            f"{root}: made by different runs of feature_extraction.py: {parts}; run it again over all, or name those of"
            " one run with --datasets"
        )
    return chosen
