"""Ledgers that are damaged, made by the earlier version, or left in the middle of being mended."""

import asyncio
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.core.errors import WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Token, Usage
from preceptor.llm import ledger_file, pages, upkeep
from preceptor.llm.ledger import Claim, Ledger, request_key
from tests.llm.conftest import ask

COUNT = 240
USAGE = Usage(prompt_tokens=900, cached_tokens=512, completion_tokens=80, thinking_tokens=7)


def key(number: int) -> bytes:
    return request_key("e", "m", ask(str(number)))


def reply(number: int) -> Reply:
    """Short ones, long ones that span pages, ones with tokens."""
    rng = random.Random(number)
    text = f'{{"diseases": ["肺炎{number}"], "reason": ["咳嗽{rng.random()}"]}}'
    if number % 30 == 0:
        return Reply(text=text, thinking=rng.randbytes(9_000).hex(), usage=USAGE)
    tokens = tuple(Token(utf8=b, logprob=-0.5) for b in text.encode().split(b" ")) if number % 3 == 0 else ()
    return Reply(text=text, usage=USAGE, tokens=tokens)


async def fill(ledger: Ledger, numbers: range) -> None:
    async def one(number: int) -> None:
        claim = await ledger.claim(key(number), "e", "m", Money(0.5, "CNY"))
        assert isinstance(claim, Claim)
        await ledger.settle(claim, reply(number), Money(0.25, "CNY"))

    for start in range(numbers.start, numbers.stop, 40):
        await asyncio.gather(*(one(n) for n in range(start, min(start + 40, numbers.stop))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "l.db"
    with Ledger(path, "r/label") as ledger:
        asyncio.run(fill(ledger, range(COUNT)))
        failed = asyncio.run(ledger.claim(key(-1), "e", "m"))
        assert isinstance(failed, Claim)
        asyncio.run(ledger.settle(failed, Failure(kind=FailureKind.TIMEOUT, detail="slow")))
        lost = asyncio.run(ledger.claim(key(-2), "e", "m", Money(3, "CNY")))
        assert isinstance(lost, Claim)
        asyncio.run(ledger.settle(lost, None))
        ledger.attest("e", "public", "host")
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "l.db"))


def stored(path: Path) -> set[int]:
    """The numbers whose replies come from the ledger; each must be what it was."""

    async def look(ledger: Ledger) -> set[int]:
        there = set()
        for number in range(COUNT):
            found = await ledger.claim(key(number), "e", "m")
            if isinstance(found, Reply):
                plain = found.model_copy(update={"key": ""})
                assert plain == reply(number)
                there.add(number)
            else:
                assert isinstance(found, Claim)
                again = await ledger.settle(found, reply(number))
                assert again == await ledger.claim(key(number), "e", "m")
        return there

    with Ledger(path, "r/label") as ledger:
        return asyncio.run(look(ledger))


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "header": lambda p: change(p, 0, os.urandom(100)),
    "first page": lambda p: change(p, 0, bytes(4096)),
    "cut": truncate,
    "second page": lambda p: change(p, 4096, os.urandom(4096)),
    "many pages": lambda p: [change(p, 4096 * n, os.urandom(12)) for n in range(2, 60, 5)] and None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_can_be_read_is_saved(copy: Path, damage: Callable[[Path], None], caplog) -> None:
    damage(copy)
    before = copy.read_bytes()
    assert upkeep.verify(copy).problems
    assert copy.read_bytes() == before, "to look changes nothing"
    there = stored(copy)
    assert COUNT // 5 < len(there) <= COUNT
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert f"it was damaged: {len(there)} replies were saved, " in told[0] or "cut" in told[0]
    assert "it is kept as l.db.damaged-1" in told[0]
    assert (copy.parent / "l.db.damaged-1").exists()
    assert upkeep.verify(copy).problems == ()
    assert stored(copy) == set(range(COUNT))
    with Ledger(copy) as ledger:
        assert ledger.summary().replies >= COUNT


def test_a_garbage_header_costs_nothing(copy: Path, caplog) -> None:
    change(copy, 0, os.urandom(100))
    with Ledger(copy, "r/label") as ledger:
        account = ledger.summary("r/label")
    assert (account.replies, account.failures, account.requests) == (COUNT, {"timeout": 1}, COUNT + 2)
    assert account.spent == {"CNY": 0.25 * COUNT}
    assert account.possible == {"CNY": 3.0}
    assert next(upkeep.export(copy))["attested"] == "public"


def test_what_lost_rows_cost_stays_spent(copy: Path, caplog) -> None:
    with sqlite3.connect(copy) as db:
        root, leaf = (
            db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]
            for name in ("outcomes", "sqlite_autoindex_outcomes_1")
        )
    change(copy, (root - 1) * 4096, bytes(4096))
    victims = [
        n for n in range(1, copy.stat().st_size // 4096) if copy.read_bytes()[n * 4096] == 0x0D and n + 1 != leaf
    ]
    change(copy, victims[-1] * 4096, os.urandom(2000))
    with Ledger(copy, "r/label") as ledger:
        asyncio.run(ledger.claim(key(0), "e", "m"))  # the first use of the table finds it out
        saved = ledger.summary("r/label")
        assert saved.spent == {"CNY": 0.25 * COUNT}
    lost = int(caplog.messages[-1].split("saved, ")[1].split()[0])
    assert 0 < lost == COUNT - len(stored(copy)) < COUNT // 4


def test_flipped_bytes_never_give_a_wrong_reply(whole: Path, tmp_path: Path, caplog) -> None:
    size, rng = whole.stat().st_size, random.Random(5)
    kept = 0
    for number in range(12):
        path = Path(shutil.copy(whole, tmp_path / f"{number}.db"))
        for _ in range(rng.choice((1, 5, 40))):
            change(path, rng.randrange(size), rng.randbytes(1))
        kept += len(stored(path))
        assert upkeep.verify(path).problems == () or stored(path) == set(range(COUNT))
    assert kept > 0.8 * 12 * COUNT


def test_a_damaged_ledger_in_use_is_left_alone(copy: Path) -> None:
    with Ledger(copy) as first:
        assert first.summary().replies == COUNT
        shutil.copy(copy, copy.with_name("kept"))
        change(copy, 0, os.urandom(100))
        with pytest.raises(WorkError, match="it is damaged, and another process uses it: end that one, and run this"):
            Ledger(copy)
        assert not list(copy.parent.glob("*.damaged*"))
        change(copy, 0, copy.with_name("kept").read_bytes()[:100])


def test_damage_during_work_is_mended_under_way(copy: Path, caplog) -> None:
    with Ledger(copy, "r/label") as ledger:
        flying = asyncio.run(ledger.claim(key(COUNT), "e", "m", Money(1, "CNY")))
        assert isinstance(flying, Claim)
        ledger._submit(lambda: ledger._db.execute("SELECT 1").fetchall()).result()
        ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ledger._db.execute("PRAGMA cache_size = 0")
        with sqlite3.connect(copy) as db:
            root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'outcomes'").fetchone()[0]
        change(copy, (root - 1) * 4096, os.urandom(4096))
        found = asyncio.run(ledger.settle(flying, reply(COUNT), Money(0.5, "CNY")))
        assert found
        assert ledger.find(found.key) == found
    assert any("replies were saved" in message for message in caplog.messages)
    assert len(stored(copy)) >= COUNT * 0.8


WRITE_AND_DIE = """
import asyncio, os, sys
from pathlib import Path
from tests.llm.test_ledger_file import *
ledger = Ledger(Path(sys.argv[1]), "r/label")
asyncio.run(fill(ledger, range(COUNT)))
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A ledger whose process was killed, most of it in its write-ahead log."""
    path = tmp_path / "l.db"
    assert subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(path)], check=False).returncode == -9
    assert pages.log_of(path).stat().st_size > 100_000
    return path


def test_a_kill_alone_loses_nothing_and_is_no_damage(killed: Path, caplog) -> None:
    assert upkeep.verify(killed).problems == ()
    assert stored(killed) == set(range(COUNT))
    assert caplog.messages == []


@pytest.mark.parametrize("frame", [0, 2, 10])
def test_a_damaged_log_is_found_out_and_read(killed: Path, frame: int, caplog) -> None:
    log = pages.log_of(killed)
    change(log, 32 + frame * (24 + 4096) + 2000 if frame else 17, b"\xff\xfe\xfd")
    assert "its write-ahead log is damaged before its end" in upkeep.verify(killed).problems
    assert len(stored(killed)) > 0.9 * COUNT
    assert "it is kept as l.db.damaged-1" in caplog.messages[0]
    assert upkeep.verify(killed).problems == ()


def test_a_missing_log_is_told(killed: Path, caplog) -> None:
    pages.log_of(killed).unlink()
    stored(killed)
    assert "its write-ahead log is gone, and with it perhaps the last replies before a crash" in caplog.messages[0]


def test_an_emptied_file_beside_its_log(killed: Path, caplog) -> None:
    os.truncate(killed, 0)
    assert len(stored(killed)) > 0.5 * COUNT
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("moved", [False, True], ids=["killed before", "killed half-way"])
def test_a_mending_that_was_cut_short_is_ended(copy: Path, whole: Path, moved: bool) -> None:
    shutil.copy(whole, copy.with_name("l.db.damaged.mended"))
    change(copy, 0, os.urandom(5000))
    if moved:
        copy.rename(copy.with_name("l.db.damaged-1"))
    assert stored(copy) == set(range(COUNT))
    assert copy.with_name("l.db.damaged-1").read_bytes()[:16] != b"SQLite format 3\0"
    assert not list(copy.parent.glob("*mended"))


EARLIER = """
CREATE TABLE sends (
    request BLOB NOT NULL, attempt INTEGER NOT NULL, run TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL,
    at REAL NOT NULL, owner TEXT, kind TEXT, body BLOB, tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (request, attempt)
)"""


def earlier(path: Path) -> None:
    """As the earlier version wrote it: digests of 32 bytes, JSON bodies."""
    timeout = Failure(kind=FailureKind.TIMEOUT, detail="slow").model_dump_json().encode()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(EARLIER)
        for number in range(COUNT):
            body = zlib.compress(reply(number).model_dump_json().encode())
            told = (b"%b%016d" % (key(number), 0), 1, "r/label", "e", "m", 1e9, None, "reply", body, 900, 80)
            db.execute("INSERT INTO sends VALUES (?,?,?,?,?,?,?,?,?,?,?)", told)
            if number % 2:
                failed = (told[0], 0, "r/label", "e", "m", 1e9, None, "timeout", timeout, 0, 0)
                db.execute("INSERT INTO sends VALUES (?,?,?,?,?,?,?,?,?,?,?)", failed)
        lost = (bytes(32), 0, "r/label", "e", "m", 1e9, "0" * 32, None, None, 0, 0)
        db.execute("INSERT INTO sends VALUES (?,?,?,?,?,?,?,?,?,?,?)", lost)
    db.close()


def test_an_earlier_versions_file_is_moved_over(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "l.db"
    earlier(path)
    with Ledger(path) as ledger:
        account = ledger.summary("r/label")
        found = ledger.find(f"{key(3).hex()}{'30' * 16}-1")  # a key of that version, as predictions carry it
        failure = ledger.find(f"{key(3).hex()}-0")
    assert (account.requests, account.replies, account.failures) == (361, COUNT, {"timeout": 120})
    assert (account.tokens_in, account.tokens_cached, account.unpriced) == (900 * COUNT, 512 * COUNT, COUNT)
    assert isinstance(found, Reply)
    assert found.text == reply(3).text
    assert failure == Failure(kind=FailureKind.TIMEOUT, detail="slow")
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert f"an earlier version's {COUNT} replies were moved over; it is kept as l.db.earlier-1" in caplog.text
    assert stored(path) == set(range(COUNT))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.db", "l.db.earlier-1"]


def test_a_damaged_file_of_the_earlier_version(tmp_path: Path, caplog) -> None:
    path = tmp_path / "l.db"
    earlier(path)
    change(path, 10 * 4096, os.urandom(4096))
    there = stored(path)
    assert COUNT * 0.8 < len(there) < COUNT
    lost = COUNT - len(there)
    assert f"it was damaged: {len(there)} replies were saved, {lost} lost, which will be asked again" in caplog.text


def test_rows_of_the_schema_are_told_apart_by_their_columns(copy: Path) -> None:
    with sqlite3.connect(copy) as db:
        for table, count in (("intents", ledger_file._INTENT), ("outcomes", ledger_file._OUTCOME)):
            assert len(db.execute(f"PRAGMA table_info({table})").fetchall()) == count


def test_every_row_is_found_on_its_page(copy: Path) -> None:
    with sqlite3.connect(copy) as db:
        wanted = db.execute("SELECT * FROM outcomes ORDER BY id").fetchall()
    found = {number: values for number, values in pages.rows(copy) if len(values) == ledger_file._OUTCOME}
    assert [(n, *found[n][1:]) for n, *_ in wanted] == wanted


def test_values_of_every_kind_are_read(tmp_path: Path) -> None:
    values = [None, 0, 1, -1, 127, -129, 40_000, -(2**23), 2**31, 2**40, -(2**62), 0.1, "", "肺炎", b"", b"x" * 9_000]
    path = tmp_path / "v.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (v)")
        db.executemany("INSERT INTO t VALUES (?)", [(value,) for value in values])
        db.execute("INSERT INTO t VALUES (?)", (json.dumps(values[:10]) * 3_000,))
    db.close()
    found = [row for _, row in pages.rows(path) if len(row) == 1]
    assert found == [[value] for value in [*values, json.dumps(values[:10]) * 3_000]]
