"""Which images are for training, validation and test: dealt by content, copies and groups together."""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from faces.images import FRAME_PATTERN
from samples.feature_files import SPLITS, FeatureFileError
from samples.sources import Source, is_named

SHARES = (60, 20, 20)  # of train, val and test in percent; the authors'


class SplitError(ValueError):
    """Samples that must not be apart are given different splits; by_split: {split: index of one of them}."""

    def __init__(self, by_split: dict[str, int]):
        super().__init__(f"samples that must not be apart are given different splits: {by_split}")
        self.by_split = by_split


def bundle(contents: Sequence[bytes], groups: Sequence[str | tuple | None]) -> list[list[int]]:
    """The samples that must not be apart: of the same content, or of the same group, or both with a third one."""
    from scipy.cluster.hierarchy import DisjointSet  # half a second, hence only here

    bundles, first_with = DisjointSet(range(len(contents))), {}
    for i, (content, of_image) in enumerate(zip(contents, groups)):
        for key in (content, *(of_image if isinstance(of_image, tuple) else (of_image,))):
            if key is not None:
                bundles.merge(i, first_with.setdefault(key, i))
    return [sorted(members) for members in bundles.subsets()]


def deal_splits(
    data_sets: Sequence[str],
    contents: Sequence[bytes],
    groups: Sequence[str | tuple | None],
    seed: int,
    test_only: Sequence[str] = (),
    given: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
) -> np.ndarray:
    """Deals samples to train, val and test, in every data set, by nothing but the content of the files.

    Samples of the same content, and of the same group, stay together, whatever data sets they are in. The bundles that
    result are taken in an order drawn from content and seed, those whose split is given first, then large ones, and
    each of the others goes where its data sets are furthest from their share.

    Args:
        data_sets: each sample's data set.
        contents: each sample's hash.
        groups: each sample's group, or groups, None for those on their own.
        test_only: data sets that go to test whole, with all that must not be apart from them.
        given: each sample's split, "" where it is dealt; none of them if empty.
        shares: of train, val and test, of any sum; 0: a split gets nothing but what is given to it.

    Returns:
        (N,) int, index into SPLITS.

    Raises:
        SplitError: copies of an image, or images of a group, are given different splits.
    """

    def given_to(members: list[int]) -> str:
        """The split that is given to a bundle."""
        by_split = {given[i]: i for i in members if given and given[i]}
        if tested := [i for i in members if is_named(data_sets[i], test_only)]:
            by_split["test"] = tested[0]
        if len(by_split) > 1:
            raise SplitError(by_split)
        return next(iter(by_split), "")

    def turn(members: list[int]) -> tuple[bool, int, bytes]:
        drawn = hashlib.sha256(str(seed).encode() + min(contents[i] for i in members)).digest()
        return not given_to(members), -len(members), drawn

    wanted = np.array(shares) / sum(shares)  # (3,)
    share = {name: np.where(wanted > 0, wanted * count, 1) for name, count in Counter(data_sets).items()}  # (3,)
    dealt = {name: np.zeros(len(SPLITS)) for name in share}
    splits = np.empty(len(contents), int)
    for members in sorted(bundle(contents, groups), key=turn):
        filled = np.where(wanted > 0, sum(dealt[data_sets[i]] / share[data_sets[i]] for i in members), np.inf)
        fixed = given_to(members)
        split = SPLITS.index(fixed) if fixed else int(np.argmin(filled))  # the first of equals: train
        splits[members] = split
        for i in members:
            dealt[data_sets[i]][split] += 1
    return splits


def groups_of(sources: Sequence[Source], by_folder: bool) -> list[tuple[str | None, ...]]:
    """Of each image that with which it shares a split, None for none: the group that its manifest names; the folder
    below its data set whose images stay together, real/FFHQ/person of real/FFHQ/person/video/1.png; its video.
    """
    parts = [source.path.split("/") for source in sources]
    folders = ["/".join(path[:3]) if by_folder and len(path) > 3 else None for path in parts]
    videos = [frame and frame[1] for frame in (re.fullmatch(FRAME_PATTERN, source.path) for source in sources)]
    return [(source.group, folder, video) for source, folder, video in zip(sources, folders, videos)]


def deal(sources: Sequence[Source], contents: Sequence[bytes], args: argparse.Namespace) -> np.ndarray:
    """deal_splits of these images, with the options of feature_extraction.py.

    Raises:
        FeatureFileError: splits that are given keep apart what must not be.
    """
    data_sets, groups = [source.data_set for source in sources], groups_of(sources, args.group_by_folder)
    given = [source.split for source in sources]
    try:
        return deal_splits(data_sets, contents, groups, args.seed, args.test_only, given, args.shares)
    except SplitError as error:
        (one, i), (other, j), *_ = error.by_split.items()
        raise FeatureFileError(
            f"{args.manifest or args.data_root}: {sources[i].path} is for {one} and {sources[j].path} for {other}, and"
            " they must not be apart: copies of an image and images of a group share a split"
        ) from None
