"""The records through which all data flows: frozen, strict, the same on disk as in memory.

A record is written as one JSON line and read back with the same class. Unknown fields are refused, so a
file from somewhere else goes through an importer and never slips in half understood.
"""

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Language = Literal["zh", "en"]
Task = Literal["diagnosis", "consult"]
GoldSource = Literal["human", "code", "textbook", "file"]
"""`file`: it came with the data, and who wrote it is not known."""


class Record(BaseModel):
    """Base of every record: immutable, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class Polarity(StrEnum):
    """What a record says of a finding."""

    AFFIRMED = "affirmed"
    NEGATED = "negated"


class Evidence(Record):
    """A passage of a case that speaks for a disease."""

    text: str
    start: int = Field(ge=0)
    """Offset of the first character in `Case.text`."""
    end: int = Field(ge=0)
    """Offset after the last character in `Case.text`."""
    polarity: Polarity = Polarity.AFFIRMED
    finding: str | None = None
    """Id of the textbook's finding, where known."""
    disease: str | None = None
    """The disease that it supports, where known."""


class Diagnosis(Record):
    """Names of diseases with the words of the record that speak for them; no disease means abstention."""

    diseases: tuple[str, ...] = ()
    reason: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    """Where `reason` stands in the case. Empty in a raw reply; the grader fills it."""

    @property
    def abstained(self) -> bool:
        """Whether the answer names no disease."""
        return not self.diseases


class Consultation(Record):
    """Advice, with the thinking before it."""

    think: str = ""
    answer: str


class Case(Record):
    """A patient's record, and what is known of it."""

    id: str
    text: str
    """All that a prompt may show, so that gold can't leak."""
    language: Language
    source: str
    group: str
    """The patient or the family of near-duplicates: the unit of a split."""
    meta: dict[str, Any] = Field(default_factory=dict)
    gold: Diagnosis | Consultation | None = None
    gold_source: GoldSource | None = None
    differential: dict[str, float] | None = None
    """Probability of each disease given the text, where known."""
    expects_abstention: bool = False
    """The text does not say enough: the best answer names no disease."""


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Record):
    """How a reply is drawn. `temperature` 0 is greedy."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, gt=0)
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Request(Record):
    """What is asked of a model."""

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    json_schema: str = ""
    """JSON schema of the reply, as JSON; endpoints that can are held to it (`response_format`)."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Alternatives wanted a token; 0 is the chosen token's log-probability alone, None is none at all."""
    candidates: tuple[str, ...] = ()
    """Ways in which the last message, the assistant's, may go on: their probabilities are wanted, and no words."""


class Token(Record):
    """One generated token: its text as UTF-8 (a character may span several tokens) and log-probability."""

    utf8: bytes
    logprob: float | None
    """None where the endpoint gave none."""
    alternatives: tuple[tuple[bytes, float], ...] = ()


class Usage(Record):
    """Tokens that a reply took."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, what the provider had in its cache."""
    completion_tokens: int = 0
    thinking_tokens: int = 0
    """Of the completion, what was thought before the reply."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in Usage.model_fields})


class Reply(Record):
    """What a model said."""

    text: str
    thinking: str = ""
    finish: Literal["stop", "length", "refusal"] = "stop"
    model: str = ""
    usage: Usage = Usage()
    tokens: tuple[Token, ...] = ()
    """The tokens of `text`, when log-probabilities were asked for; joined they are `text`, unless the endpoint gives
    ids in place of bytes (`text.token_id`): then all that it wrote, thinking and the end of the turn too. Where
    candidates were asked about: each of them with its log-probability as a whole, in their order, and no text."""
    cut: bool = False
    """The record was longer than the model's context, and its end was not read."""
    key: str = ""
    """The ledger's key, on which stores join."""


class FailureKind(StrEnum):
    """Why there is no output. Each is counted apart; none is a wrong answer."""

    PROVIDER = "provider"
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"
    REFUSED = "refused"
    EMPTY = "empty"
    UNPARSED = "unparsed"


class Failure(Record):
    """A named reason for a missing output, with the detail that helps to mend it."""

    kind: FailureKind
    detail: str = ""


class UnansweredError(Exception):
    """A request of a conversation brought no reply, for good."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


OTHER = "other"
"""In a set of diseases, every one to which the answer gives no probability of its own."""


class Withheld(Record):
    """An answer that was not given, for it was too doubtful."""

    output: Diagnosis
    confidence: float = Field(ge=0, le=1)
    """In its first disease."""
    threshold: float = Field(ge=0, le=1)
    """Below which no answer is given."""
    ask: str = ""
    """The finding that would help most, by name; empty where that is not known."""


class Prediction(Record):
    """A model's answer to a case, or the reason why there is none."""

    case_id: str
    sample: int = 0
    model: str
    prompt_sha: str
    """sha256 of the messages that were sent, as hex."""
    reply: str = ""
    """The ledger's key of the last reply."""
    text: str = ""
    """The raw reply, always kept."""
    thinking: str = ""
    """What was thought before the reply, where the endpoint tells the two apart."""
    output: Diagnosis | Consultation | None = None
    failure: Failure | None = None
    repaired: bool = False
    """The reply parsed only after mending."""
    corrected: bool = False
    """An earlier reply did not parse; the model was told why, and answered again."""
    revised: bool = False
    """The last turn says something else than an earlier one: a second look changed the answer."""
    cut: bool = False
    """The record was longer than the model's context, and its end was not read."""
    agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of the samples of this answer that say the same, where several were drawn."""
    confidence: dict[str, float] = Field(default_factory=dict)
    """Probability of each disease that the answer names, or would if it were not withheld, where known; calibrated,
    where a calibration is there."""
    uncalibrated: dict[str, float] = Field(default_factory=dict)
    """The same before it was calibrated; empty where it never was."""
    distribution: dict[str, float] = Field(default_factory=dict)
    """Probability that a disease is named first, where known; the empty name stands for abstention, and what all
    lack to 1 belongs to everything else."""
    prediction_set: tuple[str, ...] | None = None
    """Diseases, the likeliest first, one of which is true as often as was asked for; OTHER may be among them."""
    withheld: Withheld | None = None
    """What would have been answered, where the answer abstains because it was too doubtful."""
    usage: Usage = Usage()

    @model_validator(mode="after")
    def _one_result(self) -> Self:
        if (self.output is None) == (self.failure is None):
            raise ValueError("a prediction holds either an output or a failure")
        return self

    @property
    def abstained(self) -> bool:
        """Whether the answer is that no disease can be named."""
        return isinstance(self.output, Diagnosis) and self.output.abstained


class Score(Record):
    """A grader's or judge's value of one answer, in [0, 1]."""

    case_id: str
    sample: int = 0
    value: float | None
    """None when the judge broke: that is not a zero."""
    parts: dict[str, float | None] = Field(default_factory=dict)


class Row(Record):
    """One training example: the messages of a prompt and the answer to learn."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    case_id: str
    sample: int = 0


class Pair(Record):
    """Two answers to one prompt, the first better by the grader."""

    id: str
    case_id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


class Issue(Record):
    """One thing wrong with an input file, and what was done about it."""

    file: str
    line: int
    field: str = ""
    reason: str
    action: Literal["dropped", "kept", "changed"]

    @property
    def problem(self) -> str:
        """The field, where there is one, and the reason."""
        return f"{self.field}: {self.reason}" if self.field else self.reason
