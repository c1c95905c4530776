"""training/probe.py: Fisher's discriminant of data sets, and of views."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training.probe import BETWEEN, CHANGE, SHRINKAGE, Known, left_out


def drawn(seed: int = 1, sets: int = 18, size: int = 40, width: int = 200) -> tuple[np.ndarray, ...]:
    """Features (1, N, D), labels and sources (N,): a little of the class in all dimensions, more of the source."""
    rng = np.random.default_rng(seed)
    sources = np.repeat(np.arange(sets), size)
    labels = sources % 2
    own = rng.normal(0, 0.5, (sets, width))
    features = rng.normal(0, 1, (len(sources), width)) + own[sources] + 0.15 * (2 * labels - 1)[:, None]
    return features[None].astype(np.float32), labels, sources


def balance(labels: np.ndarray, sources: np.ndarray | None) -> np.ndarray:
    """Weights (N,) of mean 1 by which both classes count alike, and with sources (N,) the data sets of a class, too."""
    groups = labels.astype(np.int64) if sources is None else sources
    weights = 1 / np.bincount(groups)[groups]
    for label in (0, 1):
        weights[labels == label] *= len(labels) / 2 / weights[labels == label].sum()
    return weights


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_the_probe_is_fishers_discriminant(shrinkage):
    """Classes of unlike size, features of unlike scale, against scikit-learn's."""
    rng = np.random.default_rng(0)
    labels = (np.arange(900) % 3 == 0).astype(int)
    features = rng.normal(0, 1, (900, 6)) @ rng.normal(0, 1, (6, 6)) + labels[:, None] * rng.normal(0, 0.3, 6) + 5
    features = (features * [1, 10, 0.1, 1, 1, 3]).astype(np.float32)
    weights = balance(labels, None)
    mean = np.average(features, axis=0, weights=weights)
    scaled = (features - mean) / np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    inside = np.mean([scaled[labels == label].var(axis=0).mean() for label in (0, 1)])
    part = shrinkage / (inside + shrinkage)  # scikit-learn's: (1 - part) * covariance + part * mean variance
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=part, priors=[0.5, 0.5]).fit(scaled, labels)
    ours = Known(features[None], labels, labels, by_source=False).fit(shrinkage=shrinkage)
    expected = theirs.decision_function(scaled) * (1 - part)
    np.testing.assert_allclose(ours.log_odds(features), expected, rtol=1e-3, atol=1e-3)
    constant = np.column_stack([features, np.full(900, 7, np.float32)])
    probe = Known(constant[None], labels, labels, by_source=False).fit(shrinkage=shrinkage)
    assert probe.weight[-1] == 0
    np.testing.assert_allclose(probe.log_odds(constant), ours.log_odds(features), rtol=1e-4, atol=1e-4)


def test_a_data_set_that_is_left_out_was_not_seen():
    features, labels, sources = drawn(sets=4)
    found = left_out(Known(features, labels, sources, by_source=True))
    assert sorted(found) == [0, 1, 2, 3]
    rest = sources != 2
    probe = Known(features[:, rest], labels[rest], sources[rest], by_source=True).fit()
    np.testing.assert_allclose(found[2], probe.log_odds(features[0, ~rest]), rtol=1e-4, atol=1e-4)
    alone = np.where(sources == 0, 0, 1)  # one data set of photographs, three of fakes
    assert sorted(left_out(Known(features, alone, sources, by_source=False))) == [1, 2, 3]


@pytest.mark.parametrize("by_source", [True, False])
def test_views_and_unlike_sizes_weigh_as_they_should(by_source):
    """Against the plain formula on all images at once, each with its weight."""
    features, labels, sources = drawn(sets=6, width=12)
    rng = np.random.default_rng(0)
    some = rng.random(len(sources)) < np.array([1, 1, 0.5, 0.5, 0.2, 0.8])[sources]
    images, labels, sources = features[0, some], labels[some], sources[some]
    views = [images + rng.normal(0.3, scale, images.shape).astype(np.float32) for scale in (0.5, 1.5)]
    ours = Known(np.stack([images, *views]), labels, sources, by_source).fit()
    weights = balance(labels, sources if by_source else None).astype(float)
    weights /= weights.sum()
    means = np.stack(
        [np.average(images[labels == label], axis=0, weights=weights[labels == label]) for label in (0, 1)]
    )
    of_sources = np.stack([images[sources == source].mean(axis=0) for source in range(6)])[sources]
    covariance = np.zeros((12, 12))
    differences = [(1, images - of_sources), (BETWEEN, of_sources - means[labels])]
    for share, difference in [*differences, *((CHANGE / 2, view - images) for view in views)]:
        covariance += share * (difference * weights[:, None]).T @ difference
    apart = means[1] - means[0]
    deviation = np.sqrt(covariance.diagonal() + (apart / 2) ** 2)
    scaled = covariance / np.outer(deviation, deviation) + SHRINKAGE * np.eye(12)
    expected = np.linalg.solve(scaled, apart / deviation) / deviation
    np.testing.assert_allclose(ours.weight, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.bias, -expected @ means.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_what_views_change_does_not_count():
    """Dimension 0 tells the classes best, and changes from view to view; dimension 1 tells them less, and stays."""
    rng = np.random.default_rng(2)
    labels = np.arange(2000) % 2
    images = rng.normal(0, 1, (2000, 2)) + (2 * labels - 1)[:, None] * [2, 1]
    change = np.stack([rng.normal(0, 20, 2000), np.zeros(2000)], axis=1)
    seen = np.stack([images, images + change]).astype(np.float32)
    without, with_views = (Known(seen[:count], labels, labels, False).fit(shrinkage=0.0).weight for count in (1, 2))
    assert without[0] > 1.5 * without[1] and abs(with_views[0]) < 0.05 * with_views[1]
