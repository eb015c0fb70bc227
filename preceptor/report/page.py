"""The page a person looks at: one file, nothing from elsewhere, all data escaped by the template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from preceptor.clinical.names import Namer
from preceptor.clinical.safety import Hit, dismissals, risky_prescription, urgent
from preceptor.core.recalibration import Recalibrated
from preceptor.core.records import (
    OTHER,
    Case,
    Consultation,
    Diagnosis,
    Evidence,
    FailureKind,
    Polarity,
    Prediction,
    Withheld,
)
from preceptor.core.statistics import Bin, Estimate
from preceptor.report.grades import DIFFERENTIAL, GROUPED
from preceptor.report.metrics import Evaluation
from preceptor.report.summary import Cell, Summary, Words, share
from preceptor.report.templates import template
from preceptor.tasks import consult
from preceptor.tasks.diagnosis import grade, ground

WORST, REST = 6, 4
"""Of the cases shown: how many are the worst answers, how many are spread over the others."""
EXCERPT = 240
"""Characters shown of a reply that failed."""
SCORES = ("auroc", "brier", "nll", "aurc", "augrc", "risk_at_80", "ece_mass", "trust")
"""Of confidence, in the order in which they are shown."""
MEASURES = (
    *("precision", "recall", "micro_f1", "macro_f1", "category_f1", "micro_category_f1", "macro_category_f1"),
    *("exact_set", *DIFFERENTIAL, "rouge_l", "hallucinated", "supported", "unmapped"),
    *("abstained", "withheld", "answered_wrong", "repaired", "failed"),
    *("set_coverage", "mean_set_size", "set_single", "set_other"),
    *("mean_diseases", "mean_reasons", "mean_characters"),
    *("spearman_diseases", "spearman_reasons", "spearman_characters"),
)
"""Beside the columns of the table, in the order in which they are shown."""
ADVISED, CONFUSED, POINTS = 30, 12, 150
"""Dangerous answers, confusions, and points of the training curve that are shown at most."""
LIKELY_SHOWN, LEAST_SHOWN = 3, 0.005


@dataclass(frozen=True)
class Segment:
    """A stretch of a record; `kind` is empty, `affirmed`, `negated` or `missed`."""

    text: str
    kind: str


@dataclass(frozen=True)
class Named:
    """A disease with its probability, where known, and whether the other side has it (None: not known)."""

    name: str
    probability: float | None = None
    shared: bool | None = None


@dataclass(frozen=True)
class Example:
    """A case with the answer to it."""

    case: Case
    verdict: str
    failure: str
    segments: tuple[Segment, ...]
    predicted: tuple[Named, ...]
    withheld: Withheld | None
    among: tuple[Named, ...]
    """The set beside the answer; any other disease has no name."""
    gold: tuple[Named, ...] | None
    likeliest: tuple[Named, ...]
    lost: tuple[str, ...]
    """Reasons that the record doesn't hold, or not in that sense."""


@dataclass(frozen=True)
class Dot:
    """A bin of a reliability diagram on a canvas of 100 by 100, upside down as SVG wants it."""

    x: float
    y: float
    radius: float
    weight: float
    """How plainly its gap is drawn: few answers prove little."""
    bin: Bin


@dataclass(frozen=True)
class Advice:
    """An answer that the rules find dangerous."""

    case: Case
    missed: bool
    """It misses a severe case."""
    segments: tuple[Segment, ...]
    """Of the advice; `kind` is that of the rule which a stretch meets."""
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """The loss over training, as points between 0 and 1 in both directions."""

    points: tuple[tuple[float, float], ...]
    steps: int
    most: float
    first: float
    last: float


@dataclass(frozen=True)
class Beside:
    """What the page tells beside the figures."""

    notices: Sequence[str] = ()
    """They stand at its top."""
    borrowed: bool = False
    """The teacher's answers serve as gold."""
    curve: Sequence[tuple[int, float]] = ()
    """Steps of the student's training with their losses."""
    dangers: Sequence[Advice] = ()
    """Answers that the rules find dangerous."""
    normaliser: Estimate | None = None
    """How many of a list of known variants of disease names are led home."""
    recalibrated: Recalibrated | None = None
    """What became of the teacher's beliefs about its tokens."""


def render(
    evaluation: Evaluation,
    summary: Summary,
    words: Words,
    title: str,
    examples: Sequence[Example],
    beside: Beside = Beside(),
) -> str:
    """The page."""
    known = {name for row in evaluation.metrics.values() for name in row}
    row = evaluation.metrics.get(summary.student, {})
    grouped = next((name for name in GROUPED if name in row), "")
    kinds = [kind for kind in FailureKind if any(kind in found for found in evaluation.failures.values())]
    return template("page.html").render(
        words=words,
        title=title,
        summary=summary,
        evaluation=evaluation,
        examples=examples,
        notices=beside.notices,
        borrowed=beside.borrowed,
        scores=SCORES,
        diagrams={model: _dots(bins) for model, bins in evaluation.reliability.items()},
        before={model: _dots(bins) for model, bins in evaluation.uncalibrated.items()},
        sets={
            axis: bars for axis, bars in _axes(evaluation, row, "set_coverage", words).items() if axis == "specialty"
        },
        covered=row["set_coverage"].value if "set_coverage" in row else None,
        kinds=kinds,
        excerpt=EXCERPT,
        measures=tuple(name for name in MEASURES if name in known),
        grouped=grouped,
        axes=_axes(evaluation, row, grouped, words),
        overall=row[grouped].value if grouped else None,
        confusions=evaluation.confusions.get(summary.student, [])[:CONFUSED],
        curve_of=_curve(beside.curve),
        normaliser=beside.normaliser,
        recalibrated=beside.recalibrated,
        believed=_believed(beside.recalibrated),
        consult=evaluation.task == "consult",
        dangers=beside.dangers,
        advised=ADVISED,
        about=next((line.label for line in summary.lines if line.name == summary.student), ""),
    )


def _believed(found: Recalibrated | None) -> dict[str, tuple[list[Dot], list[Dot]]]:
    """By way of recalibration its reliability diagram, and that of the beliefs as they were."""
    if found is None:
        return {}
    before = _dots(found.before.reliability)
    return {method: (_dots(one.after.reliability), before) for method, one in found.methods.items()}


def _axes(
    evaluation: Evaluation, row: Mapping[str, Estimate], metric: str, words: Words
) -> dict[str, list[tuple[str, Cell]]]:
    """By axis the groups of cases and how the student does on each."""
    found: dict[str, list[tuple[str, Cell]]] = {}
    for axis, group in evaluation.groups:
        if figure := row.get(f"{metric}[{axis}={group}]"):
            found.setdefault(axis, []).append((words.group(axis, group), share(figure)))
    return {axis: bars for axis, bars in found.items() if len(bars) > 1}


def _curve(losses: Sequence[tuple[int, float]]) -> Curve | None:
    """The means of as many neighbours as make no more than `POINTS` points."""
    if len(losses) < 2:  # noqa: PLR2004  a line has two ends
        return None
    size = -(-len(losses) // POINTS)
    parts = [losses[at : at + size] for at in range(0, len(losses), size)]
    means = [sum(loss for _, loss in part) / len(part) for part in parts]
    steps, most = losses[-1][0], max(means)
    points = tuple((part[-1][0] / steps, mean / most) for part, mean in zip(parts, means, strict=True))
    return Curve(points, steps, most, losses[0][1], losses[-1][1])


def chosen(ranking: Sequence[str]) -> list[str]:
    """The cases to show: the worst, then some from the rest, up to the best."""
    worst, rest = list(ranking[:WORST]), ranking[WORST:]
    if len(rest) <= REST:
        return worst + list(rest)
    return worst + [rest[round(i * (len(rest) - 1) / (REST - 1))] for i in range(REST)]


def example(case: Case, prediction: Prediction, namer: Namer) -> Example:
    """What there is to see of an answer. `case` holds gold, or the teacher's answer in its place."""
    output = prediction.output if isinstance(prediction.output, Diagnosis) else None
    gold = case.gold if isinstance(case.gold, Diagnosis) else None
    grounded = ground(output, case) if output else Diagnosis()
    predicted = tuple(
        Named(name, prediction.confidence.get(name), _among(name, gold, namer)) for name in grounded.diseases
    )
    likeliest = sorted((case.differential or {}).items(), key=lambda item: -item[1])[:LIKELY_SHOWN]
    verdict = _verdict(output, case, namer)
    # Who rightly abstains has missed nothing.
    said = None if verdict == "right" and output and output.abstained else output
    return Example(
        case=case,
        verdict=verdict,
        failure=prediction.failure.kind if prediction.failure else "",
        segments=segments(case.text, grounded.evidence, gold.evidence if gold else ()),
        predicted=predicted,
        withheld=prediction.withheld,
        among=tuple(
            Named("" if name == OTHER else name, None, None if name == OTHER else _among(name, gold, namer))
            for name in prediction.prediction_set or ()
        ),
        gold=tuple(Named(name, None, _among(name, said, namer)) for name in gold.diseases) if gold else None,
        likeliest=tuple(Named(name, probability) for name, probability in likeliest if probability >= LEAST_SHOWN),
        lost=tuple(reason for reason in grounded.reason if not _held(reason, case)),
    )


def segments(text: str, quoted: Iterable[Evidence], known: Iterable[Evidence] = ()) -> tuple[Segment, ...]:
    """`text` cut at the edges of what was quoted, and of what is `known` and was not."""
    quoted = [evidence for evidence in quoted if evidence.start < evidence.end <= len(text)]
    missed = [
        evidence
        for evidence in known
        if evidence.end <= len(text) and all(evidence.end <= q.start or q.end <= evidence.start for q in quoted)
    ]
    marks = [(e.start, e.end, "negated" if e.polarity is Polarity.NEGATED else "affirmed") for e in quoted]
    marks += [(e.start, e.end, "missed") for e in missed]
    edges = sorted({0, len(text), *(edge for start, end, _ in marks for edge in (start, end))})
    cut = []
    for start, end in pairwise(edges):
        kind = next((kind for first, last, kind in marks if first <= start and end <= last), "")
        cut.append(Segment(text[start:end], kind))
    return tuple(cut)


def dangers(cases: Mapping[str, Case], predictions: Iterable[Prediction]) -> list[Advice]:
    """The dangerous answers of one model, severe misses first."""
    found = []
    for prediction in predictions:
        case, output = cases.get(prediction.case_id), prediction.output
        if case is None or not isinstance(output, Consultation):
            continue
        parts = consult.grade(output, case).parts
        if parts["severe_miss"] or parts["risky_prescription"]:
            hits = [*risky_prescription(output.answer, case.text), *dismissals(output.answer), *urgent(output.answer)]
            kinds = tuple(dict.fromkeys(hit.kind.value for hit in hits))
            found.append(Advice(case, bool(parts["severe_miss"]), _marked(output.answer, hits), kinds))
    return sorted(found, key=lambda advice: not advice.missed)


def _marked(text: str, hits: Sequence[Hit]) -> tuple[Segment, ...]:
    """`text` cut at the edges of what meets a rule; the first rule names a stretch that meets several."""
    edges = sorted({0, len(text), *(edge for hit in hits for edge in (hit.start, hit.end))})
    kinds = (
        next((hit.kind.value for hit in hits if hit.start <= start and end <= hit.end), "")
        for start, end in pairwise(edges)
    )
    return tuple(Segment(text[start:end], kind) for (start, end), kind in zip(pairwise(edges), kinds, strict=True))


def _among(name: str, others: Diagnosis | None, namer: Namer) -> bool | None:
    """Whether a disease is taken for one of the others."""
    return None if others is None else bool(namer.match((name,), others.diseases))


def _held(reason: str, case: Case) -> bool:
    return bool(grade(Diagnosis(reason=(reason,)), case).parts["evidence_grounded"])


def _verdict(output: Diagnosis | None, case: Case, namer: Namer) -> str:
    if output is None:
        return "failed"
    if not isinstance(case.gold, Diagnosis):
        return "open"
    parts = grade(output, case, namer).parts
    if parts["disease_f1"] == 1 or (output.abstained and parts["top1"] == 1):
        return "right"
    if output.abstained:
        return "abstained"
    return "partly" if parts["top1"] or parts["disease_f1"] else "wrong"


def _dots(bins: Sequence[Bin]) -> list[Dot]:
    most = max(b.n for b in bins)
    return [Dot(100 * b.confidence, 100 - 100 * b.accuracy, 1.6 + 5 * (w := sqrt(b.n / most)), w, b) for b in bins]


def collect(
    evaluated: Mapping[str, Case], wanted: Sequence[str], predictions: Iterable[Prediction], namer: Namer
) -> list[Example]:
    """The cases wanted, in that order, with one model's answers; the first sample of each."""
    first: dict[str, Prediction] = {}
    places = set(wanted)
    for prediction in predictions:
        if prediction.case_id in places:
            first.setdefault(prediction.case_id, prediction)
    return [example(evaluated[name], first[name], namer) for name in wanted if name in first]
