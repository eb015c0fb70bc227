"""Figures over a whole set of answers, against scikit-learn, MAPIE and torchmetrics, and by hand."""

import numpy as np
import pytest
from mapie.metrics.calibration import expected_calibration_error
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss, f1_score, log_loss, precision_score, recall_score, roc_auc_score
from sklearn.preprocessing import MultiLabelBinarizer

from preceptor.core.confidence import figures
from preceptor.core.records import Case, Diagnosis, Prediction
from preceptor.core.statistics import ece
from preceptor.report.groups import groups
from preceptor.report.metrics import Evaluation, Evaluator
from preceptor.tasks.diagnosis import textbook_namer
from preceptor.tasks.measures import measures, names
from tests.report.made import TEXT, answer, case, failure

NAMES = ("Bronchial asthma", "Community-acquired pneumonia", "Influenza", "Acute appendicitis", "Acute bronchitis")
ASTHMA, PNEUMONIA, INFLUENZA, APPENDICITIS, BRONCHITIS = NAMES


def evaluated(cases: list[Case], predictions: list[Prediction]) -> Evaluation:
    evaluator = Evaluator(cases)
    for prediction in predictions:
        evaluator.add(prediction)
    return evaluator.evaluation()


def drawn(n: int, seed: int) -> tuple[list[Case], list[Prediction]]:
    """Cases and answers of one or two diseases each, half of the answers copied from gold."""
    rng = np.random.default_rng(seed)

    def some() -> list[str]:
        return rng.choice(NAMES, size=int(rng.integers(1, 3)), replace=False).tolist()

    cases = [case(i, *some()) for i in range(n)]
    said = [c.gold.diseases if rng.random() < 0.5 and isinstance(c.gold, Diagnosis) else some() for c in cases]
    return cases, [answer(i, *names) for i, names in enumerate(said)]


@pytest.mark.parametrize("seed", range(5))
def test_set_scores_are_those_of_scikit_learn(seed: int) -> None:
    cases, predictions = drawn(80, seed)
    found = evaluated(cases, predictions).metrics["student"]
    binary = MultiLabelBinarizer(classes=NAMES)
    true = binary.fit_transform([c.gold.diseases for c in cases if isinstance(c.gold, Diagnosis)])
    said = binary.transform([p.output.diseases for p in predictions if isinstance(p.output, Diagnosis)])
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[f"micro_{name}"].value == pytest.approx(score(true, said, average="micro"))
        by_example = found["disease_f1" if name == "f1" else name]
        assert by_example.value == pytest.approx(score(true, said, average="samples"))
    assert found["macro_f1"].value == pytest.approx(f1_score(true, said, average="macro"))
    assert found["exact_set"].value == pytest.approx((true == said).all(axis=1).mean())
    for name in ("micro_f1", "macro_f1", "macro_category_f1", "mean_diseases", "spearman_diseases"):
        assert found[name].low <= found[name].value <= found[name].high
        assert 0 < found[name].high - found[name].low < 0.7


def test_a_category_is_enough_at_its_level_alone() -> None:
    cases = [case(1, "Type 2 diabetes mellitus"), case(2, ASTHMA)]
    namer = textbook_namer()
    near = next(n for n in ("Status asthmaticus", "Allergic asthma") if namer.code(n) != namer.code(ASTHMA))
    found = evaluated(cases, [answer(1, ASTHMA), answer(2, near)]).metrics["student"]
    assert found["micro_f1"].value == found["macro_f1"].value == 0
    assert names(Diagnosis(diseases=(ASTHMA,)), Diagnosis(diseases=("哮喘",)), namer)["concept"] == (
        ["asthma"],
        ["asthma"],
    )


def test_macro_f1_by_hand_and_failures_miss_their_diseases() -> None:
    cases = [case(0, ASTHMA), case(1, ASTHMA), case(2, PNEUMONIA), case(3, INFLUENZA, abstain=True)]
    predictions = [answer(0, ASTHMA), failure(1), answer(2, ASTHMA, PNEUMONIA), answer(3)]
    found = evaluated(cases, predictions).metrics["student"]
    # asthma: one hit, one said falsely, one missed; pneumonia: one hit; the right abstention counts for nothing.
    assert found["macro_f1"].value == pytest.approx((0.5 + 1) / 2)
    assert found["micro_f1"].value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["micro_f1"].n == 3
    assert found["mean_diseases"].value == 1


def test_length_and_count_that_go_with_the_grade_are_told() -> None:
    cases, predictions = drawn(60, 7)
    rng = np.random.default_rng(7)
    words = [("productive cough",) * int(rng.integers(1, 4)) for _ in predictions]
    longer = [
        p.model_copy(update={"output": p.output.model_copy(update={"reason": w})})
        for p, w in zip(predictions, words, strict=True)
        if isinstance(p.output, Diagnosis)
    ]
    evaluator = Evaluator(cases)
    grades = [score.value for p in longer if (score := evaluator.add(p))]
    found = evaluator.evaluation().metrics["student"]
    sizes = {
        "reasons": [len(w) for w in words],
        "characters": [len("".join(w)) for w in words],
        "diseases": [len(p.output.diseases) for p in longer if isinstance(p.output, Diagnosis)],
    }
    for name, size in sizes.items():
        assert found[f"spearman_{name}"].value == pytest.approx(spearmanr(size, grades).statistic, abs=1e-6)
        assert found[f"mean_{name}"].value == pytest.approx(np.mean(size))


def test_the_differential_by_hand() -> None:
    known = {ASTHMA: 0.6, PNEUMONIA: 0.3, INFLUENZA: 0.095, APPENDICITIS: 0.005}
    one = case(1, PNEUMONIA, APPENDICITIS, differential=known)
    said = Diagnosis(diseases=("Asthma", BRONCHITIS, "pneumonia"), reason=("productive cough",))
    assert measures(said, one, textbook_namer()) == {
        "rouge_l": 1.0,
        "ddr": pytest.approx(2 / 3),
        "ddp": pytest.approx(2 / 3),
        "ddf1": pytest.approx(2 / 3),
        "gtpa_1": 0.0,
        "gtpa_3": 1.0,
        "gtpa_5": 1.0,
    }
    # What is true but unlikely by the text is not asked for.
    unlikely = case(2, APPENDICITIS, differential=known)
    assert measures(Diagnosis(diseases=(APPENDICITIS,)), unlikely, textbook_namer())["gtpa_5"] == 0
    failed = dict(measures(None, one, textbook_namer()))
    assert (failed.pop("rouge_l"), set(failed.values())) == (None, {0.0})
    assert measures(said, case(3, ASTHMA, gold=None, gold_source=None), textbook_namer()) == {"rouge_l": None}


@pytest.mark.parametrize(
    ("said", "expected"),
    [(("咳嗽三天",), 1.0), (("咳嗽",), 2 * 2 / (2 + 4)), (("发热",), 0.0), ((), None)],
)
def test_rouge_l_is_by_character(said: tuple[str, ...], expected: float | None) -> None:
    gold = Diagnosis(diseases=("哮喘",), reason=("咳嗽三天",))
    found = measures(Diagnosis(diseases=("哮喘",), reason=said), case(1, gold=gold), textbook_namer())
    assert found["rouge_l"] == pytest.approx(expected)


def test_reasons_that_stand_nowhere_are_hallucinated_and_denied_ones_are_not() -> None:
    cases, allowed = [case(1, ASTHMA)], len(TEXT) / 2 / len("productive coughchest painFever for 8 daysnight sweats")
    reason = ("productive cough", "chest pain", "Fever for 8 days", "night sweats")
    found = evaluated(cases, [answer(1, ASTHMA, reason=reason)]).metrics["student"]
    assert found["hallucinated"].value == 0.5
    assert found["evidence_grounded"].value == pytest.approx(0.25 * allowed)


@pytest.mark.parametrize("seed", range(3))
def test_confidence_against_scikit_learn_mapie_and_torchmetrics(seed: int) -> None:
    torch = pytest.importorskip("torch", reason="torchmetrics measures tensors")
    from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError

    rng = np.random.default_rng(seed)
    p = rng.random(400)
    y = (rng.random(400) < p**1.5).astype(int)
    found = {name: value.item() for name, value in figures(p, y).items()}
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p))
    assert found["brier"] == pytest.approx(brier_score_loss(y, p))
    assert found["nll"] == pytest.approx(log_loss(y, p))
    assert found["auroc"] == pytest.approx(BinaryAUROC()(torch.tensor(p), torch.tensor(y)).item(), abs=1e-6)
    theirs = BinaryCalibrationError(n_bins=15)(torch.tensor(p), torch.tensor(y)).item()
    assert ece(p, y) == pytest.approx(theirs, abs=1e-6)
    # MAPIE counts edges, of which 15 bins have 16; its equal masses want scores in order.
    assert ece(p, y) == pytest.approx(expected_calibration_error(y, p, num_bins=16, split_strategy="uniform"))
    order = np.argsort(p[:390])
    p, y = p[:390][order], y[:390][order]
    theirs = expected_calibration_error(y, p, num_bins=15, split_strategy="array split")
    assert figures(p, y)["ece_mass"].item() == pytest.approx(theirs)


def test_groups_of_cases() -> None:
    texts = ["Woman, 30, cough." + " so" * i for i in range(8)] + ["Man, 70, cough." + " so" * i for i in range(8)]
    made = [case(i, ASTHMA, text=f"{text} productive cough") for i, text in enumerate(texts)]
    cases = {c.id: c for c in made}
    found = groups(cases)
    assert set(found) >= {("sex", "female"), ("sex", "male"), ("age", "18–39"), ("age", "65+")}
    told = {i: case(i, ASTHMA, meta={"sex": "男" if i % 2 else "female"}) for i in range(12)}
    assert {group for axis, group in groups({c.id: c for c in told.values()}) if axis == "sex"} == {"male", "female"}
    assert ("language", "en") not in found  # a single group tells nothing
    assert found["sex", "male"] == [c.id for c in made[8:]]
    assert sorted(i for (axis, _), ids in found.items() if axis == "length" for i in ids) == sorted(cases)
    predictions = [answer(i, ASTHMA if i < 8 or i == 11 else INFLUENZA) for i in range(16)]
    metrics = evaluated(made, predictions).metrics["student"]
    assert metrics["top1[sex=female]"].value == 1
    assert metrics["top1[sex=male]"].value == pytest.approx(1 / 8)
    assert metrics["top1[sex=male]"].n == 8
    assert metrics["top1[sex=male]"].low <= 1 / 8 <= metrics["top1[sex=male]"].high


@pytest.mark.parametrize(
    ("age", "band"),
    [(0, "0–17"), (17, "0–17"), (18, "18–39"), (39, "18–39"), (40, "40–64"), (64, "40–64"), (65, "65+"), (99, "65+")],
)
def test_age_bands(age: int, band: str) -> None:
    cases = {str(i): case(i, ASTHMA, meta={"age": age if i < 5 else (30 if age > 40 else 70)}) for i in range(10)}
    assert found_of(cases, "age", "0") == band


def found_of(cases: dict[str, Case], axis: str, identity: str) -> str:
    return next(group for (of, group), ids in groups(cases).items() if of == axis and identity in ids)


def test_confusions_are_counted_and_abstentions_are_no_names() -> None:
    cases = [case(i, ASTHMA) for i in range(4)]
    predictions = [answer(0, INFLUENZA), answer(1, INFLUENZA, ASTHMA), answer(2), answer(3, ASTHMA)]
    assert evaluated(cases, predictions).confusions["student"] == [
        ("", INFLUENZA, 1),
        (ASTHMA, "", 1),
        (ASTHMA, INFLUENZA, 1),
    ]
