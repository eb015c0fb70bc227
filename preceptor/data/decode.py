"""The characters of a file, however it is packed and encoded, and its lines: in pieces, in flat memory."""

import codecs
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from preceptor.core.errors import UserError

LONGEST = 16 << 20
"""Characters of the longest line or JSON object that is read as a row."""
LOST = "\udc80"
"""Stands for a byte that the file's encoding has no character for."""
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK = 1 << 20
_FEED = 2048
"""Packed bytes that are unpacked at once: what a hostile file makes of them still fits."""
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE"}
codecs.register_error("preceptor.lost", lambda error: (LOST, error.end))  # type: ignore[attr-defined]  # decoding errors have an end


class Text:
    """What a text file says. Once its pieces are used up, `broken` says what ended it early, if anything did."""

    def __init__(self, path: Path, packed: str | None) -> None:
        self._path, self._packed = path, packed
        self.broken = ""
        self.line = 1
        """The line that is being read."""
        self.encoding, self._mark = self._encoding()
        self._rest = self._decoded()
        self.head = ""
        while len(self.head) < _CHUNK and (piece := next(self._rest, "")):
            self.head += piece
        unquoted = re.sub(r'"[^"]*"', "", self.head)
        self.newline = "\r" if len(re.findall(r"\r(?!\n)", unquoted)) > unquoted.count("\n") else "\n"

    def pieces(self) -> Iterator[str]:
        """All of it, once; lost bytes are `LOST`."""
        return chain([self.head], self._rest)

    def lines(self) -> Iterator[tuple[int, str | None]]:
        """The lines with their numbers, from 1, and their ends; None for one that is too long to be held."""
        pending, skipping = "", False
        for piece in chain(self.pieces(), [None]):
            *lines, pending = (pending + (piece or "")).split(self.newline)
            for line in lines if piece is not None else [*lines, *([pending] if pending or skipping else [])]:
                yield self.line, None if skipping or len(line) > LONGEST else line + self.newline
                self.line += 1
                skipping = False
            if len(pending) > LONGEST:
                pending, skipping = "", True

    def _bytes(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            if self._packed is None:
                yield from iter(lambda: file.read(_CHUNK), b"")
                return
            new = _unpacker(self._packed)
            try:
                yield from _unpacked(iter(lambda: file.read(_FEED), b""), new)
            except Exception as error:  # noqa: BLE001  each library has errors of its own
                self.broken = f"the {self._packed} file is damaged or cut off: what follows is lost ({error})"

    def _encoding(self) -> tuple[str, int]:
        """The encoding and the length of its mark: by the mark, else by what most words are that aren't ASCII.

        Words end at lines and quotes, which are never a part of a character.
        """
        sample = b""
        for place, chunk in enumerate(self._bytes()):
            mark = next((mark for mark in _MARKS if not place and chunk.startswith(mark)), None)
            if mark:
                return _MARKS[mark], len(mark)
            if sample or not chunk.isascii():
                sample += chunk
            if len(sample) >= _CHUNK:
                break
        words = [word for word in re.split(rb'[\r\n"]', sample) if not word.isascii()]
        strange = [word for word in words if not _decodes(word, "utf-8")]
        chinese = sum(_decodes(word, "gb18030") for word in strange)
        return ("GB18030" if chinese > len(words) - len(strange) else "UTF-8"), 0

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)("preceptor.lost")
        skip = self._mark
        for chunk in self._bytes():
            if piece := decoder.decode(chunk[skip:]):
                yield piece
            skip = 0
        yield decoder.decode(b"", final=True)


def _decodes(word: bytes, encoding: str) -> bool:
    try:
        word.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _unpacker(kind: str) -> Callable[[], Any]:
    if kind == "gzip":
        import zlib

        return lambda: zlib.decompressobj(wbits=31)
    zstandard = library("zstandard", "zstd files")
    return lambda: zstandard.ZstdDecompressor().decompressobj()


def _unpacked(fed: Iterable[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """What packed bytes hold, in pieces of a useful size. Packed files may stand one after another in a file."""
    unpacker, whole, ready = new(), False, bytearray()
    try:
        for part in fed:
            rest = part
            while rest and not (whole and not rest.strip(b"\0")):  # zeros may pad the end
                if whole:
                    unpacker = new()
                ready += unpacker.decompress(rest)
                whole = unpacker.eof
                rest = unpacker.unused_data if whole else b""
            if len(ready) >= _CHUNK:
                yield bytes(ready)
                ready.clear()
        if not whole:
            raise EOFError("it ends too early")
    except Exception:
        yield bytes(ready)
        raise
    yield bytes(ready)


def library(name: str, what: str) -> Any:
    """A library that `preceptor[tables]` brings.

    Raises:
        UserError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} need {name.partition('.')[0]}: pip install 'preceptor[tables]'") from error
