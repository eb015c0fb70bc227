"""Weights in this process: batches, and bad requests that fail alone."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from preceptor.core.records import Failure, Reply, Request
from preceptor.llm.ledger import Ledger
from preceptor.llm.local import Local
from preceptor.llm.runner import run
from tests.llm.conftest import talk


class Engine:
    """Stands for `preceptor.model.generate.generate`."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()

    def __call__(self, loaded: Any, requests: list[Request]) -> list[Reply]:
        texts = [request.messages[-1].content for request in requests]
        self.threads.add(threading.current_thread().name)
        if "too long" in texts:
            raise ValueError("longer than the model's context")
        self.batches.append(texts)
        return [Reply(text=f"{loaded}: {text}") for text in texts]


def label(engine: Engine, talks: dict[str, Any], ledger: Ledger | None = None, batch: int = 32) -> dict[str, Any]:
    results: dict[str, Any] = {}

    async def main() -> None:
        local = Local("weights", "digest", batch=batch, generate=engine)
        await run(talks.items(), [local], ledger, 40, results.__setitem__)
        await local.close()

    asyncio.run(main())
    return results


def test_requests_are_batched_by_length() -> None:
    engine = Engine()
    results = label(engine, {str(n): talk("x" * (n * 7 % 40 + 1)) for n in range(40)}, batch=16)
    assert len(results) == 40
    assert [len(batch) for batch in engine.batches] == [16, 16, 8]
    lengths = [len(text) for batch in engine.batches for text in batch]
    assert lengths == sorted(lengths)
    assert engine.threads == {"generate"}


def test_a_bad_request_fails_alone(tmp_path: Path) -> None:
    engine = Engine()
    talks = {"bad": talk("too long"), **{str(n): talk(f"case {n}", f"more {n}") for n in range(9)}}
    with Ledger(tmp_path / "l.db") as ledger:
        results = label(engine, talks, ledger)
        assert ledger.summary().failures == {"provider": 1}
    failure = results.pop("bad")
    assert isinstance(failure, Failure)
    assert "context" in failure.detail
    assert results == {str(n): [f"weights: case {n}", f"weights: more {n}"] for n in range(9)}
