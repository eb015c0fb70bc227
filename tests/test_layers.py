import subprocess
import sys

import pytest

from tests import rooms


@pytest.mark.parametrize("path", rooms.files(), ids=lambda path: str(path.relative_to(rooms.PACKAGE)))
def test_imports_go_one_way(path):
    assert list(rooms.mistakes(path)) == []


def test_the_rule_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "PACKAGE", tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "verb.py").write_text("\nSTAGE = 1\n")
    (tmp_path / "stages" / "base.py").write_text("")
    table = {
        "core/a.py": ("from preceptor.tasks import prompts", ["core imports preceptor.tasks.prompts"]),
        "data/a.py": ("def f():\n import preceptor.model.load", ["data imports preceptor.model.load"]),
        "llm/a.py": ("import torch.nn", ["llm imports torch"]),
        "model/a.py": ("import torch", []),
        "clinical/a.py": ("from ..llm import ledger", ["clinical imports preceptor.llm.ledger"]),
        "stages/a.py": (
            "from .verb import run\nfrom preceptor.stages.base import x",
            ["a stage imports preceptor.stages.verb.run"],
        ),
        "api.py": ("from preceptor.stages.base import x", []),
    }
    for name, (source, expected) in table.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        assert list(rooms.mistakes(path)) == expected


def test_no_file_is_too_long():
    assert [f"{p}: {rooms.lines(p)}" for p in rooms.files() if rooms.lines(p) > rooms.LONGEST] == []


def test_every_room_is_known():
    assert {rooms.room_of(path) for path in rooms.files()} <= rooms.SHARES.keys()


def test_the_command_loads_nothing_heavy():
    heavy = {"torch", "pydantic", "omegaconf", "sklearn", "httpx2", "numpy"}
    code = f"import sys, preceptor.app.cli; print(sorted({heavy!r} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
