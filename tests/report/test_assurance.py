"""What a calibration promised and kept: figures by hand, and what the page shows of it."""

import pytest

from preceptor.core.records import OTHER, Case, Diagnosis, Prediction, Withheld
from preceptor.core.statistics import ece
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.measures import assurance
from tests.report.made import answer, case
from tests.report.test_metrics import ASTHMA, INFLUENZA, PNEUMONIA, evaluated, values
from tests.report.test_page import rendered


def assured(number: int, name: str, now: float, before: float, *among: str, held: bool = False) -> Prediction:
    """An answer whose confidence was calibrated, with its set; `held` back for doubt."""
    given = answer(number, name, confidence=now)
    shares = {ASTHMA: 0.5, INFLUENZA: 0.4}
    update: dict[str, object] = {
        "uncalibrated": {name: before},
        "prediction_set": among or None,
        "distribution": shares,
    }
    if held:
        kept = Withheld(output=Diagnosis(diseases=(name,)), confidence=now, threshold=0.7, ask="Chest <b>pain")
        update |= {"output": Diagnosis(), "confidence": {}, "withheld": kept}
    return given.model_copy(update=update)


GOLD = case(1, ASTHMA, PNEUMONIA)


@pytest.mark.parametrize(
    ("among", "distribution", "covered", "single", "other"),
    [
        ((ASTHMA,), {ASTHMA: 0.9}, 1, 1, 0),
        (("肺炎", "Asthma"), {"肺炎": 0.2, "Asthma": 0.5}, 1, 0, 0),
        ((INFLUENZA,), {}, 0, 1, 0),
        ((INFLUENZA, OTHER), {}, 1, 0, 1),
        ((OTHER,), {INFLUENZA: 0.9, "": 0.1}, 1, 0, 1),
        ((OTHER,), {INFLUENZA: 0.9, "Asthma": 0.05}, 0, 0, 1),
    ],
)
def test_a_set_holds_the_truth_by_name_or_by_the_door_it_leaves_open(
    among: tuple[str, ...], distribution: dict[str, float], covered: float, single: float, other: float
) -> None:
    said = assured(1, INFLUENZA, 0.5, 0.9, *among).model_copy(update={"distribution": distribution})
    found = assurance(said, GOLD, textbook_namer())
    assert found == {
        "withheld": 0,
        "set_coverage": covered,
        "set_size": len(among),
        "set_other": other,
        "set_single": single,
    }


def test_without_a_calibration_there_is_nothing_to_tell() -> None:
    assert assurance(answer(1, ASTHMA, confidence=0.9), GOLD, textbook_namer()) == {}
    found = values(evaluated([case(1, ASTHMA)], [answer(1, ASTHMA, confidence=0.9)]))
    assert not {"ece_uncalibrated", "ece_gain", "withheld", "set_coverage", "mean_set_size"} & found.keys()
    assert found["answered_wrong"] == 0


def sure(count: int = 40) -> tuple[list[Case], list[Prediction]]:
    """Half of the answers are right, all said with .9 before and .5 now; every fourth is held back."""
    cases = [case(i, ASTHMA, meta={"specialty": ("lungs", "hearts")[i % 2]}) for i in range(count)]
    said = [
        assured(i, ASTHMA if i % 2 else INFLUENZA, 0.5, 0.9, ASTHMA, held=i % 4 == 3)
        if i % 8
        else assured(i, INFLUENZA, 0.5, 0.9, INFLUENZA)
        for i in range(count)
    ]
    return cases, said


def test_errors_of_confidence_before_and_after_are_of_the_same_answers() -> None:
    cases, said = sure()
    evaluation = evaluated(cases, said)
    found, gain = values(evaluation), evaluation.metrics["student"]["ece_gain"]
    right = [float(bool(i % 2)) for i in range(40) if i % 4 != 3]
    assert found["withheld"] == found["abstained"] == 1 / 4
    assert found["answered_wrong"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx(ece([0.5] * 30, right))
    assert found["ece_uncalibrated"] == pytest.approx(ece([0.9] * 30, right))
    assert gain.value == pytest.approx(found["ece_uncalibrated"] - found["ece"])
    assert 0 < gain.low < gain.value < gain.high
    assert sum(b.n for b in evaluation.uncalibrated["student"]) == 30


def test_sets_by_specialty() -> None:
    found = values(evaluated(*sure()))
    assert found["set_coverage"] == pytest.approx(35 / 40)
    assert found["set_coverage[specialty=hearts]"] == 1
    assert found["set_coverage[specialty=lungs]"] == pytest.approx(15 / 20)
    assert (found["mean_set_size"], found["set_single"], found["set_other"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("language", "wanted"),
    [("en", "Withheld: Bronchial asthma, 50% sure where 70% is asked."), ("zh", "未作答：Bronchial asthma，把握 50%")],
)
def test_the_page_shows_sets_and_what_was_withheld(language, wanted) -> None:
    html = rendered(*sure(), language=language)
    assert wanted in html
    assert "Chest &lt;b&gt;pain" in html
    assert "Chest <b>pain" not in html
    assert html.count('class="before"') == 1
    assert {"en": "before 0.567; less by +", "zh": "校准前 0.567；减少 +"}[language] in html
    assert {"en": "Do the sets keep their promise", "zh": "预测集合在各专科"}[language] in html
    plain = rendered([case(1, ASTHMA)], [answer(1, ASTHMA, confidence=0.9)], language)
    assert 'class="before"' not in plain
