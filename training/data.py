"""Training and validation samples, and how the faces stand in them."""

import argparse

import numpy as np
import torch

from dataset import FaceDataset
from faces.finder import FOUND_BY
from faces.regions import face_frame
from faces.treatment import describe_treatment, parse_treatment
from model import LAMMViTConfig
from samples.feature_files import FeatureFileError, find_feature_files
from samples.transforms import TrainTransform


def load_split(
    args: argparse.Namespace, split: str, grid_size: int | None, transform: TrainTransform | None
) -> tuple[FaceDataset, list[str]]:
    """One split of the chosen data sets, and their names. Both classes have to be there."""
    files = find_feature_files(args.features, split, args.datasets)
    dataset = FaceDataset(list(files.values()), grid_size, args.mask_style, transform, args.seed)
    counts = [int((dataset.labels == label).sum()) for label in (0, 1)]
    if not all(counts):
        raise FeatureFileError(
            f"{args.features}: the {split} split of {', '.join(files)} has {counts[0]} real and {counts[1]} fake"
            " images; both are needed"
        )
    sizes = np.diff(dataset.ends, prepend=0)  # none where a data set is kept for the test
    return dataset, [name for name, size in zip(files, sizes) if size]


def load_data(args: argparse.Namespace) -> tuple[FaceDataset, FaceDataset, list[str]]:
    """The training and validation splits, made for each other, and the names of the data sets."""
    train_set, names = load_split(args, "train", None, TrainTransform(args.color_jitter, args.augment, args.mask_style))
    grid_size = LAMMViTConfig(img_size=train_set.img_size, patch_size=args.patch_size).grid_size
    val_set, _ = load_split(args, "val", grid_size, None)
    train_set.grid_size = grid_size
    if (train_set.img_size, train_set.fingerprint) != (val_set.img_size, val_set.fingerprint):
        raise FeatureFileError(
            f"{args.features}: train and val are of different runs of feature_extraction.py ({train_set.img_size} and"
            f" {val_set.img_size} px); run it again over all"
        )
    return train_set, val_set, names


def check_views(args: argparse.Namespace, framing: dict) -> None:
    """
    Raises:
        ValueError: --augment wild would cut images on grey that an earlier version cut with a mirror image around them.
    """
    treatment = framing["treatment"]
    if args.augment == "wild" and treatment and parse_treatment(treatment).reflected:
        raise ValueError(
            f"--augment wild: {args.features} is of images that an earlier version {treatment}, and that have a mirror"
            " image where their pictures end; run preprocess.py on the originals again, into another folder"
        )


def measure_framing(train_set: FaceDataset) -> dict:
    """How the faces stand in the training images, for loose ones to be framed alike.

    Mean landmarks (68, 2), and the 1st and 99th percentile of face_frame (2, 2), both in units of the image's side; and
    what preprocess.py did to the images.

    Raises:
        FeatureFileError: not the same to all.
    """
    treatments = sorted(set(train_set.column("treatments")))
    if len(treatments) > 1:
        raise FeatureFileError(
            f"the training images are not treated alike ({'; '.join(map(describe_treatment, treatments))}): that may"
            " tell the class; run preprocess.py with the same --align, --recompress and size over all"
        )
    stored = FaceDataset(train_set.files, mapped=False)  # without the transform
    some = np.unique(np.linspace(0, len(stored) - 1, 1000).astype(int))
    found = some[stored.column("found_by")[some] != FOUND_BY.index("mean")]
    mean_landmarks = stored.mean_landmarks / stored.img_size
    frames = [face_frame(landmarks) for landmarks in stored.read(found)["landmarks"] / stored.img_size]
    frames = frames or [face_frame(mean_landmarks)]
    return {
        "treatment": treatments[0],
        "mean_landmarks": torch.from_numpy(mean_landmarks),
        "usual": torch.from_numpy(np.percentile(frames, (1, 99), axis=0)),
    }
