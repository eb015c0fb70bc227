"""Judging by model: whether an answer meets each criterion of a rubric, or which of two answers is better.

What is judged is data: it stands between marks that it can't close, and a verdict counts only in JSON that carries
the check word of this very question, which no answer can know. Every "met" must quote a passage that code finds
again. A verdict that fails any of this is no verdict, and never a "not met".
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from preceptor.clinical.evidence import locate
from preceptor.core.errors import UserError
from preceptor.core.records import (
    Case,
    Consultation,
    Diagnosis,
    Failure,
    FailureKind,
    Language,
    Message,
    Prediction,
    Record,
    Reply,
    Request,
    Sampling,
    Score,
)
from preceptor.core.text import fold
from preceptor.tasks import answer as answers
from preceptor.tasks.prompts import Prompt

_PLACE = re.compile(r"\{(record|answer|first|second|criteria|check)\}")
_TAG = re.compile(r"([<＜﹤])(?=[^\s\d=.])")
"""What may begin a mark, or a token that parts a chat's turns; `WBC <3.5` and `<= 5` begin none."""
_AROUND = "\"'.,;:!?…《》*`"
"""What a judge may put around a quotation or leave out at its ends, folded: never a + or -, which a sign may have."""
_OPENING = re.compile(r"\{")
_ATTEMPTS = 200
"""Places at which JSON is tried before the reply counts as noise."""
_TOLD = {"是": True, "否": False}
"""Beside the words that pydantic knows: true, false, yes, no, 1, 0."""
_LABELS = {"en": ("Diagnosis:", "Evidence:", "none is named"), "zh": ("诊断：", "依据：", "不作诊断")}


class Criterion(Record):
    """What an answer may meet or not."""

    id: str = Field(min_length=1)
    """A short name, by which verdicts and people's files speak of it."""
    points: float = Field(allow_inf_nan=False)
    """Negative for a fault."""
    criterion: str = Field(min_length=1)
    quote: Literal["answer", "record"] = "answer"
    """Where the passage stands that shows it to be met."""


class _Criteria(Record):
    criteria: tuple[Criterion, ...]

    @field_validator("criteria")
    @classmethod
    def _can_score(cls, value: tuple[Criterion, ...]) -> tuple[Criterion, ...]:
        twice = [name for name, n in Counter(criterion.id for criterion in value).items() if n > 1]
        if twice:
            raise ValueError(f"the id {twice[0]!r} stands there twice")
        if not any(criterion.points > 0 for criterion in value) or not all(criterion.points for criterion in value):
            raise ValueError("each criterion needs points, and one at least more than 0")
        return value


@dataclass(frozen=True)
class Rubric:
    """Criteria, and the sha256 of the file that holds them."""

    name: str
    criteria: tuple[Criterion, ...]
    sha256: str

    def value(self, met: Mapping[str, float]) -> float:
        """Points of the criteria met over all positive points (HealthBench): at most 1, below 0 for many faults."""
        most = sum(criterion.points for criterion in self.criteria if criterion.points > 0)
        return sum(criterion.points * met[criterion.id] for criterion in self.criteria) / most


class Flaw(StrEnum):
    """Why a verdict doesn't count."""

    MISSING = "missing"
    MALFORMED = "malformed"
    UNQUOTED = "unquoted"
    """It is in favour, and its quotation is empty or doesn't stand in the text."""


class Verdict(Record):
    """What a judge says of one criterion; `met` is None where the verdict has a flaw."""

    met: bool | None = None
    quote: str = ""
    flaw: Flaw | None = None


class Choice(Record):
    """Which of two answers a judge calls better; None where the verdict has a flaw."""

    better: Literal["first", "second", "tie"] | None = None
    quote: str = ""
    flaw: Flaw | None = None


class Judged(Score):
    """A judge's score of one answer, which many faults take below 0.

    `parts` has the share of valid verdicts that say met, by criterion: 1 or 0 where the judge was asked once or agrees
    with itself, None where no verdict is valid.
    """

    model: str
    unscored: str = ""
    """Why `value` is None: how the answer failed, how the judge did, or `incomplete` for want of a verdict."""
    said: tuple[dict[str, Verdict] | Failure, ...] = ()
    """The verdicts of each repeat."""


class Compared(Score):
    """Whether the first of two models' answers to a case is the better one: 1, 0, or ½ for a tie; mean of repeats."""

    models: tuple[str, str]
    unscored: str = ""
    """Why `value` is None: `unanswered` by one of the two, or `incomplete` for want of a choice."""
    said: tuple[tuple[Choice | Failure, Choice | Failure], ...] = ()
    """The choices of each repeat: with the first model's answer first, and with it second."""


class HumanVerdict(BaseModel):
    """What a person says of one criterion. Other columns may stand beside these."""

    case_id: str = Field(coerce_numbers_to_str=True)
    criterion: str
    met: bool | None
    """None where the field was left empty."""
    model: str = ""

    @field_validator("met", mode="before")
    @classmethod
    def _told(cls, value: Any) -> Any:
        value = value.strip() if isinstance(value, str) else value
        return None if value == "" else _TOLD.get(value, value)

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return value or ""


Judging = Generator[Request, Reply, dict[str, Verdict] | Failure]
Comparing = Generator[Request, Reply, Choice | Failure]


def is_path(name: str) -> bool:
    """Whether a rubric's name is the path of a user's file."""
    return name.endswith((".yaml", ".yml"))


def load(name: str, language: Language) -> Rubric:
    """The rubric called `name`: one of the package's for the language, or the path of a YAML file.

    Raises:
        UserError: there is no such rubric, or it is none.
    """
    ours = files("preceptor.tasks").joinpath("prompts", "rubrics", f"{name}.{language}.yaml")
    path = Path(name) if is_path(name) else ours
    if not path.is_file():
        copy = "copy one from preceptor/tasks/prompts/rubrics and name its path"
        raise UserError(f"{name}: no such rubric in {language!r}: name diagnosis or consult, or {copy}")
    data = path.read_bytes()
    try:
        criteria = _Criteria.model_validate(yaml.safe_load(data.decode("utf-8-sig"))).criteria
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text; convert it first") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not a YAML file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}: {at}: {problem}; a rubric is a list `criteria` of id, points, criterion") from error
    return Rubric(name, criteria, hashlib.sha256(data).hexdigest())


def shown(output: Diagnosis | Consultation, language: Language) -> str:
    """An answer as its judge reads it: the names and reasons, or the advice without the thinking before it."""
    if isinstance(output, Consultation):
        return output.answer
    diseases, evidence, none = _LABELS[language]
    points = [f"{number}. {name}" for number, name in enumerate(output.diseases, 1)]
    reasons = [f"{number}. {reason}" for number, reason in enumerate(output.reason, 1)]
    return "\n".join([diseases, *(points or [none]), *([evidence, *reasons] if reasons else [])])


def judge(case: Case, answer: str, rubric: Rubric, prompt: Prompt, sampling: Sampling) -> Judging:
    """One question about one answer: a verdict on each criterion, or the failure of them all."""
    request, check = _request(prompt, sampling, rubric, {"record": case.text, "answer": answer})
    found = _read((yield request), check, "verdicts")
    if isinstance(found, Failure):
        return found
    given = found["verdicts"] if isinstance(found["verdicts"], dict) else {}
    texts = {"answer": answer, "record": case.text}
    return {c.id: _verdict(given.get(c.id), texts[c.quote]) for c in rubric.criteria}


def compare(case: Case, pair: tuple[str, str], rubric: Rubric, prompt: Prompt, sampling: Sampling) -> Comparing:
    """One question about two answers in this order: which is better by the rubric's criteria."""
    texts = dict(zip(("first", "second"), pair, strict=True))
    request, check = _request(prompt, sampling, rubric, {"record": case.text, **texts})
    found = _read((yield request), check, "better")
    if isinstance(found, Failure):
        return found
    better, quote = found["better"], found.get("quote")
    if better == "tie":
        return Choice(better="tie")
    if not isinstance(better, str) or better not in ("first", "second"):
        return Choice(flaw=Flaw.MALFORMED)
    if not isinstance(quote, str) or not _stands(quote, texts[better]):
        return Choice(quote=str(quote or ""), flaw=Flaw.UNQUOTED)
    return Choice(better=better, quote=quote)


def score(prediction: Prediction, said: Sequence[dict[str, Verdict] | Failure], rubric: Rubric) -> Judged:
    """The score of an answer, on which the judge was asked once or several times; none without all criteria."""
    parts: dict[str, float | None] = {}
    for criterion in rubric.criteria if said else ():
        given = [one[criterion.id].met for one in said if not isinstance(one, Failure)]
        valid = [met for met in given if met is not None]
        parts[criterion.id] = sum(valid) / len(valid) if valid else None
    met = {name: part for name, part in parts.items() if part is not None}
    unscored = "" if len(met) == len(rubric.criteria) else _reason(said) or "incomplete"
    return Judged(
        case_id=prediction.case_id,
        sample=prediction.sample,
        value=None if unscored else rubric.value(met),
        parts=parts,
        model=prediction.model,
        unscored=prediction.failure.kind if prediction.failure else unscored,
        said=tuple(said),
    )


def preference(one: Choice | Failure, other: Choice | Failure) -> tuple[float, bool] | None:
    """The first answer's share of a pair that was shown as it is and then swapped, and whether the choice flipped.

    A choice that flips with the order is a tie, ½. None where one of the two is none.
    """
    values = {"first": 1.0, "second": 0.0, "tie": 0.5}
    if isinstance(one, Failure) or isinstance(other, Failure) or one.better is None or other.better is None:
        return None
    as_is, swapped = values[one.better], 1 - values[other.better]
    return (0.5, True) if as_is != swapped else (as_is, False)


def contest(
    models: tuple[str, str], place: tuple[str, int], said: Sequence[tuple[Choice | Failure, Choice | Failure]]
) -> Compared:
    """The outcome for one case and sample: the mean of the repeats' preferences."""
    values = [found[0] for both in said if (found := preference(*both))]
    lacking = "incomplete" if said else "unanswered"
    return Compared(
        case_id=place[0],
        sample=place[1],
        value=sum(values) / len(values) if values else None,
        models=models,
        unscored="" if values else lacking,
        said=tuple(said),
    )


def _reason(said: Sequence[Any]) -> str:
    """The kind of the last failure where all failed."""
    return said[-1].kind.value if said and all(isinstance(one, Failure) for one in said) else ""


def _request(prompt: Prompt, sampling: Sampling, rubric: Rubric, texts: Mapping[str, str]) -> tuple[Request, str]:
    """The question, and its check word. Texts are put in at once, so that none can hold a place for another."""
    whole = json.dumps([rubric.sha256, *texts.values()])
    check = hashlib.sha256(whole.encode()).hexdigest()[:12]
    criteria = "\n".join(f"- {c.id} (quote the {c.quote}): {c.criterion}" for c in rubric.criteria)
    filled = {name: _TAG.sub(r"\1 ", text) for name, text in texts.items()} | {"criteria": criteria, "check": check}
    turns = ((turn.role, _PLACE.sub(lambda place: filled[place[1]], turn.content)) for turn in prompt.turns)
    return Request(messages=tuple(Message(role=role, content=text) for role, text in turns), sampling=sampling), check


def _read(reply: Reply, check: str, key: str) -> dict[str, Any] | Failure:
    """The last JSON object of a reply that has the check word and the key."""
    found = None
    if reply.finish == "stop":
        decoder, start = json.JSONDecoder(), 0
        for _ in range(_ATTEMPTS):
            if not (opening := _OPENING.search(reply.text, start)):
                break
            try:
                value, start = decoder.raw_decode(reply.text, opening.start())
            except (ValueError, RecursionError):
                start = opening.end()
                continue
            if value.get("check") == check and key in value:
                found = value
    if found is not None:
        return dict(found)
    cut = reply.finish == "length"
    outcome = answers.Outcome.TRUNCATED if cut else answers.parse(reply.text, reply.finish).outcome
    silent = (answers.Outcome.REFUSED, answers.Outcome.EMPTY, answers.Outcome.TRUNCATED)
    kind = FailureKind(outcome) if outcome in silent else FailureKind.UNPARSED
    return Failure(kind=kind, detail=f"the reply has no JSON object with the check word and {key!r}")


def _verdict(given: Any, text: str) -> Verdict:
    if given is None:
        return Verdict(flaw=Flaw.MISSING)
    met, quote = (given.get("met"), given.get("quote")) if isinstance(given, dict) else (None, None)
    if not isinstance(met, bool):
        return Verdict(flaw=Flaw.MALFORMED)
    quote = quote if isinstance(quote, str) else ""
    if met and not _stands(quote, text):
        return Verdict(quote=quote, flaw=Flaw.UNQUOTED)
    return Verdict(met=met, quote=quote)


def _stands(quote: str, text: str) -> bool:
    """Whether a text has these very words, but for width, case, spaces and the marks around them."""
    span = locate(quote, text)
    return span is not None and _core(text[slice(*span)]) == _core(quote)


def _core(text: str) -> str:
    return fold(text).text.strip(_AROUND)
