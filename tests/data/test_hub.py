import sys
from types import SimpleNamespace

import pytest

from preceptor.core.errors import UserError, WorkError
from preceptor.data import hub
from preceptor.data.files import importer_of, read, sniff


@pytest.fixture
def loaded(monkeypatch):
    """What the library was asked for; its rows are in `given`."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if isinstance(given, Exception):
            raise given
        return given

    given = [{"question": "a", "think": "b", "answer": "c"}, {"question": "d", "think": "e", "answer": "f"}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    def give(what):
        nonlocal given
        given = what

    return SimpleNamespace(asked=asked, give=give)


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("hub:a/b", ("a/b", None, "train", True)),
        ("hub:a/b:test", ("a/b", None, "test", True)),
        ("hub:a/b:zh:test", ("a/b", "zh", "test", True)),
    ],
)
def test_an_address(loaded, address, asked):
    assert sniff(address) == "think_answer"
    assert [found.case.text for found in read(address, importer_of("think_answer", address))] == ["a", "d"]
    assert loaded.asked == [asked, asked]


@pytest.mark.parametrize("address", ["hub:", "hub:a/b:c:d:e", "hub:a/b:"])
def test_an_address_that_is_wrong(loaded, address):
    with pytest.raises(UserError, match="is written hub:owner/name"):
        next(hub.rows(address))


def test_a_hub_that_is_out_of_reach(loaded):
    loaded.give(ConnectionError("no\nroute"))
    with pytest.raises(UserError, match=r"hub:a/b: not reached \(no route\); check name and network"):
        next(hub.rows("hub:a/b"))


def test_a_hub_that_breaks_off(loaded):
    loaded.give({"a": 1 // number} for number in (1, 1, 0))
    rows = hub.rows("hub:a/b")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 1})]
    with pytest.raises(WorkError, match="broke off after row 2"):
        next(rows)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets: pip install"):
        next(hub.rows("hub:a/b"))


def test_the_library_itself_reads_a_folder_as_it_reads_a_hub(tmp_path, monkeypatch):
    """What is named owner/name here is a folder, which needs no network."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    lines = [f'{{"question": "q{n}", "think": "t", "answer": "x"}}\n' for n in range(3)]
    (tmp_path / "a" / "b" / "train.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    assert [(number, row["question"]) for number, row in hub.rows("hub:a/b")] == [(1, "q0"), (2, "q1"), (3, "q2")]
    with pytest.raises(UserError, match="not reached"):
        list(hub.rows("hub:a/b:test"))
