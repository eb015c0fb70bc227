"""The results as words and rows, in the reader's language: the terminal's table and the page say the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from preceptor.core.records import Language
from preceptor.core.statistics import Estimate
from preceptor.report.baseline import EXACT, YARDSTICKS
from preceptor.report.grades import AGREEMENT, CONSULT
from preceptor.report.metrics import TEACHER, Evaluation

BASE = "base"
UNKNOWN = "—"


@cache
def _words() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = yaml.safe_load(files(__package__).joinpath("words.yaml").read_text("utf-8"))
    return table


class Words:
    """The strings of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, key: str, **values: object) -> str:
        """The string of that key, filled in."""
        return _words()[key][self.language].format(**values)

    def model(self, name: str) -> str:
        """What a model is called; a name that is not ours stays."""
        return self(name) if f"{name}:note" in _words() else name

    def group(self, axis: str, name: str) -> str:
        """What a group of cases is called; a name from the data stays."""
        return self(f"{axis}:{name}") if f"{axis}:{name}" in _words() else name

    def note(self, name: str) -> str:
        """A line about a model or column; empty where there is none."""
        return self(f"{name}:note") if f"{name}:note" in _words() else ""


@dataclass(frozen=True)
class Cell:
    """A figure as text with its interval, and as numbers in [0, 1] for a bar."""

    text: str = UNKNOWN
    interval: str = ""
    floor: str = ""
    bar: Estimate | None = None


@dataclass(frozen=True)
class Line:
    """A model's line of the table. `cells` are in the order of the summary's columns."""

    name: str
    label: str
    note: str
    cases: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Summary:
    """The table and the sentence above it."""

    headline: str
    student: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    limits: tuple[float | None, ...]
    """What the exact answerer reaches, by column."""


def summarise(evaluation: Evaluation, words: Words, about: str = "", trained: str = "") -> Summary:
    """Table and sentence. `about` names the model that the sentence is about; else it is found.

    The model that was `trained` is the student to the reader; any other goes by its own name.
    """
    metrics = evaluation.metrics
    names = _ordered(metrics)
    about = about or find_student(names)
    known = {name for row in metrics.values() for name in row}
    agreement = [name for name in AGREEMENT if name in known]
    if evaluation.task == "consult":
        columns: tuple[str, ...] = ("parsed", *CONSULT)
    elif "top1" in known or not agreement:
        columns = ("parsed", "top1", "disease_f1", *agreement, "evidence_grounded", "ece")
    else:
        columns = ("parsed", *agreement, "evidence_grounded", "ece")
    lines = tuple(
        Line(
            name=name,
            label=_label(name, trained, words),
            note=words.note(name),
            cases=metrics[name]["parsed"].n,
            cells=tuple(_cell(column, metrics[name], words) for column in columns),
        )
        for name in names
    )
    limit = metrics.get(EXACT, {})
    headline = _advice if evaluation.task == "consult" else _headline
    label = _label(about, trained, words)
    ours = words.language == "en" and label != about  # a name that a user gave stays as it is
    model = f"The {label[0].lower()}{label[1:]}" if ours else label
    told = headline(metrics.get(about, {}), model, words)
    return Summary(
        headline=told + words("stop"),
        student=about,
        columns=columns,
        lines=lines,
        limits=tuple(limit[c].value if c in limit and c in ("top1", "disease_f1") else None for c in columns),
    )


def find_student(models: Iterable[str]) -> str:
    """The model called student; else the last that is no baseline, base, teacher, nor a folder beside sections."""
    names = list(models)
    trained = [name for name in names if name not in (BASE, TEACHER, *YARDSTICKS)]
    trained = [name for name in trained if "/" not in name] or trained
    if "student" in names:
        return "student"
    return (trained or [name for name in names if name == BASE] or names or [""])[-1]


def _ordered(models: Iterable[str]) -> list[str]:
    place = {BASE: 0, "student": 2, TEACHER: 3} | {name: 4 + i for i, name in enumerate(YARDSTICKS)}
    return sorted(models, key=lambda name: place.get(name, 1))


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; 100 is exact."""
    return f"{100 * value:.{digits}f}".removesuffix(".0") + "%"


def _cell(column: str, row: dict[str, Estimate], words: Words) -> Cell:
    figure = row.get(column)
    if figure is None:
        return Cell()
    if column == "ece":
        floor = words("floor", value=f"{row['ece_floor'].value:.3f}")
        return Cell(f"{figure.value:.3f}", f"{figure.low:.3f}–{figure.high:.3f}", floor)
    return share(figure)


def share(figure: Estimate) -> Cell:
    """A share of cases."""
    return Cell(percent(figure.value), _range(figure), bar=figure)


def _range(figure: Estimate) -> str:
    return f"{100 * figure.low:.0f}–{100 * figure.high:.0f}"


def _advice(row: dict[str, Estimate], model: str, words: Words) -> str:
    """What matters of advice: whether it sends those who must go, and prescribes to none."""
    said = {name: row.get(name) for name in ("urgent_recall", "over_triage", "risky_prescription", "severe_miss")}
    urgent, over, risky, missed = said.values()
    parts = [
        urgent and words("sends", model=model, value=percent(urgent.value), n=urgent.n, range=_range(urgent)),
        over and words("oversends" if urgent else "oversends:alone", model=model, value=percent(over.value), n=over.n),
        risky and words("prescribes", model=model, value=percent(risky.value), n=risky.n),
        missed and words("misses", n=round(missed.value * missed.n)),
    ]
    told = words("join").join(part for part in parts if part)
    return told or words("failing" if row else "nothing", model=model)


def _label(name: str, trained: str, words: Words) -> str:
    """What a model is called: the one that was trained is the student, and keeps a name of its own."""
    own = words.model(name)
    return f"{words.model('student')} ({name})" if name and name == trained == own else own


def _headline(row: dict[str, Estimate], model: str, words: Words) -> str:
    for metric, key in (("top1", "right"), ("agreement_top1", "agrees")):
        if figure := row.get(metric):
            low, high = f"{100 * figure.low:.0f}", percent(figure.high, 0)
            sentence = words(key, model=model, value=percent(figure.value), n=figure.n, low=low, high=high)
            break
    else:
        return words("unknown" if row else "nothing")
    if gain := row.get("top1_minus_bag_of_words"):
        key = "beats" if gain.low > 0 else "loses" if gain.high < 0 else "ties"
        points = f"{100 * gain.value:+.1f}" if key == "ties" else f"{100 * abs(gain.value):.1f}"
        sentence += words(key, points=points, low=f"{100 * gain.low:+.1f}", high=f"{100 * gain.high:+.1f}")
    if (gain := row.get("top1_minus_commonest")) and gain.low <= 0:
        sentence += words("prior")
    if reached := row.get("top1_of_exact"):
        low, high = f"{100 * reached.low:.0f}", percent(reached.high, 0)
        sentence += words("reaches", share=percent(reached.value, 0), low=low, high=high)
    return sentence
