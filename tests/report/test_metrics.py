"""What the figures come to on small tables, by hand."""

from collections.abc import Iterable

import numpy as np
import pytest

from preceptor.core.confidence import figures
from preceptor.core.records import Case, Diagnosis, FailureKind, Prediction
from preceptor.core.statistics import ece
from preceptor.report.baseline import BAG_OF_WORDS, exact
from preceptor.report.metrics import Evaluation, Evaluator
from tests.report.made import answer, case, failure

ASTHMA, PNEUMONIA, INFLUENZA = "Bronchial asthma", "Community-acquired pneumonia", "Influenza"


def evaluated(
    cases: Iterable[Case], predictions: Iterable[Prediction], teacher: dict[str, Diagnosis] | None = None
) -> Evaluation:
    evaluator = Evaluator(cases, teacher)
    for prediction in predictions:
        evaluator.add(prediction)
    return evaluator.evaluation()


def values(evaluation: Evaluation, model: str = "student") -> dict[str, float]:
    return {name: estimate.value for name, estimate in evaluation.metrics[model].items()}


def test_gold_scores_one_on_everything() -> None:
    cases = [case(1, ASTHMA), case(2, PNEUMONIA, INFLUENZA), case(3, INFLUENZA)]
    gold = [
        answer(i, *c.gold.diseases, confidence=1.0) for i, c in enumerate(cases, 1) if isinstance(c.gold, Diagnosis)
    ]
    found = values(evaluated(cases, gold))
    assert {name: found[name] for name in ("parsed", "top1", "disease_f1", "evidence_grounded")} == {
        "parsed": 1,
        "top1": 1,
        "disease_f1": 1,
        "evidence_grounded": 1,
    }
    assert found["ece"] == 0
    assert found["failed"] == found["abstained"] == found["repaired"] == 0


def test_all_cases_count_and_failures_are_wrong_and_counted_apart() -> None:
    cases = [case(i, ASTHMA, PNEUMONIA) for i in range(5)] + [case(5, ASTHMA, abstain=True)]
    predictions = [
        answer(0, ASTHMA, PNEUMONIA),
        answer(1, ASTHMA),
        answer(2, INFLUENZA),
        failure(3),
        failure(4, FailureKind.TRUNCATED),
        answer(5),
    ]
    evaluation = evaluated(cases, predictions)
    found = values(evaluation)
    assert found["parsed"] == pytest.approx(4 / 6)
    assert found["top1"] == pytest.approx(3 / 6)
    assert found["disease_f1"] == pytest.approx((1 + 2 / 3 + 0 + 0 + 0 + 1) / 6)
    assert found["abstained"] == pytest.approx(1 / 6)
    assert found["failed"] == pytest.approx(2 / 6)
    assert found["failed_unparsed"] == found["failed_truncated"] == pytest.approx(1 / 6)
    assert found["failed_timeout"] == 0
    assert evaluation.metrics["student"]["top1"].n == 6
    failures = evaluation.failures["student"]
    assert {kind: one.count for kind, one in failures.items()} == {
        FailureKind.UNPARSED: 1,
        FailureKind.TRUNCATED: 1,
    }
    assert failures[FailureKind.UNPARSED].example.case_id == "case-3"


def test_answers_without_reasons_leave_evidence_alone() -> None:
    cases = [case(1, ASTHMA), case(2, ASTHMA), case(3, ASTHMA)]
    predictions = [
        answer(1, ASTHMA, reason=("productive cough", "haemoglobin 60 g/L")),
        answer(2, ASTHMA, reason=()),
        failure(3),
    ]
    grounded = evaluated(cases, predictions).metrics["student"]["evidence_grounded"]
    assert (grounded.value, grounded.n) == (0.5, 1)


def test_evidence_is_absent_where_nobody_gives_reasons() -> None:
    assert "evidence_grounded" not in values(evaluated([case(1, ASTHMA)], [answer(1, ASTHMA, reason=())]))


def test_calibration_is_of_the_first_disease_of_answers_that_have_a_confidence() -> None:
    cases = [case(i, ASTHMA) for i in range(5)]
    predictions = [
        answer(0, ASTHMA, confidence=0.9),
        answer(1, INFLUENZA, confidence=0.9),
        answer(2, ASTHMA, confidence=0.4),
        answer(3, ASTHMA),
        failure(4),
    ]
    evaluation = evaluated(cases, predictions)
    metrics = evaluation.metrics["student"]
    assert metrics["ece"].value == pytest.approx(ece([0.9, 0.9, 0.4], [1, 0, 1]))
    assert metrics["ece"].value == pytest.approx((2 * 0.4 + 0.6) / 3)
    assert metrics["ece"].n == metrics["ece_floor"].n == 3
    assert metrics["ece"].low <= metrics["ece"].value <= metrics["ece"].high
    assert [(b.n, b.accuracy) for b in evaluation.reliability["student"]] == [(1, 1.0), (2, 0.5)]


def test_scores_of_confidence_have_intervals_whatever_is_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cases = [case(i, ASTHMA) for i in range(60)]
    sure = rng.random(60).round(2).tolist()
    predictions = [answer(i, ASTHMA if rng.random() < p else INFLUENZA, confidence=p) for i, p in enumerate(sure)]
    evaluation = evaluated(cases, predictions)
    found = evaluation.metrics["student"]
    right = [p.output.diseases == (ASTHMA,) for p in predictions if isinstance(p.output, Diagnosis)]
    for name, value in figures(sure, right).items():
        assert found[name].value == pytest.approx(value.item())
        assert found[name].low <= found[name].value <= found[name].high
        assert found[name].high - found[name].low > 0.01
    assert found["auroc"].low > 0.5
    assert found["ece_mass_floor"].value > 0
    assert evaluation.risk["student"][-1] == pytest.approx((1, 1 - np.mean(right)))
    monkeypatch.setattr("preceptor.report.grades.BLOCK", 700)
    other = evaluated(cases, predictions).metrics["student"]
    assert other["auroc"].value == found["auroc"].value
    assert other["auroc"].low == pytest.approx(found["auroc"].low, abs=0.03)


def test_where_all_are_right_nothing_tells_right_from_wrong() -> None:
    found = evaluated([case(1, ASTHMA)], [answer(1, ASTHMA, confidence=0.9)]).metrics["student"]
    assert "auroc" not in found
    assert found["brier"].value == pytest.approx(0.01)


def test_several_samples_of_a_case_are_one_case() -> None:
    cases = [case(1, ASTHMA), case(2, ASTHMA)]
    predictions = [
        answer(1, ASTHMA),
        answer(1, INFLUENZA, sample=1),
        answer(2, ASTHMA),
        answer(2, ASTHMA, sample=1),
    ]
    top1 = evaluated(cases, predictions).metrics["student"]["top1"]
    assert (top1.value, top1.n) == (0.75, 2)


def test_without_gold_there_is_agreement_with_the_teacher_and_no_accuracy() -> None:
    cases = [case(i, gold=None, gold_source=None) for i in range(3)]
    teacher = {"case-0": Diagnosis(diseases=(ASTHMA,)), "case-1": Diagnosis(diseases=(PNEUMONIA, INFLUENZA))}
    predictions = [
        answer(0, ASTHMA, confidence=0.8),
        answer(1, PNEUMONIA),
        answer(2, PNEUMONIA),
        answer(0, ASTHMA, model="teacher"),
    ]
    evaluation = evaluated(cases, predictions, teacher)
    found = evaluation.metrics["student"]
    assert not {"top1", "disease_f1", "ece"} & set(found)
    assert (found["agreement_top1"].value, found["agreement_top1"].n) == (1, 2)
    assert found["agreement_disease_f1"].value == pytest.approx((1 + 2 / 3) / 2)
    assert not {"agreement_top1", "agreement_disease_f1", "top1"} & set(evaluation.metrics["teacher"])


def test_without_gold_or_teacher_nothing_is_claimed() -> None:
    found = values(evaluated([case(1, gold=None, gold_source=None)], [answer(1, ASTHMA)]))
    assert not {"top1", "disease_f1", "agreement_top1", "agreement_disease_f1", "ece"} & set(found)
    assert found["parsed"] == 1


def test_models_are_compared_case_by_case() -> None:
    cases = [case(i, ASTHMA, differential={ASTHMA: 0.9, INFLUENZA: 0.1}) for i in range(10)]
    student = [answer(i, ASTHMA if i < 8 else INFLUENZA) for i in range(10)]
    bag = [answer(i, ASTHMA if i < 5 else INFLUENZA, model=BAG_OF_WORDS) for i in range(10)]
    metrics = evaluated(cases, [*student, *bag, *exact(cases)]).metrics
    gain, reached = metrics["student"]["top1_minus_bag_of_words"], metrics["student"]["top1_of_exact"]
    assert gain.value == pytest.approx(0.3)
    assert 0 <= gain.low < 0.3 < gain.high
    assert reached.value == pytest.approx(0.8)
    assert "top1_minus_bag_of_words" not in metrics[BAG_OF_WORDS]


def test_intervals_hold_the_figure_and_repeat() -> None:
    cases = [case(i, ASTHMA) for i in range(40)]
    predictions = [answer(i, ASTHMA if i % 3 else INFLUENZA, confidence=0.7) for i in range(40)]
    first, again = (evaluated(cases, predictions).metrics["student"] for _ in range(2))
    assert first == again
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in first.values())
    assert first["top1"].low < first["top1"].value < first["top1"].high
    assert first["parsed"].low == pytest.approx(40 / (40 + 1.96**2))


def test_predictions_of_other_cases_are_counted_and_left_out() -> None:
    evaluation = evaluated([case(1, ASTHMA)], [answer(1, ASTHMA), answer(7, ASTHMA)])
    assert evaluation.strangers == 1
    assert evaluation.metrics["student"]["parsed"].n == 1


def test_the_worst_answers_come_first_the_surest_before_the_others() -> None:
    cases = [case(i, ASTHMA) for i in range(4)]
    predictions = [
        answer(0, ASTHMA, confidence=0.9),
        answer(1, INFLUENZA, confidence=0.5),
        answer(2, INFLUENZA, confidence=0.8),
        failure(3),
    ]
    assert evaluated(cases, predictions).ranking["student"] == ["case-2", "case-1", "case-0"]
