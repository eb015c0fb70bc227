"""The page a person looks at: one file, nothing from elsewhere, all data escaped by the template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from preceptor.core.records import Case, Diagnosis, Evidence, FailureKind, Polarity, Prediction
from preceptor.core.statistics import Bin
from preceptor.report.metrics import Evaluation
from preceptor.report.summary import Summary, Words
from preceptor.report.templates import template
from preceptor.tasks.diagnosis import grade, ground

WORST, REST = 6, 4
"""Of the cases shown: how many are the worst answers, how many are spread over the others."""
EXCERPT = 240
"""Characters shown of a reply that failed."""
SCORES = ("auroc", "brier", "nll", "aurc", "augrc", "risk_at_80", "ece_mass", "trust")
"""Of confidence, in the order in which they are shown."""
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


def render(
    evaluation: Evaluation,
    summary: Summary,
    words: Words,
    title: str,
    examples: Sequence[Example],
    *,
    notices: Sequence[str],
    borrowed: bool,
) -> str:
    """The page. `notices` stand at its top. `borrowed`: the teacher's answers serve as gold."""
    kinds = [kind for kind in FailureKind if any(kind in found for found in evaluation.failures.values())]
    return template("page.html").render(
        words=words,
        title=title,
        summary=summary,
        evaluation=evaluation,
        examples=examples,
        notices=notices,
        borrowed=borrowed,
        scores=SCORES,
        diagrams={model: _dots(bins) for model, bins in evaluation.reliability.items()},
        kinds=kinds,
        excerpt=EXCERPT,
        about=next((line.label for line in summary.lines if line.name == summary.student), ""),
    )


def chosen(ranking: Sequence[str]) -> list[str]:
    """The cases to show: the worst, then some from the rest, up to the best."""
    worst, rest = list(ranking[:WORST]), ranking[WORST:]
    if len(rest) <= REST:
        return worst + list(rest)
    return worst + [rest[round(i * (len(rest) - 1) / (REST - 1))] for i in range(REST)]


def example(case: Case, prediction: Prediction) -> Example:
    """What there is to see of an answer. `case` holds gold, or the teacher's answer in its place."""
    output = prediction.output if isinstance(prediction.output, Diagnosis) else None
    gold = case.gold if isinstance(case.gold, Diagnosis) else None
    grounded = ground(output, case) if output else Diagnosis()
    predicted = tuple(
        Named(name, prediction.confidence.get(name), _among(name, gold, case)) for name in grounded.diseases
    )
    likeliest = sorted((case.differential or {}).items(), key=lambda item: -item[1])[:LIKELY_SHOWN]
    verdict = _verdict(output, gold, case)
    # Who rightly abstains has missed nothing.
    said = None if verdict == "right" and output and output.abstained else output
    return Example(
        case=case,
        verdict=verdict,
        failure=prediction.failure.kind if prediction.failure else "",
        segments=segments(case.text, grounded.evidence, gold.evidence if gold else ()),
        predicted=predicted,
        gold=tuple(Named(name, None, _among(name, said, case)) for name in gold.diseases) if gold else None,
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


def _among(name: str, others: Diagnosis | None, case: Case) -> bool | None:
    """Whether the grader takes a disease for one of the others."""
    if others is None:
        return None
    asked = case.model_copy(update={"gold": others, "expects_abstention": False})
    return grade(Diagnosis(diseases=(name,)), asked).parts["top1"] == 1


def _held(reason: str, case: Case) -> bool:
    return bool(grade(Diagnosis(reason=(reason,)), case).parts["evidence_grounded"])


def _verdict(output: Diagnosis | None, gold: Diagnosis | None, case: Case) -> str:
    if output is None:
        return "failed"
    if gold is None:
        return "open"
    parts = grade(output, case).parts
    if parts["disease_f1"] == 1 or (output.abstained and parts["top1"] == 1):
        return "right"
    if output.abstained:
        return "abstained"
    return "partly" if parts["top1"] or parts["disease_f1"] else "wrong"


def _dots(bins: Sequence[Bin]) -> list[Dot]:
    most = max(b.n for b in bins)
    return [Dot(100 * b.confidence, 100 - 100 * b.accuracy, 1.6 + 5 * (w := sqrt(b.n / most)), w, b) for b in bins]


def collect(evaluated: Mapping[str, Case], wanted: Sequence[str], predictions: Iterable[Prediction]) -> list[Example]:
    """The cases wanted, in that order, with one model's answers; the first sample of each."""
    first: dict[str, Prediction] = {}
    places = set(wanted)
    for prediction in predictions:
        if prediction.case_id in places:
            first.setdefault(prediction.case_id, prediction)
    return [example(evaluated[name], first[name]) for name in wanted if name in first]
