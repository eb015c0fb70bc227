"""A prompt that a teacher writes from solved cases: the words are the teacher's, all else of the prompt is ours."""

import re
from collections.abc import Generator, Sequence

from preceptor.core.records import Case, Failure, FailureKind, Language, Message, Reply, Request, Sampling, Task
from preceptor.core.text import clean, normalise
from preceptor.tasks import prompts
from preceptor.tasks.examples import solution
from preceptor.tasks.wrapping import refuses, unwrapped

_SHOWN = re.compile(r"<record>.*?</record>|<answer>.*?</answer>", re.IGNORECASE | re.DOTALL)
_MARK = re.compile(r"</?(?:record|answer)>|\{(?:record|words)\}|^[ \t]*```.*$", re.IGNORECASE | re.MULTILINE)
_OURS = re.compile(r"^[ \t]*(?:\[(?:act|task):.*\]|===.*)[ \t]*$", re.IGNORECASE | re.MULTILINE)
"""Lines by which prompts say what is asked, and who speaks. How many reasons there are is the teacher's to say."""
_LEAST = 20
"""Characters of an instruction."""
_PASSAGE = 40
"""Characters that no instruction has in common with a patient's record by chance."""


def design(
    cases: Sequence[Case], task: Task, language: Language, sampling: Sampling
) -> Generator[Request, Reply, str | Failure]:
    """Shows solved cases and asks for an instruction; returns the text of a prompt file with the teacher's words."""
    shown = "\n\n".join(
        f"<record>\n{prompts.unmarked(case.text)}\n</record>\n<answer>\n{prompts.unmarked(solution(case))}\n</answer>"
        for case in cases
    )
    name = "designing"
    asked = prompts.turns(prompts.words(task, name, language), name)
    messages = tuple(Message(role=turn.role, content=turn.content.replace("{examples}", shown)) for turn in asked)
    reply = yield Request(messages=messages, sampling=sampling)
    words = instruction(reply, cases)
    if isinstance(words, Failure):
        return words
    return prompts.words(task, "designed", language).replace("{words}", words) + "\n"


def instruction(reply: Reply, cases: Sequence[Case]) -> str | Failure:
    """The teacher's words, without what only our frame may say: turns, acts, the marks of the record and its place.

    An instruction that repeats a passage of a patient's record is refused: it would go along with every question.
    """
    if reply.finish == "length":
        detail = "the instruction was cut off; raise max_tokens"
        return Failure(kind=FailureKind.TRUNCATED, detail=detail)
    body, thinking = unwrapped(reply.text)
    if reply.finish == "refusal" or refuses(body):
        return Failure(kind=FailureKind.REFUSED, detail="the teacher declines to write an instruction")
    words = clean(_OURS.sub("", _MARK.sub("", _SHOWN.sub("", body))))
    words = re.sub(r"\s*\n\s*", "\n", words)
    if thinking or len(words) < _LEAST:
        return Failure(kind=FailureKind.EMPTY, detail="the teacher wrote no instruction")
    plain = normalise(words)
    passages = {plain[at : at + _PASSAGE] for at in range(len(plain) - _PASSAGE + 1)}
    if any(passage in normalise(case.text) for case in cases for passage in passages):
        return Failure(kind=FailureKind.REFUSED, detail="the instruction repeats a passage of a patient's record")
    return words
