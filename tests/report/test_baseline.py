"""The three yardsticks."""

import json

import pytest

from preceptor.core.records import Diagnosis, Row
from preceptor.report.baseline import BAG_OF_WORDS, EXACT, BagOfWords, commonest, exact, labelled
from preceptor.tasks.prompts import load
from tests.report.made import case

LABELS = [("wheezing at night", ["Asthma"]), ("burning urine", ["Cystitis"]), ("seen in clinic", [])] * 8


def test_it_learns_words_and_when_to_abstain() -> None:
    cases = [case(1, text="wheezing, productive cough"), case(2, text="seen in clinic productive cough")]
    asthma, unclear = BagOfWords(LABELS).predict(cases)
    assert asthma.output is not None
    assert asthma.model == BAG_OF_WORDS
    assert list(asthma.confidence) == ["Asthma"]
    assert 0 < asthma.confidence["Asthma"] < 1
    assert unclear.abstained


def test_it_names_every_disease_that_is_likely() -> None:
    both = [("fever and wheeze", ["Asthma", "Influenza"]), ("quiet", ["Migraine"])] * 10
    (found,) = BagOfWords(both).predict([case(1, text="fever and wheeze, productive cough")])
    assert set(found.confidence) == {"Asthma", "Influenza"}


@pytest.mark.parametrize("labels", [[], [("cough", ["Asthma"])], [("cough", []), ("fever", [])]])
def test_it_copes_with_little(labels: list[tuple[str, list[str]]]) -> None:
    found = list(BagOfWords(labels).predict([case(1)]))
    assert len(found) == bool(labels)


def test_labels_come_from_the_training_rows() -> None:
    prompt = load("diagnosis", "zero_shot", "en")
    reply = json.dumps({"diseases": ["Asthma"], "reason": []})
    rows = [
        Row(id="1", messages=prompt.render("wheeze"), answer=reply, case_id="1"),
        Row(id="2", messages=prompt.render("cough"), answer="no answer at all {", case_id="2"),
    ]
    assert ("wheeze", ("Asthma",)) in list(labelled(rows))


def test_exact_names_what_is_likely_in_order_and_abstains_when_due() -> None:
    chances = {"Asthma": 0.55, "Influenza": 0.7, "Migraine": 0.1}
    cases = [
        case(1, differential=chances),
        case(2, differential={"Asthma": 0.3, "Influenza": 0.4}),
        case(3, differential={"Asthma": 0.2}, abstain=True),
        case(4),
    ]
    found = list(exact(cases))
    assert [p.model for p in found] == [EXACT] * 3
    assert [list(p.confidence.items()) for p in found] == [
        [("Influenza", 0.7), ("Asthma", 0.55)],
        [("Influenza", 0.4)],
        [],
    ]
    assert found[2].abstained


def test_the_commonest_disease_is_named_every_time() -> None:
    cases = [case(i) for i in range(2)]
    labels = [("a", ("cold",)), ("b", ("asthma", "cold")), ("c", ()), ("d", ("asthma",)), ("e", ("cold",))]
    found = list(commonest(labels, cases))
    assert [p.output for p in found] == [Diagnosis(diseases=("cold",))] * 2
    assert [p.confidence for p in found] == [{"cold": 0.6}] * 2
    (unsure, _) = commonest([("a", ()), ("b", ()), ("c", ("cold",))], cases)
    assert unsure.abstained
    assert not list(commonest([], cases))
