"""Rows of a damaged SQLite file, read page by page: neither header, index nor inner page has to be whole.

After the description of the format at sqlite.org/fileformat2.html. What is found may be an old version of a
row, or nonsense: the reader's checksums tell.
"""

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PAGE = 4096
"""Bytes of a page; every ledger is made with pages of this size."""
_FILE_HEADER, _LOG_HEADER, _FRAME_HEADER, _LEAF = 100, 32, 24, 0x0D
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
"""Bytes of a value by its serial type; texts and blobs have larger ones."""
_MORE = 0x80
_FLOAT, _ZERO, _BLOB, _TEXT = 7, 8, 12, 13
_Page = Callable[[int], bytes]


def log_of(path: Path) -> Path:
    """The write-ahead log of a database."""
    return path.with_name(f"{path.name}-wal")


def rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """The number and values of every table row that stands whole in the file or in any frame of its write-ahead log."""
    log_path = log_of(path)
    with path.open("rb") as file, log_path.open("rb") if log_path.exists() else io.BytesIO() as log:
        latest = {number: at for number, at, _ in _frames(log, _read(log, 16, 8))}

        def page(number: int) -> bytes:
            if number in latest:
                return _read(log, latest[number])
            return _read(file, (number - 1) * PAGE)

        for number, at, _ in list(_frames(log)):
            yield from _rows(_read(log, at), number, page)
        for number in range(1, path.stat().st_size // PAGE + 1):
            yield from _rows(_read(file, (number - 1) * PAGE), number, page)


def holds_more(log_path: Path) -> bool:
    """Whether a write-ahead log has commits behind a frame, or a header, whose checksum is wrong: SQLite drops them."""
    if not log_path.exists() or log_path.stat().st_size <= _LOG_HEADER:
        return False
    with log_path.open("rb") as log:
        header = _read(log, 0, _LOG_HEADER)
        order = ">" if header[3] & 1 else "<"
        state = _checksum(header[:24], (0, 0), order)
        if struct.unpack(">II", header[24:]) != state:
            return True
        good = True
        for _, at, ends_commit in _frames(log, header[16:24]):
            if good:
                frame = _read(log, at - _FRAME_HEADER, _FRAME_HEADER + PAGE)
                state = _checksum(frame[:8] + frame[_FRAME_HEADER:], state, order) if len(frame[24:]) == PAGE else state
                good = struct.unpack(">II", frame[16:24]) == state
            if not good and ends_commit and at + PAGE <= log_path.stat().st_size:
                return True
    return False


def _checksum(data: bytes, state: tuple[int, int], order: str) -> tuple[int, int]:
    """Of a log's header or frame, going on from the one before it."""
    one, two = state
    for first, second in struct.iter_unpack(f"{order}II", data):
        one = one + first + two & 0xFFFFFFFF
        two = two + second + one & 0xFFFFFFFF
    return one, two


def _frames(log: BinaryIO, salts: bytes | None = None) -> Iterator[tuple[int, int, bool]]:
    """Page number, place and whether it ends a commit, of every frame, or of those with these salts."""
    at = _LOG_HEADER
    while len(header := _read(log, at, _FRAME_HEADER)) == _FRAME_HEADER:
        number, size = struct.unpack(">II", header[:8])
        if salts in (None, header[8:16]):
            yield number, at + _FRAME_HEADER, size > 0
        at += _FRAME_HEADER + PAGE


def _read(file: BinaryIO | io.BytesIO, at: int, size: int = PAGE) -> bytes:
    file.seek(at)
    return file.read(size)


def _rows(data: bytes, number: int, page: _Page) -> Iterator[tuple[int, list[Any]]]:
    start = _FILE_HEADER if number == 1 else 0
    if len(data) < PAGE or data[start] != _LEAF:
        return
    (count,) = struct.unpack_from(">H", data, start + 3)
    for cell in range(min(count, PAGE // 4)):
        (at,) = struct.unpack_from(">H", data, start + 8 + 2 * cell)
        try:
            row, payload = _payload(data, at, page)
            yield row, _values(payload)
        except (IndexError, ValueError, struct.error):  # damaged: what stands beside it may still be whole
            continue


def _payload(data: bytes, at: int, page: _Page) -> tuple[int, bytes]:
    size, at = _varint(data, at)
    row, at = _varint(data, at)
    most, least = PAGE - 35, (PAGE - 12) * 32 // 255 - 23
    local = size
    if size > most:
        local = least + (size - least) % (PAGE - 4)
        local = local if local <= most else least
    parts, left = [data[at : at + local]], size - local
    following, seen = data[at + local : at + local + 4], {0}
    while left > 0:
        (number,) = struct.unpack(">I", following)
        more = b"" if number in seen else page(number)
        if len(more) < PAGE:
            raise ValueError("the chain of pages is broken")
        seen.add(number)
        parts.append(more[4 : 4 + left])
        left, following = left - (PAGE - 4), more[:4]
    return row, b"".join(parts)


def _values(payload: bytes) -> list[Any]:
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _SIZES[kind] if kind < len(_SIZES) else (kind - _BLOB) // 2
        piece = payload[at : at + size]
        if len(piece) < size:
            raise ValueError("the row is cut short")
        at += size
        values.append(_value(kind, piece))
    return values


def _value(kind: int, piece: bytes) -> Any:
    if kind == 0:
        return None
    if kind >= _BLOB:
        return piece.decode() if kind % 2 == _TEXT % 2 else piece
    if kind == _FLOAT:
        return struct.unpack(">d", piece)[0]
    return kind - _ZERO if kind >= _ZERO else int.from_bytes(piece, "big", signed=True)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the highest first; a ninth byte gives eight. The number and where it ends."""
    number = 0
    for place in range(at, at + 8):
        number = number << 7 | data[place] & ~_MORE
        if data[place] < _MORE:
            return number, place + 1
    return number << 8 | data[at + 8], at + 9
