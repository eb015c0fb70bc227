"""Weights in this process: requests join those under way, and bad ones fail alone."""

import asyncio
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from preceptor.core.errors import UserError
from preceptor.core.records import Failure, Message, Reply, Request, Sampling
from preceptor.llm.completer import ProviderError
from preceptor.llm.ledger import Ledger
from preceptor.llm.local import Local
from preceptor.llm.runner import run
from preceptor.model import generate as generating
from preceptor.model.generate import generate
from preceptor.model.load import Loaded
from tests.llm.conftest import talk
from tests.model import tiny


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.set_num_threads(1)
    return Loaded(tiny.qwen(), tiny.tokenizer(), Path())


def ask(text: str, most: int = 6, **sampling: Any) -> Request:
    return Request(messages=(Message(role="user", content=text),), sampling=Sampling(max_tokens=most, **sampling))


def answers(local: Local, *requests: Request) -> list[Any]:
    """What becomes of requests that are made at once, errors too."""

    async def main() -> list[Any]:
        try:
            return await asyncio.gather(*map(local.complete, requests), return_exceptions=True)
        finally:
            await local.close()

    return asyncio.run(main())


def test_each_gets_its_own_reply(loaded: Loaded) -> None:
    """Many more than places, in any order of lengths; and again after all threads have ended."""
    requests = [ask("fever " * (n * 7 % 20 + 1) + str(n)) for n in range(40)]
    expected = generate(loaded, requests)
    local = Local(loaded, "digest", batch=8)
    assert answers(local, *requests) == expected
    assert answers(local, *requests[:3]) == expected[:3]
    assert len({reply.text for reply in expected}) > 10


def test_what_is_done_is_told_at_once_and_makes_place(loaded: Loaded) -> None:
    """A long reply holds up neither those beside it nor those that come after it began."""
    local, order = Local(loaded, "digest", batch=2), []
    long = ask("fever and cough", 400)

    async def told(name: str, request: Request) -> None:
        await local.complete(request)
        order.append(name)

    async def main() -> None:
        first = [asyncio.create_task(told("long", long)), asyncio.create_task(told("short", ask("fever", 2)))]
        await first[1]
        await asyncio.gather(*(told(str(n), ask(f"cough {n}", 2)) for n in range(3)))
        await first[0]

    (alone,) = generate(loaded, [long])
    assert alone.usage.completion_tokens > 100
    asyncio.run(main())
    assert order[0] == "short"
    assert order[-1] == "long"


def test_a_bad_request_fails_alone(tmp_path: Path) -> None:
    """One over which the model stumbles is a counted failure; conversations beside it go on."""
    loaded = Loaded(tiny.qwen(), tiny.tokenizer(), tmp_path)
    loaded.model.config.max_position_embeddings = 100  # so that replies are short
    (mark,) = loaded.tokenizer.encode("~")

    def stumble(_: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1 and (kwargs["input_ids"] == mark).any():
            raise ValueError("stumbled")

    results: dict[str, Any] = {}
    talks = {"bad": talk("~"), **{str(n): talk(f"case {n}", f"more {n}") for n in range(9)}}

    async def main(ledger: Ledger) -> None:
        local = Local(loaded, "digest", batch=4)
        await run(talks.items(), [local], ledger, 10, results.__setitem__)
        await local.close()

    hook = loaded.model.register_forward_pre_hook(stumble, with_kwargs=True)
    try:
        with Ledger(tmp_path / "l.db") as ledger:
            asyncio.run(main(ledger))
            assert ledger.summary().failures == {"provider": 1}
    finally:
        hook.remove()
    failure = results.pop("bad")
    assert isinstance(failure, Failure)
    assert failure.detail == "ValueError: stumbled"
    assert {name: len(said) for name, said in results.items()} == {str(n): 2 for n in range(9)}


@pytest.mark.parametrize(
    ("raised", "heard"),
    [(UserError("no chat template"), UserError), (RuntimeError("broken"), ProviderError)],
    ids=["for all", "for this one"],
)
def test_an_engine_that_breaks_leaves_nobody_waiting(raised: Exception, heard: type[Exception]) -> None:
    """Whatever an engine raises reaches everyone who waits for it, and it is asked again next time."""
    broken = [raised]

    def answer(_: Any, requests: list[Request]) -> list[Reply]:
        if broken:
            raise broken[0]
        return [Reply(text=request.messages[-1].content) for request in requests]

    local = Local(None, "digest", batch=2, generate=answer)
    outcomes = answers(local, *(ask(str(n)) for n in range(5)))
    assert [type(outcome) for outcome in outcomes] == [heard] * 5
    broken.clear()
    assert [reply.text for reply in answers(local, ask("a"), ask("b"))] == ["a", "b"]
    assert "generate" not in {thread.name for thread in threading.enumerate() if not thread.daemon}


def test_to_close_ends_what_is_under_way(loaded: Loaded) -> None:
    """A thread that went on would outlive the interpreter, and bring it down."""
    local = Local(loaded, "digest")

    async def main() -> None:
        task = asyncio.create_task(local.complete(ask("fever", 10**6, temperature=1.0, seed=1)))
        await asyncio.sleep(0.2)
        task.cancel()
        await local.close()

    with patch.object(generating, "_ends", lambda _: [-1]):  # it never stops by itself
        asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert answers(local, ask("cough")) == generate(loaded, [ask("cough")])
