"""The bytes behind tokens: a character may span several, so text is joined from bytes and never guessed."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

from preceptor.model.tokens import special_tokens

_HEX = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """The function from a token's id to its bytes; a special token has none."""
    special = set(special_tokens(tokenizer).values())
    added = tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    alphabet = _alphabet()

    @cache
    def piece(token: int) -> bytes:
        text = tokenizer.convert_ids_to_tokens(token)
        if token in special or text is None:  # None: the head is padded past the vocabulary
            found = b""
        elif token in added:
            found = str(added[token]).encode()
        elif byte_level:
            found = bytes(alphabet[character] for character in text)
        elif match := _HEX.fullmatch(text):
            found = bytes([int(match[1], 16)])
        elif "▁" in text:
            found = text.replace("▁", " ").encode()
        else:
            found = tokenizer.decode([token]).encode()
        return found

    return piece


def readable(pieces: Sequence[bytes]) -> list[bytes]:
    """The pieces with what isn't UTF-8 replaced, so that joined they are the text's own bytes.

    A stretch that can't be decoded becomes one replacement character, in the piece where it starts.
    """
    joined = b"".join(pieces)
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    mended = [b""] * len(pieces)
    done = 0
    while done < len(joined):
        bad = after = len(joined)
        try:
            joined[done:].decode()
        except UnicodeDecodeError as error:
            bad, after = done + error.start, done + error.end
        for at in range(done, bad):
            mended[owner[at]] += joined[at : at + 1]
        if after > bad:
            mended[owner[bad]] += _REPLACEMENT
        done = after
    return mended


@cache
def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes that don't print as the characters from U+0100 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
