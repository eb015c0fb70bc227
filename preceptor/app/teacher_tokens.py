"""The tokens of the textbook teacher, and the exact log-probability of each.

The teacher's model is a distribution over whole replies. At each token it gives the probability of the replies that
go on with that token among those that share what was said before: of the model itself, whatever the temperature at
which the reply was drawn.
"""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from preceptor.clinical.textbook.exact import Choice
from preceptor.core.errors import UserError
from preceptor.model.resolve import resolve

if TYPE_CHECKING:
    import tokenizers

_FILE = "tokenizer.json"
_PROBES = ('{"diseases": ["Common cold", "焦虑障碍"], "reason": ["39℃"]}', "<think>\n咳嗽3天\n</think>\n\n好。")
"""What a tokenizer must give back as it was."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Step:
    """One token: its part of the reply's UTF-8, and the tokens that could have stood there, likeliest first."""

    utf8: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...]


class Tokens:
    """A tokenizer.

    Raises:
        UserError: there is none of that name, or its tokens don't join to the text that they were made of.
    """

    def __init__(self, name: str) -> None:
        self._tokenizer = _load(name)
        self._tokenizer.encode_special_tokens = True  # words of a record are text, whatever they look like
        decoder = repr(self._tokenizer.decoder)
        self._alphabet = _alphabet() if "ByteLevel" in decoder else None
        self._lead = 0
        self._lead = int(self._joined("x").startswith(b" "))
        if any(self._joined(probe) != probe.encode() for probe in _PROBES):
            raise UserError(f"--tokenizer {name}: its tokens don't join to the text they were made of; name another")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text as an answer begins, without special ones."""
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def piece(self, token: int, place: int) -> bytes:
        """What a token adds to a text; at place 0 without the space that some tokenizers put before every text."""
        piece = self._pieces[token]
        return piece[self._lead :] if place == 0 and piece.startswith(b" ") else piece

    def _joined(self, text: str) -> bytes:
        return b"".join(self.piece(token, place) for place, token in enumerate(self.encode([text])[0]))

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        added = {token: str(entry.content) for token, entry in self._tokenizer.get_added_tokens_decoder().items()}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return {token: self._bytes(text, as_is=token in added) for text, token in vocabulary.items()}

    def _bytes(self, text: str, *, as_is: bool) -> bytes:
        if as_is:
            return text.encode()
        if self._alphabet:
            return bytes(self._alphabet[character] for character in text)
        found = _BYTE.fullmatch(text)
        return bytes([int(found[1], 16)]) if found else text.replace("▁", " ").encode()


class Replies:
    """All that may be replied to one request, in tokens."""

    def __init__(self, choice: Choice[str], tokens: Tokens) -> None:
        self.choice, self.tokens = choice, tokens

    def steps(self, chosen: int, top: int | None) -> list[Step]:
        """The tokens of one reply with `top` alternatives each, the token itself among them if it is one of these.

        Where the reply can go on in one way only the log-probability is 0. Without `top` it is not computed, and 0.
        """
        if top is None:
            (row,) = self.tokens.encode([self.choice.options[chosen]])
            return [Step(self.tokens.piece(token, place), 0.0, ()) for place, token in enumerate(row)]
        rows, found = self._rows, []
        alive, mass = np.arange(len(rows)), self.choice.probabilities
        for place in range(int((rows[chosen] >= 0).sum())):
            token = rows[chosen, place]
            options, which = np.unique(rows[alive, place], return_inverse=True)
            if len(options) == 1:
                logs = np.zeros(1)
            else:
                sums = np.bincount(which, mass)
                with np.errstate(divide="ignore"):
                    logs = np.minimum(np.log(sums / sums.sum()), 0.0)
                kept = which == np.flatnonzero(options == token)[0]
                alive, mass = alive[kept], mass[kept]
            order = [at for at in np.argsort(-logs, kind="stable") if options[at] >= 0 and np.isfinite(logs[at])]
            ranked = tuple((self.tokens.piece(int(options[at]), place), float(logs[at])) for at in order[:top])
            logprob = float(logs[options == token][0])
            found.append(Step(self.tokens.piece(int(token), place), logprob, ranked))
        return found

    @cached_property
    def _rows(self) -> NDArray[np.int32]:
        """The tokens of each reply, shape (replies, longest), -1 behind the end."""
        encoded = self.tokens.encode(list(self.choice.options))
        rows = np.full((len(encoded), max(map(len, encoded))), -1, np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            row[: len(ids)] = ids
        return rows


def _load(name: str) -> "tokenizers.Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("the textbook teacher counts real tokens: pip install tokenizers") from error
    path = Path(name).expanduser()
    file = path if path.is_file() else path / _FILE
    if not file.is_file():
        file = resolve(name) / _FILE
    if not file.is_file():
        raise UserError(f"--tokenizer {name}: no {_FILE} there; save the tokenizer with transformers' save_pretrained")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"--tokenizer {name}: {file.name} is no tokenizer: {error}") from error


@cache
def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes that don't print as the characters from U+0100 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
