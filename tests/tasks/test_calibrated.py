"""What a calibration makes of an answer, by hand, and what it promises, on cases of the textbook."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import betabinom

from preceptor.clinical.textbook.exact import exact
from preceptor.clinical.textbook.sampler import sample
from preceptor.core.calibration import Quantile, Selection, SetScore, lot, tempered
from preceptor.core.records import OTHER, Case, Diagnosis, Failure, FailureKind, Prediction, Sampling
from preceptor.core.statistics import ece, ece_estimate, ece_floor
from preceptor.tasks import prompts
from preceptor.tasks.calibrated import (
    Answered,
    Calibration,
    Calibrations,
    Curve,
    Wanted,
    answered,
    apply,
    covers,
    digest,
    fit,
    least,
    outcomes,
    way,
)
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.strategies import Asking

ASTHMA, PNEUMONIA, INFLUENZA = "Bronchial asthma", "Community-acquired pneumonia", "Influenza"
TEXT = "Man, 70, breathlessness on exertion for 7 days."
WAY = {"strategy": "zero_shot", "confidence": "chain"}


def case(*gold: str, identity: str = "c", text: str = TEXT, specialty: str = "respiratory") -> Case:
    return Case(
        id=identity,
        text=text,
        language="en",
        source="test",
        group=identity,
        meta={"specialty": specialty},
        gold=Diagnosis(diseases=gold),
    )


def said(
    confidence: dict[str, float], distribution: dict[str, float] | None = None, diseases: tuple[str, ...] | None = None
) -> Prediction:
    output = Diagnosis(diseases=tuple(confidence) if diseases is None else diseases)
    return Prediction(
        case_id="c",
        model="m",
        prompt_sha="0" * 64,
        output=output,
        confidence=confidence,
        distribution=distribution or {},
    )


def calibration(
    *, temperature: float = 2.0, threshold: float | None = None, sets: SetScore = "lac", **quantiles: float
) -> Calibration:
    return Calibration(
        asked=digest(WAY),
        way=WAY,
        weights="w",
        n=99,
        wanted=Wanted(sets=sets),
        first=Curve(temperature=temperature),
        later=Curve(points=((0.0, 0.1), (1.0, 0.5))),
        selection=Selection(threshold=threshold, n=99, reachable=0.1),
        quantiles={name if name != "rest" else "": Quantile(value=q, n=99) for name, q in quantiles.items()},
    )


def test_confidences_become_probabilities_each_by_its_place() -> None:
    found = apply(calibration(), said({ASTHMA: 0.8, PNEUMONIA: 0.6}), case(ASTHMA))
    assert found.confidence == pytest.approx({ASTHMA: 2 / 3, PNEUMONIA: 0.34})
    assert found.uncalibrated == {ASTHMA: 0.8, PNEUMONIA: 0.6}
    assert found.output == Diagnosis(diseases=(ASTHMA, PNEUMONIA))
    assert (found.prediction_set, found.withheld) == (None, None)


@pytest.mark.parametrize(
    ("threshold", "withheld"),
    [(0.66, False), (float(tempered(0.8, 2.0)), False), (0.67, True)],
)
def test_an_answer_below_the_threshold_is_withheld(threshold: float, withheld: bool) -> None:
    before = said({ASTHMA: 0.8})
    found = apply(calibration(threshold=threshold), before, case(ASTHMA))
    assert found.abstained == withheld
    assert (found.withheld is not None) == withheld
    if found.withheld:
        assert found.withheld.output == before.output
        assert (found.withheld.confidence, found.withheld.threshold) == (pytest.approx(2 / 3), threshold)
        assert found.withheld.ask == "exertional chest pain"
    assert Prediction.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("name", "text", "language", "ask"),
    [
        (ASTHMA, "男，70岁，活动后气促7天。", "zh", "劳力性胸痛"),
        ("Dengue fever", TEXT, "en", ""),
        (ASTHMA, "主诉: 乙肝阳性", "zh", ""),
    ],
)
def test_what_to_ask_is_told_where_the_textbook_knows_it(name: str, text: str, language: str, ask: str) -> None:
    asked = case(ASTHMA, text=text).model_copy(update={"language": language})
    found = apply(calibration(threshold=0.99), said({name: 0.5}), asked)
    assert found.withheld is not None
    assert found.withheld.ask == ask


def test_an_answer_of_unknown_confidence_has_no_set_and_is_withheld_where_a_threshold_is() -> None:
    unknown = said({}, diseases=(ASTHMA,))
    assert apply(calibration(rest=1.0), unknown, case(ASTHMA)) == unknown
    found = apply(calibration(threshold=0.2, rest=1.0), unknown, case(ASTHMA))
    assert found.withheld is not None
    assert (found.withheld.confidence, found.prediction_set) == (0.0, None)
    assert apply(calibration(), found, case(ASTHMA)) == unknown, "under another calibration it is given again"


def test_failures_and_abstentions_of_the_models_own_stay() -> None:
    failed = Prediction(
        case_id="c", model="m", prompt_sha="0", failure=Failure(kind=FailureKind.UNPARSED, detail="why")
    )
    for before in (failed, said({}), said({}, {"": 0.9, ASTHMA: 0.1}, ())):
        assert apply(calibration(threshold=0.9, rest=0.5), before, case(ASTHMA)) is before


@pytest.mark.parametrize(
    ("prediction", "limit", "expected"),
    [
        (said({ASTHMA: 0.7}), 0.5, (ASTHMA,)),
        (said({ASTHMA: 0.7}), 0.7, (ASTHMA, OTHER)),
        (said({ASTHMA: 0.2}), 0.5, (OTHER,)),
        (said({ASTHMA: 0.7, PNEUMONIA: 0.5}), 0.85, (ASTHMA, PNEUMONIA, OTHER)),  # .5 of the .3 that were left
        (said({ASTHMA: 0.6}, {ASTHMA: 0.5, INFLUENZA: 0.3, "": 0.1}), 0.6, (ASTHMA,)),
        (said({ASTHMA: 0.6}, {ASTHMA: 0.5, INFLUENZA: 0.3, "": 0.1}), 0.75, (ASTHMA, INFLUENZA)),
        (said({ASTHMA: 0.6}, {ASTHMA: 0.5, INFLUENZA: 0.3, "": 0.1}), 1.0, (ASTHMA, INFLUENZA, OTHER)),
        (said({ASTHMA: 0.6}, {ASTHMA: 0.5, INFLUENZA: 0.3}), 0.1, (ASTHMA,)),  # it would be empty
    ],
)
def test_sets_by_hand(prediction: Prediction, limit: float, expected: tuple[str, ...]) -> None:
    assert apply(calibration(rest=limit), prediction, case(ASTHMA)).prediction_set == expected


def test_a_set_goes_by_the_quantile_of_its_group_and_by_the_lot_of_its_case() -> None:
    by_group = calibration(rest=0.5, respiratory=0.7)
    assert apply(by_group, said({ASTHMA: 0.7}), case(ASTHMA)).prediction_set == (ASTHMA, OTHER)
    assert apply(by_group, said({ASTHMA: 0.7}), case(ASTHMA, specialty="urology")).prediction_set == (ASTHMA,)
    # aps: of the second class .7 + u * .3 is the strangeness, so it is in for a lot of at most 2/3.
    drawn = calibration(sets="aps", rest=0.9)
    for identity in map(str, range(20)):
        found = apply(drawn, said({ASTHMA: 0.7}), case(ASTHMA, identity=identity)).prediction_set
        assert found == ((ASTHMA, OTHER) if lot(identity) <= 2 / 3 else (ASTHMA,))


@pytest.mark.parametrize(
    ("gold", "held", "expected"),
    [
        ((ASTHMA,), (ASTHMA,), True),
        (("哮喘",), (ASTHMA,), True),
        ((ASTHMA,), (OTHER,), False),  # it has a name here
        ((INFLUENZA,), (OTHER,), True),
        ((INFLUENZA,), (ASTHMA,), False),
        ((INFLUENZA, PNEUMONIA), (PNEUMONIA,), True),
        ((INFLUENZA, PNEUMONIA), (OTHER,), False),
        ((), (OTHER,), True),
    ],
)
def test_what_covers_the_truth(gold: tuple[str, ...], held: tuple[str, ...], expected: bool) -> None:
    known = {ASTHMA: 0.6, PNEUMONIA: 0.2}
    found = said(known).model_copy(update={"uncalibrated": known, "prediction_set": held})
    assert covers(case(*gold), found) == expected


def test_outcomes_are_matched_one_to_one() -> None:
    both = said({ASTHMA: 0.6, PNEUMONIA: 0.2})
    namer = textbook_namer()
    assert outcomes(case(PNEUMONIA), both, namer) == [(ASTHMA, False), (PNEUMONIA, True)]
    assert outcomes(case("哮喘", INFLUENZA), both, namer) == [(ASTHMA, True), (PNEUMONIA, False)]
    twice = said({ASTHMA: 0.6, "Asthma": 0.5})
    assert [right for _, right in outcomes(case(ASTHMA), twice, namer)].count(True) == 1


def test_only_answers_with_gold_and_a_confidence_teach() -> None:
    assert answered(case(ASTHMA), said({ASTHMA: 0.6}))
    assert answered(case(), said({ASTHMA: 0.6}))
    assert not answered(case(ASTHMA), said({}))
    assert not answered(case(ASTHMA), said({PNEUMONIA: 0.2}, diseases=(ASTHMA, PNEUMONIA)))
    assert not answered(case(ASTHMA).model_copy(update={"gold": None}), said({ASTHMA: 0.6}))


def test_one_calibration_for_each_way_of_asking_these_weights() -> None:
    one = calibration()
    other_way = {**WAY, "confidence": "samples", "votes": 5}
    other = one.model_copy(update={"asked": digest(other_way), "way": other_way})
    both = Calibrations().with_(one).with_(other)
    assert (both.of("w", WAY), both.of("w", other_way)) == (one, other)
    assert both.of("v", WAY) is None
    assert both.of("w", {**WAY, "strategy": "two_stage"}) is None
    assert both.with_(one.model_copy(update={"weights": "v"})).by_way.keys() == {digest(WAY)}
    assert Calibrations.model_validate_json(both.model_dump_json()) == both


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"first": {"temperature": 0}}, "greater than 0"),
        ({"first": {"temperature": -2}}, "greater than 0"),
        ({"first": {"temperature": 2, "least": 0.9}}, "less than 0.5"),
        ({"first": {}}, "either a temperature or points"),
        ({"first": {"temperature": 2, "points": [[0, 0.1], [1, 0.9]]}}, "either a temperature or points"),
        ({"first": {"points": [[0, -3], [1, 7]]}}, "greater than or equal to 0"),
        ({"selection": {"threshold": 5, "n": 9, "reachable": 0.1}}, "less than or equal to 1"),
        ({"quantiles": {"ward": {"value": 0.5, "n": 9}}}, "none is for cases of other groups"),
    ],
)
def test_a_calibration_that_cannot_be_applied_is_not_read(change: dict[str, object], told: str) -> None:
    whole = calibration(threshold=0.5, rest=0.4).model_dump(mode="json")
    assert Calibration.model_validate(whole)
    with pytest.raises(ValidationError, match=told):
        Calibration.model_validate(whole | change)


def test_a_way_of_asking_is_all_that_confidence_hangs_on() -> None:
    asking = Asking(prompts.load("diagnosis", "zero_shot", "en"), "m", Sampling(), logprobs=0)
    ways = [
        way(asking, "zero_shot"),
        way(asking, "two_stage"),
        way(asking, "self_consistency"),
        way(Asking(asking.prompt, "m", Sampling(), logprobs=None), "zero_shot"),
        way(Asking(asking.prompt, "m", Sampling(), logprobs=0, constrained=False), "zero_shot"),
        way(Asking(asking.prompt, "m", Sampling(temperature=0.5), logprobs=0), "zero_shot"),
        way(Asking(prompts.load("diagnosis", "zero_shot", "zh"), "m", Sampling(), logprobs=0), "zero_shot"),
        way(asking, "zero_shot", examples={"shots": 3}),
        *(way(Asking(asking.prompt, "m", Sampling(), confidence=s), "zero_shot") for s in ("samples", "stated")),
        *(
            way(Asking(asking.prompt, "m", Sampling(), confidence="candidates", candidates=names), "zero_shot")
            for names in ((ASTHMA,), (ASTHMA, PNEUMONIA))
        ),
    ]
    assert len({digest(one) for one in ways}) == len(ways)
    longer = Asking(asking.prompt, "another name", Sampling(max_tokens=9), logprobs=0)
    assert digest(way(longer, "zero_shot")) == digest(ways[0])
    assert [least(one) for one in (ways[0], ways[2], ways[9])] == [1e-7, 1 / 12, 0.005]


# On cases of the textbook, asked of the exact answerer whose confidences are then exaggerated.

TARGET, RISK, POWER = 0.9, 0.06, 3.0


@pytest.fixture(scope="module")
def known() -> tuple[list[Answered], list[Answered]]:
    """Answers to learn from, and new ones: log-odds three times as large as they should be."""
    answers = [(one, over_confident(one)) for one in sample(2600, seed=5, language="en", style="short")]
    return answers[:1300], answers[1300:]


def over_confident(one: Case) -> Prediction:
    differential = one.differential or {}
    first = next(iter(differential))
    sharp = {name: p**POWER for name, p in differential.items() if p > 0.005}
    left = (1 - max(differential.values())) ** POWER
    total = sum(sharp.values()) + left
    distribution = {name: p / total for name, p in sharp.items()}
    confidence = float(tempered(differential[first], 1 / POWER))
    return said({first: confidence}, distribution).model_copy(update={"case_id": one.id})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_lowers_ece_on_new_cases_beyond_the_intervals(
    known: tuple[list[Answered], list[Answered]], method: str
) -> None:
    found = fit(known[0], Wanted(method=method, coverage=None), WAY, "w")
    before, after, right = [], [], []
    for one, prediction in known[1]:
        (name, true), *_ = outcomes(one, prediction, textbook_namer())
        before.append(prediction.confidence[name])
        after.append(apply(found, prediction, one).confidence[name])
        right.append(true)
    assert ece_estimate(after, right).high < ece_estimate(before, right).low
    if method == "temperature":  # steps have more to learn
        assert ece(after, right) < 2 * ece_floor(after)
        assert found.first.temperature == pytest.approx(POWER, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("chain", [False, True])
def test_sets_cover_new_cases_as_often_as_promised_overall_and_by_specialty(
    known: tuple[list[Answered], list[Answered]], score: SetScore, chain: bool
) -> None:
    """Of m new cases covered after n known ones there is a beta-binomial number, if scores do not tie."""
    learned, new = (
        [(one, p.model_copy(update={"distribution": {}}) if chain else p) for one, p in part] for part in known
    )
    found = fit(learned, Wanted(sets=score, coverage=TARGET), WAY, "w")
    settled = [(one, apply(found, prediction, one)) for one, prediction in new]
    by_group: dict[str, list[bool]] = defaultdict(list)
    for one, prediction in settled:
        by_group[one.meta["specialty"]].append(covers(one, prediction))
    sizes = [len(prediction.prediction_set or ()) for _, prediction in settled]
    assert min(sizes) == 1 < max(sizes)
    assert len(by_group) >= 6
    for name, covered in [*by_group.items(), ("", [one for part in by_group.values() for one in part])]:
        quantile = found.quantiles[name]
        rank = int(np.ceil((quantile.n + 1) * TARGET - 1e-9))
        expected = betabinom(len(covered), rank, quantile.n + 1 - rank)
        # Ten comparisons at .1 %. Sets that would be empty and hold the likeliest only add to coverage.
        assert expected.ppf(0.0005) <= sum(covered), name
        if score == "lac" and not chain:
            assert sum(covered) <= expected.ppf(0.9995), name


@pytest.mark.slow
def test_abstention_keeps_the_risk_on_new_cases(known: tuple[list[Answered], list[Answered]]) -> None:
    """Five calibrations, each on its own fifth, of which more than three miss the risk with a chance of .05 %."""
    learned, new = known
    everyone = np.array([outcomes(one, p, textbook_namer())[0][1] for one, p in new])
    failed, kept = 0, []
    for number in range(5):
        found = fit(learned[number::5], Wanted(risk=RISK, coverage=None), WAY, "w")
        given = np.array([not apply(found, p, one).abstained for one, p in new])
        kept.append(given.mean())
        failed += (1 - everyone[given].mean()) > RISK
    assert 1 - everyone.mean() > RISK
    assert 0.4 < np.mean(kept) < 1
    assert failed <= 3


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 20), st.floats(0, 1), st.sampled_from(["lac", "aps"]))
def test_what_is_applied_is_a_probability_and_no_set_is_empty(
    p: float, q: float, temperature: float, limit: float, score: SetScore
) -> None:
    found = apply(calibration(temperature=temperature, sets=score, rest=limit), said({ASTHMA: p, PNEUMONIA: q}), case())
    assert all(0 <= sure <= 1 for sure in found.confidence.values())
    assert found.prediction_set
    assert len(set(found.prediction_set)) == len(found.prediction_set)
    assert set(found.prediction_set) <= {ASTHMA, PNEUMONIA, OTHER}


def test_the_textbook_knows_what_is_used_here() -> None:
    namer = textbook_namer()
    assert all(namer.concept(name) in exact().book.diseases for name in (ASTHMA, PNEUMONIA, INFLUENZA))
