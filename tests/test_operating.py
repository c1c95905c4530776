"""evaluation/operating.py: the temperature, the thresholds for rates of false alarms, the verdicts."""

import numpy as np
import pytest
from scipy.special import expit, logit

from evaluation.metrics import calibration, log_loss
from evaluation.operating import (
    MARGIN,
    ON_VALIDATION,
    TEMPERATURES,
    WORST,
    allowed_alarms,
    choose_thresholds,
    describe_rates,
    describe_thresholds,
    describe_verdict,
    fit_temperature,
    judge_left_out,
    operating_points,
    threshold_for,
    threshold_for_others,
    thresholds_of,
    verdict_of,
    why_apart,
)

pytestmark = pytest.mark.filterwarnings("error")


# ---------------------------------------------------------------------------------------------------------- calibration


def test_temperature_by_hand():
    """Of 1,000 images of each class nine in ten are on the right side, all at log odds of 5. Right would be those of
    (900 + 1 - 0.1) in 1,002: Platt's targets count an image more on each side."""
    labels, logits = np.repeat([1, 0], 1000), 5.0 * np.tile(np.repeat([1, -1], [900, 100]), 2)
    logits[1000:] *= -1
    share = 0.9 * 1001 / 1002 + 0.1 / 1002
    assert fit_temperature(labels, logits) == pytest.approx(5 / logit(share), rel=1e-4)


def test_classes_weigh_alike():
    """Nine fakes for each real image: as with one, up to the targets of few."""
    rng = np.random.default_rng(0)
    fake, real = 3 * rng.normal(1, 1, 90_000), 3 * rng.normal(-0.5, 1, 10_000)
    labels = np.repeat([1, 0], [90_000, 10_000])
    many = fit_temperature(labels, np.concatenate([fake, real]))
    assert many == pytest.approx(fit_temperature(np.repeat([1, 0], 10_000), np.r_[fake[::9], real]), rel=0.03)
    plain = min(np.geomspace(0.5, 10, 200), key=lambda t: log_loss(labels, expit(np.concatenate([fake, real]) / t)))
    assert abs(many / plain - 1) > 0.05, "which is not the least loss over the images as they come"


def test_left_out_data_sets_weigh_alike():
    """A large collection that looks like fakes is one of four, and not most of the images."""
    rng = np.random.default_rng(0)
    others = [(0, rng.normal(-3, 2, 200)), (1, rng.normal(3, 2, 200)), (1, rng.normal(3, 2, 200))]
    few, many = ([*others, (0, np.tile(rng.normal(4, 1, 200), times))] for times in (1, 20))
    labels, log_odds, real = np.array([0, 1]), np.array([-1.0, 1.0]), {"A": np.array([0])}
    temperature, _ = operating_points(labels, log_odds, real, few)
    assert temperature > 2 * fit_temperature(*(np.concatenate(part) for part in by_image(others)))
    assert operating_points(labels, log_odds, real, many)[0] == pytest.approx(
        temperature, rel=0.1
    )  # fewer are less certain
    assert fit_temperature(*(np.concatenate(part) for part in by_image(many))) > 1.2 * temperature


def by_image(others):
    """Labels and log odds of data sets."""
    return zip(*((np.full(len(values), label), values) for label, values in others))


@pytest.mark.parametrize("scale", [0.4, 1.0, 6.0])
def test_at_equal_counts_a_score_is_a_probability(scale):
    """Two normal distributions with a distance of d have log odds of d · x: a model that says `scale` times as much."""
    rng, labels = np.random.default_rng(1), np.repeat([0, 1], 20_000)
    log_odds = 2 * (rng.normal(size=40_000) + 2 * (labels - 0.5))
    temperature = fit_temperature(labels, scale * log_odds)
    assert temperature == pytest.approx(scale, rel=0.03)
    assert calibration(labels, expit(scale * log_odds / temperature))[3] < 0.01
    scores = expit(scale * log_odds / temperature)
    assert labels[(scores > 0.88) & (scores < 0.92)].mean() == pytest.approx(0.9, abs=0.02)


def test_a_perfect_separation_of_few_is_no_certainty():
    """Ten images of each class, all at log odds of ±3: eleven in twelve is what they say."""
    labels = np.repeat([0, 1], 10)
    temperature = fit_temperature(labels, np.repeat([-3.0, 3.0], 10))
    assert expit(3 / temperature) == pytest.approx(11 / 12, abs=1e-4)


@pytest.mark.parametrize("right", [1e-9, 40.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_temperatures_are_bounded(right, sign):
    """However far classes are apart, and where the model is wrong of every image."""
    temperature = fit_temperature(np.array([0, 1]), sign * np.array([-right, right]))
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
    if sign < 0:
        assert temperature == pytest.approx(TEMPERATURES[1], rel=1e-3), "it says as little as it may"


def test_data_sets_left_out_by_hand():
    others = {"real/A": (0, np.array([-2.0, 0.0])), "real/B": (0, np.array([3.0])), "fake/X": (1, np.array([-1.0, 4]))}
    found = judge_left_out(others, 2.0, {"0.05": expit(1.4)})  # of log odds 2.8
    assert found["real/A"] == {"images": 2, "auc": 0.75, "0.05": 0.0}
    assert found["real/B"] == {"images": 1, "auc": 0.5, "0.05": 1.0}
    assert found["fake/X"] == {"images": 2, "auc": 0.625, "0.05": 0.5}


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_how_many_false_alarms_a_rate_allows():
    assert [allowed_alarms(n, 0.01) for n in (1, 98, 99, 198, 199, 2899, 10_000)] == [-1, -1, 0, 0, 1, 28, 99]
    assert [allowed_alarms(n, 0.05) for n in (18, 19, 39, 99)] == [-1, 0, 1, 4]
    assert allowed_alarms(99, 0.29) == 28, "though 0.29 · 100 is less than 29 in floating point"


def test_threshold_by_hand():
    scores = np.arange(1, 200) / 200  # 199: one may be above at 1 %, nine at 5 %
    assert threshold_for(scores, 0.01) == pytest.approx((198 + 199) / 400)
    assert threshold_for(scores, 0.05) == pytest.approx((190 + 191) / 400)
    assert threshold_for(scores[:150], 0.01) == pytest.approx(0.75 + MARGIN)  # none may be
    assert threshold_for(scores[:50], 0.01) == pytest.approx((0.25 + 1) / 2)  # too few to say
    tied = np.r_[np.full(10, 0.9), np.full(189, 0.2)]
    assert threshold_for(tied, 0.01) == pytest.approx(0.9 + MARGIN)  # ten at once would be too many
    assert threshold_for(np.r_[tied[1:], 0.2], 0.05) == pytest.approx((0.9 + 0.2) / 2)  # nine are not


@pytest.mark.parametrize("value", [0.0, 0.3, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("count", [1, 30, 500])
def test_where_all_scores_are_alike_none_is_above(value, count):
    thresholds = choose_thresholds({"FFHQ": np.full(count, value)})
    assert thresholds["0.01"] >= thresholds["0.05"] > value and thresholds["0.05"] <= max(1, np.nextafter(value, 2))


def test_the_worst_collection_has_its_say():
    rng = np.random.default_rng(0)
    easy, hard = rng.random(2000) * 0.5, rng.random(300) * 0.5 + 0.4
    both = choose_thresholds({"FFHQ": easy, "scans": hard})
    assert both == choose_thresholds({"scans": hard}), "300 are enough for both rates"
    assert (hard >= both["0.01"]).sum() == 2 and (hard >= both["0.05"]).sum() == 14
    pooled = choose_thresholds({"all": np.r_[easy, hard]})
    assert pooled["0.01"] < both["0.01"] and (hard >= pooled["0.05"]).mean() > 0.25

    few = choose_thresholds({"FFHQ": easy, "scans": hard[:50]})
    assert few["0.05"] == choose_thresholds({"scans": hard[:50]})["0.05"], "50 are enough for 5 % alone"
    pool = choose_thresholds({"all": np.r_[easy, hard[:50]]})
    assert few["0.01"] == max(pool["0.01"], few["0.05"])

    tiny = choose_thresholds({"FFHQ": easy, "scans": hard[:5]})
    assert tiny == choose_thresholds({"all": np.r_[easy, hard[:5]]}), "five count in the pool alone"


def test_of_collections_left_out_each_counts_alike():
    """Two collections: of 10 photographs one at 0.9, of 2 one at 0.8. A mean rate of 0.05 lets the first through,
    0.3 both."""
    left_out = [np.array([0.9] + [0.1] * 9), np.array([0.8, 0.2])]
    assert threshold_for_others(left_out, 0.05) == pytest.approx(0.85)
    assert threshold_for_others(left_out, 0.3) == pytest.approx(0.5)
    assert 0.9 < threshold_for_others(left_out, 0.04) < 0.9001, "none may be above it"
    assert threshold_for_others([np.array([0.5, 0.5]), np.array([0.5])], 0.5) > 0.5, "ties stay together"
    known = {"a": np.linspace(0, 0.3, 200)}
    alone, both = choose_thresholds(known), choose_thresholds(known, left_out=left_out)
    assert both["0.05"] == pytest.approx(0.85) and both["0.01"] > 0.9 and alone["0.01"] < 0.3
    assert choose_thresholds(known, left_out=left_out[:1]) == alone, "one says nothing of others"
    high = {"a": np.linspace(0.9, 1, 200)}
    assert choose_thresholds(high, left_out=left_out) == choose_thresholds(high), "those on validation hold as well"


def test_the_worst_collection_left_out_has_its_say():
    """Ten collections of 100 photographs, one of them higher: in the mean 5 % is half of these alone."""
    scores = np.linspace(0.01, 0.4, 100)
    left_out = [scores] * 9 + [scores + 0.5]
    threshold = threshold_for_others(left_out, 0.05)
    assert (left_out[-1] >= threshold).sum() == 100 * 0.05 * WORST
    assert (left_out[-1] >= threshold_for_others(left_out, 0.01)).sum() == 100 * 0.01 * WORST
    few = [*left_out[:9], left_out[-1][::25]]
    assert (few[-1] >= threshold_for_others(few, 0.05)).sum() == 2, "of four images no such share can be told"


def test_a_lower_rate_never_has_a_lower_threshold():
    """Fifty images are enough for 5 %, and higher than the pool of all is at 1 %."""
    thresholds = choose_thresholds({"FFHQ": np.linspace(0, 0.1, 10_000), "scans": np.linspace(0.5, 0.9, 50)})
    assert thresholds["0.01"] == thresholds["0.05"] > 0.85
    rng = np.random.default_rng(2)
    for sizes in rng.integers(1, 250, (200, 3)):
        real = {name: rng.random(size).round(rng.integers(1, 4)) for name, size in zip("abc", sizes)}
        found = choose_thresholds(real, (0.1, 0.01, 0.05))
        assert list(found) == ["0.1", "0.01", "0.05"] and found["0.01"] >= found["0.05"] >= found["0.1"]
        for rate, scores in ((0.01, np.concatenate(list(real.values()))), (0.05, real["a"]), (0.1, real["c"])):
            assert (scores >= found[f"{rate:g}"]).mean() <= rate or len(scores) < 1 / rate - 1


def test_of_further_photographs_no_more_are_called_fake():
    """1,000 thresholds from 150 photographs each: the mean rate among others is the rate, or less."""
    rng = np.random.default_rng(3)
    real = rng.random((1000, 150))  # of uniform scores the rate above t is 1 - t
    rates = {name: np.mean([1 - choose_thresholds({"a": row})[name] for row in real]) for name in ("0.01", "0.05")}
    assert 0.005 < rates["0.01"] <= 0.01 and 0.04 < rates["0.05"] <= 0.05


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_verdicts():
    thresholds = {"0.01": 0.9, "0.05": 0.6}
    scores = (0.0, 0.59, 0.6, 0.89, 0.9, 1.0)
    assert [verdict_of(score, thresholds) for score in scores] == ["real"] * 2 + ["uncertain"] * 2 + ["fake"] * 2
    assert [verdict_of(score, {"0.05": 0.6}) for score in scores] == ["real"] * 2 + ["fake"] * 4
    assert {verdict_of(score, {"0.01": 0.6, "0.05": 0.6}) for score in scores} == {"real", "fake"}
    assert describe_thresholds(thresholds) == "fake from 0.9000 on, real below 0.6000"
    assert describe_thresholds({"0.01": 0.9}) == "fake from 0.9000 on"
    assert describe_rates(thresholds) == "1 % and 5 % of false alarms, chosen in training"
    assert [describe_verdict(verdict_of(score, thresholds), thresholds) for score in (0.1, 0.74, 0.95)] == [
        "real below 0.6000",
        "uncertain from 0.6000 to 0.9000",
        "fake from 0.9000 on",
    ]
    assert describe_verdict("real", {"0.01": 0.9}) == "real below 0.9000"
    assert "may seem to disagree" in why_apart(thresholds) and why_apart({ON_VALIDATION: 0.4}) == ""


def test_by_what_a_checkpoint_judges():
    new = {"val_threshold": 0.4, "thresholds": {"0.01": 0.9, "0.05": 0.6}}
    assert thresholds_of(new, None, "m.pth") == new["thresholds"]
    assert thresholds_of(new, 0.05, "m.pth") == {"0.05": 0.6}
    old = thresholds_of({"val_threshold": 0.4}, None, "m.pth")
    assert old == {ON_VALIDATION: 0.4} and describe_rates(old) == "the threshold chosen on validation"
    assert [verdict_of(score, old) for score in (0.39, 0.4)] == ["real", "fake"]
    with pytest.raises(ValueError, match=r"--fpr 0.02: m.pth has thresholds for 0.01 and 0.05; take one of these"):
        thresholds_of(new, 0.02, "m.pth")
    with pytest.raises(ValueError, match="--fpr 0.01: m.pth has no such thresholds; leave it away, or train again"):
        thresholds_of({"val_threshold": 0.4}, 0.01, "m.pth")
