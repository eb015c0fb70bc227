"""Evaluating predictions: grades, estimates with 1,000 bootstrap resamples, and the page.

10,000 predictions of five models on 2,000 cases of the textbook; one answer in five has a reason that is not
in the record, which takes the longest to look for. Drawing the cases is not counted.
"""

import random
import time
from typing import Any

from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Case, Diagnosis, Prediction
from preceptor.report import page
from preceptor.report.metrics import Evaluator
from preceptor.report.summary import Words, summarise
from preceptor.tasks.diagnosis import textbook_namer

CASES, MODELS, BUDGET = 2_000, ("base", "student", "teacher", "bag_of_words", "exact"), 5.0


def _answer(case: Case, model: str, rng: random.Random) -> Prediction:
    gold, differential = case.gold, case.differential or {}
    assert isinstance(gold, Diagnosis)
    disease = max(differential, key=differential.__getitem__) if rng.random() < 0.8 else rng.choice([*differential])
    invented = ("a cough that no one has mentioned",) if rng.random() < 0.2 else ()
    return Prediction(
        case_id=case.id,
        model=model,
        prompt_sha="",
        output=Diagnosis(diseases=(disease,), reason=(*gold.reason[:3], *invented)),
        confidence={disease: rng.random()},
    )


def measure() -> dict[str, dict[str, Any]]:
    """Seconds from predictions to page."""
    rng = random.Random(0)
    cases = sample(CASES, 0, "en", "full")
    predictions = [_answer(case, model, rng) for model in MODELS for case in cases]
    started = time.perf_counter()
    evaluator = Evaluator(cases)
    for prediction in predictions:
        evaluator.add(prediction)
    evaluation, words = evaluator.evaluation(), Words("en")
    summary = summarise(evaluation, words)
    told = (prediction for prediction in predictions if prediction.model == summary.student)
    shown = page.collect(evaluator.cases, page.chosen(evaluation.ranking[summary.student]), told, textbook_namer())
    page.render(evaluation, summary, words, "benchmark", shown)
    seconds = time.perf_counter() - started
    return {"evaluate": {"value": round(seconds, 2), "unit": "s", "budget": BUDGET, "ok": seconds <= BUDGET}}


if __name__ == "__main__":
    print(measure())
