"""How many replies are in the making at once: as many as memory holds, within the container's limits."""

from pathlib import Path

import psutil
import pytest
import torch

from preceptor.model import generate as generating
from preceptor.model import room
from preceptor.model.generate import Engine, generate
from preceptor.model.load import Loaded
from tests.model import tiny
from tests.model.test_generate import Asked, ask

CPU = torch.device("cpu")
V2 = {"memory.max": "1000000", "memory.current": "700000", "memory.stat": "anon 5\ninactive_file 100000\n"}
V1 = {
    "memory/memory.limit_in_bytes": "2000000",
    "memory/memory.usage_in_bytes": "1500000",
    "memory/memory.stat": "cache 9\ntotal_inactive_file 20000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2, 400_000),
        (V1, 520_000),
        ({**V1, **V2}, 400_000),
        ({**V2, "memory.stat": "anon 5\n"}, 300_000),
        ({**V2, "memory.current": "1200000"}, 0),
        ({**V2, "memory.max": "max"}, None),
        ({"memory.max": "1000"}, None),
        ({}, None),
    ],
)
def test_what_is_free_is_what_the_container_leaves(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert room.free(CPU, tmp_path) == (10**9 if expected is None else expected)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(available=1000))
    assert room.free(CPU, tmp_path) == (0 if expected == 0 else 1000)


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are free; the last one counts."""
    told = [1 << 40]
    monkeypatch.setattr(room, "free", lambda _: told[-1])
    return told


def test_rows_are_as_many_as_fit(space: list[int]) -> None:
    known = room.Room(tiny.qwen())
    assert known._column == 2 * 2 * 2 * 8 * 4, "layers, keys and values, heads, their width, bytes"
    assert known.rows([100] * 50) == 50
    fit = []
    for free in (0, 1 << 24, 1 << 27, 1 << 28):
        space.append(free)
        fit.append(known.rows([500] * 100_000))
    assert fit[0] == 1, "one is always tried"
    assert fit == sorted(fit)
    assert 1 < fit[2] < fit[3] < 100_000
    assert known.rows([500] * 100_000, held=100_000) > fit[3], "what is taken now will be let go"
    wide = known.rows([5000] * 100_000)
    assert wide < fit[3] / 5, "all rows of a batch are as wide as its widest"
    assert known.rows([500] * 3 + [10**9]) == 3


def test_where_memory_ran_out_half_of_it_is_tried(space: list[int]) -> None:
    known = room.Room(tiny.qwen())
    known.shrink(8, 100)
    assert known.rows([100] * 50) == 4
    assert known.rows([400] * 50) == 1
    assert known.rows([10] * 50) == 40


def test_the_engine_begins_no_more_than_fit(monkeypatch: pytest.MonkeyPatch, space: list[int]) -> None:
    torch.set_num_threads(1)
    loaded, rows = Loaded(tiny.qwen(), tiny.tokenizer(), Path()), list[int]()
    requests = [ask(n % 4, max_tokens=6) for n in range(12)]
    expected = generate(loaded, requests)
    monkeypatch.setattr(room.Room, "rows", lambda self, columns, held=0: min(3, len(columns)))
    loaded.model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    Engine(loaded, 8).serve(feed := Asked(requests))
    assert [feed.outcomes[n] for n in range(12)] == expected
    assert max(rows) == 3


def test_prompts_go_with_others_of_like_length(space: list[int]) -> None:
    """A long one among short ones: the padding never comes to more than the prompts."""
    loaded, seen = Loaded(tiny.qwen(), tiny.tokenizer(), Path()), list[int]()
    requests = [ask(n % 2, max_tokens=1) for n in range(10)] + [ask(20, max_tokens=1)]
    lengths = [reply.usage.prompt_tokens for reply in generate(loaded, requests)]
    assert max(lengths) > generating._LIKE * min(lengths)
    loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    engine = Engine(loaded)
    engine._prefixes.wanted = lambda _: iter(())
    engine.serve(Asked(requests))
    assert sum(seen) <= generating._LIKE * sum(lengths) < len(requests) * max(lengths)
