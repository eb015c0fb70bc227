"""Grades predictions on held-out cases beside yardsticks, and shows the result as a table and a page.

The yardsticks are the commonest disease and a bag of words, on the labels that the student learned from, and,
where the cases come from a world that is known, the exact answerer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Language, Prediction, Row
from preceptor.report import page
from preceptor.report.baseline import BagOfWords, commonest, exact, labelled
from preceptor.report.metrics import TEACHER, Evaluator, ModelScore
from preceptor.report.summary import UNKNOWN, Cell, Summary, Words, summarise
from preceptor.stages.base import Context, Need, Stage, StageConfig, nearest, read_records, replacing, write_records


class Config(StageConfig):
    """What is evaluated."""

    language: Language = "en"
    """Of the table and the page."""
    seed: int = 0
    """Of the resampling."""
    about: str = ""
    """The model that the sentence and the cases of the page are about; by default the last one trained."""

    def needs(self) -> tuple[Need, ...]:
        """Held-out cases, what models said to them, and the labels for the bag of words."""
        return (
            Need("cases", files=("test.jsonl", "target.jsonl")),
            Need("predictions", files=("predictions.jsonl",), stages=("predict", "label")),
            Need("rows", files=("rows.jsonl",), required=False),
            Need("target", files=("target.jsonl",), required=False),
        )


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes scores.jsonl and report.html; returns `model -> metric -> {value, low, high, n}`."""
    words = Words(config.language)

    def predictions() -> Iterator[Prediction]:
        for path in context.inputs["predictions"]:
            yield from read_records(path, Prediction)

    rows = context.optional("rows")
    learned = {row.case_id for row in read_records(rows, Row)} if rows else set()
    target = context.optional("target")
    transductive = sum(case.id in learned for case in read_records(target, Case)) if target and learned else 0
    asked = _answered(read_records(context.input("cases"), Case, config.limit), predictions)
    cases = [case for case in asked if case.id not in learned]
    if not cases:
        raise UserError(f"{context.section}: all {len(asked)} cases were trained on; a figure about them says nothing")
    if len(cases) < len(asked):
        context.say(f"{context.section}: {len(asked) - len(cases)} cases were trained on, and are left out")
    evaluator = Evaluator(cases, _teacher(cases, predictions))
    with context.progress(context.section, None) as tick:
        labels = list(labelled(read_records(rows, Row))) if rows else []
        bag = BagOfWords(labels).predict(cases)
        every = chain(predictions(), commonest(labels, cases), bag, exact(cases))
        write_records(context.folder / "scores.jsonl", _graded(evaluator, every, tick))
        evaluation = evaluator.evaluation(config.seed)
    if config.about and config.about not in evaluation.metrics:
        raise UserError(
            f"{context.section}.about: no model {config.about!r}{nearest(config.about, evaluation.metrics)}"
        )
    summary = summarise(evaluation, words, config.about)
    said = (p for p in predictions() if p.model == summary.student)
    shown = page.collect(evaluator.cases, page.chosen(evaluation.ranking[summary.student]), said)
    notices = [words("simulation")] if any(case.source == "textbook" for case in cases) else []
    notices += [words("transductive", n=transductive)] if transductive else []
    path = context.folder / "report.html"
    html = page.render(
        evaluation,
        summary,
        words,
        title=context.recipe,
        examples=shown,
        notices=notices,
        borrowed=bool(evaluator.borrowed),
    )
    with replacing(path) as beside:
        beside.write_text(html, "utf-8")
    strangers = [words("strangers", n=evaluation.strangers)] if evaluation.strangers else []
    for told in (table(summary, words), summary.headline, *strangers, *notices, words("page", path=path)):
        context.say(told)
    return {
        model: {name: estimate.model_dump() for name, estimate in row.items()}
        for model, row in evaluation.metrics.items()
    }


def _answered(cases: Iterable[Case], predictions: Callable[[], Iterator[Prediction]]) -> list[Case]:
    """The cases that some model was asked about: the yardsticks are laid on those."""
    asked = {prediction.case_id for prediction in predictions()}
    found = [case for case in cases if case.id in asked]
    if not found:
        raise UserError("evaluate: no prediction is about any of the cases; in `from:` name one that predicts on them")
    return found


def _teacher(cases: Iterable[Case], predictions: Callable[[], Iterator[Prediction]]) -> dict[str, Diagnosis]:
    """The teacher's first answers to the cases without gold."""
    bare = {case.id for case in cases if not isinstance(case.gold, Diagnosis)}
    answers: dict[str, Diagnosis] = {}
    if bare:
        for prediction in predictions():
            output = prediction.output if prediction.case_id in bare else None
            if prediction.model == TEACHER and isinstance(output, Diagnosis):
                answers.setdefault(prediction.case_id, output)
    return answers


def _graded(
    evaluator: Evaluator, predictions: Iterable[Prediction], tick: Callable[[int], None]
) -> Iterator[ModelScore]:
    for prediction in predictions:
        tick(1)
        if score := evaluator.add(prediction):
            yield score


def table(summary: Summary, words: Words) -> Table:
    """The results for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column(words("model"), no_wrap=True)
    for column in (*summary.columns, "cases"):
        shown.add_column(words(column), justify="right")
    for line in summary.lines:
        style = "bold" if line.name == summary.student else ""
        shown.add_row(line.label, *map(_cell, line.cells), str(line.cases), style=style)
    return shown


def _cell(cell: Cell) -> Text:
    if not cell.interval:
        return Text(UNKNOWN, style="dim")
    below = "\n".join(part for part in (cell.interval, cell.floor) if part)
    return Text.assemble(cell.text, "\n", (below, "dim"))


STAGE = Stage("evaluate", Config, run, leaves=("scores.jsonl", "report.html"))
