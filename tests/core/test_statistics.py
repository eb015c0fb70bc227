"""Figures agree with tables that were worked by hand, and intervals cover."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from preceptor.core.statistics import bootstrap, ece, ece_estimate, ece_floor, estimate, reliability

CONFIDENCE = [0.95, 0.9, 0.85, 0.7, 0.65, 0.3, 0.1, 0.0]
CORRECT = [1, 1, 0, 1, 0, 0, 1, 0]
# Five bins. (.8, 1]: .95 .9 .85, mean .9, right 2/3. (.6, .8]: .7 .65, mean .675, right 1/2.
# (.2, .4]: .3, wrong. [0, .2]: .1 0, mean .05, right 1/2. Gaps times n: .7, .35, .3, .9; sum 2.25 over 8.
BY_HAND = 2.25 / 8


def test_ece_by_hand() -> None:
    """The table above."""
    assert ece(CONFIDENCE, CORRECT, bins=5) == pytest.approx(BY_HAND)


def test_reliability_by_hand() -> None:
    """Its rows, the empty bin left out; they give the same ECE."""
    rows = reliability(CONFIDENCE, CORRECT, bins=5)
    assert [(row.n, row.confidence, row.accuracy) for row in rows] == [
        (2, pytest.approx(0.05), 0.5),
        (1, 0.3, 0.0),
        (2, pytest.approx(0.675), 0.5),
        (3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    assert sum(row.n * abs(row.confidence - row.accuracy) for row in rows) / 8 == pytest.approx(BY_HAND)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0, 1.0], [1, 1], 0),
        ([1.0, 1.0], [0, 0], 1),
        ([0.5, 0.5], [1, 0], 0),
        ([0.0], [1], 1),
        ([0.8], [1], 0.2),
    ],
)
def test_ece_at_the_ends(confidence: list[float], correct: list[int], expected: float) -> None:
    """Sure and right, sure and wrong, even, and one answer."""
    assert ece(confidence, correct) == pytest.approx(expected)


def test_bins_are_closed_above() -> None:
    """0.7 belongs to (0.6, 0.7] in spite of its rounding."""
    (row,) = reliability([0.7], [1], bins=10)
    assert (row.low, row.high) == pytest.approx((0.6, 0.7))


def test_reliability_agrees_with_scikit_learn() -> None:
    """On random answers, none of which lies on an edge."""
    rng = np.random.default_rng(0)
    p = rng.random(2000)
    y = rng.random(2000) < p
    accuracy, confidence = calibration_curve(y, p, n_bins=15)
    rows = reliability(p, y)
    assert [row.accuracy for row in rows] == pytest.approx(accuracy.tolist())
    assert [row.confidence for row in rows] == pytest.approx(confidence.tolist())


def test_floor_is_the_ece_of_a_calibrated_model() -> None:
    """It matches fresh calibrated draws, falls with n, and lies below the ECE of a miscalibrated model."""
    rng = np.random.default_rng(1)
    p = rng.random(500)
    fresh = np.mean([ece(p, rng.random(500) < p) for _ in range(200)])
    floor = ece_floor(p)
    assert floor == pytest.approx(fresh, rel=0.1)
    assert ece_floor(np.tile(p, 16)) == pytest.approx(floor / 4, rel=0.15)
    assert ece(p, rng.random(500) < p**3) > 2 * floor


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    """On 10,000 values, and the same for the same seed."""
    values = np.random.default_rng(2).normal(3, 2, 10_000)
    low, high = bootstrap(values)
    error = 1.96 * values.std() / 100
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.004)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_bootstrap_covers() -> None:
    """About 95 % of the intervals of shares hold the truth."""
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(200):
        low, high = bootstrap((rng.random(80) < 0.3).astype(float), seed=i, resamples=400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


def test_estimate_of_a_ratio() -> None:
    """Micro-F1 from columns of hits and names."""
    hits, names = np.array([1, 0, 2, 1]), np.array([2, 2, 4, 3])
    found = estimate(np.column_stack([hits, names]), lambda means: 2 * means[:, 0] / means[:, 1])
    assert found.value == pytest.approx(8 / 11)
    assert found.low <= found.value <= found.high
    assert found.n == 4


def test_paired_difference_is_tighter_than_two_intervals() -> None:
    """Cases that are hard for both cancel out."""
    rng = np.random.default_rng(4)
    hard = rng.random(300)
    a, b = hard + rng.normal(0, 0.05, 300), hard + 0.02 + rng.normal(0, 0.05, 300)
    paired = estimate(b - a)
    assert paired.low > 0
    assert paired.high - paired.low < estimate(a).high - estimate(a).low


def test_ece_estimate_holds_the_figure() -> None:
    """The same value as `ece`, with an interval."""
    found = ece_estimate(CONFIDENCE, CORRECT, bins=5)
    assert found.value == pytest.approx(BY_HAND)
    assert found.low <= found.high


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses_what_it_cannot_know(values: list[float]) -> None:
    """No cases, or an unscored one."""
    with pytest.raises(ValueError, match="at least one case"):
        bootstrap(values)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "at least one"),
        ([0.5], [1, 0], "one confidence"),
        ([1.5], [1], r"\[0, 1\]"),
        ([float("nan")], [1], r"\[0, 1\]"),
    ],
)
def test_ece_refuses_nonsense(confidence: list[float], correct: list[int], message: str) -> None:
    """By name."""
    with pytest.raises(ValueError, match=message):
        ece(confidence, correct)
