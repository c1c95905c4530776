"""The images of a comparison: prepared twice, sifted, and dealt to the splits so that nothing near is on both sides."""

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.comparison.near_duplicates import Fingerprint, find_pairs, leave_out, take_fingerprints
from benchmarks.comparison.variants import command, run
from dataset import FaceDataset
from faces.images import list_images
from faces.prepared import plan_outputs
from faces.rejection import BEYOND, NO_FACE, REJECTED_LIST, REJECTED_SUFFIX, read_reasons, write_reasons
from samples.feature_files import CLASSES, SPLITS, find_feature_files, open_features
from samples.sources import data_set_folders

RAW, EQUALISED = TREATMENTS = ("raw", "equalised")
QUALITIES = "75-95"  # of the JPEG that all equalised images go through
NOT_AGAIN = "no face found in the aligned crop"
# of the images that are left out, by their beginnings; and what the table calls them
REASONS = {
    NO_FACE: "no face",
    BEYOND: "crop beyond the border",
    NOT_AGAIN: "no face in the crop",
    "near-duplicate": "near-duplicate",
    "face at a distance": "perhaps one person",
    "unusable": "unusable",
}


def data_sets_of(*roots: Path) -> dict[str, Path]:
    """{"real/FFHQ": its folder, "fake/StyleGAN1": ..., ...} of one data root or several, real ones first.

    Raises:
        ValueError: a data set lies in two of them.
    """
    found: dict[str, Path] = {}
    for kind in CLASSES:
        for folder in (folder for root in roots for folder in data_set_folders(root, kind)):
            data_set = f"{kind}/{folder.name}"
            if data_set in found:
                raise ValueError(f"{folder}: {data_set} is in {found[data_set].parents[1]}, too; rename one of them")
            found[data_set] = folder
    return found


def prepare(args: argparse.Namespace, data_sets: Mapping[str, Path], treatments: Sequence[str] = TREATMENTS) -> None:
    """Every image in each of the treatments, in prepared/<treatment>/."""
    options_of = {RAW: (), EQUALISED: ("--align", f"{args.align:g}", "--recompress", QUALITIES)}
    for treatment in treatments:
        for data_set, folder in tqdm(data_sets.items(), desc=f"prepare, {treatment}", unit="data set"):
            target = args.output_dir / "prepared" / treatment / data_set
            side = {"target_height": args.img_size, "target_width": args.img_size}
            given = {"directory": folder, "output_dir": target, "workers": args.workers}
            run(command("preprocess.py", *options_of[treatment], **given, **side))


def sources_of(data_set: str, folder: Path) -> dict[str, Path]:
    """{path of a prepared image, below prepared/<treatment>: its file} of a data set, as preprocess.py gives names."""
    return {f"{data_set}/{path}": source for source, path in plan_outputs(folder, list_images(folder)).items()}


def sift(
    args: argparse.Namespace, data_sets: Mapping[str, Path], treatments: Sequence[str] = TREATMENTS
) -> tuple[dict[str, Fingerprint], dict[str, Counter]]:
    """Which of the prepared images are used: links in data/<treatment>/, the same for all; all others in dropped.csv.

    Args:
        treatments: of prepare; EQUALISED, in which images are compared, is one of them.

    Returns:
        {path of an image: its fingerprint} and {data set: how many were left out for which reason}.
    """
    prepared = args.output_dir / "prepared"
    paths, dropped, sizes = [], {}, Counter()
    for data_set, folder in data_sets.items():
        reasons: dict[str, str] = {}
        for treatment in treatments:
            reasons |= read_reasons(prepared / treatment / f"{data_set}{REJECTED_SUFFIX}" / REJECTED_LIST)
        for path, source in sources_of(data_set, folder).items():
            if all((prepared / treatment / path).exists() for treatment in treatments):
                paths.append(path)
                sizes[data_set] += 1
            else:
                dropped[path] = reasons.get(str(source.relative_to(folder)), "could not be prepared")
    paths.sort()
    fingerprints = take_fingerprints(prepared / EQUALISED, paths, args)
    seen = [i for i, one in enumerate(fingerprints) if np.isfinite(one.face).all()]
    dropped |= {paths[i]: NOT_AGAIN for i in set(range(len(paths))) - set(seen)}
    # The smaller a data set, the more its images are worth
    rank = [sizes["/".join(Path(paths[i]).parts[:2])] for i in seen]
    for i, (stays, reason) in leave_out(find_pairs([fingerprints[i] for i in seen]), rank).items():
        dropped[paths[seen[i]]] = f"{reason}: {paths[seen[stays]]}"
    kept = {path: one for path, one in zip(paths, fingerprints) if path not in dropped}
    write_reasons(args.output_dir / "dropped.csv", dropped)
    for treatment in treatments:
        link(prepared / treatment, args.output_dir / "data" / treatment, kept)
    return kept, {
        data_set: Counter(kind_of(reason) for path, reason in dropped.items() if path.startswith(f"{data_set}/"))
        for data_set in data_sets
    }


def link(prepared: Path, chosen: Path, paths: Iterable[str]) -> None:
    """The folder `chosen` anew, with these of the prepared images and no others."""
    shutil.rmtree(chosen, ignore_errors=True)
    for path in paths:
        target = chosen / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(prepared / path, target)
        except OSError:  # a file system without
            shutil.copy2(prepared / path, target)


def kind_of(reason: str) -> str:
    """The reason without what differs from image to image."""
    return next((kind for kind in sorted(REASONS, key=len, reverse=True) if reason.startswith(kind)), "unusable")


def extract(
    args: argparse.Namespace,
    test_only: Sequence[str] = (),
    treatments: Sequence[str] = TREATMENTS,
    shares: Sequence[float] = (),
) -> None:
    """Feature files of each treatment, dealt to train, val and test by these shares, if any are given; the data sets of
    test_only are not dealt, but go to the test split whole."""
    for treatment in tqdm(treatments, desc="extract"):
        folders = {"data_root": args.output_dir / "data" / treatment, "output_dir": features_of(args, treatment)}
        sizes = {"img_size": args.img_size, "patch_size": args.patch_size, "workers": args.workers}
        dealt = ["--shares", *map(str, shares)] if shares else []
        kept_apart = ["--test_only", *test_only] if test_only else []
        run([*command("feature_extraction.py", **folders, **sizes), *dealt, *kept_apart])


def features_of(args: argparse.Namespace, treatment: str) -> Path:
    return args.output_dir / "features" / treatment


def check_splits(features: Path, kept: dict[str, Fingerprint]) -> dict[str, tuple[int, int, int]]:
    """That nothing stands on both sides of a split that is near each other.

    Returns:
        {data set: images in train, val, test}.

    Raises:
        ValueError: names the pair.
    """
    split_of, sizes = {}, {}
    for split in SPLITS:
        for data_set, path in find_feature_files(features, split).items():
            there = FaceDataset([path]).column("paths") if count_of(path) else []
            split_of |= dict.fromkeys(there, split)
            sizes.setdefault(data_set, {})[split] = len(there)
    if set(split_of) != set(kept):
        raise ValueError(
            f"{features}: does not hold the images that were chosen; remove it and run the same command again"
        )
    paths = list(kept)
    for i, j, reason in find_pairs(list(kept.values())):
        if split_of[paths[i]] != split_of[paths[j]]:
            raise ValueError(f"{paths[i]} is in {split_of[paths[i]]}, {paths[j]} in {split_of[paths[j]]}: {reason}")
    return {data_set: tuple(of[split] for split in SPLITS) for data_set, of in sizes.items()}


def count_of(path: Path) -> int:
    with open_features(path) as file:
        return len(file["labels"])
