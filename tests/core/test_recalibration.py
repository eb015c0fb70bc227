"""Recalibration of a teacher's tokens: by hand, by what it keeps, and by what was planted and must be found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from preceptor.core.confidence import LEAST
from preceptor.core.recalibration import METHODS, Method, Observation, Recalibrated, Recalibration, fit, recalibrated

NONE = -np.inf
FIVE = [0.90, 0.05, 0.02, 0.01, 0.005]


def applied(method: Method, value: float, p: list[float], rest: float) -> tuple[list[float], float]:
    with np.errstate(divide="ignore"):
        logs, others = Recalibration(method=method, value=value).apply(np.log([p]), np.array([rest]))
    return np.exp(logs)[0].tolist(), float(others[0])


@pytest.mark.parametrize(
    ("method", "value", "p", "rest", "expected", "left"),
    [
        ("temperature", 1.0, FIVE, 0.015, FIVE, 0.015),
        ("temperature", 2.0, [0.64, 0.16], 0.04, [0.8 / 1.4, 0.4 / 1.4], 0.2 / 1.4),  # .2 and .2 would be .4 of it
        ("temperature", 0.5, [0.5, 0.25], 0.25, [4 / 6, 1 / 6], 1 / 6),
        ("temperature", 3.0, [1.0, 0.0, 0.0], 0.0, [1, 0, 0], 0),
        ("temperature", 1.0, [0.6, 0.2], 0.0, [0.75, 0.25], 0),  # mass that got lost in rounding
        ("resoftmax", 1.0, FIVE, 0.015, [0.376, 0.161, 0.156, 0.154, 0.154], 0),
        ("resoftmax", 0.3, FIVE, 0.015, [0.824, 0.048, 0.044, 0.042, 0.042], 0),
        ("resoftmax", 0.2, FIVE, 0.015, [0.953, 0.014, 0.012, 0.011, 0.011], 0),
        ("resoftmax", 0.3, [1.0, 0.0, 0.0], 0.0, [1, 0, 0], 0),
        ("resoftmax", 0.3, [1.0, *[1e-9] * 4], 0.0, [0.875, *[0.0312] * 4], 0),
        ("resoftmax", 0.001, [0.9, 0.1], 0.0, [1, 0], 0),
        ("smoothing", 0.1, [0.8, 0.1], 0.1, [0.77, 0.14], 0.09),
        ("smoothing", 0.1, [0.8, 0.1, 0.0], 0.1, [0.77, 0.14, 0], 0.09),
        ("smoothing", 0.5, [1.0, 0.0, 0.0], 0.0, [1, 0, 0], 0),
        ("smoothing", 0.0, FIVE, 0.015, FIVE, 0.015),
        ("smoothing", 1.0, [0.8, 0.1], 0.1, [0.5, 0.5], 0),
    ],
)
def test_by_hand(method: Method, value: float, p: list[float], rest: float, expected: list[float], left: float) -> None:
    tokens, others = applied(method, value, p, rest)
    assert tokens == pytest.approx(expected, abs=6e-4)
    assert others == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_what_is_certain_or_not_known_stays_so(method: Method, kind: type) -> None:
    logs = np.array([[0, NONE, NONE], [NONE, NONE, NONE], [-1, -1, NONE]], kind)
    rest = np.array([0, 0.7, 1 - 2 / np.e], kind)
    with np.errstate(all="raise", under="ignore"):
        tokens, others = Recalibration(method=method, value=0.3).apply(logs, rest)
    assert (tokens.dtype, others.dtype) == (kind, kind)
    np.testing.assert_array_equal(tokens[:2], logs[:2])
    np.testing.assert_array_equal(others[:2], rest[:2])
    assert np.isneginf(tokens[2, 2])


@st.composite
def positions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Beliefs in single precision, some tokens of no probability, of mass 1 with the rest."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    tokens = draw(arrays.arrays(np.float32, shape, elements=st.floats(-40, 0, width=32) | st.just(NONE)))
    rest = draw(arrays.arrays(np.float64, shape[0], elements=st.floats(0, 1)))
    mass = np.exp(tokens.astype(float)).sum(axis=1) + rest
    mass = np.where(mass > 0, mass, 1)
    return (tokens - np.log(mass)[:, None]).astype(np.float32), (rest / mass).astype(np.float32)


@given(positions(), st.sampled_from(METHODS), st.floats(0.05, 1))
def test_the_mass_is_one_and_the_order_stays(seen: tuple[np.ndarray, np.ndarray], method: Method, value: float) -> None:
    logs, rest = seen
    tokens, others = Recalibration(method=method, value=value).apply(logs, rest)
    known = np.isfinite(logs).any(axis=1)
    np.testing.assert_allclose(np.exp(tokens.astype(float)).sum(axis=1)[known] + others[known], 1, atol=1e-5)
    assert (others >= 0).all()
    for before, after in zip(logs, tokens, strict=True):
        assert (np.diff(after[np.argsort(before, kind="stable")].clip(-1e9)) >= -1e-4).all()


@given(positions())
def test_a_temperature_of_one_changes_nothing(seen: tuple[np.ndarray, np.ndarray]) -> None:
    logs, rest = seen
    tokens, others = Recalibration(method="temperature", value=1).apply(logs, rest)
    np.testing.assert_allclose(tokens, logs, atol=1e-4)
    np.testing.assert_allclose(others, rest, atol=1e-5)


def world(n: int, believed: float, seed: int = 1, known: int = 5) -> list[Observation]:
    """Positions with ten outcomes, of which five are told, by a teacher whose temperature is off by a factor."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(10, 0.4), n)
    right = [int(rng.choice(10, p=row)) for row in p]
    said = np.maximum(p, 1e-30) ** believed
    said /= said.sum(axis=1, keepdims=True)
    seen = []
    for place, (row, truth) in enumerate(zip(said, right, strict=True)):
        best = np.argsort(-row)[:known]
        seen.append(
            Observation(
                group=f"c{place}",
                logprobs=tuple(np.log(row[best]).tolist()),
                ways=tuple(range(known)),
                right=best.tolist().index(truth) if truth in best else None,
                rest=float(1 - row[best].sum()),
            )
        )
    return seen


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.0])
def test_the_temperature_that_was_planted_is_found(planted: float) -> None:
    """All outcomes are told, since what many others in one are worth is not their own power."""
    assert fit(world(4000, planted, known=10), "temperature").value == pytest.approx(planted, rel=0.05)


@pytest.mark.parametrize(("believed", "known", "sign"), [(2.5, 5, 1), (0.4, 10, -1)])
def test_a_teacher_too_sure_or_too_unsure_is_mended(believed: float, known: int, sign: int) -> None:
    found = recalibrated(world(1500, believed, known=known), "temperature", "t", 5)
    assert (found.n, found.cases, found.chosen.method) == (1500, 1500, "temperature")
    assert sign * (found.chosen.value - 1) > 0.2
    after = found.methods["temperature"].after
    assert found.before.ece > 2 * found.before.ece_floor
    assert after.ece < found.before.ece / 2
    assert after.nll < found.before.nll
    assert found.methods["resoftmax"].after.ece < found.before.ece
    assert sum(one.n for one in after.reliability) == 1500
    assert (found.methods["smoothing"].value > 0.01) == (sign > 0)
    assert Recalibrated.model_validate_json(found.model_dump_json()) == found


def test_an_honest_teacher_stays_as_it_is() -> None:
    found = recalibrated(world(3000, 1.0, known=10), "smoothing", "t", 10)
    assert found.methods["temperature"].value == pytest.approx(1, abs=0.05)
    assert found.chosen == Recalibration(method="smoothing", value=found.methods["smoothing"].value)
    assert found.chosen.value < 0.01
    assert found.before.ece < 2 * found.before.ece_floor


def test_the_grid_is_that_of_first() -> None:
    found = fit(world(300, 2.0), "resoftmax").value
    assert 0 < found <= 1
    assert round(found / 0.02, 6) == round(found / 0.02)


def test_tokens_that_say_the_same_are_one_and_the_rest_is_never_the_answer() -> None:
    seen = [
        Observation(group=f"c{n}", logprobs=tuple(np.log([0.3, 0.35, 0.25])), ways=(0, 1, 0), right=right, rest=0.1)
        for n, right in enumerate((0, 0, 1, None))
    ]
    (only,) = recalibrated(seen, "temperature", "t", 5).before.reliability
    assert (only.confidence, only.accuracy, only.n) == (pytest.approx(0.55), 0.5, 4)
    assert recalibrated(seen, "temperature", "t", 5).before.nll == pytest.approx(
        -np.log([0.55, 0.55, 0.35, 0.1]).mean()
    )
    lost = [Observation(group=f"c{n}", logprobs=(0.0,), ways=(0,), right=None, rest=0.0) for n in range(9)]
    assert recalibrated(lost, "resoftmax", "t", 5).methods["resoftmax"].after.nll == pytest.approx(-np.log(LEAST))


def test_positions_of_one_case_are_never_on_both_sides() -> None:
    """Ten cases with copies: a constant that had seen the copies would fit them better."""
    apart = world(10, 3.0)
    copies = [one for one in apart for _ in range(20)]
    one, many = (recalibrated(seen, "temperature", "t", 5).methods["temperature"].after for seen in (apart, copies))
    assert many.nll == pytest.approx(one.nll, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "value"),
    [("temperature", 0), ("resoftmax", 0), ("smoothing", 1.5), ("smoothing", -1), ("temperature", NONE)],
)
def test_a_constant_out_of_range_is_refused(method: Method, value: float) -> None:
    with pytest.raises(ValidationError):
        Recalibration(method=method, value=value)
