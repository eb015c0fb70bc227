"""What tests of the whole command share."""

import sys

import hypothesis
import pytest

from preceptor.app import cli

# The same examples each time, and no clock, so that what passes here passes elsewhere.
# --hypothesis-profile=default tries others.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command in this process and an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["preceptor", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return run
