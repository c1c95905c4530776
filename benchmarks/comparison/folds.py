"""Folds of a comparison: which data sets are left out together, and all images with what is known of each.

The file of the folds, folds.json, is {kind: {fold: {"fakes": [generators], "photographs": [collections]}}}, and a text
under "about". What a fold names is in neither training nor validation, and is tested over all of its images. No data
set is left out by two folds of a kind.

    new families    a family of generators leaves together with the photographs that it learned from, so that nothing
                    of it is known: the six families leave out each data set of ours exactly once
    new sources     one source of a family that training knows, and one collection of photographs
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.comparison.images import count_of
from dataset import FaceDataset
from samples.feature_files import SPLITS, find_feature_files

FOLDS = Path(__file__).with_name("folds.json")
ABOUT = "about"
TRAIN, VAL, _ = range(len(SPLITS))


class Fold(NamedTuple):
    kind: str  # "new families"
    name: str  # "StyleGAN"
    fakes: tuple[str, ...]  # data sets that are left out: "fake/StyleGAN1", ...
    photographs: tuple[str, ...]  # "real/FFHQ", ...

    @property
    def left_out(self) -> tuple[str, ...]:
        return (*self.photographs, *self.fakes)

    @property
    def folder(self) -> str:
        """Of its models. Another one where the fold's data sets are others."""
        digest = hashlib.sha256("\n".join(sorted(self.left_out)).encode()).hexdigest()[:8]
        return "/".join(re.sub(r"[^\w.-]+", "_", name) for name in (self.kind, f"{self.name}_{digest}"))


def read_folds(path: Path, data_sets: Iterable[str]) -> list[Fold]:
    """The folds of a file, in its order.

    Args:
        data_sets: all that there are, "real/FFHQ", ...

    Raises:
        ValueError: no such file or not of this form; a name that is not there; a data set that is left out twice in a
            kind; a fold that leaves nothing of a class out, or nothing to train on.
    """
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
        folds = [
            Fold(
                kind,
                name,
                tuple(f"fake/{one}" for one in of["fakes"]),
                tuple(f"real/{one}" for one in of["photographs"]),
            )
            for kind, of_kind in kinds.items()
            if kind != ABOUT
            for name, of in of_kind.items()
        ]
    except OSError as error:
        raise ValueError(f"--folds {path}: {error.strerror}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'--folds {path}: not of the form {{kind: {{fold: {{"fakes": [...], "photographs": [...]}}}}}} ({error!r})'
        ) from error
    if not folds:
        raise ValueError(f"--folds {path}: no fold in it")
    there, left_out_by = set(data_sets), {}
    for fold in folds:
        check_fold(path, fold, there)
        for data_set in fold.left_out:
            if before := left_out_by.get((fold.kind, data_set)):
                raise ValueError(f"--folds {path}: {fold.kind}, {fold.name}: {data_set} is left out by {before}, too")
            left_out_by[fold.kind, data_set] = fold.name
    return folds


def check_fold(path: Path, fold: Fold, there: set[str]) -> None:
    """Raises ValueError where a fold cannot be."""
    where = f"--folds {path}: {fold.kind}, {fold.name}"
    if unknown := [name for name in fold.left_out if name not in there]:
        raise ValueError(f"{where}: no data set {', '.join(unknown)}; there are {', '.join(sorted(there)) or 'none'}")
    if not fold.fakes or not fold.photographs:
        raise ValueError(
            f"{where}: leaves out {', '.join(fold.left_out) or 'nothing'}; fakes and photographs are needed"
        )
    known = there - set(fold.left_out)
    if missing := [kind for kind in ("real", "fake") if not any(name.startswith(f"{kind}/") for name in known)]:
        raise ValueError(f"{where}: leaves no {' and no '.join(missing)} data set to train on")


class Stock(NamedTuple):
    """All images of a features folder, with what is known of each. Scores of them are in this order."""

    files: dict[str, list[Path]]  # {data set: its feature files}, in the order of SPLITS
    names: np.ndarray  # (N,) str, each image's data set
    splits: np.ndarray  # (N,) int, index into SPLITS
    labels: np.ndarray  # (N,) 1 = fake
    paths: np.ndarray  # (N,) str, below the data root
    img_size: int
    fingerprint: str  # of the run that made the files

    def of(self, data_sets: Sequence[str], split: int | None = None) -> np.ndarray:
        """Indices of the images of these data sets, of all splits if None."""
        chosen = np.isin(self.names, list(data_sets))
        return np.flatnonzero(chosen if split is None else chosen & (self.splits == split))

    def known(self, fold: Fold, split: int, label: int | None = None) -> np.ndarray:
        """Indices of the images of a split whose data sets the fold does not leave out; of one class, if given."""
        chosen = ~np.isin(self.names, fold.left_out) & (self.splits == split)
        return np.flatnonzero(chosen if label is None else chosen & (self.labels == label))

    def needed(self, fold: Fold) -> np.ndarray:
        """Indices of the images whose scores a fold needs: all left-out ones, and of the known ones those of
        validation."""
        return np.sort(np.concatenate([self.of(fold.left_out), self.known(fold, VAL)]))

    def known_names(self, fold: Fold) -> list[str]:
        """The data sets that are left to train on."""
        return [name for name in self.files if name not in fold.left_out]

    def dataset(
        self, data_sets: Sequence[str] = (), grid_size: int | None = None, mask_style: str = "polygon"
    ) -> FaceDataset:
        """Their samples, of all data sets if none are named, in the order of this stock."""
        files = [path for name, of in self.files.items() if not data_sets or name in data_sets for path in of]
        return FaceDataset(files, grid_size, mask_style)


def load_stock(features: Path) -> Stock:
    by_split = [find_feature_files(features, split) for split in SPLITS]
    files = {name: [of[name] for of in by_split] for name in by_split[0]}
    counts = {name: [count_of(path) for path in of] for name, of in files.items()}
    names = [name for name, of in counts.items() for _ in range(sum(of))]
    splits = [split for of in counts.values() for split, count in enumerate(of) for _ in range(count)]
    dataset = FaceDataset([path for of in files.values() for path in of])
    return Stock(
        files,
        np.array(names),
        np.array(splits),
        dataset.labels,
        dataset.column("paths").astype(str),
        dataset.img_size,
        dataset.fingerprint,
    )


def check_images(stock: Stock, folds: Sequence[Fold], sifted: Mapping[str, object]) -> None:
    """Raises ValueError where sifting has left a fold without images of a data set, or of a class to train on.

    Args:
        sifted: where it is listed why images are left out, {data set: counts by reason}.
    """
    for fold in folds:
        where = f"{fold.kind}, {fold.name}"
        for data_set in fold.left_out:
            if not len(stock.of([data_set])):
                raise ValueError(f"{where}: no image of {data_set} is left ({dict(sifted.get(data_set, {}))})")
        for split in (TRAIN, VAL):
            counts = [len(stock.known(fold, split, label)) for label in (0, 1)]
            if not all(counts):
                raise ValueError(
                    f"{where}: {counts[0]} real and {counts[1]} fake images are left in the {SPLITS[split]} split; both"
                    " are needed"
                )
