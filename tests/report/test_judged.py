"""Figures of a judge from verdicts worked by hand."""

import pytest
from rich.console import Console

from preceptor.core.records import Failure, FailureKind
from preceptor.report import judged
from preceptor.tasks.judging import Criterion, Flaw, HumanVerdict, Judged, Rubric, Verdict

RUBRIC = Rubric("own", (Criterion(id="a", points=1, criterion="a"), Criterion(id="b", points=-3, criterion="b")), "")


def score(name, value, **parts):
    said = ({key: Verdict(met=bool(part)) for key, part in parts.items()},)
    return Judged(case_id=name, model="m", value=value, parts=parts, said=said)


def test_the_mean_is_clipped_and_no_score_is():
    low = judged.of_rubric([score("1", -3, a=0, b=1), score("2", -2, a=1, b=1)], RUBRIC, 0)["score"]
    assert low == {"value": 0, "low": 0, "high": 0, "n": 2}
    mixed = judged.of_rubric([score("1", 1, a=1, b=0)] * 9 + [score("2", -2, a=1, b=1)], RUBRIC, 0)["score"]
    assert mixed["value"] == pytest.approx(0.7)


def test_a_failed_reply_counts_for_each_criterion():
    said = (Failure(kind=FailureKind.TIMEOUT), {"a": Verdict(met=True), "b": Verdict(flaw=Flaw.MISSING)})
    one = Judged(case_id="1", model="m", value=None, unscored="incomplete", parts={"a": 1, "b": None}, said=said)
    row = judged.of_rubric([one], RUBRIC, 0)
    assert row["flaws"] == {"timeout": 2, "missing": 1}
    assert (row["validity"]["value"], row["validity"]["n"]) == (0.25, 1)
    assert (row["score"], row["criteria"]["b"], row["repeat_agreement"]) == ({}, {}, {})


def person(name, criterion, *, met):
    return HumanVerdict(case_id=name, criterion=criterion, met=met, model="m")


def test_people_meet_the_majority_of_repeats():
    scores = {
        ("m", "1", 0): score("1", 1, a=2 / 3, b=1 / 3),
        ("m", "2", 0): score("2", None, a=0.5, b=None),
        ("m", "3", 0): Judged(case_id="3", model="m", value=None, unscored="unparsed"),
    }
    people = [person("1", "a", met=True), person("1", "b", met=True), person("1", "b", met=False)]
    people += [person("2", "a", met=True), person("2", "b", met=True), person("3", "a", met=True)]
    row = judged.against(people, scores, 0)
    assert row["human"] == {"verdicts": 3, "unjudged": 3}
    assert (row["bias"]["value"], row["bias"]["n"]) == (pytest.approx(-1 / 3), 1)
    assert judged.against([], scores, 0) == {}
    assert judged.against(people[3:], scores, 0)["kappa"] == {}


def test_what_cannot_be_known_is_a_dash():
    figures = {"m": judged.of_rubric([score("1", 1, a=1, b=0)], RUBRIC, 0), "n": judged.of_rubric([], RUBRIC, 0)}
    console = Console(width=100)
    with console.capture() as shown:
        console.print(judged.table(figures, RUBRIC.criteria, "en"))
    (line,) = [line for line in shown.get().splitlines() if line.strip().startswith("score")]
    assert line.split() == ["score", "1.00", "1.00", "to", "1.00,", "n=1", "–"]
