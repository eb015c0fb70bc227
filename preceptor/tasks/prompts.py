"""Prompts are text files, by task, strategy and language; a user may copy one, edit it and name its path.

A line `=== system`, `=== user` or `=== assistant` begins a turn. Where two turns of the user follow each other the
model answers between them: such a prompt asks in stages. A line `[act: NAME]` says what is asked, for the textbook
teacher and for readers of logs, and the record stands between `<record>` marks.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from preceptor.core.errors import UserError
from preceptor.core.records import Language, Message

_TURN = re.compile(r"^=== (system|user|assistant)[ \t]*\n", re.MULTILINE)
_RECORD = re.compile(r"<record>\n?(.*?)\n?</record>", re.DOTALL)
_MARK = re.compile(r"<(\s*/?\s*(?:record|answer)\s*)>", re.IGNORECASE)
_ACT = re.compile(r"^\[act: ([a-z_-]+)\][ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A conversation with a place for the record."""

    turns: tuple[Message, ...]

    @property
    def stages(self) -> tuple[tuple[Message, ...], ...]:
        """The turns, cut where the model answers before the user goes on."""
        ends = [at for at in range(1, len(self.turns)) if self.turns[at - 1].role == self.turns[at].role == "user"]
        return tuple(self.turns[a:b] for a, b in zip([0, *ends], [*ends, len(self.turns)], strict=True))

    def render(self, record: str, examples: Sequence[tuple[str, str]] = ()) -> tuple[Message, ...]:
        """The messages of the first stage about `record`, after the examples: records with their answers, in turns.

        Record marks within a record are broken, so that it can't end itself. What all records share comes first.
        """
        first = self.stages[0]
        at = next(number for number, turn in enumerate(first) if "{record}" in turn.content)
        shown = [
            message
            for text, answer in examples
            for message in (_about(first[at], text), Message(role="assistant", content=answer))
        ]
        return (*first[:at], *shown, _about(first[at], record), *first[at + 1 :])

    def with_words(self, words: str) -> "Prompt":
        """The same with a line more in the system's turn, which all records share."""
        system = Message(role="system", content=words)
        if self.turns[0].role != "system":
            return replace(self, turns=(system, *self.turns))
        longer = Message(role="system", content=f"{self.turns[0].content}\n{words}")
        return replace(self, turns=(longer, *self.turns[1:]))


def _about(turn: Message, record: str) -> Message:
    return Message(role=turn.role, content=turn.content.replace("{record}", unmarked(record)))


def unmarked(text: str) -> str:
    """The text with the marks of records and answers in it broken."""
    return _MARK.sub(r"< \1>", text)


def load(task: str, name: str, language: Language) -> Prompt:
    """The prompt called `name`: one of the package's for the task and language, or the path of a text file.

    Raises:
        UserError: there is no such prompt, or it lacks the record's place or marks.
    """
    path = Path(name)
    if path.suffix != ".txt":
        return parse(words(task, name, language), f"prompt {name!r} for {task}")
    if not path.is_file():
        raise UserError(f"{name}: no such prompt file; copy one from preceptor/tasks/prompts and name its path")
    try:
        return parse(path.read_text("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text; convert it first") from error


def words(task: str, name: str, language: Language) -> str:
    """The text of one of the package's files.

    Raises:
        UserError: there is no such file.
    """
    resource = files("preceptor.tasks").joinpath("prompts", task, f"{name}.{language}.txt")
    if not resource.is_file():
        raise UserError(
            f"no prompt {name!r} for {task} in {language!r}; name one that exists, or the path of a .txt file"
        )
    return resource.read_text("utf-8").strip()


def turns(text: str, where: str) -> tuple[Message, ...]:
    """The turns that a text is divided into; `where` names it in errors."""
    parts = _TURN.split(text)
    if len(parts) == 1 or parts[0].strip():
        raise UserError(f"{where}: a prompt begins with a line '=== system' or '=== user'")
    return tuple(
        Message.model_validate({"role": role, "content": content.strip()})
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def parse(text: str, where: str) -> Prompt:
    """A prompt from its text; `where` names it in errors."""
    prompt = Prompt(turns(text, where))
    asking = [turn for turn in prompt.stages[0] if turn.role == "user"]
    if sum(turn.content.count("{record}") for turn in prompt.turns) != 1 or record_in(asking) is None:
        raise UserError(
            f"{where}: a prompt holds '{{record}}' once, between lines '<record>' and '</record>', in the user's turn; "
            "of several stages in the first"
        )
    return prompt


def record_in(messages: Sequence[Message]) -> str | None:
    """The last record that the messages to a model show; None where there is none."""
    for message in reversed(messages):
        if message.role != "assistant" and (found := _RECORD.findall(message.content)):
            return str(found[-1])
    return None


def act_in(messages: Sequence[Message]) -> str | None:
    """What the messages to a model ask for by a marker line outside the record; None without one."""
    for message in reversed(messages):
        if message.role != "assistant" and (found := _ACT.findall(_RECORD.sub("", message.content))):
            return str(found[-1])
    return None


def prompt_sha(messages: Sequence[Message]) -> str:
    """sha256 of the messages, as hex."""
    plain = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()
