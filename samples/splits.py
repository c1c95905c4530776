"""Which images are for training, validation and test: dealt by content, copies and groups together."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from samples.feature_files import SPLITS
from samples.sources import is_named

SPLIT_FRACTIONS = (0.6, 0.2, 0.2)  # train, val, test; the authors'


def bundle(contents: Sequence[bytes], groups: Sequence[str | None]) -> list[list[int]]:
    """The samples that must not be apart: of the same content, or of the same group, or both with a third one."""
    from scipy.cluster.hierarchy import DisjointSet  # half a second, hence only here

    bundles, first_with = DisjointSet(range(len(contents))), {}
    for i, keys in enumerate(zip(contents, groups)):
        for key in keys:
            if key is not None:
                bundles.merge(i, first_with.setdefault(key, i))
    return [sorted(members) for members in bundles.subsets()]


def deal_splits(
    data_sets: Sequence[str],
    contents: Sequence[bytes],
    groups: Sequence[str | None],
    seed: int,
    test_only: Sequence[str] = (),
) -> np.ndarray:
    """Deals samples to train, val and test, 60/20/20 in every data set, by nothing but the content of the files.

    Samples of the same content, and of the same group, stay together, whatever data sets they are in. The bundles that
    result are taken in an order drawn from content and seed, those for the test first, then large ones, and each goes
    where its data sets are furthest from their share.

    Args:
        data_sets: each sample's data set.
        contents: each sample's hash.
        groups: each sample's group, None for those on their own.
        test_only: data sets that go to test whole, with all that must not be apart from them.

    Returns:
        (N,) int, index into SPLITS.
    """

    def is_tested(members: list[int]) -> bool:
        return any(is_named(data_sets[i], test_only) for i in members)

    def turn(members: list[int]) -> tuple[bool, int, bytes]:
        drawn = hashlib.sha256(str(seed).encode() + min(contents[i] for i in members)).digest()
        return not is_tested(members), -len(members), drawn

    share = {name: np.array(SPLIT_FRACTIONS) * count for name, count in Counter(data_sets).items()}  # (3,)
    dealt = {name: np.zeros(len(SPLITS)) for name in share}
    splits = np.empty(len(contents), int)
    for members in sorted(bundle(contents, groups), key=turn):
        filled = sum(dealt[data_sets[i]] / share[data_sets[i]] for i in members)
        split = SPLITS.index("test") if is_tested(members) else int(np.argmin(filled))  # the first of equals: train
        splits[members] = split
        for i in members:
            dealt[data_sets[i]][split] += 1
    return splits
