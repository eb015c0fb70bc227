"""How many tokens a prompt takes: by the model's own tokenizer where it lies on this disk, else an estimate.

Nothing is fetched. A chat template adds tokens to each message: they are counted where it lies beside the tokenizer.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preceptor.core.errors import UserError
from preceptor.core.records import Message
from preceptor.llm.config import EndpointConfig
from preceptor.model.resolve import resolve

_TEXTBOOK = "textbook"
_FILE, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_CHINESE, _OTHER = 0.6, 0.3
"""Tokens a character, of Chinese and of all else: between those of small and of large vocabularies."""
_MESSAGE, _MOST = 4, 16
"""Tokens that an unknown template adds to a message, and may add."""
_HAN = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")
_CACHED = 4096
"""Texts whose count is kept: those that many prompts share."""


class Counting:
    """Counts tokens; without a tokenizer it estimates."""

    def __init__(self, name: str = "", tokenizer: Any = None, template: Callable[..., str] | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._bare = name == _TEXTBOOK
        self.estimated = tokenizer is None
        self.told = f"the tokenizer of {name}" if name else f"{_CHINESE} a Chinese character, {_OTHER} any other"
        if not (self._bare or template):
            self.told += f", {_MESSAGE} a message for the chat template"
        self.of = lru_cache(_CACHED)(self._of)
        """Tokens of a text alone."""

    def prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, with what the template adds."""
        if (known := self._known(messages)) is not None:
            return known
        return sum(self.of(message.content) for message in messages) + _MESSAGE * len(messages)

    def most(self, messages: Sequence[Message]) -> int:
        """No prompt has more: it is the count where all is known, and else a token has a byte at least."""
        if (known := self._known(messages)) is not None:
            return known
        texts = [message.content for message in messages]
        bytes_or_tokens = (len(text.encode()) if self.estimated else self.of(text) for text in texts)
        return sum(bytes_or_tokens) + _MOST * len(messages)

    def _known(self, messages: Sequence[Message]) -> int | None:
        """The tokens where the template is known, and has a place for these messages."""
        if self._bare:
            return sum(self.of(message.content) for message in messages)
        if self._template:
            with suppress(TemplateError):
                return self._of(self._template(messages=[message.model_dump() for message in messages]))
        return None

    def _of(self, text: str) -> int:
        if self._tokenizer is not None:
            return len(self._tokenizer.encode(text, add_special_tokens=False))
        chinese = len(_HAN.findall(text))
        return math.ceil(chinese * _CHINESE + (len(text) - chinese) * _OTHER)


def counting(model: str, endpoint: EndpointConfig, named: str = "") -> Counting:
    """What counts the tokens of a model at an endpoint. `named`: the tokenizer that the user names.

    Raises:
        UserError: there is no such tokenizer on this disk.
    """
    called = endpoint.model or model
    if called == _TEXTBOOK:  # it counts what messages say, without a template
        words = shlex.split(endpoint.start or "")
        started = words[words.index("--tokenizer") + 1 :][:1] if "--tokenizer" in words else []
        file = _find(named or next(iter(started), "mini"))
        tokenizer = _load(file) if file else None
        if tokenizer is not None:
            tokenizer.encode_special_tokens = True
        return Counting(_TEXTBOOK, tokenizer) if tokenizer is not None else Counting()
    file = _find(named or called)
    if named and file is None:
        raise UserError(f"teacher.tokenizer: no {_FILE} at {named!r} nor in the hub's cache; name a folder that has it")
    tokenizer = _load(file) if file else None
    return (
        Counting(named or called, tokenizer, _template(file.parent)) if file and tokenizer is not None else Counting()
    )


def _find(name: str) -> Path | None:
    """The tokenizer's file, if it lies on this disk."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name == "mini":
        path = resolve(name)
    if path.is_dir():
        return path / _FILE if (path / _FILE).is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = [try_to_load_from_cache(name, file) for file in (_FILE, _CONFIG, _TEMPLATE)]
    except HFValidationError:
        return None
    return Path(cached[0]) if isinstance(cached[0], str) else None


def _load(file: Path) -> Any:
    """The tokenizer of a file; None where the library is not installed."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{file}: no tokenizer can be read from it ({error}); name another in teacher.tokenizer"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template(folder: Path) -> Callable[..., str] | None:
    """Renders messages as the model reads them, up to where its reply begins; None where no template lies there."""
    config: dict[str, Any] = {}
    if (folder / _CONFIG).is_file():
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
    file = folder / _TEMPLATE
    text = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(text, str):
        return None
    # As the library sets it up whose templates these are.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refused
    named = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {name: given["content"] if isinstance(given, dict) else given for name, given in named.items() if given}
    try:
        template = environment.from_string(text)
    except TemplateError:
        return None
    return lambda messages: template.render(messages=messages, add_generation_prompt=True, **special)


def _refused(message: str) -> None:
    raise TemplateError(message)
