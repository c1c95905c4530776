"""The samples that training and evaluation see: read from feature files, transformed, in the order of training.

    features/<real|fake>/<Name>/{train,val,test}_features.h5  ->  FaceDataset  ->  image, region masks, landmarks, label

The schema is samples/feature_files.py's, the masks are faces/regions.py's, the transforms samples/transforms.py's. All
is
NumPy: feature_extraction.py runs many processes of it, and none of them has to load torch.

Coordinates are pixels of the stored image, x to the right and y down, with the centre of the first pixel at (0, 0).
"""

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from faces.regions import REGIONS, draw_region_masks
from samples.feature_files import TEXTS, FeatureFileError, open_features, rows_offset

MAX_OPEN_FILES = 64  # of a FaceDataset at a time, two handles each; the system allows 1,024 a process, mostly


class _OpenFile:
    """Reads rows of one feature file. Many threads may do so at a time; it is closed when the last one lets go of it.

    HDF5 lets one thread in at a time, so it is used only where rows have no known place in the file. Elsewhere each row
    is read there with one call, outside of Python's lock; but the small columns, if `mapped`, by way of memory: with a
    call for each of their rows, and a wait for the lock after it, two threads take longer than one.
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
                    raise FeatureFileError(
                        f"{self.path}: has been cut off; delete it and run feature_extraction.py again"
                    )
            elif (
                self.file[name].compression == "gzip"
            ):  # taken out of HDF5 compressed, so that threads inflate side by side
                _, chunk = self.file[name].id.read_direct_chunk((row, *(0,) * target.ndim))
                target[...] = np.frombuffer(zlib.decompress(chunk), target.dtype).reshape(target.shape)
            else:
                target[...] = self.file[name][row]


def file_state(file: str | int) -> tuple[int, int, int]:
    stat = os.stat(file)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class FaceDataset:
    """Samples of several feature files, one after another. A map-style dataset, in NumPy, for any number of threads.

    A sample: image (3, h, w) uint8 RGB, region_masks (8, G, G) float32, landmarks (68, 2) float32 in pixels, label 0 or
    1, index of the sample. `read` gives a batch of them, which scoring.load_batches turns into tensors; torch's
    DataLoader works as well, with fork and spawn. In memory there are the labels, one byte a sample, and the layout of
    each file; no more than MAX_OPEN_FILES are open.

    Args:
        files: feature files; those without a sample are passed over.
        grid_size: G of the masks; None: as stored.
        mask_style: "polygon" or "gaussian".
        transform: called with (image (h, w, 3), landmarks, region_masks, rng), returns the first three. The rng depends
            on (seed, draw, index) alone, not on the number of readers or processes. The draw is given to `read`, or is
            set_epoch's.
        mapped: read landmarks and masks by way of memory maps: faster with several threads. What has been read of them,
            7 KB a sample, then counts as this process's memory until the system needs it.

    Raises:
        FeatureFileError: a file that cannot be used, files of different image sizes, or no sample at all.
    """

    def __init__(
        self,
        files: Sequence[Path],
        grid_size: int | None = None,
        mask_style: str = "polygon",
        transform: Callable | None = None,
        seed: int = 0,
        mapped: bool = True,
    ):
        self.files, self._mapped = [str(path) for path in files], mapped
        self.grid_size, self.mask_style, self.transform, self.seed, self.epoch = (
            grid_size,
            mask_style,
            transform,
            seed,
            0,
        )
        labels, counts, shapes, self._layouts = [], [], {}, []
        for path in self.files:
            with open_features(path) as file:
                labels.append(file["labels"][:])
                counts.append(len(labels[-1]))
                shapes[path] = (*file["images"].shape[1:3], file["region_masks"].shape[-1])
                columns = {name: file[name] for name in ("images", "landmarks", "region_masks")}
                layout = {
                    name: (rows_offset(column) if hasattr(os, "preadv") else None, column.shape)
                    for name, column in columns.items()
                }
                self._layouts.append((layout, file_state(path)))
                self.fingerprint = file.attrs.get("fingerprint")  # of the run that made the files
                self.mean_landmarks = file.attrs.get("mean_landmarks")  # (68, 2), what images without a face got
                self._stored_style = file.attrs["mask_style"]
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.uint8)  # (N,) uint8
        self.ends = np.cumsum(counts, dtype=np.int64)  # of each file, in samples
        self.starts = self.ends - np.array(counts, np.int64)
        if not len(self.labels):
            raise FeatureFileError(
                f"{', '.join(self.files) or 'no feature file'}: not one sample; add images, or with --manifest give"
                " this split some, and run feature_extraction.py again"
            )
        if len(set(shapes.values())) != 1:
            listed = "; ".join(f"{path}: {h}x{w}, {grid}x{grid} masks" for path, (h, w, grid) in shapes.items())
            raise FeatureFileError(
                f"images or masks of different sizes ({listed}); run feature_extraction.py again with one --img_size"
                " and --patch_size for all"
            )
        self.img_size, _, self._stored_grid = next(iter(shapes.values()))
        self.stand_in: np.ndarray | None = None  # (N, ...), a row for each sample: `read` gives it instead of its image
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
        """One of the small per-sample datasets (labels, paths, originals, treatments, found_by, filled, about,
        sha256) over all files, in the order of samples.
        """
        return self.columns(name)[name]

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Several of them; each file is opened once."""
        parts = {name: [] for name in names}
        for path in self.files:
            with open_features(path) as file:
                for name in names:
                    rows = file[name].asstr("utf-8", "surrogateescape") if name in TEXTS else file[name]
                    parts[name].append(rows[:])
        return {name: np.concatenate(rows) for name, rows in parts.items()}

    def read(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """A batch: the arrays of a sample, each with an axis B in front. draws (B,): which draw of the transform each
        one gets.
        """
        indices = np.array(indices)  # a copy: what is returned is the caller's
        if len(indices) and (indices.dtype.kind not in "iu" or indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"indices have to be whole numbers from 0 to {len(self) - 1}")
        indices = indices.astype(np.int64, copy=False)
        known = {"label": self.labels[indices].astype(np.int64), "index": indices}
        if self.stand_in is not None:
            nothing = np.zeros((len(indices), 0), np.float32)
            return {"image": np.asarray(self.stand_in[indices]), "region_masks": nothing} | known
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
                rng = np.random.default_rng(
                    (self.seed, self.epoch if draws is None else int(draws[k]), int(indices[k]))
                )
                images[k], landmarks[k], masks[k] = self.transform(images[k], landmarks[k], masks[k], rng)
        # (B, h, w, 3) -> (B, 3, h, w), the same memory: torch's channels_last
        return {
            "image": images.transpose(0, 3, 1, 2),
            "region_masks": masks,
            "landmarks": landmarks,
        } | known

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.read([index]).items()}


def source_numbers(dataset: FaceDataset) -> np.ndarray:
    """(N,) which of the dataset's files, hence data sets, each sample is of."""
    return np.searchsorted(dataset.ends, np.arange(len(dataset)), side="right")


def image_ids(dataset: FaceDataset) -> np.ndarray:
    """(N,) int64: of each image eight bytes of the SHA-256 of what is stored of it."""
    return np.ascontiguousarray(dataset.column("sha256")[:, :8]).view(np.int64).ravel()


SAMPLINGS = ("balanced", "sources", "natural")


class TrainSampler:
    """The endless order in which training sees the samples, in shuffled passes that are drawn from the seed alone.

    "balanced": real and fake take turns, each class in passes of its own: both are seen equally often, whatever their
    numbers, and all images of a class as often as each other. "sources": and within a class its data sets take turns,
    so that the largest of them is not what training sees most. "natural": all samples are shuffled together. Sample t
    of a run is the same for any batch size and number of processes, and nothing is left over at the end of an epoch.

    Args:
        labels: (N,) 0 or 1, both present.
        sampling: one of SAMPLINGS.
        sources: (N,) the number of each sample's data set, for "sources".
    """

    def __init__(self, labels: np.ndarray, sampling: str, seed: int, sources: np.ndarray | None = None):
        self.seed, classes = seed, (labels >= 0,) if sampling == "natural" else (labels == 0, labels == 1)
        # Sample t is of turn t modulo their number; each turn has the groups that share it, int32: an order of ten
        # million samples takes 40 MB
        self.turns = [
            [np.flatnonzero(of_class & (sources == source)).astype(np.int32) for source in np.unique(sources[of_class])]
            if sampling == "sources"
            else [np.flatnonzero(of_class).astype(np.int32)]
            for of_class in classes
        ]
        # of each group: the pass last used
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first, first + 1, ... of the run -> their indices and the passes that they belong to, both (count,)
        int64.
        """
        places = np.arange(first, first + count)
        indices, passes = np.empty(count, np.int64), np.empty(count, np.int64)
        turns, rounds = places % len(self.turns), places // len(self.turns)
        for turn, groups in enumerate(self.turns):
            for number, group in enumerate(groups):
                mine = (turns == turn) & (rounds % len(groups) == number)
                passes[mine], within = np.divmod(rounds[mine] // len(groups), len(group))
                for one in np.unique(passes[mine]).tolist():
                    in_pass = passes[mine] == one
                    indices[np.flatnonzero(mine)[in_pass]] = self._order(turn, number, one)[within[in_pass]]
        return indices, passes

    def _order(self, turn: int, number: int, one: int) -> np.ndarray:
        """Of a group of a turn, in one of its passes."""
        key = (turn, number)
        if self._orders.get(key, (-1,))[0] != one:
            # The first group's is that of "balanced", so that orders of before there were several stay as they are
            stream = (self.seed, turn, one) if number == 0 else (self.seed, turn, one, number)
            self._orders[key] = one, np.random.default_rng(stream).permutation(self.turns[turn][number])
        return self._orders[key][1]
