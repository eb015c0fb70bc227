"""What a teacher's label must be to be learned, which of several answers to one case is, and which two make a pair.

The grader decides. What no rule may lift: a failure is no label, a reason stands in the record, and advice neither
prescribes nor misses an emergency.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preceptor.core.records import Case, Consultation, Diagnosis, Message, Pair, Prediction, Record, Row, Score, Task
from preceptor.tasks import consult, diagnosis
from preceptor.tasks.prompts import Prompt

Fate = Literal["keep", "review", "drop"]
OTHER_TASK, OUTDONE, REPEATED, UNGROUNDED, UNTHOUGHT = "other_task", "outdone", "repeated", "ungrounded", "unthought"
UNSTATED = "unstated"
FLAGS = ("repaired", "corrected", "revised")
"""Marks of a label, each with a rule of its name."""
KEYS = {
    OTHER_TASK: "task",
    UNGROUNDED: "grounded",
    UNTHOUGHT: "think",
    UNSTATED: "states",
    "hallucinated": "hallucinated",
    "unmapped": "known",
    "low_score": "score",
    "score": "review_score",
    "agreement": "agreement",
    **{flag: flag for flag in FLAGS},
}
"""The rule that keeps a label from being learned, by the first word of the fault or doubt."""
_UNSURE = "how sure the teacher is of {} is not known; label with logprobs: 5, or with confidence: stated"
_UNTOLD = "the teacher's thinking is not told; ask with a prompt that wants it"
_EXACT = 9
"""Decimals to which scores are told apart."""


class Rules(BaseModel):
    """What a label must be to be learned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task = "diagnosis"
    part: Literal["whole", "diseases", "evidence"] = "whole"
    """What of an answer is learned, of a prompt that asks in two stages: the diseases alone, or the evidence where they
    are given, each by a model of its own. Pairs are of whole answers alone."""
    think: bool | None = None
    """The thinking is learned before the answer, and a label without any is dropped; by default so in consult alone."""
    states: bool | None = None
    """The label's confidence in each disease is learned with it, and a label without it is dropped; by default so where
    the prompt asks for it, by `[act: stated]`."""
    grounded: float = Field(default=0.5, ge=0, le=1)
    """Least share of an answer's reasons that must stand in the record; the others are taken out."""
    hallucinated: float = Field(default=1, ge=0, le=1)
    """Most share of the reasons that may stand nowhere in the record, or with another number."""
    score: float = Field(default=0, ge=0, le=1)
    """Least score by the grader, which knows the case's gold where there is one; what scores less is dropped."""
    review_score: float = Field(default=0, ge=0, le=1)
    """What scores less, and is not dropped, goes to review."""
    agreement: float = Field(default=0, ge=0, le=1)
    """Least agreement among the teacher's samples; below it, or where it is unknown, a label goes to review."""
    repaired: Fate = "keep"
    """What becomes of an answer that parsed only after mending."""
    corrected: Fate = "keep"
    """Of one that the teacher gave on being told why an earlier one did not parse."""
    revised: Fate = "keep"
    """Of one that a second look changed."""
    known: bool = False
    """Only diseases that the textbook knows are learned."""
    samples: Literal["best", "all"] = "best"
    """Which of a case's answers are learned: the best by the grader, or all that differ."""
    pairs: int = Field(default=1, ge=0)
    """Most pairs of a better and a worse answer that a case gives."""
    margin: float = Field(default=0.2, gt=0, le=1)
    """Least difference between the scores of a pair."""

    @model_validator(mode="after")
    def _in_parts(self) -> "Rules":
        if self.part != "whole" and (self.thinks or self.task == "consult"):
            raise ValueError("part: only a diagnosis without thinking has parts; leave out `part`, or `think`")
        if self.states and (self.part != "whole" or self.task == "consult"):
            raise ValueError("states: only a whole diagnosis states its confidence; leave out `states`")
        return self

    @property
    def thinks(self) -> bool:
        """Whether thinking is learned."""
        return self.task == "consult" if self.think is None else self.think


class Dropped(Record):
    """A label that is not learned, and why."""

    case_id: str
    sample: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Graded:
    """An answer that parsed, and what the rules say of it."""

    label: Prediction
    answer: Diagnosis | Consultation
    """What can be learned of it: without the reasons that stand nowhere."""
    value: float | None
    """The grader's, of the answer as it came; None where it can't tell: an abstention without gold."""
    fault: tuple[str, str] | None
    """Why it can't be learned: a word, and the detail."""
    doubts: tuple[str, ...]
    """Why a person should look at it first."""
    source: int = 0
    """Of which file it is: of equals the later is better."""
    reviewed: bool = False
    """It is a person's word."""

    @property
    def passes(self) -> bool:
        """Whether it can be learned as it is."""
        return not self.fault and not self.doubts

    @property
    def thinking(self) -> str:
        """What was thought before the answer."""
        return (self.answer.think if isinstance(self.answer, Consultation) else self.label.thinking).strip()

    @property
    def trimmed(self) -> bool:
        """Whether reasons were taken out."""
        came = self.label.output
        return isinstance(self.answer, Diagnosis) and isinstance(came, Diagnosis) and self.answer.reason != came.reason

    def dropped(self, reason: str, detail: str = "") -> Dropped:
        """It is not learned."""
        return Dropped(case_id=self.label.case_id, sample=self.label.sample, reason=reason, detail=detail)


@dataclass(frozen=True)
class Choice:
    """What becomes of the answers to one case: each stands in one of these."""

    learned: tuple[Graded, ...] = ()
    apart: tuple[Graded, ...] = ()
    """Could be learned, and is kept to validate on."""
    review: tuple[Graded, ...] = ()
    dropped: tuple[Dropped, ...] = ()

    def held_back(self) -> "Choice":
        """The same where the case is kept apart: one answer to validate on, and none to learn."""
        others = (one.dropped(REPEATED, "another answer of its case is kept apart") for one in self.learned[1:])
        return Choice((), self.learned[:1], self.review, (*self.dropped, *others))


def graded(label: Prediction, case: Case, rules: Rules, *, reviewed: bool = False) -> Graded | Dropped:
    """A label held against the rules; Dropped if there is no answer in it.

    `reviewed`: a person has said that it is right, so that only what no rule may lift is held against it.
    """
    if label.failure:
        return _dropped(label, label.failure.kind.value, label.failure.detail)
    output = label.output
    if not isinstance(output, Diagnosis if rules.task == "diagnosis" else Consultation):
        return _dropped(label, OTHER_TASK, f"a {type(output).__name__}, where the task is {rules.task}")
    answer: Diagnosis | Consultation = output
    if isinstance(output, Diagnosis):
        score = diagnosis.grade(Diagnosis() if output.abstained else output, case)  # its reasons speak for nothing
        answer, fault = _diagnosed(label, output, case, rules, reviewed=reviewed)
    else:
        score = consult.grade(output, case)
        fault = _advised(output, score, rules)
    if reviewed:
        return Graded(label, answer, score.value, fault, (), reviewed=True)
    return Graded(label, answer, score.value, fault or _below(label, score, rules), _doubts(label, score, rules))


def row(label: Prediction, answer: Diagnosis | Consultation, record: str, prompt: Prompt, rules: Rules) -> Row:
    """What teaches a model to give the answer where `prompt` asks about the record."""
    return Row(
        id=f"{label.case_id}#{label.sample}",
        messages=asked(prompt, record, answer, rules),
        answer=written(label, answer, rules),
        case_id=label.case_id,
        sample=label.sample,
    )


def asked(prompt: Prompt, record: str, answer: Diagnosis | Consultation, rules: Rules) -> tuple[Message, ...]:
    """The messages before the answer; where the evidence alone is asked for, with the answer's diseases as given."""
    first = prompt.render(record)
    if rules.part != "evidence" or not isinstance(answer, Diagnosis):
        return first
    return (*first, Message(role="assistant", content=_named(answer)), *prompt.stages[1])


def written(label: Prediction, answer: Diagnosis | Consultation, rules: Rules) -> str:
    """The answer as the student is to write it; one that nothing was thought before has no marks of thinking."""
    if isinstance(answer, Consultation):
        return consult.canonical(answer) if rules.thinks and answer.think.strip() else answer.answer
    thought = f"<think>\n{label.thinking}\n</think>\n\n" if rules.thinks and label.thinking.strip() else ""
    return thought + _told(answer, rules, label)


def _told(answer: Diagnosis, rules: Rules, label: Prediction | None = None) -> str:
    """The answer in JSON; with the confidence of its label where that is to be stated."""
    if label and rules.states:
        return diagnosis.canonical(answer, label.confidence)
    return _named(answer) if rules.part == "diseases" else diagnosis.canonical(answer)


def _named(answer: Diagnosis) -> str:
    """The answer to the first of two questions."""
    return json.dumps({"diseases": list(answer.diseases)}, ensure_ascii=False)


def choose(answers: Sequence[Graded | Dropped], rules: Rules) -> Choice:
    """Which answers to one case are learned, and which go to review where none can be without it.

    A person's word comes before all else. The best by the grader wins; of equals that of the later file, then the one
    with the highest agreement, then the first sample.
    """
    able = [one for one in answers if isinstance(one, Graded) and not one.fault]
    passing = [one for one in able if one.passes]
    said = [one for one in passing if one.reviewed]
    ranked = _ranked((said if rules.samples == "best" else []) or passing or able)
    chosen: dict[str, Graded] = {}
    for one in ranked if said or rules.samples == "all" else ranked[:1]:
        chosen.setdefault(_said(one, rules), one)
    taken, dropped = tuple(chosen.values()), list[Dropped]()
    for answer in answers:
        if isinstance(answer, Dropped):
            dropped.append(answer)
        elif answer.fault:
            dropped.append(answer.dropped(*answer.fault))
        elif all(answer is not other for other in taken):
            same = chosen.get(_said(answer, rules))
            better = (same or ranked[0]).label.sample
            dropped.append(answer.dropped(REPEATED if same else OUTDONE, f"sample {better} stands for the case"))
    return Choice(learned=taken if passing else (), review=() if passing else taken, dropped=tuple(dropped))


def paired(answers: Sequence[Graded | Dropped], case: Case, messages: tuple[Message, ...], rules: Rules) -> list[Pair]:
    """The pairs of a case, the most different first. The better one could be learned; the worse one parsed."""
    if rules.part != "whole":
        return []
    scored = [(one, one.value) for one in answers if isinstance(one, Graded) and one.value is not None]
    options = [
        (round(high - low, _EXACT), better, worse)
        for better, high in scored
        if better.passes
        for worse, low in scored
        if round(high - low, _EXACT) >= rules.margin and (worse.thinking or not rules.thinks)
        if not (rules.states and _unsure(worse.label))
    ]
    options.sort(key=lambda option: -option[0])
    return [_pair(better, worse, case, messages, rules) for _, better, worse in options[: rules.pairs]]


def _pair(better: Graded, worse: Graded, case: Case, messages: tuple[Message, ...], rules: Rules) -> Pair:
    """Its scores are those of the texts: what was taken out of the better one counts no more."""
    value = diagnosis.grade(better.answer, case).value if isinstance(better.answer, Diagnosis) else better.value
    return Pair(
        id=f"{case.id}#{better.label.sample}>{worse.label.sample}",
        case_id=case.id,
        messages=messages,
        chosen=written(better.label, better.answer, rules),
        rejected=written(worse.label, _output(worse.label), rules),
        chosen_score=value or 0.0,
        rejected_score=worse.value or 0.0,
    )


def _ranked(pool: Sequence[Graded]) -> list[Graded]:
    """The best first. The grader can't weigh abstaining against naming without gold: there the many go first."""
    silent = 2 * sum(one.value is None for one in pool) > len(pool)

    def worth(one: Graded) -> tuple[bool, float, int, float, int]:
        value = round(one.value or 0.0, _EXACT)
        return (one.value is None) == silent, value, one.source, one.label.agreement or 0.0, -one.label.sample

    return sorted(pool, key=worth, reverse=True)


def _said(one: Graded, rules: Rules) -> str:
    """What two answers that are the same have in common; another thinking doesn't make another answer."""
    answer = one.answer
    return _told(answer, rules) if isinstance(answer, Diagnosis) else answer.answer


def _diagnosed(
    label: Prediction, output: Diagnosis, case: Case, rules: Rules, *, reviewed: bool
) -> tuple[Diagnosis, tuple[str, str] | None]:
    lacking = (UNTHOUGHT, _UNTOLD) if rules.thinks and not label.thinking.strip() else None
    if rules.states and (unsure := _unsure(label)):
        lacking = lacking or (UNSTATED, _UNSURE.format(unsure[0]))
    if output.abstained:
        return Diagnosis(), lacking
    blind = case.model_copy(update={"gold": None})  # the record alone decides what stands in it
    reasons = tuple(reason for reason in output.reason if _stands(reason, blind))
    answer = Diagnosis(diseases=output.diseases, reason=reasons)
    if not reasons or (len(reasons) < rules.grounded * len(output.reason) and not reviewed):
        detail = f"{len(reasons)} of {len(output.reason)} reasons stand in the record"
        return answer, lacking or (UNGROUNDED, detail)
    return answer, lacking


def _unsure(label: Prediction) -> list[str]:
    """The diseases of a label of which it is not known how sure it is."""
    output = label.output
    return [d for d in output.diseases if d not in label.confidence] if isinstance(output, Diagnosis) else []


def _stands(reason: str, case: Case) -> bool:
    return bool(diagnosis.grade(Diagnosis(reason=(reason,)), case).parts["evidence_grounded"])


def _advised(output: Consultation, score: Score, rules: Rules) -> tuple[str, str] | None:
    for part in ("risky_prescription", "severe_miss"):
        if score.parts[part]:
            return part, "advice that does so is never learned"
    if output.think.strip() and not score.parts["think_tag"]:
        return "stray_tags", "marks of thinking stand in the midst of the text"
    return (UNTHOUGHT, _UNTOLD) if rules.thinks and not output.think.strip() else None


def _below(label: Prediction, score: Score, rules: Rules) -> tuple[str, str] | None:
    """What a recipe's thresholds hold against a label."""
    for name in FLAGS:
        if getattr(label, name) and getattr(rules, name) == "drop":
            return name, f"the recipe says {name}: drop"
    if (lost := score.parts.get("hallucinated")) is not None and lost > rules.hallucinated:
        return "hallucinated", f"{lost:.2f} of the reasons stand nowhere in the record"
    if rules.known and score.parts.get("unmapped"):
        return "unmapped", f"{score.parts['unmapped']:.2f} of the names are unknown to the textbook"
    if score.value is not None and score.value < rules.score:
        return "low_score", f"{score.value:.3f}"
    return None


def _doubts(label: Prediction, score: Score, rules: Rules) -> tuple[str, ...]:
    found = []
    if rules.agreement and (label.agreement is None or label.agreement < rules.agreement):
        found.append("agreement unknown" if label.agreement is None else f"agreement {label.agreement:.2f}")
    if score.value is not None and score.value < rules.review_score:
        found.append(f"score {score.value:.2f}")
    return (*found, *(name for name in FLAGS if getattr(label, name) and getattr(rules, name) == "review"))


def _output(label: Prediction) -> Diagnosis | Consultation:
    assert label.output is not None  # only those are graded
    return label.output


def _dropped(label: Prediction, reason: str, detail: str = "") -> Dropped:
    return Dropped(case_id=label.case_id, sample=label.sample, reason=reason, detail=detail)
