import sys
from pathlib import Path

import pytest

from preceptor.app.stages import STAGES
from tests.app import toy


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """The toy stages beside ours, in an empty folder with the toy recipe."""
    for name in toy.TOYS:
        monkeypatch.setitem(STAGES, name, "a toy")
        monkeypatch.delitem(sys.modules, f"preceptor.stages.{name}", raising=False)
    toy.register()
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(toy.RECIPE)
    return tmp_path


@pytest.fixture
def command(toys, command):
    """The same beside the toy recipe."""
    return command
