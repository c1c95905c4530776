"""metrics.py: each metric by hand and against scikit-learn, the bootstrap against real resampling, the intervals'
coverage.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from evaluation.intervals import (
    auc_replicates,
    bootstrap_intervals,
    bootstrap_replicates,
    compare_aucs,
    draw_multiplicities,
    draw_real_multiplicities,
    interval,
    weighted_metrics,
    win_matrix,
)
from evaluation.metrics import (
    METRIC_RANGE,
    METRICS,
    binary_metrics,
    calibration,
    choose_threshold,
    log_loss,
    roc_curve,
    tpr_at_fpr,
)

# Warnings are errors here: a division by zero is a NaN in a table.
pytestmark = pytest.mark.filterwarnings("error")


def draw(
    n_real: int, n_fake: int, seed: int | tuple[int, int], distance: float = 1.5, digits: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """labels and scores (N,) of two normal distributions, put into (0, 1), in random order; rounded, there are ties."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], [n_real, n_fake]))
    scores = norm.cdf(rng.normal(size=n_real + n_fake) + distance * (labels - 0.5))
    return labels, scores if digits is None else scores.round(digits)


# ------------------------------------------------------------------------------------------------------- one comparison


def test_metrics_by_hand():
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.4, 0.8, 0.35, 0.6, 0.9])
    metrics = binary_metrics(labels, scores, threshold=0.3)
    assert metrics["accuracy"] == pytest.approx(100 * 4 / 6)
    assert metrics["real_accuracy"] == pytest.approx(100 * 2 / 3) and metrics["fake_accuracy"] == pytest.approx(
        100 * 2 / 3
    )
    assert metrics["accuracy_val_threshold"] == pytest.approx(100 * 4 / 6)  # 0.1 is real, all others are called fake
    assert metrics["auc"] == pytest.approx(6 / 9)  # pairs in the right order
    assert metrics["ap"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert metrics["eer"] == pytest.approx(1 / 3)  # at 0.6: one real above, one fake below
    assert metrics["n_real"] == metrics["n_fake"] == 3
    assert metrics["tpr_at_fpr1"] == metrics["tpr_at_fpr10"] == pytest.approx(100 / 3)  # 0.9 is above all real ones
    assert metrics["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.2, 0.35, 0.6, 0.9]).mean())
    # in bins of their own, but for 0.8 and 0.9: each as far from the truth as its score
    assert metrics["ece"] == pytest.approx((0.1 + 0.4 + 0.8 + 0.65 + 0.4 + 0.1) / 6)
    assert {*METRICS, "n_real", "n_fake"} == metrics.keys()


@pytest.mark.parametrize(
    "labels, scores, expected",
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0),  # perfect
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], 1),  # always wrong
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5),  # no information: the diagonal
        ([0, 0, 1, 1], [0.1, 0.6, 0.6, 0.9], 0.25),  # from (0, 1/2) to (1/2, 1): fpr = 1 - tpr half way
        ([0, 0, 0, 1, 1], [0.1, 0.2, 0.7, 0.5, 0.9], 1 / 3),  # fpr is 1/3 from tpr 1/2 to 1
    ],
)
def test_equal_error_rate_by_hand(labels, scores, expected):
    assert binary_metrics(np.array(labels), np.array(scores), 0.5)["eer"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "rate, expected",
    [(0.0, 0.2), (0.0999, 0.2), (0.1, 0.4), (0.2, 0.4), (0.25, 0.4), (0.3, 0.8), (1.0, 1.0)],
)
def test_fakes_found_at_a_rate_of_false_alarms_by_hand(rate, expected):
    """Ten real images, five fakes. Nothing is interpolated, not where a real image and a fake share a score either: at
    a rate of 0.25 the fakes found are those of 0.2."""
    real = [0.05, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    fake = [0.95, 0.8, 0.6, 0.55, 0.01]  # one above 0.9, two above 0.7, four above 0.5 with the real one at 0.6
    curve = roc_curve(np.repeat([0, 1], [10, 5]), np.array(real + fake))
    assert tpr_at_fpr(*curve[:2], rate) == pytest.approx(expected)


def test_log_loss_is_finite_where_a_model_is_certain_and_wrong():
    assert binary_metrics(np.array([0, 1]), np.array([1.0, 1.0]), 0.5)["log_loss"] == pytest.approx(6 * np.log(10))


def test_threshold_separates_in_the_middle():
    labels = np.array([0, 0, 0, 1, 1])
    assert choose_threshold(labels, np.array([0.01, 0.02, 0.04, 0.10, 0.30])) == pytest.approx(0.07)
    # 4 of 5, 0.02 | 0.10
    assert choose_threshold(labels, np.array([0.01, 0.02, 0.50, 0.10, 0.30])) == pytest.approx(0.06)
    hopeless = choose_threshold(np.array([1, 0]), np.array([0.2, 0.7]))
    assert hopeless > 0.7  # nothing beats calling all of them real


@pytest.mark.parametrize("digits", [None, 1, 2])
@pytest.mark.parametrize("n_real, n_fake", [(1, 1), (40, 40), (7, 90)])
def test_metrics_are_scikit_learns(n_real, n_fake, digits):
    labels, scores = draw(n_real, n_fake, seed=n_fake, digits=digits)
    for metrics in (
        binary_metrics(labels, scores, 0.3),
        {key: value.item() for key, value in resampled(labels, scores, np.ones((1, len(labels)), int), 0.3).items()},
    ):
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert metrics["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert metrics["accuracy"] == pytest.approx(100 * accuracy_score(labels, scores >= 0.5), abs=1e-12)
        assert metrics["accuracy_val_threshold"] == pytest.approx(
            100 * accuracy_score(labels, scores >= 0.3), abs=1e-12
        )


# ------------------------------------------------------------------------------------------------------------ bootstrap


def resampled(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """weighted_metrics of samples in any order."""
    falling = np.argsort(-scores, kind="stable")
    return weighted_metrics(labels[falling], scores[falling], weights[:, falling], threshold)


@pytest.mark.parametrize("digits", [None, 1, 2])
@pytest.mark.parametrize("n_real, n_fake", [(1, 1), (2, 2), (30, 30), (5, 60)])
@pytest.mark.parametrize("threshold", [0.4, 2.0, -1.0])
def test_multiplicities_are_copies_of_images(n_real, n_fake, digits, threshold):
    labels, scores = draw(n_real, n_fake, seed=n_real, digits=digits)
    rng = np.random.default_rng(3)
    weights = np.zeros((20, len(labels)), int)
    weights[:, labels == 0] = rng.multinomial(n_real, np.full(n_real, 1 / n_real), 20)
    weights[:, labels == 1] = rng.multinomial(n_fake, np.full(n_fake, 1 / n_fake), 20)
    fast = resampled(labels, scores, weights, threshold)
    for row, times in enumerate(weights):
        slow = binary_metrics(np.repeat(labels, times), np.repeat(scores, times), threshold)
        assert {key: value[row] for key, value in fast.items()} == pytest.approx(
            {key: slow[key] for key in METRIC_RANGE}, abs=1e-10
        )


def test_replicates_are_resamples_of_each_class():
    labels, scores = draw(12, 20, seed=1, digits=1)
    replicates = bootstrap_replicates(labels, scores, 0.4, count=6, seed=9, stream=4)
    real, fake = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    for row, (real_times, fake_times) in enumerate(
        zip(draw_multiplicities(6, 12, 9, 0), draw_multiplicities(6, 20, 9, 4))
    ):
        assert real_times.sum() == 12 and fake_times.sum() == 20
        both = np.concatenate([np.repeat(real, real_times), np.repeat(fake, fake_times)])
        slow = binary_metrics(np.repeat([0, 1], [12, 20]), both, 0.4)
        assert {key: value[row] for key, value in replicates.items()} == pytest.approx(
            {key: slow[key] for key in METRIC_RANGE}, abs=1e-10
        )


def test_replicates_depend_on_seed_and_not_on_order_or_chunks(monkeypatch):
    labels, scores = draw(50, 60, seed=2, digits=2)
    one = bootstrap_replicates(labels, scores, 0.4, 40, seed=5)
    order = np.random.default_rng(0).permutation(len(labels))
    monkeypatch.setattr("evaluation.intervals.CHUNK_ELEMENTS", 7 * len(labels))  # 7 rows a chunk, 5 in the last
    again = bootstrap_replicates(labels[order], scores[order], 0.4, 40, seed=5)
    for metric in METRIC_RANGE:
        assert one[metric].shape == (40,)
        np.testing.assert_array_equal(one[metric], again[metric])
    assert not np.array_equal(one["ap"], bootstrap_replicates(labels, scores, 0.4, 40, seed=6)["ap"])
    assert bootstrap_intervals(labels, scores, 0.4, 40, seed=5) == bootstrap_intervals(
        labels[order], scores[order], 0.4, 40, seed=5
    )


def test_generators_share_the_draws_of_real_images():
    """Two generators, the same real images: these are drawn alike, the fakes are not."""
    labels, scores = draw(50, 50, seed=3)
    other = np.where(labels == 1, draw(50, 50, seed=4)[1], scores)
    one, two = (
        bootstrap_replicates(labels, s, 0.4, 200, seed=5, stream=stream) for s, stream in ((scores, 1), (other, 2))
    )
    np.testing.assert_array_equal(one["real_accuracy"], two["real_accuracy"])
    assert abs(np.corrcoef(one["fake_accuracy"], two["fake_accuracy"])[0, 1]) < 0.25
    with pytest.raises(ValueError, match="stream 0"):
        bootstrap_replicates(labels, scores, 0.4, 2, seed=5, stream=0)
    with pytest.raises(ValueError, match="50 real and 0 fake"):
        bootstrap_replicates(labels[labels == 0], scores[labels == 0], 0.4, 2, seed=5)


def test_memory_of_many_images():
    labels, scores = draw(50_000, 50_000, seed=0)
    tracemalloc.start()
    bootstrap_replicates(labels, scores, 0.4, 25, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


# ------------------------------------------------------------------------------------------------------------ intervals


def normal_truth(distance: float) -> tuple[float, float]:
    """AP at equal counts and AUC of all images, for real scores ~ N(0, 1) and fake ones ~ N(distance, 1)."""
    missed = (np.arange(200_000) + 0.5) / 200_000  # share of fakes below the threshold
    threshold = norm.ppf(missed) + distance
    true_positive, false_positive = 1 - missed, norm.sf(threshold)
    return float(np.mean(true_positive / (true_positive + false_positive))), float(norm.cdf(distance / 2**0.5))


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Of 95 % intervals, 93-97 % hold the true value, in 300 simulated sets of each of three kinds.

    All 900 together are held to it: in 300 alone, chance takes a coverage of exactly 95 % out of these bounds one time
    in ten.
    """
    hits = {}
    for distance, size in ((1.0, 100), (2.0, 100), (3.0, 200)):
        truth = normal_truth(distance)
        for seed in range(300):
            labels, scores = draw(size, size, (int(distance), seed), distance)
            intervals = bootstrap_intervals(labels, scores, 0.5, 150, seed)
            for metric, value in zip(("ap", "auc"), truth):
                hits.setdefault((metric, distance), []).append(intervals[metric][0] <= value <= intervals[metric][1])
    assert all(0.92 <= np.mean(one) <= 0.98 for one in hits.values()), {
        kind: np.mean(one) for kind, one in hits.items()
    }
    for metric in ("ap", "auc"):
        assert 0.93 <= np.mean([one for (name, _), one in hits.items() if name == metric]) <= 0.97


@pytest.mark.slow
def test_interval_of_a_mean_covers_it():
    """Three generators against the same real images, whose common draws belong to the mean's spread."""
    distances, size, hits = (1.0, 2.0, 2.5), 80, 0
    truth = np.mean([normal_truth(distance)[0] for distance in distances])
    labels = np.repeat([0, 1], size)
    for seed in range(150):
        rng = np.random.default_rng((17, seed))
        real = rng.normal(size=size)
        sets = [np.concatenate([real, rng.normal(distance, 1, size)]) for distance in distances]
        estimate = np.mean([average_precision_score(labels, scores) for scores in sets])
        replicates = np.mean(
            [
                bootstrap_replicates(labels, scores, 0.5, 150, seed, stream)["ap"]
                for stream, scores in enumerate(sets, 1)
            ],
            axis=0,
        )
        low, high = interval(estimate, replicates, size)
        hits += low <= truth <= high
    assert 0.93 <= hits / 150 <= 0.98


@pytest.mark.parametrize(
    "labels, scores",
    [
        ([0] * 50 + [1] * 50, np.r_[np.linspace(0, 0.4, 50), np.linspace(0.6, 1, 50)]),  # perfect separation
        ([1] * 50 + [0] * 50, np.r_[np.linspace(0, 0.4, 50), np.linspace(0.6, 1, 50)]),  # all wrong
        ([0] * 50 + [1] * 50, np.r_[np.linspace(0, 0.4, 49), 0.7, np.linspace(0.6, 1, 50)]),  # nearly perfect
        ([0] * 30 + [1] * 30, np.full(60, 0.5)),  # all scores alike
        ([0] * 30 + [1] * 30, np.zeros(60)),
        ([0, 1], [0.2, 0.9]),
        ([0, 1], [0.9, 0.2]),
        ([0, 1], [0.5, 0.5]),
        ([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8]),
        ([0, 1, 1], [0.1, 0.1, 0.8]),
        ([0] + [1] * 500, np.r_[0.5, np.linspace(0, 1, 500)]),
    ],
)
@pytest.mark.parametrize("count", [2, 100])
def test_degenerate_sets_have_sane_intervals(labels, scores, count):
    labels, scores = np.array(labels), np.asarray(scores)
    estimates = binary_metrics(labels, scores, 0.45)
    for metric, (low, high) in bootstrap_intervals(labels, scores, 0.45, count, seed=0).items():
        assert 0 <= low <= estimates[metric] <= high <= METRIC_RANGE[metric], metric
        assert low < high, metric  # nothing is known for certain


def test_perfect_separation_is_the_rule_of_three():
    labels, scores = np.repeat([0, 1], 100), np.repeat([0.1, 0.9], 100)
    intervals = bootstrap_intervals(labels, scores, 0.5, 50, seed=0)
    assert intervals["ap"] == intervals["auc"] == pytest.approx((0.05**0.01, 1))  # 0.970: 3 / 100 below
    assert intervals["accuracy"] == pytest.approx((100 * 0.05**0.01, 100))
    assert intervals["eer"] == pytest.approx((0, 1 - 0.05**0.01))


def test_interval_grows_with_the_level_and_shrinks_with_the_sample():
    widths = []
    for size, level in ((400, 0.8), (400, 0.95), (100, 0.95)):
        low, high = bootstrap_intervals(*draw(size, size, seed=1), 0.5, 300, seed=0, level=level)["ap"]
        widths.append(high - low)
    assert widths[0] < widths[1] < widths[2]


# ---------------------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand():
    labels, scores = np.array([0, 0, 1, 1, 1]), np.array([0.05, 0.15, 0.3, 0.9, 1.0])
    mean_score, fake_fraction, counts, ece = calibration(labels, scores, bins=4)
    np.testing.assert_array_equal(counts, [2, 1, 0, 2])
    np.testing.assert_allclose(mean_score, [0.1, 0.3, np.nan, 0.95])
    np.testing.assert_allclose(fake_fraction, [0, 1, np.nan, 1])
    assert ece == pytest.approx((2 * 0.1 + 1 * 0.7 + 2 * 0.05) / 5)


def test_an_image_of_weight_three_counts_as_three_images():
    labels, scores = np.array([0, 1, 1, 0]), np.array([0.1, 0.3, 0.8, 0.9])
    weights = np.array([3, 1, 2, 1])
    times = np.repeat(np.arange(4), weights)
    weighted, repeated = (
        calibration(labels, scores, 5, weights),
        calibration(labels[times], scores[times], 5),
    )
    for one, other in zip(weighted, repeated):
        np.testing.assert_allclose(one, other)
    assert log_loss(labels, scores, weights) == pytest.approx(log_loss(labels[times], scores[times]))
    assert log_loss(labels, scores, weights) != pytest.approx(log_loss(labels, scores), abs=0.01)


def test_calibration_edges_belong_to_the_upper_bin():
    scores = np.arange(11) / 10
    assert calibration(np.ones(11), scores)[2].tolist() == [1] * 9 + [2]
    counts = calibration(np.zeros(11), scores.astype(np.float32))[2]
    assert counts.sum() == 11


def test_calibrated_scores_have_a_small_error():
    rng = np.random.default_rng(0)
    scores = rng.random(50_000)
    labels = (rng.random(50_000) < scores).astype(int)
    assert calibration(labels, scores)[3] < 0.01
    assert calibration(labels, scores**3)[3] > 0.1


# -------------------------------------------------------------------------------------------------------- two detectors


def two_detectors(
    seed: int, n_real: int, n_fake: int, gain: float, runs: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and the scores of two detectors that see the same images, with noise of their own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], (n_real, n_fake))
    image = rng.normal(size=len(labels)) + labels
    return (
        labels,
        image + gain * labels + rng.normal(size=(runs, len(labels))),
        image + rng.normal(size=(runs, len(labels))),
    )


def test_win_matrix_is_the_auc_pair_by_pair():
    labels, first, _ = two_detectors(0, 40, 25, 0.5, runs=3)
    first = np.round(first, 1)  # with ties
    assert win_matrix(labels, first).mean() == pytest.approx(
        np.mean([roc_auc_score(labels, scores) for scores in first])
    )
    order = np.random.default_rng(0).permutation(len(labels))
    assert win_matrix(labels[order], first[:, order]).mean() == pytest.approx(win_matrix(labels, first).mean())


def test_auc_replicates_are_aucs_of_resamples():
    labels, first, _ = two_detectors(1, 30, 20, 0.5)
    replicates = auc_replicates(win_matrix(labels, first), 5, seed=3, stream=4)
    reals, fakes = (list(draw_multiplicities(5, size, 3, stream)) for size, stream in ((30, 0), (20, 4)))
    for replicate, real, fake in zip(replicates, reals, fakes):
        assert replicate == pytest.approx(roc_auc_score(labels, first[0], sample_weight=np.concatenate([real, fake])))


def test_the_paired_test_agrees_with_the_bootstrap_and_with_a_known_case():
    labels, first, second = two_detectors(2, 150, 100, 0.3, runs=2)
    found = compare_aucs(labels, first, second)
    differences = auc_replicates(win_matrix(labels, first), 4000, 0) - auc_replicates(
        win_matrix(labels, second), 4000, 0
    )
    assert found.difference == pytest.approx(
        np.mean([roc_auc_score(labels, a) - roc_auc_score(labels, b) for a, b in zip(first, second)])
    )
    assert (found.high - found.low) / 3.92 == pytest.approx(differences.std(), rel=0.06)
    swapped = compare_aucs(labels, second, first)
    assert (swapped.difference, swapped.low, swapped.p_value) == pytest.approx(
        (-found.difference, -found.high, found.p_value)
    )
    assert compare_aucs(labels, first, first).difference == 0
    # By hand, from the placements: reals 0 and 1, fakes 0.5 and 2; wins [[1, 1], [0, 1]] against [[0, 1], [1, 1]]
    labels, first, second = np.array([0, 0, 1, 1]), np.array([[0, 1, 0.5, 2]]), np.array([[1, 0, 0.5, 2]])
    found = compare_aucs(labels, first, second)
    assert found.difference == 0 and found.high == pytest.approx(1.96 * np.sqrt(0.5 / 2), rel=1e-3)


def test_where_the_images_cannot_tell_there_is_no_p_value():
    labels = np.repeat([0, 1], 20)
    for case in ((labels, labels[None], np.zeros((1, 40))), (labels[19:], np.arange(21.0)[None], np.zeros((1, 21)))):
        found = compare_aucs(*case)
        assert found.difference == 0.5 and np.isnan([found.low, found.high, found.p_value]).all()


@pytest.mark.slow
def test_a_mean_over_generators_keeps_what_they_have_in_common():
    """Two generators stand against 200 real images and against the first 90 of these. The standard error of their mean
    is the true one; with the reals drawn for each alone it is a quarter too small, as the fakes are much alike."""
    rng, means, right, apart = np.random.default_rng(0), [], [], []
    for seed in range(300):
        real, fakes = rng.normal(size=200), [1 + 0.2 * rng.normal(size=size) for size in (200, 90)]
        wins = [(fake[None] > real[: len(fake), None]).astype(float) for fake in fakes]
        means.append(np.mean([of.mean() for of in wins]))
        if seed < 40:
            right.append(
                np.mean(
                    [auc_replicates(of, 400, seed, stream, pool=200) for stream, of in enumerate(wins, 1)], axis=0
                ).std()
            )
            apart.append(
                np.mean(
                    [auc_replicates(of, 400, seed + stream, stream) for stream, of in enumerate(wins, 1)], axis=0
                ).std()
            )
    assert np.mean(right) == pytest.approx(np.std(means), rel=0.1) and np.mean(apart) < 0.85 * np.mean(right)


def test_real_images_of_a_smaller_comparison_follow_the_larger_ones_draws():
    large, small, alone = (
        np.stack(list(draw_real_multiplicities(300, size, pool, 7))) for size, pool in ((50, 50), (20, 50), (50, 50))
    )
    assert np.array_equal(large, alone) and (small.sum(axis=1) == 20).all() and (large.sum(axis=1) == 50).all()
    assert np.mean([np.corrcoef(a, b[:20])[0, 1] for a, b in zip(small, large)]) > 0.85
    assert np.abs(small.mean(axis=0) - 1).max() < 0.25 and np.abs(small.var(axis=0).mean() - 0.95) < 0.05, (
        "as if drawn alone"
    )
    labels, scores = draw(30, 20, seed=0)
    with pytest.raises(ValueError, match="the first ones of the order"):
        bootstrap_replicates(labels, scores, 0.5, 5, seed=0, places=np.arange(50) + 1)


def test_the_paired_test_is_right_as_often_as_it_says():
    """1,000 comparisons of detectors that are equally good: p is below 0.05 in about 50 of them; the interval holds the
    true gain.
    """
    equal = [compare_aucs(*two_detectors(seed, 60, 45, 0)).p_value < 0.05 for seed in range(1000)]
    assert 0.03 < np.mean(equal) < 0.075
    truth = norm.cdf((1.3) / 2) - norm.cdf(1 / 2)  # score differences have a variance of 4
    held = [
        low <= truth <= high
        for _, low, high, _ in (compare_aucs(*two_detectors(seed, 60, 45, 0.3)) for seed in range(1000))
    ]
    assert 0.925 < np.mean(held) < 0.97
