"""What the model card and the data sheet tell of a run: gathered from its files, nothing made up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from preceptor.core.records import Language, Task
from preceptor.core.statistics import Estimate
from preceptor.report.prepared import Summary

MINORS = "0–17"
"""The band of ages below that of adults."""
TEXTBOOK = "textbook"
"""The source of cases that were drawn from it."""
LEAST = 5
"""Patients that a group must have to be counted openly: fewer may point at a person."""
Figures = Mapping[str, Estimate]
"""By metric, as evaluate has them."""


class Stated(BaseModel):
    """What only people know of a model and its data; what is empty is told to be not stated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contact: str = ""
    """Who answers for the model, and how they are reached."""
    use: str = ""
    """Who is to use it, in what setting, and for what."""
    origin: str = ""
    """Where the records come from: institutions, years, departments."""
    ethics: str = ""
    """Consent, or its waiver, and the approval of an ethics committee."""
    licenses: Mapping[str, str] = {}
    """Of the data, by the name of its file."""
    deidentified: str = ""
    """How and with what identities were taken out of the records, and who checked it."""
    retention: str = ""
    """How long data, labels and model are kept, and who deletes them."""


NOTHING_STATED = Stated()


@dataclass(frozen=True)
class Asked:
    """A model that a section of the run asked."""

    section: str
    stage: str
    model: str
    services: tuple[str, ...]
    """Names of known services; an endpoint of one's own has none, for its address is nobody's business."""
    distillation: bool | None
    """Whether the terms let replies train another model; None where that is not known of all endpoints."""
    served: tuple[str, ...] = ()
    """What the endpoints said that the model is called."""


@dataclass(frozen=True)
class Labelled:
    """What a section that labels did."""

    section: str
    teacher: str
    strategy: str
    samples: int
    account: Mapping[str, Any]
    """Its metrics: cases, answered, abstained, failed, failures by kind, agreement of samples."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said of the model."""

    judge: Mapping[str, Any]
    """model, temperature, repeats, rubric, and the digests of rubric and prompt."""
    figures: Mapping[str, Any]
    """score, validity, and where people judged too kappa, balanced_f1 and bias."""


@dataclass(frozen=True)
class Learned:
    """The rows that were learned."""

    rows: int = 0
    diseases: Mapping[str, int] = field(default_factory=dict)
    """Rows that name a disease, the commonest first."""
    abstained: int = 0
    unread: int = 0
    """Answers that are no diagnosis."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Rows by the source of their case; of a case that is not at hand, none."""
    sexes: Mapping[str, int] = field(default_factory=dict)
    """Rows by the patient's sex; empty where the record doesn't say."""
    ages: Mapping[str, int] = field(default_factory=dict)
    """Rows by the patient's age, in bands of years; likewise."""
    held_out: int = 0
    """Held-out cases and red-team items at hand."""
    about_held_out: int = 0
    """Rows about one of them, by id or by text."""

    @property
    def synthetic(self) -> int:
        """Rows about generated cases."""
        return self.sources.get(TEXTBOOK, 0)

    @property
    def about_nobody(self) -> bool:
        """Whether all rows are about generated cases."""
        return bool(self.rows) and self.synthetic == self.rows


@dataclass(frozen=True)
class Facts:
    """All of it. What a run doesn't hold is empty or None."""

    recipe: str
    section: str
    """The section that trained the model."""
    language: Language
    task: Task
    adapter: bool
    """What the card goes with is an adapter; else it is a whole model, trained as one or merged."""
    base: str
    """As the recipe names it, or as the section does that was trained first."""
    earlier: tuple[str, ...] = ()
    """Sections that trained the model before this one did."""
    license: str = ""
    """Of the base."""
    base_digest: str = ""
    """sha256 over what decides the base's answers, where an adapter says it."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """sha256 by file."""
    data: tuple[tuple[str, str], ...] = ()
    """Files from outside, the rows, and the cases that the figures are about, with their sha256."""
    raw: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files that prepare read, by path."""
    seed: int | None = None
    code: Mapping[str, Any] = field(default_factory=dict)
    """version, commit, and whether it was changed since."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: Mapping[str, Any] = field(default_factory=dict)
    """The metrics of the training."""
    validation: tuple[int, Literal["gold", "labels"]] | None = None
    """How many rows checkpoints were graded on, and what their answers are; None: checkpoints were not graded."""
    asked: tuple[Asked, ...] = ()
    prepared: Summary | None = None
    textbook: bool = False
    """Cases were drawn from the textbook: all figures are of a simulation."""
    labelled: tuple[Labelled, ...] = ()
    curated: Mapping[str, Any] = field(default_factory=dict)
    """The metrics of curation."""
    learned: Learned = Learned()
    name: str = ""
    """What the model is called in `metrics`."""
    together: str = ""
    """Of two models that answered in turn, one of which this is."""
    metrics: Mapping[str, Figures] = field(default_factory=dict)
    """By model; empty where none was evaluated."""
    answers: Mapping[str, Any] = field(default_factory=dict)
    """What became of the model's own answers: cases, answered, abstained, repaired, failed, failures by kind."""
    severe: Mapping[str, int] = field(default_factory=dict)
    """Severe misses by kind of case."""
    judged: tuple[Judgement, ...] = ()
    stated: Stated = NOTHING_STATED
    watermark: str = ""
    """A line that the card begins with."""

    @property
    def figures(self) -> Figures:
        """The model's own."""
        return self.metrics.get(self.name, {})

    @property
    def languages(self) -> tuple[str, ...]:
        """Of the cases, the commonest first; of the recipe where there are none."""
        told = self.prepared.distributions["language"] if self.prepared else {}
        return tuple(sorted(told, key=lambda name: -told[name])) or (self.language,)

    @property
    def transductive(self) -> int:
        """Rows about cases that were to be predicted."""
        return int(self.trained.get("transductive_rows", 0))

    def count(self, n: int) -> str:
        """A number of patients as it may be told."""
        return f"<{LEAST}" if 0 < n < LEAST and not self.learned.about_nobody else f"{n:,}"
