"""Agreement of raters: by hand, and as scikit-learn has it."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, f1_score

from preceptor.core.agreement import agreeing, balanced_f1, bias, kappa, share, tally
from preceptor.core.statistics import estimate

VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def of(statistic, verdicts):
    return float(statistic(np.array([tally(verdicts)], dtype=float))[0])


def test_by_hand():
    # 4 both, 1 the first alone, 2 the second alone, 3 neither: agreement .7, chance .5 * .6 + .5 * .4 = .5.
    verdicts = [(True, True)] * 4 + [(True, False)] + [(False, True)] * 2 + [(False, False)] * 3
    assert tally(verdicts) == (4, 1, 2, 3)
    assert of(kappa, verdicts) == pytest.approx(0.4)
    assert of(balanced_f1, verdicts) == pytest.approx((8 / 11 + 6 / 9) / 2)
    assert of(bias, verdicts) == pytest.approx(-0.1)


@given(VERDICTS)
def test_as_scikit_learn_has_it(verdicts):
    first, second = zip(*verdicts, strict=True)
    expected = f1_score(second, first, labels=[False, True], average="macro", zero_division=0)
    assert of(balanced_f1, verdicts) == pytest.approx(expected)
    if len({*first, *second}) > 1:
        assert of(kappa, verdicts) == pytest.approx(cohen_kappa_score(first, second), abs=1e-9)
    else:
        assert of(kappa, verdicts) == 0
    assert of(bias, verdicts) == pytest.approx(np.mean(first) - np.mean(second))


@given(VERDICTS)
def test_what_swapping_raters_changes(verdicts):
    swapped = [pair[::-1] for pair in verdicts]
    assert of(kappa, swapped) == pytest.approx(of(kappa, verdicts))
    assert of(balanced_f1, swapped) == pytest.approx(of(balanced_f1, verdicts))
    assert of(bias, swapped) == pytest.approx(-of(bias, verdicts))


@given(st.lists(st.sampled_from([True, False, 0.5]), max_size=8))
def test_repeats_agree_pair_by_pair(repeats):
    pairs = list(combinations(repeats, 2))
    assert agreeing(repeats) == (sum(a == b for a, b in pairs), len(pairs))


def test_cases_are_resampled_whole():
    tallies = [tally([(True, True), (True, False)])] * 30
    assert estimate(tallies, bias).model_dump() == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 30}
    assert estimate([(1, 4), (3, 4)], share).value == 0.5
