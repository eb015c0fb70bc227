import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from tests.app.toy import RECIPE

ROOT = Path(__file__).parents[2]


def worked():
    """The rows that the toy stage `double` has worked on, in all starts."""
    path = Path("runs/toy/double/worked")
    return path.read_text().split() if path.exists() else []


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.app.toy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a background job ignores it
    )


def await_(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_leaves_what_it_was_made_of(command):
    code, out, err = command("run", "toy.yaml")
    assert (code, out) == (0, "total 66\n")
    assert "total: done in" in err
    folder = Path("runs/toy/double")
    config = json.loads((folder / "config.json").read_text())
    source = config["inputs"]["rows.jsonl"][0]
    assert source["path"] == "runs/toy/numbers/rows.jsonl"
    assert len(source["sha256"]) == 64
    assert config["config"] == {"from": [], "limit": None, "seconds": 0.0, "fail": ""}
    assert config["code"]["version"]
    assert json.loads((folder / "metrics.json").read_text()) == {"rows": 6}
    assert json.loads((folder / "done.json").read_text())["digest"] == config["digest"]
    assert "done in" in (folder / "log.txt").read_text()
    assert (folder / "code.diff").exists()
    assert json.loads(Path("runs/toy/numbers/config.json").read_text())["seed"] == 3


def test_a_second_run_does_nothing_and_says_so(command):
    command("run", "toy.yaml")
    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("toy/*/*")}
    assert len(before) > 15
    code, out, err = command("run", "toy.yaml")
    assert (code, out) == (0, "")
    assert [line.split(", in")[0] for line in err.splitlines()] == [
        f"{name}: done already" for name in ("numbers", "double", "total")
    ]
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").glob("toy/*/*")}


def test_how_fields_never_refuse_and_result_fields_do_by_name(command):
    command("run", "toy.yaml")
    assert command("run", "toy.yaml", "double.seconds=0.01")[0] == 0
    code, _, err = command("run", "toy.yaml", "numbers.n=7")
    assert code == 2
    assert err == (
        "preceptor: runs/toy/numbers was made from another request: n was 6, now 7. Undo the change, "
        "give the recipe another name, or start over with --fresh, which keeps the old folder\n"
    )


def test_fresh_keeps_the_old_folder(command):
    command("run", "toy.yaml")
    for number in (1, 2):
        assert command("run", "toy.yaml", "--fresh", f"numbers.n={number}")[0] == 0
        assert Path(f"runs/toy/numbers.{number}/done.json").exists()
    assert json.loads(Path("runs/toy/total/total").read_text()) == 14
    assert json.loads(Path("runs/toy/total.1/total").read_text()) == 66


def test_changed_inputs_are_refused_by_name(command):
    command("run", "toy.yaml")
    command("run", "toy.yaml", "numbers", "numbers.n=7", "--fresh")
    code, _, err = command("run", "toy.yaml", "numbers.n=7")
    assert code == 2
    assert "runs/toy/double was made from another request: inputs.rows.jsonl changed." in err


def test_a_limit_that_grew_goes_on_and_one_that_shrank_is_refused(command):
    assert command("run", "toy.yaml", "limit=2")[1] == "total 14\n"
    assert worked() == ["3", "4"]
    code, out, err = command("run", "toy.yaml", "limit=4")
    assert (code, out) == (0, "total 36\n")
    assert worked() == ["3", "4", "5", "6"]
    assert "double: goes on with more cases" in err
    assert "total: starts over: there are more cases" in err
    assert json.loads(Path("runs/toy/total.1/total").read_text()) == 14
    assert command("run", "toy.yaml")[1] == "total 66\n"
    code, _, err = command("run", "toy.yaml", "limit=4")
    assert code == 2
    assert "limit was null, now 4" in err


def test_a_limit_beyond_what_there_is_changes_nothing_downstream(command):
    command("run", "toy.yaml", "limit=9")
    code, out, err = command("run", "toy.yaml", "limit=9", "numbers.limit=12")
    assert (code, out) == (0, "")
    assert "numbers: goes on with more cases" in err
    assert "total: done already" in err


def test_sections_by_name_and_stage(command):
    code, _, err = command("run", "toy.yaml", "double")
    assert code == 2
    assert "rows.jsonl comes from section 'numbers', which is not done; run it first: preceptor run toy.yaml" in err
    assert command("run", "toy.yaml", "double", "numbers")[0] == 0
    assert not Path("runs/toy/total").exists()
    code, _, err = command("run", "toy.yaml", "doubl")
    assert (code, "did you mean 'double'?" in err) == (2, True)


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("space", 1, "the disk is full; free some space and run it again"),
        ("bug", 1, "double failed: ZeroDivisionError: a bug (see runs/toy/double/log.txt)"),
        ("stop", 130, "stopped; the same command goes on from here"),
    ],
)
def test_what_fails_is_told_in_one_line_and_goes_on(command, fail, code, message):
    found, _, err = command("run", "toy.yaml", f"double.fail={fail}")
    assert found == code
    assert message in err.splitlines()[-1]
    assert not Path("runs/toy/double/done.json").exists()
    assert command("run", "toy.yaml")[:2] == (0, "total 66\n")


def test_a_full_disk_is_told_in_one_line(toys, tmp_path):
    Path("toy.yaml").write_text(RECIPE.replace("{n: 6}", "{n: 200000}"))
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = Path("runs/toy/numbers")
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    (folder / ".rows.jsonl.new").symlink_to("/dev/full")
    process = start("run", "toy.yaml")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "the disk is full; free some space and run it again" in err.splitlines()[-1]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_anywhere_it_goes_on(toys, kill):
    process = start("run", "toy.yaml", "double.seconds=0.4")
    await_(lambda: len(worked()) >= 2)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kill == signal.SIGINT else -kill)
    if kill == signal.SIGINT:
        assert err.splitlines()[-1] == "preceptor: stopped; the same command goes on from here"
    process = start("run", "toy.yaml", "double.seconds=0")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "total 66\n")
    assert "double: goes on where it was" in err
    assert len(worked()) <= 7  # one row at most was under way at the kill
    assert set(worked()) == set("345678")


def test_a_second_process_is_refused(toys):
    first = start("run", "toy.yaml", "double.seconds=2")
    try:
        await_(worked)
        second = start("run", "toy.yaml")
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert err.splitlines()[-1] == (
            f"preceptor: runs/toy/double: process {first.pid} is running it; wait for it, or stop it"
        )
    finally:
        first.kill()
        first.communicate(timeout=60)


def test_damaged_or_unwritable_runs_are_told(command):
    command("run", "toy.yaml")
    for name, text in product(("config.json", "done.json"), ("", "{", "[]", "{}", "null")):
        path = Path("runs/toy/numbers") / name
        whole = path.read_text()
        path.write_text(text)
        code, _, err = command("run", "toy.yaml")
        assert (code, "damaged" in err, len(err.splitlines())) == (2, True, 1)
        path.write_text(whole)
    Path("source").mkdir()
    Path("source/rows.jsonl").write_text("")
    Path("source/config.json").write_text("[1]")
    assert command("run", "toy.yaml", "double", "--runs", "other", "double.from=source")[0] == 0
    Path("file").write_text("")
    code, _, err = command("run", "toy.yaml", "--runs", "file")
    assert (code, len(err.splitlines())) == (2, 1)
    code, _, err = command("run", "toy.yaml", f"name={'a' * 300}")
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_request_that_failed_before_any_work_binds_nobody(command):
    assert command("run", "toy.yaml", "numbers.n=2", "double.fail=bug")[0] == 1
    Path("runs/toy/numbers/done.json").unlink()
    Path("runs/toy/numbers/rows.jsonl").unlink()
    Path("runs/toy/numbers/metrics.json").unlink()
    code, _, err = command("run", "toy.yaml", "numbers.n=5")
    assert (code, "double: starts" in err) == (0, True)
