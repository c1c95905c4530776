"""Feature files and what is read from them: the HDF5 schema, the facial regions, their masks, the train-time transforms.

    features/<real|fake>/<Name>/{train,val,test}_features.h5  ->  samples for train.py and inference.py

This module is the one owner of
    the schema         FeatureWriter writes it, open_features checks it, FaceDataset reads it
    the region order   REGIONS and what a mirror does to it
    the masks          draw_region_masks, from 68 landmarks to (8, G, G)
    normalisation      normalize, called right before the model

Coordinates are pixels of the stored image, x to the right and y down, with the centre of the first pixel at (0, 0).
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

SCHEMA_VERSION = 1
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

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


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

    def fixed_point(values: np.ndarray | float) -> np.ndarray:
        return np.round(np.multiply(values, 1 << fraction_bits)).astype(np.int32)

    masks = np.empty((len(REGIONS), grid_size, grid_size), np.float32)
    for region, (name, members) in enumerate(REGIONS.items()):
        plane = np.zeros(image_size, np.uint8)
        if name == "mouth_corners":  # two points have no area
            for corner in fixed_point(landmarks[list(members)]):
                cv2.circle(plane, tuple(map(int, corner)), int(fixed_point(CORNER_RADIUS * eye_distance)), 255, cv2.FILLED, shift=fraction_bits)
        else:
            for outline in OUTLINES[name]:
                points = fixed_point(landmarks[list(outline)])
                cv2.fillPoly(plane, [cv2.convexHull(points) if name in CONVEX_HULLS else points], 255, shift=fraction_bits)
        masks[region] = cv2.resize(plane.astype(np.float32), (grid_size, grid_size), interpolation=cv2.INTER_AREA) / 255
    return masks


def _draw_gaussians(landmarks: np.ndarray, eye_distance: float, image_size: tuple[int, int], grid_size: int) -> np.ndarray:
    """exp(−d² / 2σ²), d the distance to the nearest landmark of the region."""
    steps = 4  # samples along a patch's side; at σ near a patch's side their mean is the area's mean to 1e-3
    h, w = image_size
    ticks = (np.arange(grid_size * steps) + 0.5) / (grid_size * steps)  # centres of the samples, in units of the side
    # A two-dimensional Gaussian is the product of two one-dimensional ones: 68 · 2 rows of exponentials instead of an image each.
    falloff_x = np.exp(-0.5 * ((ticks * w - 0.5 - landmarks[:, :1]) / (GAUSSIAN_SIGMA * eye_distance)) ** 2)  # (68, G * steps)
    falloff_y = np.exp(-0.5 * ((ticks * h - 0.5 - landmarks[:, 1:]) / (GAUSSIAN_SIGMA * eye_distance)) ** 2)  # (68, G * steps)
    masks = np.empty((len(REGIONS), grid_size, grid_size), np.float32)
    for region, members in enumerate(REGIONS.values()):
        members = list(members)
        nearest = (falloff_y[members][:, :, None] * falloff_x[members][:, None, :]).max(axis=0)  # (G * steps, G * steps)
        masks[region] = nearest.reshape(grid_size, steps, grid_size, steps).mean(axis=(1, 3))
    return masks


# --------------------------------------------------------------------------------------------------------- feature files

PER_SAMPLE = ("images", "landmarks", "region_masks", "labels", "paths", "found_by", "sha256")


class FeatureWriter:
    """Writes one feature file, sample by sample or many at a time. The file appears under its name when it is complete.

    Used as a context manager; leaving it on an error removes what was written. Datasets, one row a sample:
        images        uint8 (N, h, w, 3) RGB             one chunk a sample, so that shuffled reading reads no more than it needs
        landmarks     float32 (N, 68, 2)                 x and y in pixels of the stored image
        region_masks  float32 (N, 8, G, G)               polygon style; the gaussian style is drawn from landmarks when read
        labels        uint8 (N,)                         0 real, 1 fake
        paths         str (N,)                           of the source image, below the data root
        found_by      enum (N,)                          index into FOUND_BY
        sha256        uint8 (N, 32)                      of the stored image
    """

    def __init__(self, path: Path, img_size: int, grid_size: int, attributes: dict[str, object]):
        self.path, self.partial = Path(path), Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = h5py.File(self.partial, "w", libver="v110")
        self.file.attrs["schema_version"] = SCHEMA_VERSION
        self.file.attrs["regions"] = list(REGIONS)
        self.file.attrs["mask_style"] = "polygon"
        for name, value in attributes.items():
            self.file.attrs[name] = value
        rows = {"images": ((img_size, img_size, 3), "u1", 1), "landmarks": ((68, 2), "f4", 64)}
        rows |= {"region_masks": ((len(REGIONS), grid_size, grid_size), "f4", 1), "labels": ((), "u1", 4096)}
        rows |= {"paths": ((), h5py.string_dtype(), 1024), "sha256": ((32,), "u1", 1024)}
        rows |= {"found_by": ((), h5py.enum_dtype({name: code for code, name in enumerate(FOUND_BY)}, basetype="u1"), 4096)}
        for name, (shape, dtype, per_chunk) in rows.items():
            self.file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(per_chunk, *shape))

    def append(self, **samples: np.ndarray) -> None:
        """One array for each name in PER_SAMPLE, all of the same length along the first axis."""
        if set(samples) != set(PER_SAMPLE) or len({len(rows) for rows in samples.values()}) != 1:
            raise ValueError(f"append wants {', '.join(PER_SAMPLE)}, all of one length")
        for name, rows in samples.items():
            if len(rows):
                self.file[name].resize(len(self.file[name]) + len(rows), axis=0)
                self.file[name][-len(rows) :] = rows

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        try:
            self.file.close()
            if error_type is None:
                with open(self.partial, "rb+") as written:
                    os.fsync(written.fileno())
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)


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


# ------------------------------------------------------------------------------------------------- samples and transforms


def normalize(images: Tensor) -> Tensor:
    """(B, 3, h, w) uint8 RGB -> float32, zero mean and unit variance over ImageNet. On the device that the images are on."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), IMAGE_MEAN, IMAGE_STD)


def horizontal_flip(image: Tensor, landmarks: Tensor, region_masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mirrors a sample: image (3, h, w), landmarks (68, 2) in its pixels, region_masks (8, G, G). Left and right change places."""
    width = image.shape[-1]
    landmarks = landmarks[MIRROR_LANDMARKS].clone()
    landmarks[:, 0] = width - 1 - landmarks[:, 0]
    return v2.functional.horizontal_flip(image), landmarks, region_masks[MIRROR_REGIONS].flip(-1)


class RandomGaussianNoise(v2.GaussianNoise):
    """torchvision's GaussianNoise with σ drawn from a range, in units of the full scale."""

    def __init__(self, sigma: tuple[float, float]):
        super().__init__()
        self.sigma_range = sigma

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        return {"sigma": torch.empty(1).uniform_(*self.sigma_range).item()}

    def transform(self, inpt: Tensor, params: dict[str, float]) -> Tensor:
        return v2.functional.gaussian_noise(inpt, sigma=params["sigma"])


class TrainTransform:
    """The paper's corruptions, each with probability 0.1, and a mirror with probability 0.5.

    Differs from the authors' code, which draws them once before extraction and so trains on the same ones in every epoch.
    """

    def __init__(self):
        self.corrupt = v2.Compose(
            [
                v2.RandomApply([RandomGaussianNoise(sigma=(0.05, 0.25))], p=0.1),
                v2.RandomApply([v2.JPEG(quality=(50, 90))], p=0.1),
                v2.RandomApply([v2.GaussianBlur(kernel_size=31, sigma=(1.0, 5.0))], p=0.1),  # 31 px = ±3 σ of the widest
            ]
        )

    def __call__(self, image: Tensor, landmarks: Tensor, region_masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image (3, h, w) uint8, landmarks (68, 2), region_masks (8, G, G) -> the same, drawn from torch's generator."""
        if torch.rand(()) < 0.5:
            image, landmarks, region_masks = horizontal_flip(image, landmarks, region_masks)
        return self.corrupt(image), landmarks, region_masks


class FaceDataset(torch.utils.data.Dataset):
    """Samples of several feature files, one after another.

    A sample: image (3, h, w) uint8 RGB, region_masks (8, G, G) float32, landmarks (68, 2) float32 in pixels, label 0 or 1,
    index of the sample. Files are opened when first read, once per process, so that fork and spawn both work.

    Args:
        files: feature files; those without a sample are passed over.
        grid_size: G of the masks; None: as stored.
        mask_style: "polygon" or "gaussian".
        transform: takes and returns (image, landmarks, region_masks). Its draws depend on (seed, epoch, index) alone, not
            on the number of workers or processes; set_epoch makes fresh ones.

    Raises:
        FeatureFileError: a file that cannot be used, files of different image sizes, or no sample at all.
    """

    def __init__(
        self, files: Sequence[Path], grid_size: int | None = None, mask_style: str = "polygon", transform: Callable | None = None, seed: int = 0
    ):
        self.files = [str(path) for path in files]
        self.grid_size, self.mask_style, self.transform, self.seed, self.epoch = grid_size, mask_style, transform, seed, 0
        labels, self.ends, sizes = [], [], {}
        for path in self.files:
            with open_features(path) as file:
                labels.append(file["labels"][:].astype(np.int64))
                self.ends.append(len(file["labels"]) + (self.ends[-1] if self.ends else 0))
                sizes[path] = file["images"].shape[1:3]
                self.fingerprint = file.attrs.get("fingerprint")  # of the run that made the files
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)  # (N,)
        if not len(self.labels):
            raise FeatureFileError(f"{', '.join(self.files) or 'no feature file'}: not one sample; add images and run feature_extraction.py again")
        if len(set(sizes.values())) != 1:
            listed = "; ".join(f"{path}: {h}x{w}" for path, (h, w) in sizes.items())
            raise FeatureFileError(f"images of different sizes ({listed}); run feature_extraction.py again with one --img_size for all")
        self.img_size = next(iter(sizes.values()))[0]
        self._open: dict[str, h5py.File] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """New draws of the transform from here on. Call it before the epoch's DataLoader starts its workers."""
        self.epoch = epoch

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # an open file cannot be sent to a spawned worker

    def _file(self, path: str) -> h5py.File:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file handles
            self._open, self._owner = {}, os.getpid()
        if path not in self._open:
            self._open[path] = open_features(path)
        return self._open[path]

    def column(self, name: str) -> np.ndarray:
        """One of the small per-sample datasets (labels, paths, found_by, sha256) over all files, in the order of samples."""
        columns = []
        for path in self.files:
            with open_features(path) as file:
                columns.append(file[name].asstr("utf-8", "surrogateescape")[:] if name == "paths" else file[name][:])
        return np.concatenate(columns)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        file = self._file(self.files[number])
        image = torch.from_numpy(file["images"][row]).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        landmarks = file["landmarks"][row]
        if file.attrs["mask_style"] == self.mask_style and self.grid_size in (None, file["region_masks"].shape[-1]):
            masks = file["region_masks"][row]
        else:
            grid_size = self.grid_size or file["region_masks"].shape[-1]
            masks = draw_region_masks(landmarks, tuple(image.shape[1:]), grid_size, self.mask_style)
        landmarks, masks = torch.from_numpy(landmarks), torch.from_numpy(masks)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((self.seed, self.epoch, index)))
                image, landmarks, masks = self.transform(image, landmarks, masks)
        return {"image": image, "region_masks": masks, "landmarks": landmarks, "label": int(self.labels[index]), "index": index}
