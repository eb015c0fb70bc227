"""Scores of confidence agree with a table worked by hand and with scikit-learn, and keep their properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from preceptor.core.confidence import curve, figures
from preceptor.core.statistics import ece

# Surest first: right, wrong, right, wrong.
CONFIDENCE, CORRECT = [0.9, 0.8, 0.6, 0.3], [1, 0, 1, 0]
BY_HAND = {
    "brier": (0.01 + 0.64 + 0.16 + 0.09) / 4,
    "nll": -np.log([0.9, 0.2, 0.6, 0.7]).mean(),
    "auroc": 3 / 4,  # of the four pairs, one is the wrong way round
    "aurc": (0 + 1 / 2 + 1 / 3 + 2 / 4) / 4,
    "augrc": (0 + 1 + 1 + 2) / 16,
    "risk_at_80": 2 / 4,  # 80 % of four are four
    "ece_mass": (0.1 + 0.8 + 0.4 + 0.3) / 4,
    "trust": 0.5 - (0.1 + 0.8 + 0.4 + 0.3) / 4,
}
answers = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.99, 1.0]), st.booleans()), min_size=1, max_size=30)


def test_by_hand() -> None:
    """The four answers above."""
    found = figures(CONFIDENCE, CORRECT)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(BY_HAND)


def test_a_curve_by_hand() -> None:
    """Each answer more that is kept."""
    expected = [(0.25, 0), (0.5, 0.5), (0.75, 1 / 3), (1, 0.5)]
    assert np.array(curve(CONFIDENCE, CORRECT, 5)) == pytest.approx(np.array(expected))


def test_agrees_with_scikit_learn() -> None:
    """On answers of which many are equally sure."""
    rng = np.random.default_rng(0)
    p = np.round(rng.random(3000), 2)
    y = rng.random(3000) < p
    found = figures(p, y)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p))
    assert found["nll"] == pytest.approx(log_loss(y, np.clip(p, 1e-12, 1 - 1e-12)))
    assert found["trust"] == pytest.approx(y.mean() - ece(p, y))


@given(answers)
def test_weights_are_repeats(told: list[tuple[float, bool]]) -> None:
    """An answer of weight 2 counts as two, one of weight 0 as none, in what doesn't depend on ranks among equals."""
    p, y = map(np.array, zip(*told, strict=True))
    weights = np.arange(len(p)) % 3
    if not weights.sum():
        return
    weighed = figures(p, y, weights[None])
    repeated = figures(np.repeat(p, weights), np.repeat(y, weights))
    for name in ("brier", "nll", "trust"):
        assert weighed[name] == pytest.approx(repeated[name])
    if len(set(p)) == len(p):
        assert weighed["auroc"] == pytest.approx(repeated["auroc"], nan_ok=True)
        assert weighed["augrc"] == pytest.approx(repeated["augrc"])


@given(answers, st.randoms(use_true_random=False))
def test_the_order_of_the_answers_changes_nothing(told: list[tuple[float, bool]], random: object) -> None:
    """Ties included."""
    shuffled = list(told)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis's Random
    one, other = (figures(*map(list, zip(*rows, strict=True))) for rows in (told, shuffled))
    assert {n: v.item() for n, v in one.items()} == pytest.approx({n: v.item() for n, v in other.items()}, nan_ok=True)
    curves = (np.array(curve(*map(list, zip(*rows, strict=True)))) for rows in (told, shuffled))
    assert next(curves) == pytest.approx(next(curves))


@given(answers)
def test_equal_confidence_is_as_good_as_chance(told: list[tuple[float, bool]]) -> None:
    """Ordering by nothing keeps the mean error at every coverage."""
    y = [right for _, right in told]
    found, error = figures([0.5] * len(y), y), 1 - float(np.mean(y))
    assert found["aurc"] == pytest.approx(error)
    assert found["risk_at_80"] == pytest.approx(error)
    assert np.isnan(found["auroc"]) if error in (0, 1) else found["auroc"] == pytest.approx(0.5)


def test_a_perfect_order_is_the_best_that_a_hit_rate_allows() -> None:
    """With a fifth wrong and put last, nothing wrong is kept at 80 %."""
    found = figures(np.linspace(1, 0, 100), np.arange(100) < 80)
    assert found["auroc"] == 1
    assert found["risk_at_80"] == 0
    assert found["augrc"] == pytest.approx(sum(range(1, 21)) / 100**2)
