"""Prompts are text files, by task, strategy and language; a user may copy one, edit it and name its path.

A line `=== system`, `=== user` or `=== assistant` begins a turn. A line `[act: NAME]` in it says what is asked,
for the textbook teacher and for readers of logs, and the record stands between `<record>` marks.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from preceptor.core.errors import UserError
from preceptor.core.records import Language, Message

_TURN = re.compile(r"^=== (system|user|assistant)[ \t]*\n", re.MULTILINE)
_RECORD = re.compile(r"<record>\n?(.*?)\n?</record>", re.DOTALL)
_MARK = re.compile(r"<(/?)record>", re.IGNORECASE)
_ACT = re.compile(r"^\[act: ([a-z_-]+)\][ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A conversation with a place for the record."""

    turns: tuple[Message, ...]

    def render(self, record: str) -> tuple[Message, ...]:
        """The messages about `record`. Record marks within the record are broken, so that it can't end itself."""
        safe = _MARK.sub(r"< \1record>", record)
        return tuple(Message(role=turn.role, content=turn.content.replace("{record}", safe)) for turn in self.turns)


def load(task: str, name: str, language: Language) -> Prompt:
    """The prompt called `name`: one of the package's for the task and language, or the path of a text file.

    Raises:
        UserError: there is no such prompt, or it lacks the record's place or marks.
    """
    path = Path(name)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"{name}: no such prompt file; copy one from preceptor/tasks/prompts and name its path")
        try:
            return parse(path.read_text("utf-8-sig"), name)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 text; convert it first") from error
    resource = files("preceptor.tasks").joinpath("prompts", task, f"{name}.{language}.txt")
    if not resource.is_file():
        raise UserError(
            f"no prompt {name!r} for {task} in {language!r}; name one that exists, or the path of a .txt file"
        )
    return parse(resource.read_text("utf-8"), resource.name)


def parse(text: str, where: str) -> Prompt:
    """A prompt from its text; `where` names it in errors."""
    parts = _TURN.split(text)
    if len(parts) == 1 or parts[0].strip():
        raise UserError(f"{where}: a prompt begins with a line '=== system' or '=== user'")
    turns = tuple(
        Message.model_validate({"role": role, "content": content.strip()})
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    )
    if sum(turn.content.count("{record}") for turn in turns) != 1 or record_in(turns) is None:
        raise UserError(f"{where}: a prompt holds '{{record}}' once, between lines '<record>' and '</record>'")
    return Prompt(turns)


def record_in(messages: Sequence[Message]) -> str | None:
    """The last record that the messages show; None where there is none."""
    for message in reversed(messages):
        if found := _RECORD.findall(message.content):
            return str(found[-1])
    return None


def act_in(messages: Sequence[Message]) -> str | None:
    """What the messages ask for by a marker line outside the record; None without one."""
    for message in reversed(messages):
        if found := _ACT.findall(_RECORD.sub("", message.content)):
            return str(found[-1])
    return None


def prompt_sha(messages: Sequence[Message]) -> str:
    """sha256 of the messages, as hex."""
    plain = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()
