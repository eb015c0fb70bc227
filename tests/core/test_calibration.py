"""Calibration, selection and conformal sets: by hand, against scikit-learn and MAPIE, and by what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy.stats import binom
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.isotonic import IsotonicRegression

from preceptor.core.calibration import (
    LEVEL,
    SINGLE,
    Quantile,
    SetScore,
    interpolated,
    isotonic,
    lot,
    quantile,
    quantiles,
    select,
    strangeness,
    temperature,
    tempered,
)

PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_that_distorted_is_found(true: float) -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(2, 1, 20_000)
    y = rng.random(len(p)) < p
    said = tempered(p, 1 / true, 1e-12)
    assert temperature(said, y, 1e-12) == pytest.approx(true, rel=0.05)
    np.testing.assert_allclose(tempered(said, true, 1e-12), p, atol=1e-3)


@pytest.mark.parametrize(
    ("p", "t", "expected"),
    [
        (0.5, 3.0, 0.5),
        (0.8, 1.0, 0.8),
        (0.8, 2.0, 2 / 3),
        (0.9, 0.5, 81 / 82),
        (1.0, 1.0, 1 - SINGLE),
        (0.0, 2.0, SINGLE**0.5 / (1 + SINGLE**0.5)),
    ],
)
def test_tempered_by_hand(p: float, t: float, expected: float) -> None:
    assert tempered(p, t) == pytest.approx(expected, rel=1e-6)


def test_what_counts_coarsely_is_never_certain() -> None:
    """Five samples that all agree are no certainty: with a least of 1/12 that is a confidence of 11/12."""
    assert tempered([0, 1], 1.0, 1 / 12) == pytest.approx([1 / 12, 11 / 12])
    assert temperature([1.0] * 11 + [1.0], [1] * 11 + [0], 1 / 12) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("p", "y", "edge"), [([0.9] * 5, [1] * 5, 0.02), ([0.9] * 5, [0] * 5, 50.0)])
def test_the_temperature_is_bounded_where_all_are_right_or_wrong(p: list[float], y: list[int], edge: float) -> None:
    assert temperature(p, y) == pytest.approx(edge, rel=1e-3)


@given(PROBABILITIES, st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_and_the_sides_of_one_half(p: list[float], t: float) -> None:
    found = tempered(sorted(p), t)
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert all((q >= 0.5) == (r >= 0.5 - 1e-12) for q, r in zip(sorted(p), found.tolist(), strict=True))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_isotonic_is_that_of_scikit_learn_less_certainty(known: list[tuple[float, bool]]) -> None:
    p, y = zip(*known, strict=True)
    points = isotonic(p, y)
    least = 1 / (len(p) + 2)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(p, y)
    places = np.linspace(0, 1, 23)
    expected = np.clip(theirs.predict(np.array(p)), least, 1 - least)
    np.testing.assert_allclose(interpolated(p, points), expected, atol=1e-9)
    assert (np.diff(interpolated(places, points)) >= -1e-12).all()


def test_selection_by_hand() -> None:
    """Of 100 answers the surest 60 are right, then every second one: 100 in steps of five."""
    p = np.linspace(1, 0.01, 100)
    y = np.array([1.0] * 60 + [0.0, 1.0] * 20)
    # 22 without an error show .1 with 90 % certainty, so the first try is 25; 75 with 8 wrong have a bound above .1.
    passing = [k for k in range(25, 101, 5) if binom.cdf((1 - y[:k]).sum(), k, 0.1) <= 1 - LEVEL]
    assert passing == [25, 30, 35, 40, 45, 50, 55, 60, 65]
    found = select(p, y, 0.1)
    assert (found.threshold, found.kept, found.wrong, found.n) == (pytest.approx(p[64]), 65, 3, 100)
    assert found.reachable == pytest.approx(1 - 0.1 ** (1 / 60))
    assert select(p, y, 0.03).threshold is None
    assert select(p, y, 0.03).reachable == found.reachable
    assert select(p, y, 1.0).kept == 100


@pytest.mark.parametrize(
    ("p", "y", "risk", "threshold", "kept", "reachable"),
    [
        ([0.7] * 30, [1] * 30, 0.1, 0.7, 30, 0.0739),  # equal ones stay together
        ([0.9] * 15 + [0.7] * 15, [1] * 15 + [0] * 15, 0.2, 0.9, 15, 0.1423),
        ([0.9] * 5, [0] * 5, 0.5, None, 0, 1.0),
        ([0.9] * 5, [1] * 5, 0.1, None, 0, 0.3690),
        ([0.2], [1], 0.95, 0.2, 1, 0.9),
    ],
)
def test_selection_of_few(
    p: list[float], y: list[int], risk: float, threshold: float | None, kept: int, reachable: float
) -> None:
    found = select(p, y, risk)
    assert (found.threshold, found.kept) == (threshold, kept)
    assert found.reachable == pytest.approx(reachable, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
def test_selection_keeps_what_it_says(known: list[tuple[float, bool]], risk: float, rng: object) -> None:
    found = select(*zip(*known, strict=True), risk)
    assert (found.threshold is not None) == (found.reachable <= risk + 1e-9)
    if found.threshold is not None:
        kept = [right for p, right in known if p >= found.threshold]
        assert (len(kept), kept.count(False)) == (found.kept, found.wrong)
        assert binom.cdf(found.wrong, found.kept, risk) <= 1 - LEVEL + 1e-6
    if found.reachable < 1:
        assert select(*zip(*known, strict=True), found.reachable).threshold is not None
    rng.shuffle(known)
    assert select(*zip(*known, strict=True), risk) == found


def test_the_risk_holds_with_the_chance_that_is_promised() -> None:
    """Of 400 calibrations at most 10 % may let the true error exceed the risk, within four standard errors."""
    rng = np.random.default_rng(2)
    risk, draws, failed, given_any = 0.2, 400, 0, 0
    for _ in range(draws):
        p = rng.random(300)
        found = select(p, rng.random(300) < p, risk)  # the true error above t is (1 - t) / 2
        if found.threshold is not None:
            given_any += 1
            failed += (1 - found.threshold) / 2 > risk
    assert given_any > draws / 2
    assert failed / draws <= 1 - LEVEL + 4 * (LEVEL * (1 - LEVEL) / draws) ** 0.5


@pytest.mark.parametrize(
    ("score", "u", "expected"),
    [
        ("lac", 0.0, [0.4, 0.9, 0.7]),
        ("lac", 0.9, [0.4, 0.9, 0.7]),
        ("aps", 0.0, [0.0, 0.9, 0.6]),
        ("aps", 0.5, [0.3, 0.95, 0.75]),
    ],
)
def test_strangeness_by_hand(score: SetScore, u: float, expected: list[float]) -> None:
    assert strangeness(score, [0.6, 0.1, 0.3], u) == pytest.approx(expected)


@given(st.sampled_from(["lac", "aps"]), st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1))
def test_the_likelier_is_never_stranger_and_nothing_is_stranger_than_1(
    score: SetScore, raw: list[float], u: float
) -> None:
    p = np.array(raw) / max(1.0, sum(raw))
    found = strangeness(score, p, u)
    assert ((found >= -1e-9) & (found <= 1)).all()
    assert (np.diff(found[np.argsort(-p, kind="stable")]) >= -1e-9).all()


def test_the_quantile_by_hand() -> None:
    scores = [n / 100 for n in range(100)]
    assert quantile(scores, 0.9) == Quantile(value=0.90, n=100)  # the 91st of 101
    assert quantile(scores[:9], 0.9) == Quantile(value=0.08, n=9)  # the 9th of 10
    assert quantile(scores[:8], 0.9) == Quantile(value=1.0, n=8)
    assert quantile([], 0.9) == Quantile(value=1.0, n=0)


@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=40), st.floats(0.05, 0.95))
def test_a_truth_is_no_stranger_than_the_quantile_of_the_others_as_often_as_promised(
    scores: list[float], coverage: float
) -> None:
    """The lemma behind the guarantee, on every choice of the new one among n + 1 that could as well be any."""
    held = sum(one <= quantile(scores[:i] + scores[i + 1 :], coverage).value for i, one in enumerate(scores))
    assert held >= coverage * len(scores) - 1e-6


def test_groups_have_their_own_quantile_where_they_are_large_enough() -> None:
    scores = [*[n / 100 for n in range(20)], *[n / 10 for n in range(8)], *[0.85] * 3, 0.99]
    groups = [*["a"] * 20, *["b"] * 8, *["c"] * 3, ""]
    assert quantiles(scores, groups, 0.9) == {
        "": quantile(scores, 0.9),
        "a": Quantile(value=0.18, n=20),
        "b": Quantile(value=0.99, n=12),  # b, c and the one without a group together
        "c": Quantile(value=0.99, n=12),
    }
    few = quantiles(scores[:23], groups[:20] + ["b"] * 3, 0.9)
    assert few["b"] == few[""] == Quantile(value=0.19, n=23)


def test_lots_are_spread_evenly_and_depend_on_the_id_alone() -> None:
    drawn = np.array([lot(f"case-{n}") for n in range(10_000)])
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert (abs(counts - 1000) < 150).all()
    assert lot("case-1") == lot("case-1") != lot("case-2")
    assert 0 <= lot("\ud800 病") < 1


class Known(ClassifierMixin, BaseEstimator):
    """Its features are the probabilities."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Known":
        self.classes_ = np.arange(x.shape[1])
        self.fitted_ = True
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x.argmax(axis=1)

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return x


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_sets_are_those_of_mapie(score: SetScore, coverage: float) -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.full(6, 0.5), 500)
    y = np.array([rng.choice(6, p=row) for row in p])
    known, new = slice(0, 300), slice(300, 500)
    seed = 7
    mapie = SplitConformalClassifier(
        Known().fit(p, y), confidence_level=coverage, conformity_score=score, prefit=True, random_state=seed
    )
    mapie.conformalize(p[known], y[known])
    more = {"conformity_score_params": {"include_last_label": "randomized"}} if score == "aps" else {}
    _, theirs = mapie.predict_set(p[new], **more)

    def drawn(n: int) -> np.ndarray:  # MAPIE's u is the share that is taken off, ours the one that stays
        return 1 - np.random.RandomState(seed).uniform(size=n)

    truths = [strangeness(score, row, u)[true] for row, u, true in zip(p[known], drawn(300), y[known], strict=True)]
    limit = quantile(truths, coverage).value
    ours = np.array([strangeness(score, row, u) <= limit + 1e-12 for row, u in zip(p[new], drawn(200), strict=True)])
    np.testing.assert_array_equal(ours, theirs[:, :, 0])
    assert 0 < ours.mean() < 1
