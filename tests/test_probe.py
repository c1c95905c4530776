"""training/probe.py: Fisher's discriminant, its shrinkage chosen on data sets that are left out."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training.probe import SHRINKAGES, balance, choose_shrinkage, fit, left_out


def drawn(seed: int = 1, sets: int = 18, size: int = 40, width: int = 200) -> tuple[np.ndarray, ...]:
    """Features (1, N, D), labels and sources (N,): a little of the class in all dimensions, more of the source."""
    rng = np.random.default_rng(seed)
    sources = np.repeat(np.arange(sets), size)
    labels = sources % 2
    own = rng.normal(0, 0.5, (sets, width))
    features = rng.normal(0, 1, (len(sources), width)) + own[sources] + 0.15 * (2 * labels - 1)[:, None]
    return features[None].astype(np.float32), labels, sources


def test_each_data_set_of_a_class_counts_alike():
    labels, sources = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 2, 2, 2, 3])
    weights = balance(labels, sources)
    np.testing.assert_allclose(weights, np.array([1, 1, 2, 2 / 3, 2 / 3, 2 / 3, 2]) * 7 / 8)
    np.testing.assert_allclose(balance(labels, None), np.array([1 / 3] * 3 + [1 / 4] * 4) * 7 / 2)


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
    ours = fit(features, labels, weights, shrinkage).log_odds(features)
    np.testing.assert_allclose(ours, theirs.decision_function(scaled) * (1 - part), rtol=1e-3, atol=1e-3)
    constant = np.column_stack([features, np.full(900, 7, np.float32)])
    np.testing.assert_allclose(fit(constant, labels, weights, 0.5).weight[-1], 0, atol=1e-6)


def test_on_data_sets_left_out_more_shrinkage_is_better():
    features, labels, sources = drawn()
    rng = np.random.default_rng(1)
    inside = rng.random(len(labels)) < 0.7
    val = features[0, ~inside], labels[~inside]
    known = features[:, inside], labels[inside], sources[inside]
    chosen = choose_shrinkage(*known, True, val)

    def unseen(shrinkage: float) -> float:
        """The AUC on further data sets, drawn likewise."""
        others, of_class, _ = drawn(seed=99, sets=40)
        probe = fit(known[0][0], known[1], balance(known[1], known[2]), shrinkage)
        odds = probe.log_odds(others[0])
        return float(np.mean(odds[of_class == 1][:, None] > odds[of_class == 0][None]))

    assert chosen == max(SHRINKAGES, key=unseen) == max(SHRINKAGES)


def test_where_a_class_has_one_data_set_validation_chooses():
    features, labels, sources = drawn(sets=2)
    val = np.array([[1.0] * 200, [-1.0] * 200], np.float32), np.array([1, 0])
    assert choose_shrinkage(features, labels, sources, False, val) == SHRINKAGES[0], "the first of equals"


def test_a_data_set_that_is_left_out_was_not_seen():
    features, labels, sources = drawn(sets=4)
    found = left_out(features, labels, sources, 0.1, by_source=True)
    assert sorted(found) == [0, 1, 2, 3]
    rest = sources != 2
    probe = fit(features[0, rest], labels[rest], balance(labels[rest], sources[rest]), 0.1)
    np.testing.assert_allclose(found[2], probe.log_odds(features[0, ~rest]), rtol=1e-4, atol=1e-5)
    alone = np.where(sources == 0, 0, 1)  # one data set of photographs, three of fakes
    assert sorted(left_out(features, alone, sources, 0.1, by_source=False)) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        fit(features[0, alone == 1], alone[alone == 1], np.ones((alone == 1).sum()), 0.1)
