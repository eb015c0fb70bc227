"""The ledger under two processes, kills and a full disk, and its money."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Request, Sampling, Token, Usage
from preceptor.llm import upkeep
from preceptor.llm.ledger import Busy, CapError, Claim, Ledger, request_key
from tests.llm.conftest import ask

T = TypeVar("T")
REPLY = Reply(
    text="肺炎",
    usage=Usage(prompt_tokens=5, completion_tokens=2),
    tokens=(
        Token(utf8=b"\xe8\x82", logprob=-0.25, alternatives=((b"\xff", -3.0),)),
        Token(utf8=b"\xba", logprob=0),
    ),
)
KEY = request_key("e", "m", ask("x"))


def go(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def claim(ledger: Ledger, key: bytes = KEY) -> Reply | Claim | Busy:
    return go(ledger.claim(key, "e", "m"))


def claimed(ledger: Ledger, key: bytes = KEY) -> Claim:
    found = claim(ledger, key)
    assert isinstance(found, Claim)
    return found


def test_a_reply_is_kept_and_found(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a" / "ledger.db") as ledger:
        stored = go(ledger.settle(claimed(ledger), REPLY))
        assert stored
    with Ledger(tmp_path / "a" / "ledger.db") as ledger:
        assert claim(ledger) == stored == ledger.find(stored.key)
        assert stored.model_copy(update={"key": ""}) == REPLY
        assert ledger.find("00-0") is None


def test_only_live_processes_leave_marks(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    (tmp_path / f"{path.name}.{'0' * 32}.alive").touch()
    with Ledger(path):
        assert len(list(tmp_path.glob("*.alive"))) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.db"]


def test_failures_are_attempts_and_counted(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", run="r1") as ledger:
        first = claimed(ledger)
        go(ledger.settle(first, Failure(kind=FailureKind.TIMEOUT, detail="slow")))
        second = claimed(ledger)
        assert (first.attempt, second.attempt) == (0, 1)
        go(ledger.settle(second, REPLY))
        claimed(ledger, request_key("e", "m", ask("y")))
        summary = ledger.summary()
        assert (summary.requests, summary.replies, summary.failures) == (3, 1, {"timeout": 1})
        assert (summary.tokens_in, summary.tokens_out) == (5, 2)
        assert summary == ledger.summary("r1")
        assert ledger.summary("another").requests == 0


def test_key_holds_all_that_decides_a_reply() -> None:
    x = ask("x")
    others: list[Request] = [
        ask("y"),
        ask("x", logprobs=0),
        ask("x", logprobs=5),
        x.model_copy(update={"json_schema": "{}"}),
        x.model_copy(update={"sampling": Sampling(seed=1)}),
    ]
    keys = [request_key("e", "m", request) for request in [x, *others]]
    keys += [request_key("f", "m", x), request_key("e", "n", x)]
    keys += [request_key("e", "m", x, sample=1), request_key("e", "m", x, repeat=1)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == request_key("e", "m", ask("x"))


def test_a_request_in_flight_is_not_sent_again(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as one, Ledger(tmp_path / "l.db") as two:
        mine = claimed(one)
        assert isinstance(claim(one), Busy)
        assert isinstance(claim(two), Busy)
        go(one.settle(mine, REPLY))
        assert isinstance(claim(two), Reply)
        other = request_key("e", "m", ask("y"))
        one.drop(claimed(one, other))
        one.summary()  # waits for the writer
        assert isinstance(claim(two, other), Claim)


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\nfrom tests.llm.test_ledger import KEY, Ledger, Path\n"
        "ledger = Ledger(Path(sys.argv[1]))\nasyncio.run(ledger.claim(KEY, 'e', 'm'))\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "l.db"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    with Ledger(path) as ledger:
        assert claimed(ledger).attempt == 1
        assert ledger.summary().requests == 2


def test_two_processes_pay_once(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from tests.llm.test_ledger import *
async def main():
    paid = 0
    with Ledger(Path(sys.argv[1])) as ledger:
        for number in range(60):
            key = request_key("e", "m", ask(str(number)))
            while isinstance(found := await ledger.claim(key, "e", "m"), Busy):
                await asyncio.sleep(0.001)
            if isinstance(found, Claim):
                await asyncio.sleep(0.002)
                await ledger.settle(found, REPLY)
                paid += 1
    print(paid)
asyncio.run(main())
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l.db")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sum(int(run.communicate()[0]) for run in runs) == 60


def test_full_disk_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    big = Reply(text=os.urandom(200_000).hex())
    with Ledger(path) as ledger:
        go(ledger.settle(claimed(ledger), REPLY))
        ledger._db.execute("PRAGMA max_page_count = 20")
        other = claimed(ledger, request_key("e", "m", ask("y")))
        with pytest.raises(WorkError, match="disk is full: free some space") as caught:
            go(ledger.settle(other, big))
        assert "\n" not in str(caught.value)
        ledger._db.execute("PRAGMA max_page_count = 100000")
        go(ledger.settle(other, big))  # once there is space, it goes on
        assert ledger.summary().replies == 2


def test_wrong_places(tmp_path: Path) -> None:
    noise = tmp_path / "noise.db"
    noise.write_bytes(os.urandom(8192))
    with pytest.raises(WorkError, match="not a ledger, or nothing of it can be read: move it aside"):
        Ledger(noise)
    with pytest.raises(WorkError, match="check its folder"):
        Ledger(noise / "ledger.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(WorkError, match="can't be opened"):
        Ledger(tmp_path / "folder.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE sends (something)")
    other = (tmp_path / "other.db").read_bytes()
    with pytest.raises(WorkError, match="another version or program made it"):
        Ledger(tmp_path / "other.db")
    assert (tmp_path / "other.db").read_bytes() == other
    with Ledger(tmp_path / "l.db") as ledger:
        pass
    with pytest.raises(WorkError, match="closed"):
        ledger.summary()


def cny(amount: float) -> Money:
    return Money(amount, "CNY")


def buy(ledger: Ledger, text: str, reserve: Money | None, cost: Money | None, outcome: Any = REPLY) -> Claim:
    found = go(ledger.claim(request_key("e", "m", ask(text)), "e", "m", reserve))
    assert isinstance(found, Claim)
    go(ledger.settle(found, outcome, cost))
    return found


def test_money_is_spent_possible_or_unknown(tmp_path: Path) -> None:
    timeout = Failure(kind=FailureKind.TIMEOUT)
    with Ledger(tmp_path / "l.db", "quick/label") as ledger:
        buy(ledger, "known", cny(0.5), cny(0.1))
        buy(ledger, "dollars", Money(3, "USD"), Money(2, "USD"))
        buy(ledger, "no usage", cny(0.5), None)
        buy(ledger, "timed out", cny(0.25), None, timeout)
        buy(ledger, "refused with 400", cny(0.25), cny(0), timeout)
        buy(ledger, "not sent", cny(0.25), cny(0), None)
        buy(ledger, "lost", cny(0.125), None, None)
        buy(ledger, "free", None, None)
        account = ledger.summary("quick/label")
        assert account.spent == {"CNY": 0.1, "USD": 2.0}
        assert account.possible == {"CNY": 0.875}
        assert (account.requests, account.replies, account.unpriced) == (8, 4, 2)
        assert account.failures == {"timeout": 2}
        assert (account.tokens_in, account.tokens_out) == (20, 8)


def test_tokens_are_counted_by_kind(tmp_path: Path) -> None:
    usage = Usage(prompt_tokens=100, cached_tokens=64, completion_tokens=30, thinking_tokens=20)
    with Ledger(tmp_path / "l.db") as ledger:
        buy(ledger, "x", None, None, REPLY.model_copy(update={"usage": usage}))
        account = ledger.summary()
        counts = (account.tokens_in, account.tokens_cached, account.tokens_out, account.tokens_thinking)
        assert counts == (100, 64, 30, 20)
        found = go(ledger.claim(request_key("e", "m", ask("x")), "e", "m"))
        assert isinstance(found, Reply)
        assert found.usage == usage


def test_cents_add_up_exactly(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", "r/s", cny(0.3)) as ledger:
        for number in range(3):
            buy(ledger, str(number), cny(0.1), cny(0.1))
        assert ledger.summary().spent == {"CNY": 0.3}
        with pytest.raises(CapError):
            claim_for(ledger, cny(1e-9))


def claim_for(ledger: Ledger, reserve: Money | None, text: str = "new") -> Reply | Claim | Busy:
    return go(ledger.claim(request_key("e", "m", ask(text)), "e", "m", reserve))


def test_the_cap_counts_all_sections_of_the_recipe_and_what_may_be_spent(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with Ledger(path, "quick/label") as ledger:
        buy(ledger, "a", cny(5), cny(4))
        buy(ledger, "b", cny(5), None, Failure(kind=FailureKind.TIMEOUT))
    for other in ("quicker/label", "quick2", "quick-2/x", "qui/label", ""):
        with Ledger(path, other) as ledger:
            buy(ledger, f"of {other}", cny(50), cny(50))
    with Ledger(path, "quick/judge", cny(10)) as ledger:
        first = claim_for(ledger, cny(1))
        assert isinstance(first, Claim)
        with pytest.raises(CapError) as caught:
            claim_for(ledger, cny(0.5), "another")
        assert str(caught.value) == (
            "the cap of 10 CNY: 4 is spent, 6 more may be (in flight, or of unknown cost), and the next request may "
            "cost 0.5; raise it with teacher.cap=..., and the same command goes on from here"
        )
        assert ledger.summary("quick/judge").requests == 1, "nothing was written for the refused one"
        assert isinstance(claim_for(ledger, cny(5), "a"), Reply), "a stored reply costs nothing"
        go(ledger.settle(first, REPLY, cny(0.25)))
        assert isinstance(claim_for(ledger, cny(0.75), "another"), Claim), "what a claim held back is free again"
    with Ledger(path, "quick/judge", cny(11)) as ledger:
        assert isinstance(claim_for(ledger, cny(1), "with a higher cap"), Claim)


@pytest.mark.parametrize(
    ("reserve", "why"), [(None, "the price is not known"), (Money(1, "USD"), "the price is in USD")]
)
def test_a_cap_that_cant_be_held_is_refused(tmp_path: Path, reserve: Money | None, why: str) -> None:
    with Ledger(tmp_path / "l.db", "r/s", cny(1)) as ledger:
        with pytest.raises(UserError, match=f"teacher.cap: 1 CNY can't be held, as {why}: give it"):
            claim_for(ledger, reserve)
        assert ledger.summary().requests == 0


@pytest.mark.parametrize("outcome", [REPLY, None])
def test_a_cap_is_not_forgotten_when_the_currency_changes(tmp_path: Path, outcome: Reply | None) -> None:
    path = tmp_path / "l.db"
    for run, cost in (("r/label", Money(4.06, "USD")), ("r/judge", Money(0, "GBP")), ("other/label", Money(9, "GBP"))):
        with Ledger(path, run) as ledger:
            buy(ledger, run, cost, cost if outcome else None, outcome)
    with Ledger(path, "r/label", Money(5, "EUR")) as ledger:
        with pytest.raises(UserError) as caught:
            claim_for(ledger, Money(1, "EUR"))
        assert str(caught.value) == (
            "teacher.cap: 5 EUR can't be held, as 4.06 USD is or may be spent on this recipe: give the price in USD, "
            "or take the cap away"
        )
        assert ledger.summary("r/label").requests == 1, "nothing was written for the refused one"
        if outcome:
            assert isinstance(claim_for(ledger, Money(1, "EUR"), "r/label"), Reply), "a stored reply costs nothing"
    for run, cap in (("r/label", Money(5.06, "USD")), ("s/label", Money(1, "EUR"))):
        with Ledger(path, run, cap) as ledger:
            assert isinstance(claim_for(ledger, Money(1, cap.currency), run + " more"), Claim)


def test_a_refusal_disturbs_no_other_of_its_commit(tmp_path: Path) -> None:
    async def main(ledger: Ledger) -> list[Any]:
        keys = [request_key("e", "m", ask(str(n))) for n in range(20)]
        work = (ledger.claim(key, "e", "m", cny(1)) for key in keys)
        return await asyncio.gather(*work, return_exceptions=True)

    with Ledger(tmp_path / "l.db", "r/s", cny(7)) as ledger:
        found = go(main(ledger))
        assert [type(one) for one in found] == [Claim] * 7 + [CapError] * 13
        assert ledger.summary().possible == {"CNY": 7.0}


def test_the_cap_holds_under_two_processes_and_a_kill(tmp_path: Path) -> None:
    code = """
import asyncio, os, sys
from pathlib import Path
from tests.llm.test_ledger import *
async def main():
    path = Path(sys.argv[1])
    with Ledger(path, f"r/{sys.argv[2]}", cny(10)) as ledger:
        while len(list(path.parent.glob("*.alive"))) < 2:
            await asyncio.sleep(0.001)
        async def one(number):
            key = request_key("e", "m", ask(f"{sys.argv[2]} {number}"))
            try:
                found = await ledger.claim(key, "e", "m", cny(0.25))
            except CapError:
                return
            await asyncio.sleep(0.002)
            if sys.argv[2] == "killed" and number == 15:
                os.kill(os.getpid(), 9)
            await ledger.settle(found, REPLY, cny(0.125))
        for number in range(0, 200, 10):
            await asyncio.gather(*(one(n) for n in range(number, number + 10)))
asyncio.run(main())
"""
    path = tmp_path / "l.db"
    names = ("one", "killed")
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in names]
    assert sorted(process.wait() for process in started) == [-9, 0]
    with Ledger(path) as ledger:
        account = ledger.summary()
        assert 9.5 < account.spent["CNY"] + account.possible["CNY"] <= 10
        assert account.possible["CNY"] == 0.25 * (account.requests - account.replies) > 0


costs = st.none() | st.integers(0, 8).map(lambda eighths: cny(eighths / 8))
outcomes = st.sampled_from([REPLY, Failure(kind=FailureKind.TIMEOUT), None])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["r/a", "r/b"]), st.integers(0, 8), costs, outcomes), max_size=25))
def test_accounts_are_those_of_the_sends_and_the_cap_is_never_passed(sends: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spent = possible = replies = 0.0
        path = Path(folder) / "l.db"
        with Ledger(path, "r/a", cny(6)) as one, Ledger(path, "r/b", cny(6)) as two:
            for number, (run, eighths, cost, outcome) in enumerate(sends):
                ledger, reserve = (one if run == "r/a" else two), eighths / 8
                cost = min(cost, cny(reserve)) if cost else None  # noqa: PLW2901  never more than was said
                key = request_key("e", "m", ask(str(number)))
                try:
                    found = go(ledger.claim(key, "e", "m", cny(reserve)))
                except CapError:
                    assert spent + possible + reserve > 6
                    continue
                assert isinstance(found, Claim)
                go(ledger.settle(found, outcome, cost))
                known = cost.amount if cost else reserve
                spent += known if cost and outcome else 0
                possible += 0 if cost and outcome else known
                replies += outcome is REPLY
                assert spent + possible <= 6
            account = one.summary()
        assert account.spent.get("CNY", 0) == spent
        assert account.possible.get("CNY", 0) == possible
        assert account.replies == replies
        assert upkeep.verify(path).problems == ()


def test_an_attestation_is_written_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", "r/label") as ledger:
        for _ in range(2):
            ledger.attest("deepseek", "public", "api.deepseek.com")
    with Ledger(tmp_path / "l.db", "r/judge") as ledger:
        ledger.attest("deepseek", "public", "api.deepseek.com")
        rows = ledger._db.execute("SELECT run, endpoint, privacy, host FROM attestations ORDER BY run").fetchall()
        assert rows == [(f"r/{name}", "deepseek", "public", "api.deepseek.com") for name in ("judge", "label")]


def test_the_rate_is_that_of_late_and_of_one_run(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", "r/label") as ledger:
        assert ledger.rate("r/label") == 0
        for number in range(12):
            buy(ledger, str(number), None, None)
        ledger._submit(lambda: ledger._db.execute("UPDATE outcomes SET at = at - 60000")).result()
        assert ledger.rate("r/label") == pytest.approx(12, rel=0.1)
        assert ledger.rate("r/judge") == 0
        ledger._submit(lambda: ledger._db.execute("UPDATE outcomes SET at = at - 600000")).result()
        assert ledger.rate("r/label") == 0


def test_the_same_reply_comes_now_and_ever_after(tmp_path: Path) -> None:
    reply = Reply(text="a", tokens=(Token(utf8=b"a", logprob=-0.1, alternatives=((b"b", -2.3),)),))
    with Ledger(tmp_path / "l.db") as ledger:
        now = go(ledger.settle(claimed(ledger), reply))
        assert now == claim(ledger) != reply
        assert now.tokens[0].logprob == pytest.approx(-0.1, rel=1e-7)


def test_a_cancelled_claim_lets_go(tmp_path: Path) -> None:
    async def main() -> Reply | Claim | Busy:
        task = asyncio.create_task(ledger.claim(KEY, "e", "m"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)
        return await ledger.claim(KEY, "e", "m")

    with Ledger(tmp_path / "l.db") as ledger:
        assert isinstance(go(main()), Claim)
