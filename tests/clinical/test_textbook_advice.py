"""The textbook's advice, by the rules that grade everybody's."""

import re

import numpy as np
import pytest

from preceptor.clinical.safety import dismissals, risky_prescription, urgent
from preceptor.clinical.textbook.advice import advise
from preceptor.clinical.textbook.book import Style
from preceptor.clinical.textbook.exact import Choice, exact
from preceptor.clinical.textbook.sampler import draw, sample
from preceptor.core.records import Consultation, Language
from preceptor.tasks import consult

LANGUAGES: tuple[Language, ...] = ("zh", "en")


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("style", ["full", "short"])
def test_gold_advice_is_worth_one_and_urgent_where_it_must_be(language: Language, style: Style) -> None:
    called = 0
    for case in draw(120, 13, language, style, "consult"):
        assert isinstance(case.gold, Consultation)
        must = bool(case.meta["red_flags"]) or case.meta["risk_level"] == "critical"
        assert bool(urgent(case.gold.answer)) == must, case.gold.answer
        assert not (must and dismissals(case.gold.answer))
        assert not risky_prescription(case.gold.answer, case.text)
        assert consult.grade(case.gold, case).value == 1.0, (case.text, case.gold)
        assert consult.parse(consult.canonical(case.gold)).output == case.gold
        called += must
    assert 30 < called < 60


def test_a_consult_case_is_the_diagnosis_case_with_advice() -> None:
    for one, other in zip(sample(30, 4, "en"), draw(30, 4, "en", task="consult"), strict=True):
        kept = {"gold": None, "meta": {}}
        assert one.model_copy(update=kept) == other.model_copy(update=kept)
        assert one.gold is not None
        assert set(other.meta["red_flags"]) <= set(one.meta["red_flags"])
        for name in one.gold.diseases:
            assert name[1:] in other.gold.answer


@pytest.mark.parametrize(
    ("text", "language", "told"),
    [
        ("女，46岁，反酸12天。\n伴烧心；无干咳。", "zh", ["“反酸”", "女性患者，46岁", "“无干咳”"]),
        ("男，9岁，发热2天。\n现病史: 咳嗽；否认头痛、寒战。", "zh", ["“发热”", "没有“寒战”"]),
        (
            "Man, 60, chest tightness for 2 days.\nAlso fever; denies chills, headache.",
            "en",
            ["“fever”", "no “headache”"],
        ),
        ("Nothing that it has words for", "en", ["no single disease|several diseases|any one disease"]),
    ],
)
def test_thinking_says_what_the_record_says(text: str, language: Language, told: list[str]) -> None:
    answerer = exact()
    reading = answerer.reader.read(text)
    diseases = answerer.choice(answerer.believe(text, reading))
    likeliest = next(iter(answerer.posterior(text).marginals))
    advice = advise(answerer, text, reading, diseases.options[diseases.best], likeliest, language)
    assert all(re.search(words, advice.think) for words in told), advice.think


@pytest.mark.parametrize(
    ("marginals", "named"),
    [
        ({("asthma",): 0.6, ("copd",): 0.4}, ("asthma",)),
        ({("asthma", "influenza"): 0.7, ("asthma",): 0.3}, ("asthma", "influenza")),
        ({("asthma", "influenza"): 0.34, ("asthma", "gord"): 0.33, ("influenza", "gord"): 0.33}, 2),
        ({("asthma",): 0.5, ("copd",): 0.5}, 1),
        ({("asthma",): 0.44, ("copd",): 0.3, ("influenza",): 0.26}, 0),
    ],
)
def test_the_best_answer_is_a_hypothesis_or_none(marginals, named) -> None:
    """Also where three diseases are likely, or two that never occur together."""
    answerer = exact()
    third = next(d for d in ("gerd", "reflux", "gord", *answerer.book.diseases) if d in answerer.book.diseases)
    wanted = {frozenset(third if d == "gord" else d for d in h): p for h, p in marginals.items()}
    hypotheses = answerer.world.hypotheses
    probabilities = np.array([wanted.get(frozenset(h), 0.0) for h in hypotheses])
    posterior = answerer.world.believed(probabilities)
    best = answerer.world.exact(posterior)
    choice = answerer.choice(posterior)
    assert choice.options[choice.best] == best
    assert choice.probabilities.sum() == pytest.approx(1)
    assert (best if isinstance(named, tuple) else len(best)) == named


def test_options_that_read_alike_are_one() -> None:
    choice = Choice(("a", "b", "c"), np.array([0.2, 0.5, 0.3]), best=2).said(["x", "y", "x"])
    assert choice.options == ("x", "y")
    assert choice.probabilities.tolist() == [0.5, 0.5]
    assert choice.best == 0
