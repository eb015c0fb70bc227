"""What label and predict share: one file of answers, read and written without holding what is in it."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Failure, FailureKind, Prediction
from preceptor.stages.account import Account, Names
from preceptor.stages.asking import Answers, AskingConfig, Cases
from preceptor.stages.base import Context, write_records
from tests.stages.scripted import scripted
from tests.stages.test_label import FLU, case, cases


def prediction(n, sample=0, model="m", **more):
    failure = None if "output" in more else Failure(kind=FailureKind.UNPARSED)
    return Prediction(case_id=f"c{n}", sample=sample, model=model, prompt_sha="", failure=failure, **more)


def answers(folder, samples=1, limit=None):
    context = Context("r", "label", folder, folder, {}, None, None, None)
    return Answers.begun(AskingConfig(), context, Cases([folder / "cases.jsonl"], limit), samples)


def test_what_is_owed_and_what_is_written(tmp_path):
    cases(4, tmp_path / "cases.jsonl")
    timeout = Prediction(case_id="c0", model="m", prompt_sha="", failure=Failure(kind=FailureKind.TIMEOUT))
    path = tmp_path / "predictions.jsonl"
    write_records(path, [prediction(3), prediction(1, 1), timeout, prediction(9), prediction(2, model="other")])
    path.write_bytes(path.read_bytes() + b'{"case_id": "c2", "samp')
    begun = answers(tmp_path, samples=2, limit=3)
    owed = [(one.id, sample) for one, sample in begun.owed("m")]
    assert owed == [("c0", 0), ("c0", 1), ("c1", 0), ("c2", 0), ("c2", 1)], "a failure of the moment is owed"
    # The last answer of a key counts; what is about no case, or beyond the limit, is left out.
    with path.open("ab") as file:
        for one in (prediction(0), prediction(0, 1, output=Diagnosis())):
            file.write(one.model_dump_json().encode() + b"\n")
    accounts = begun.finish(["other", "m"])
    kept = [(p.model, p.case_id, p.sample, p.failure and p.failure.kind) for p in api.load_predictions(path)]
    assert kept == [
        ("other", "c2", 0, "unparsed"),
        ("m", "c0", 0, "unparsed"),
        ("m", "c0", 1, None),
        ("m", "c1", 1, "unparsed"),
    ]
    assert accounts["m"].figures()["failures"] == {"unparsed": 2}
    assert (accounts["m"].figures()["abstained"], accounts["other"].figures()["cases"]) == (1, 1)


def test_neither_cases_nor_answers_are_held(tmp_path):
    number, size = 400, 30_000
    cases(number, tmp_path / "cases.jsonl", text="x" * size)
    write_records(tmp_path / "predictions.jsonl", (prediction(n, text="y" * size) for n in range(0, number, 2)))
    tracemalloc.start()
    begun = answers(tmp_path)
    owed = sum(1 for _ in begun.owed("m"))
    account = begun.finish(["m"])["m"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (owed, account.figures()["failed"]) == (200, 200)
    assert peak < number * size / 8


def test_the_account_in_words(tmp_path):
    names = Names(tmp_path, "m")
    for name in ("a-1", "", "b\n2", "a-1"):
        names.add(name)
    Names(tmp_path, "n").add("c")
    assert Names(tmp_path, "m").known == ["a-1", "b 2"]
    account = Account(Names(tmp_path, "m").known)
    for agreement in (1.0, 0.5, None):
        account.add(prediction(1, output=Diagnosis(diseases=("flu",)), agreement=agreement, revised=True))
    account.add(prediction(2, corrected=True))
    first, second, third = account.lines()
    told = "3 of 4 answered, 0 abstained, 1 failed (1 unparsed); 1 corrected, 3 revised; agreement 0.75; tokens 0 in"
    assert (first, second) == (f"{told}, 0 out", "the endpoint said it was a-1, b 2")
    assert third == "the same command with --retry asks the failed ones again, and them alone"


def test_an_endpoint_with_a_name_for_each_reply_does_not_fill_the_disk(tmp_path):
    names = Names(tmp_path, "m")
    for n in range(1000):
        names.add(f"name {n}")
    assert len(Names(tmp_path, "m").known) == 20


@pytest.mark.slow
def test_killed_at_any_time_it_loses_nothing(tmp_path):
    cases(60, tmp_path / "train.jsonl")

    def answer(_):
        time.sleep(0.05)
        return FLU

    with scripted(answer) as server:
        (tmp_path / "r.yaml").write_text(
            f"teacher: {server.teacher()}\n"
            "label: {from: train.jsonl, strategy: self_consistency, votes: 2, temperature: 1, concurrency: 4}\n"
        )
        start = "import sys; from preceptor.app.cli import main; sys.argv[1:] = ['run', 'r.yaml']; main()"
        command = [sys.executable, "-c", start]
        path = tmp_path / "runs/r/label/predictions.jsonl"
        for least in (5, 25):
            with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < least):
                    time.sleep(0.02)
                process.kill()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [p.case_id for p in api.load_predictions(path)] == [f"c{n}" for n in range(60)]
        assert {p.agreement for p in api.load_predictions(path)} == {1.0}
        sent = len(server.asked)
    assert 120 <= sent <= 120 + 2 * 4, "no reply is paid for twice but what was in flight at the two kills"


# --- one model under several names -----------------------------------------------------------------------------------


def test_one_model_asked_in_several_ways(command):
    cases(2, "t/test.jsonl")
    with scripted(lambda _: FLU) as server:
        Path("r.yaml").write_text(
            f"teacher: {server.teacher()}\n"
            "predict: {from: t/test.jsonl, models: [teacher], called: zero_shot}\n"
            "predict_two: {from: t/test.jsonl, models: [teacher], called: two_stage, strategy: two_stage}\n"
        )
        code, out, err = command("run", "r.yaml")
        assert code == 0, err
        code, _, err = command("predict", "r.yaml", "predict.models=[teacher,mini]")
    models = {
        p.model for name in ("predict", "predict_two") for p in api.load_predictions(f"runs/r/{name}/predictions.jsonl")
    }
    assert models == {"zero_shot", "two_stage"}
    assert "predict_two: two_stage: 2 of 2 answered" in out
    assert list(json.loads(Path("runs/r/predict_two/metrics.json").read_text())) == ["two_stage"]
    assert (code, "called: it is one model's name; give each of `models` a section" in err.splitlines()[-1]) == (
        2,
        True,
    )


def test_a_file_without_cases(tmp_path):
    (tmp_path / "cases.jsonl").write_text("")
    with pytest.raises(UserError, match="no cases here"):
        answers(tmp_path)


def test_cases_are_read_up_to_the_limit_of_all_files(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_records(paths[0], [case(0), case(1)])
    write_records(paths[1], [case(2), case(3)])
    assert [one.id for one in Cases(paths, 3)] == ["c0", "c1", "c2"]
    assert all(isinstance(one, Case) for one in Cases(paths, None))
