"""Replies held to a JSON schema: tokens that would break it are ruled out, and what runs out of room is closed.

llguidance knows which tokens may follow. It is told each token's bytes as `pieces` has them, so the text that it allows
is the text that is read. What it can't know is when tokens run out: in good time the shortest ending is then written
instead of what the model would have said.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.model import pieces

_SPACE = r"[ \n\r\t]{1,10}"
"""What may stand between two marks of JSON: a line break and a deep indent, and no more."""
_ESCAPES = '"\\nt'
"""`\\u` would let in halves of characters, which are no text; a character itself can be written."""
_ORDER = bytes([*b']}":,[{0', *range(0x21, 0x7F), *range(0xA0, 0xC0), *range(0x80, 0xA0), *range(0xC2, 0xF5), 0x20])
"""Bytes by how soon they end what is begun: where several may follow, the first belongs to the shortest ending."""
_LONGEST = 1000
"""Bytes that an ending may take."""
_BROKEN_OFF = 3
"""Bytes that a string or a number may lack within a character, an escape or an exponent."""
_BOUNDED = {
    *("type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const"),
    *("anyOf", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("title", "description", "default", "examples", "$schema"),
}
"""Keywords whose part in how far a reply is from its end is known."""


@dataclass(frozen=True)
class _Words:
    """A tokenizer as the library wants to see it. It need not encode, for no text is ever put in."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, _text: bytes) -> list[int]:
        return []


@dataclass(frozen=True)
class _Form:
    """A schema that replies can be held to."""

    start: LLMatcher
    shortest: int
    """Bytes of the shortest reply."""
    slack: int
    """Bytes by which one token can put a reply's end further off."""


class Guide:
    """A model's tokens as constraints need them, made once a model: all of them are read.

    `vocabulary` is the width of the logits, to which heads are padded; `ends` are the tokens that end an answer, all
    of which are allowed just where the reply may end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        piece = pieces.reader(tokenizer)
        # Marks such as <think>, where they are tokens of their own, are no words of an answer.
        marks = {token for token, added in tokenizer.added_tokens_decoder.items() if str(added)[:1] == "<"} | {*ends}
        self.words = [b"" if token in marks else piece(token) for token in range(vocabulary)]
        """Each token's bytes; none where it is no text."""
        self.ends = tuple(ends)
        self.executor = LLExecutor()
        special = [token for token, word in enumerate(self.words) if not word]
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Words(self.words, special, ends[0])), eos_token=[*ends])
        self._tokens = {word: token for token, word in enumerate(self.words) if word}
        self._longest = max(map(len, self.words))
        self._forms: dict[str, _Form] = {}

    def hold(self, schema: str) -> "Hold":
        """What holds one reply to a schema, given as JSON.

        Raises:
            UserError: the schema is broken, or leaves open how far a reply may be from its end.
        """
        if schema not in self._forms:
            try:
                value = json.loads(schema)
            except ValueError as error:
                raise UserError(f"json_schema: not JSON: {error}") from error
            slack = self._slack(value)
            start = self._matcher(value)
            self._forms[schema] = _Form(start, len(self.ending(start)), slack)
        return Hold(self, self._forms[schema])

    def ending(self, matcher: LLMatcher) -> bytes:
        """The shortest text that completes a reply from where it stands."""
        trial, text = matcher.deep_copy(), bytearray()
        while not trial.is_accepting():
            byte = next(self._following(trial), b"")
            if not byte or len(text) == _LONGEST:
                raise UserError("json_schema: a reply under it can't be brought to an end in this model's tokens")
            trial.consume_token(self._tokens[byte])
            text += byte
        return bytes(text)

    def first(self, text: bytes) -> int:
        """The longest token with which a text begins."""
        return next(self._tokens[text[:end]] for end in range(self._longest, 0, -1) if text[:end] in self._tokens)

    def _following(self, matcher: LLMatcher) -> Iterator[bytes]:
        """Bytes that may come next, the one that ends the reply soonest first."""
        if self._allows(matcher, b'"') and self._allows(matcher, b"Z"):
            yield b'"'  # within a string, where all the others are words
        yield from (byte for byte in (bytes([number]) for number in _ORDER) if self._allows(matcher, byte))

    def _allows(self, matcher: LLMatcher, byte: bytes) -> bool:
        return byte in self._tokens and matcher.validate_tokens([self._tokens[byte]]) == 1

    def _matcher(self, schema: Any) -> LLMatcher:
        options = {"whitespace_pattern": _SPACE, "json_allowed_escapes": _ESCAPES}
        # Without forcing, a key may be written in whichever tokens the model would take.
        lark = '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps({**schema, "x-guidance": options})
        grammar = LLMatcher.grammar_from_lark(lark)
        if error := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise UserError(f"json_schema: {error.splitlines()[0]}")
        return LLMatcher(self._tokenizer, grammar, log_level=0)

    def _least(self, schema: Any) -> int:
        """Bytes of the shortest value."""
        return len(self.ending(self._matcher(schema)))

    def _slack(self, schema: Any) -> int:
        """Bytes by which one token can put the end of a value further off, at most.

        That is what the value may be broken off by, and what may be begun in it without need: one token may begin
        something at every level.
        """
        if not isinstance(schema, dict) or (unknown := set(schema) - _BOUNDED):
            what = ", ".join(sorted(unknown)) if isinstance(schema, dict) else json.dumps(schema)
            raise UserError(f"json_schema: {what}: a model on this machine can't be held to that; leave it out")
        if options := schema.get("anyOf"):
            return max(self._least(option) + self._slack(option) for option in options)
        if values := schema.get("enum"):
            return max(len(json.dumps(value)) for value in values)
        if schema.get("type") == "array" and "items" in schema:
            return 1 + self._least(schema["items"]) + self._slack(schema["items"])
        if schema.get("type") == "object" and schema.get("additionalProperties") is False:
            required = schema.get("required", ())
            return max(
                (
                    self._slack(inner) + (0 if name in required else len(json.dumps(name) + ",:") + self._least(inner))
                    for name, inner in schema.get("properties", {}).items()
                ),
                default=0,
            )
        if schema.get("type") in ("array", "object", None) and "const" not in schema:
            raise UserError(
                "json_schema: too open to be held to: give each value a type, each array its items, each object "
                '"additionalProperties": false'
            )
        return _BROKEN_OFF


class Hold:
    """One reply under a schema: what may follow what is written."""

    def __init__(self, guide: Guide, form: _Form) -> None:
        self.guide = guide
        self.matcher = form.start.deep_copy()
        self.closed = False
        """The reply is ended for want of room: its `finish` is length."""
        self.form = form
        self._empty = True
        self._ending = b""
        """What a closed reply still lacks."""

    def write(self, token: int) -> None:
        """Tell which token was chosen."""
        self._empty = False
        if self.closed:
            self._ending = self._ending[len(self.guide.words[token]) :]
        elif not self.matcher.consume_token(token):
            raise RuntimeError(f"a constrained reply went astray: {self.matcher.get_error().splitlines()[0]}")

    def forced(self, room: int) -> tuple[int, ...]:
        """The tokens one of which must come next, with `room` tokens left; none while the schema alone decides.

        As long as the model may choose, there is room to complete the reply byte by byte after any choice. Where there
        is not from the beginning, the reply ends at once and stays empty: what closed it would be an answer made up.
        """
        if not self.closed and room <= self.form.shortest + 2 * self.form.slack:  # else no ending is too long
            ending = self.guide.ending(self.matcher)
            if ending and len(ending) + self.form.slack >= room:
                self.closed, self._ending = True, b"" if self._empty else ending
        if not self.closed:
            return ()
        return (self.guide.first(self._ending),) if self._ending else self.guide.ends


def restrict(logits: Tensor, holds: Sequence[Hold | None], rooms: Sequence[int]) -> None:
    """Rule out what may not come next, in place: of `logits`, shape (rows, vocabulary), those become -inf.

    `holds` has None for a row that is free; `rooms` are the tokens that each row may take, the next one included.
    """
    guide = next((hold.guide for hold in holds if hold), None)
    if guide is None:
        return
    allowed = allocate_token_bitmask(*logits.shape)  # all of them
    bits = allowed.view(np.uint8)
    asked = []
    for row, (hold, room) in enumerate(zip(holds, rooms, strict=True)):
        if hold and (forced := hold.forced(room)):
            bits[row] = 0
            for token in forced:
                bits[row, token // 8] |= 1 << token % 8
        elif hold:
            asked.append((hold.matcher, row))
    if asked:
        fill_next_token_bitmask_par(guide.executor, asked, allowed)
    ruled_out = np.unpackbits(~bits, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    logits.masked_fill_(torch.from_numpy(ruled_out).to(logits.device), -torch.inf)
