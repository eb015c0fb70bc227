"""What a teacher believed of each token of its replies, on disk: few bytes a token, read at random, joined by key.

A folder with `header.json` (what it is about), `tokens.bin` and `replies.bin`. A token takes 5k + 3 bytes, 28 at k = 5:
k ids of 24 bits and log-probabilities in half precision, the likeliest first, the mass of all others, and the place of
the token that was written. That one is always among the k: where it is not likely enough it takes the last place, and
what stood there joins the rest. A reply's entry holds its key, where its tokens stand, and checksums of them and of
itself. It is written after them, so that a crash leaves whole replies and a torn end, which is cut off when more is
written. Where a key was written twice, the later one counts.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from preceptor.core.errors import UserError, WorkError

VERSION = 1
HEADER, TOKENS, REPLIES = "header.json", "tokens.bin", "replies.bin"
LARGEST = 2**24 - 1
"""Id of a token."""
MOST = 255
"""Tokens that are kept of a place, which one byte counts."""
_ENTRY = np.dtype([("key", "u1", 16), ("start", "<u8"), ("count", "<u4"), ("tokens", "<u4"), ("own", "<u4")])
"""Key of a reply, its first token, how many, their checksum, and the entry's own."""
_ANEW = "delete the folder, and it is made anew"


@dataclass(frozen=True)
class Header:
    """What a store is about.

    Raises:
        UserError: more tokens of a place are to be kept than it has room for, or none.
    """

    k: int
    tokenizer: str
    """Fingerprint of the tokenizer whose ids these are."""
    teacher: str
    """Who believed it: the teacher's name, or the digest of its weights."""
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MOST:
            raise UserError(f"k: {self.k} is not from 1 to {MOST}, which a store of a teacher's beliefs has room for")


@dataclass(frozen=True)
class Beliefs:
    """Of the n tokens of one reply."""

    ids: NDArray[np.int64]
    """Shape (n, k)."""
    logprobs: NDArray[np.float32]
    """Shape (n, k); -inf where there is no more."""
    rest: NDArray[np.float32]
    """Mass of all other tokens, shape (n,)."""
    place: NDArray[np.int64]
    """Of the token that was written, among the k, shape (n,)."""

    @property
    def written(self) -> NDArray[np.int64]:
        """The ids of the reply itself, shape (n,)."""
        found: NDArray[np.int64] = np.take_along_axis(self.ids, self.place[:, None], axis=1)[:, 0]
        return found


def kept(written: int, logprob: float, others: Mapping[int, float], k: int) -> tuple[list[int], list[float], int]:
    """Of one token the k ids and log-probabilities that are kept, -inf filling up, and the place of the one written."""
    best = sorted({**others, written: logprob}.items(), key=lambda item: -item[1])
    first = best[:k] if any(token == written for token, _ in best[:k]) else [*best[: k - 1], (written, logprob)]
    place = next(at for at, (token, _) in enumerate(first) if token == written)
    first += [(0, -np.inf)] * (k - len(first))
    return [token for token, _ in first], [value for _, value in first], place


class Store:
    """A store to read from.

    Raises:
        UserError: there is none, or of another version.
        WorkError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.header = folder, _header(folder)
        self._entries = _entries(folder, self.header)
        self._numbers = {entry["key"].tobytes(): number for number, entry in enumerate(self._entries)}
        kind, path = _kind(self.header.k), folder / TOKENS
        whole = path.stat().st_size // kind.itemsize
        self._tokens = np.memmap(path, kind, "r", shape=(whole,)) if whole else np.zeros(0, kind)

    def __len__(self) -> int:
        """Replies in it."""
        return len(self._numbers)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return _digest(*key) in self._numbers

    def __getitem__(self, key: tuple[str, int]) -> Beliefs:
        """What was believed of the reply to a case, by its id and the number of the sample.

        Raises:
            KeyError: there is none.
            WorkError: a byte of it is not what was written.
        """
        entry = self._entries[self._numbers[_digest(*key)]]
        found = self._of(entry)
        if zlib.crc32(found.tobytes()) != entry["tokens"]:
            raise WorkError(f"{self.folder / TOKENS}: the reply to {key[0]!r} is damaged; {_ANEW}")
        return _beliefs(found)

    def places(self, key: tuple[str, int]) -> range:
        """Where the tokens of a reply stand, as `at` counts them.

        Raises:
            KeyError: there is no such reply.
        """
        entry = self._entries[self._numbers[_digest(*key)]]
        return range(int(entry["start"]), int(entry["start"]) + int(entry["count"]))

    def at(self, places: NDArray[np.int64]) -> Beliefs:
        """What was believed of tokens of any replies; whether a byte of them was changed is not looked at."""
        return _beliefs(self._tokens[places])

    def damages(self) -> Iterator[str]:
        """A line for each reply that is not what was written."""
        for number, entry in enumerate(self._entries, 1):
            if zlib.crc32(self._of(entry).tobytes()) != entry["tokens"]:
                yield f"{self.folder / TOKENS}: reply {number} is damaged"

    def _of(self, entry: np.void) -> NDArray[np.void]:
        start = int(entry["start"])
        found: NDArray[np.void] = self._tokens[start : start + int(entry["count"])]
        return found


class Writer:
    """Adds to a store, which is made where it isn't there.

    Raises:
        UserError: what is there is about something else.
        WorkError: it is damaged.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder, self._kind = folder, _kind(header.k)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / HEADER).exists():
            for name in (TOKENS, REPLIES):
                (folder / name).write_bytes(b"")
            beside = folder / f".{HEADER}.new"
            beside.write_text(json.dumps(asdict(header)), "utf-8")
            beside.replace(folder / HEADER)
        old = _header(folder)
        if differ := [name for name, value in asdict(header).items() if value != getattr(old, name)]:
            raise UserError(f"{folder}: made for another {' and another '.join(differ)}; {_ANEW}")
        entries = _entries(folder, header)
        self._keys = {entry["key"].tobytes() for entry in entries}
        self._end = int((entries["start"] + entries["count"]).max(initial=0))
        os.truncate(folder / REPLIES, len(entries) * _ENTRY.itemsize)
        os.truncate(folder / TOKENS, self._end * self._kind.itemsize)
        self._files = [(folder / name).open("ab") for name in (TOKENS, REPLIES)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.fsync(file.fileno())
            file.close()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return _digest(*key) in self._keys

    def add(self, case_id: str, sample: int, found: Beliefs) -> None:
        """One more reply. It has reached the system when this returns, and survives the end of this process."""
        if found.ids.size and not 0 <= int(found.ids.min()) <= int(found.ids.max()) <= LARGEST:
            raise UserError(f"{self._folder}: token {found.ids.max()} is past {LARGEST}: no such vocabulary fits")
        packed = np.zeros(len(found.rest), self._kind)
        packed["ids"] = (found.ids[..., None] >> np.array([0, 8, 16])) & 0xFF
        packed["logprobs"], packed["rest"], packed["place"] = found.logprobs, found.rest, found.place
        entry = np.zeros((), _ENTRY)
        entry["key"] = np.frombuffer(_digest(case_id, sample), "u1")
        entry["start"], entry["count"], entry["tokens"] = self._end, len(packed), zlib.crc32(packed.tobytes())
        entry["own"] = zlib.crc32(entry.tobytes())
        for file, data in zip(self._files, (packed, entry), strict=True):
            file.write(data.tobytes())
            file.flush()
        self._end += len(packed)
        self._keys.add(_digest(case_id, sample))


def _beliefs(packed: NDArray[np.void]) -> Beliefs:
    ids = packed["ids"].astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
    logprobs, rest = packed["logprobs"].astype(np.float32), packed["rest"].astype(np.float32)
    return Beliefs(ids, logprobs, rest, packed["place"].astype(np.int64))


def _kind(k: int) -> np.dtype[np.void]:
    return np.dtype([("ids", "u1", (k, 3)), ("logprobs", "<f2", (k,)), ("rest", "<f2"), ("place", "u1")])


def _digest(case_id: str, sample: int) -> bytes:
    return hashlib.sha256(f"{sample} {case_id}".encode("utf-8", "surrogatepass")).digest()[:16]


def _header(folder: Path) -> Header:
    path = folder / HEADER
    try:
        known = json.loads(path.read_text("utf-8"))
        if known["version"] == VERSION:
            return Header(**known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        anew = f"; {_ANEW}" if path.exists() else ""
        raise UserError(f"{path}: no store of a teacher's beliefs here ({type(error).__name__}){anew}") from error
    raise UserError(f"{path}: of version {known['version']}, where this program reads {VERSION}; {_ANEW}")


def _entries(folder: Path, header: Header) -> NDArray[np.void]:
    """The whole ones; of a torn end nothing."""
    for name in (REPLIES, TOKENS):
        if not (folder / name).is_file():
            raise WorkError(f"{folder / name}: gone; {_ANEW}")
    raw = (folder / REPLIES).read_bytes()
    entries = np.frombuffer(raw, _ENTRY, len(raw) // _ENTRY.itemsize)
    room = (folder / TOKENS).stat().st_size // _kind(header.k).itemsize
    for number, entry in enumerate(entries):
        bare = entry.copy()
        bare["own"] = 0
        if zlib.crc32(bare.tobytes()) != entry["own"] or int(entry["start"]) + int(entry["count"]) > room:
            if number < len(entries) - 1:
                raise WorkError(f"{folder / REPLIES}: entry {number + 1} is damaged; {_ANEW}")
            return entries[:number]
    return entries
