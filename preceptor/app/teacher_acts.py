"""What the textbook teacher may reply to a conversation, with probabilities: one function for each act."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from preceptor.app.teacher_design import designs
from preceptor.app.teacher_tokens import Replies, Tokens
from preceptor.clinical.textbook.advice import advise
from preceptor.clinical.textbook.exact import REASONS, Choice, Confidence, Exact, exact
from preceptor.core.errors import UserError
from preceptor.core.records import Consultation, Diagnosis, Language, Message, Task
from preceptor.tasks import consult, diagnosis, prompts

_RECORD = re.compile(r"<record>.*?</record>", re.DOTALL)
_LINE = re.compile(r"^\[(reasons|characters|task): (\w+)\][ \t]*$", re.MULTILINE)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_TASKS: Mapping[str, Task] = {"diagnosis": "diagnosis", "consult": "consult"}
_KEPT = 128
"""Requests whose replies are kept: samples and turns of one case ask for the same."""


@dataclass(frozen=True)
class Question:
    """What a conversation asks for."""

    act: str
    record: str = ""
    reasons: int = REASONS
    """Most of them, by a line `[reasons: N]`."""
    characters: int | None = None
    """Of the longest reason, by a line `[characters: L]`."""
    analysis: str = ""
    """Of `advice`: what the teacher thought in the turn before."""
    task: Task = "diagnosis"
    """Of `design`, by a line `[task: NAME]`."""
    examples: tuple[Message, ...] = ()
    """Of `design`: where they stand."""

    @cached_property
    def language(self) -> Language:
        """The record's."""
        return "zh" if _HAN.search(self.record) else "en"


def question(messages: Sequence[Message]) -> Question:
    """What the messages ask for; of records, acts and lines the last one counts.

    Raises:
        UserError: they lack an act, or what it needs, or a line of theirs is wrong.
    """
    act = prompts.act_in(messages)
    if act is None:
        raise UserError("the textbook teacher needs a line such as '[act: diagnosis]' in the prompt")
    if act not in _ACTS:
        raise UserError(f"the textbook teacher doesn't know the act {act!r}; it knows {', '.join(_ACTS)}")
    asking = "\n".join(_RECORD.sub("", message.content) for message in messages if message.role != "assistant")
    lines = dict(_LINE.findall(asking))
    if act == "design":
        if lines.get("task", "") not in _TASKS:
            raise UserError(f"the act design needs a line '[task: NAME]', NAME being one of {', '.join(_TASKS)}")
        return Question(act, task=_TASKS[lines["task"]], examples=tuple(messages))
    record = prompts.record_in(messages)
    if record is None:
        raise UserError("the textbook teacher needs the record between <record> and </record>")
    for name in ("reasons", "characters"):
        if name in lines and not (lines[name].isascii() and lines[name].isdigit()):
            raise UserError(f"[{name}: {lines[name]}]: write a whole number")
    said = [message.content for message in messages if message.role == "assistant"]
    return Question(
        act,
        record,
        reasons=int(lines.get("reasons", REASONS)),
        characters=int(lines["characters"]) if "characters" in lines else None,
        analysis=said[-1] if act == "advice" and said else "",
    )


class Teacher:
    """A reader of the textbook who answers in tokens."""

    def __init__(self, confidence: Confidence, tokens: Tokens) -> None:
        self.exact, self.tokens = exact(confidence), tokens
        self.replies = lru_cache(_KEPT)(self._replies)

    def _replies(self, asked: Question) -> Replies:
        """All that may be replied, with the probability of each reply as a whole."""
        return Replies(_ACTS[asked.act](self.exact, asked), self.tokens)


def _diagnosis(answerer: Exact, asked: Question) -> Choice[str]:
    """Of each hypothesis one answer: its diseases, and the words of the record that speak most for them.

    Where it is to be stated, beside each disease how probable the reader believes it: in any answer.
    """
    reading = answerer.reader.read(asked.record)
    posterior = answerer.believe(asked.record, reading)
    choice = answerer.choice(posterior)
    quoted = answerer.mentions(reading, choice.options, asked.reasons, asked.characters)
    reasons = (tuple(asked.record[m.start : m.end] for m in mentions) for mentions in quoted)
    answers = zip(_names(answerer, asked, choice), reasons, strict=True)
    name = _written(answerer, asked)
    believed = {name[key]: share for key, share in posterior.marginals.items()} if asked.act == "stated" else None
    return choice.said([diagnosis.canonical(Diagnosis(diseases=d, reason=r), believed) for d, r in answers])


def _diseases(answerer: Exact, asked: Question) -> Choice[str]:
    """The first of two turns: the diseases alone."""
    choice = answerer.choice(answerer.posterior(asked.record))
    return choice.said(
        [json.dumps({"diseases": names}, ensure_ascii=False) for names in _names(answerer, asked, choice)]
    )


def _names(answerer: Exact, asked: Question, choice: Choice[tuple[str, ...]]) -> list[tuple[str, ...]]:
    name = _written(answerer, asked)
    return [tuple(name[disease] for disease in diseases) for diseases in choice.options]


def _written(answerer: Exact, asked: Question) -> dict[str, str]:
    """The diseases' names in the record's language, by id."""
    return {key: disease.name(asked.language) for key, disease in answerer.book.diseases.items()}


def _thinking(answerer: Exact, asked: Question) -> Choice[str]:
    thought = answerer.thinking(asked.record, asked.language)
    choice = _diagnosis(answerer, asked)
    return choice.said([f"<think>\n{thought}\n</think>\n\n{answer}" for answer in choice.options])


def _metadata(answerer: Exact, asked: Question) -> Choice[str]:
    return Choice.even((json.dumps(answerer.metadata(asked.record)),))


def _consultations(answerer: Exact, asked: Question) -> Choice[Consultation]:
    reading = answerer.reader.read(asked.record)
    posterior = answerer.believe(asked.record, reading)
    likeliest, language, choice = next(iter(posterior.marginals)), asked.language, answerer.choice(posterior)
    return choice.said([advise(answerer, asked.record, reading, d, likeliest, language) for d in choice.options])


def _consult(answerer: Exact, asked: Question) -> Choice[str]:
    choice = _consultations(answerer, asked)
    return choice.said([consult.canonical(answer) for answer in choice.options])


def _analysis(answerer: Exact, asked: Question) -> Choice[str]:
    """The first of two turns: the thinking alone."""
    choice = _consultations(answerer, asked)
    return choice.said([answer.think for answer in choice.options])


def _advice(answerer: Exact, asked: Question) -> Choice[str]:
    """The second: what follows from the analysis; from the teacher's own if that one is not the textbook's."""
    choice = _consultations(answerer, asked)
    follow = [place for place, answer in enumerate(choice.options) if answer.think == asked.analysis.strip()]
    if follow:
        probabilities = choice.probabilities[follow]
        best = follow.index(choice.best) if choice.best in follow else int(probabilities.argmax())
        options = tuple(choice.options[place] for place in follow)
        choice = Choice(options, probabilities / probabilities.sum(), best)
    return choice.said([consult.canonical(answer) for answer in choice.options])


def _design(_: Exact, asked: Question) -> Choice[str]:
    """An instruction, each wording as likely as the others."""
    return Choice.even(designs(asked.examples, asked.task))


_ACTS: Mapping[str, Callable[[Exact, Question], Choice[str]]] = {
    "diagnosis": _diagnosis,
    "stated": _diagnosis,
    "thinking": _thinking,
    "diseases": _diseases,
    "evidence": _diagnosis,  # the second of two turns looks again, and may correct the first
    "consult": _consult,
    "analysis": _analysis,
    "advice": _advice,
    "metadata": _metadata,
    "design": _design,
}
