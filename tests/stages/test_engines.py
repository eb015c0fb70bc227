"""Prediction in each engine: this process, a server, workers of Ray; killed, starved and lied to, it loses no case."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.records import Case, Diagnosis
from preceptor.model.resolve import digest
from preceptor.stages.base import write_records
from tests.llm.foreign import listens
from tests.model import tiny
from tests.model.test_merge import trained

TEXTBOOK = '{start: "{python} -m preceptor teacher --port {port}", model: textbook}'


def cases(count, folder="own"):
    """Held-out cases, and training cases with gold for few_shot's examples."""
    Path(folder).mkdir()
    for name, signs in (("train", ("fever", "发热")), ("test", ("cough", "咳嗽"))):
        made = [
            Case(
                id=f"{name}{n}",
                text=f"{signs[n % 2]} {n}",
                language="en",
                source="s",
                group=f"{name}{n}",
                gold=Diagnosis(diseases=("Common cold",), reason=(signs[n % 2],)),
                gold_source="human",
            )
            for n in range(count)
        ]
        write_records(Path(folder, f"{name}.jsonl"), made)


def recipe(fields):
    Path("r.yaml").write_text(f"predict: {{from: ./own, {fields}}}\n", "utf-8")


def predictions(runs="runs", section="predict"):
    return api.load_predictions(f"{runs}/r/{section}/predictions.jsonl")


def last(text):
    return text.splitlines()[-1].removeprefix("preceptor: ")


def settled(prediction):
    """What an answer says, whatever its attempt and batch were: the last digits of a confidence depend on these."""
    confidence = {name: round(value, 3) for name, value in prediction.confidence.items()}
    return prediction.model_copy(update={"reply": prediction.reply.partition("-")[0], "confidence": confidence})


def start(*words):
    command = [sys.executable, "-m", "preceptor", "run", "r.yaml", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STARTED_IN": str(Path.cwd())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("endpoint: http://h/v1, constrained: true", "predict: constrained: at an endpoint its `json_mode` holds"),
        ("endpoint: http://h/v1, confidence: candidates", "predict: confidence: candidates needs the weights in this"),
        (
            "endpoint: {start: serve it}, ray: {address: 'h:1'}",
            "predict: ray.address: other machines can't reach a server that `start` starts here; give its `url`",
        ),
        (
            "models: [mini, ./other], endpoint: {url: http://h/v1, model: m}",
            "predict: endpoint.model: it is one model's name; give each of `models` a section of its own",
        ),
        (
            "endpoint: [http://h/v1, {url: http://g/v1, extra: {top_k: 1}}]",
            "predict.endpoint: g is asked otherwise than h (extra, json_mode, thinking)",
        ),
        ("ray: {address: 'ray://h:10001'}", "predict.ray.address: 'ray://h:10001' goes through another machine"),
    ],
)
def test_what_cannot_be(command, fields, told):
    recipe(fields if "models" in fields else f"models: [mini], {fields}")
    code, _, err = command("run", "r.yaml")
    assert (code, last(err)[: len(told) + 8]) == (2, f"r.yaml: {told}"[: len(told) + 8])


def test_a_folder_that_holds_no_model(command):
    cases(2)
    Path("empty").mkdir()
    recipe("models: [./empty]")
    code, _, err = command("run", "r.yaml")
    assert (code, last(err)) == (2, "empty: no model here (neither config.json nor adapter_config.json)")


def test_two_cases_of_one_id(command):
    cases(2)
    test = Path("own/test.jsonl")
    test.write_text(test.read_text() * 2)
    recipe("models: [mini]")
    code, _, err = command("run", "r.yaml")
    assert (code, last(err)) == (2, "own/test.jsonl: two cases have the id 'test0'; give each its own")


def test_what_the_model_cannot_take_in_is_told(command):
    """A record past its context is read in part; examples past it leave no room at all."""
    tiny.save(tiny.qwen(), Path("tiny"))
    cases(3)
    for name in ("train", "test"):
        (first, *others) = api.load_cases(f"own/{name}.jsonl")
        write_records(Path(f"own/{name}.jsonl"), [first.model_copy(update={"text": "fever, " * 900}), *others])
    shots = "predict_shots: {from: ./own, models: [./tiny], max_tokens: 5, strategy: few_shot}"
    Path("r.yaml").write_text(f"predict: {{from: ./own, models: [./tiny], max_tokens: 5}}\n{shots}\n")
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    assert [p.cut for p in predictions()] == [True, False, False]
    assert "./tiny: records longer than the model can take in, whose ends were not read: 1" in " ".join(out.split())
    _, *cut = predictions(section="predict_shots")
    (detail,) = {p.failure.detail for p in cut}
    assert detail.startswith("the reply is empty: its prompt leaves no room in the model's context; shorten it")
    assert f"./tiny: the commonest failure: {detail}" in " ".join(out.split())


# --- at a server -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_of_an_adapter_says_what_this_process_says(command, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = trained(Path.cwd(), noise=0.1, target_modules="all-linear")
    cases(6)
    serve = '{start: "transformers serve {model} --device cpu --port {port}", logprobs: 0}'
    settings = f"from: ./own, models: [{adapter}], max_tokens: 12"
    Path("r.yaml").write_text(f"predict: {{{settings}}}\npredict_served: {{{settings}, endpoint: {serve}}}\n")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    here, served = predictions(), predictions(section="predict_served")
    assert [(p.case_id, p.text.strip()) for p in served] == [(p.case_id, p.text.strip()) for p in here]
    assert len({p.text for p in here}) > 1
    whole = Path("runs/r/predict_served/served", digest(adapter)[:16])
    assert (whole / "model.safetensors").is_file()
    log = Path("runs/r/predict_served/server.log").read_text()
    assert not listens(int(re.search(r"running on http://[\w.]+:(\d+)", log)[1]))

    # What was merged once is served again.
    before = (whole / "model.safetensors").stat().st_mtime_ns
    lines = Path("runs/r/predict_served/predictions.jsonl").read_text().splitlines(keepends=True)
    Path("runs/r/predict_served/predictions.jsonl").write_text("".join(lines[:3]))
    Path("runs/r/predict_served/done.json").unlink()
    assert command("run", "r.yaml", "predict_served")[0] == 0
    assert predictions(section="predict_served") == served
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_replies_of_a_server_serve_these_weights_alone(command):
    cases(4)
    for seed in (0, 1):
        tiny.save(tiny.qwen(seed), Path(f"m{seed}"))
    shutil.copytree("m0", "again")
    sections = {"a": "./m0", "same": "./again", "other": "./m1"}
    Path("r.yaml").write_text(
        "".join(
            f"predict_{name}: {{from: ./own, models: [{at}], endpoint: {TEXTBOOK}}}\n" for name, at in sections.items()
        )
    )
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    keys = {name: [p.reply for p in predictions(section=f"predict_{name}")] for name in sections}
    assert keys["a"] == keys["same"], "the folder's name is nothing to the ledger"
    assert not set(keys["a"]) & set(keys["other"])
    assert all(p.confidence for p in predictions(section="predict_a") if p.output.diseases), "it has log-probabilities"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "code", "told"),
    [
        ("{python} -c 'raise SystemExit(\\\"no GPU\\\")'", 1, r"` ended before it answered: no GPU \(see "),
        ("nowhere-vllm serve {model}", 2, "start: there is no command 'nowhere-vllm': install it, or mend `start`"),
    ],
)
def test_a_server_that_does_not_start(command, start, code, told):
    cases(2)
    tiny.save(tiny.qwen(), Path("tiny"))
    recipe(f'models: [./tiny], endpoint: {{start: "{start}"}}')
    ended, _, err = command("run", "r.yaml")
    assert (ended, bool(re.search(told, last(err)))) == (code, True), err


DYING = """
import os, sys, time
from tests.stages.scripted import scripted
left = 5
def answer(body):
    global left
    left -= 1
    if left < 0:
        print("device lost", file=sys.stderr, flush=True)
        os._exit(3)
    return '{"diseases": ["Common cold"], "reason": ["cough"]}'
with scripted(answer, int(sys.argv[1])):
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_server_that_dies_half_way_ends_the_run_at_once(command, monkeypatch):
    """Nobody would start it again; what it said is kept, and the same command goes on from there."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cases(20)
    tiny.save(tiny.qwen(), Path("tiny"))
    Path("dying.py").write_text(DYING)
    served = '{start: "{python} dying.py {port}", logprobs: 0}'
    recipe(f"models: [./tiny], endpoint: {served}, concurrency: 1")
    begin = time.monotonic()
    code, _, err = command("run", "r.yaml")
    told = "`{python} dying.py {port}` ended while it was asked: device lost (see runs/r/predict/server.log)"
    assert (code, last(err)) == (1, told)
    assert time.monotonic() - begin < 30
    assert len(predictions()) == 5
    for _ in range(3):
        code, _, err = command("run", "r.yaml")
    assert code == 0, err
    assert [p.case_id for p in predictions()] == [f"test{n}" for n in range(20)]


@pytest.mark.slow
def test_an_endpoint_that_is_dead(command):
    cases(2)
    tiny.save(tiny.qwen(), Path("tiny"))
    recipe("models: [./tiny], endpoint: 'http://127.0.0.1:9/v1'")
    code, _, err = command("run", "r.yaml")
    told = "127.0.0.1 can't be reached at http://127.0.0.1:9/v1 (ConnectError"
    assert (code, last(err)[: len(told)]) == (1, told), err


# --- the same questions in every engine ------------------------------------------------------------------------------

ENGINES = {"here": "", "server": f", endpoint: {TEXTBOOK}", "ray": ", ray: {cpus: 0.5}"}


@pytest.mark.slow
def test_few_shot_asks_the_same_in_every_engine(command):
    tiny.save(tiny.qwen(), Path("tiny"))
    cases(4)
    settings = "from: ./own, models: [./tiny], strategy: few_shot, examples: nearest, shots: 2, max_tokens: 40"
    Path("r.yaml").write_text("".join(f"predict_{name}: {{{settings}{how}}}\n" for name, how in ENGINES.items()))
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    here, server, ray = (predictions(section=f"predict_{name}") for name in ENGINES)
    assert [p.prompt_sha for p in here] == [p.prompt_sha for p in server] == [p.prompt_sha for p in ray]
    assert list(map(settled, here)) == list(map(settled, ray)), "one ledger: the same weights, the same replies"
    assert [p.case_id for p in server] == [f"test{n}" for n in range(4)]
    assert all(p.output for p in server)


@pytest.mark.slow
def test_labels_are_the_same_by_way_of_ray(command):
    Path("l.yaml").write_text(
        "teacher: {endpoint: textbook}\n"
        "prepare: {source: textbook, style: short, train: 30, validation: 1, test: 1}\n"
        "label: {logprobs: 2}\n"
    )
    for runs, more in (("here", ()), ("there", ("label.ray={workers: 2, cpus: 0.5}",))):
        code, _, err = command("run", "l.yaml", "--runs", runs, *more)
        assert code == 0, err
    here, there = (Path(runs, "l/label/predictions.jsonl").read_bytes() for runs in ("here", "there"))
    assert (here == there, here.count(b"\n")) == (True, 30)


@pytest.mark.slow
def test_two_in_turn_at_servers(command):
    for seed in (0, 1):
        tiny.save(tiny.qwen(seed), Path(f"m{seed}"))
    cases(4)
    recipe(f"models: [./m0+./m1], strategy: two_stage, max_tokens: 300, endpoint: {TEXTBOOK}")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    found = predictions()
    assert [p.case_id for p in found] == [f"test{n}" for n in range(4)]
    assert all(p.output for p in found)
    logs = [Path("runs/r/predict", name).exists() for name in ("server.log", "server1.log")]
    assert logs == [True, True], "one for each"


# --- killed ----------------------------------------------------------------------------------------------------------


# A start is a fork of one process, so that libraries which take seconds to load are loaded once.
FORKING = """
import os, sys
import preceptor.llm.local, preceptor.model.generate, preceptor.model.load
from preceptor.app import cli
answers = os.fdopen(os.dup(1), "w")
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        for stream in 1, 2:
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        cli.main()
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_it_never_was(command):
    rng, count, file = random.Random(5), 400, Path("broken/r/predict/predictions.jsonl")
    cases(count)
    tiny.save(tiny.qwen(), Path("tiny"))
    recipe("models: [./tiny], max_tokens: 40, batch: 2")
    words = [sys.executable, "-c", FORKING, "run", "r.yaml", "--runs", "broken"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    before = 0
    with subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as forking:
        for _ in range(20):
            forking.stdin.write("start\n")
            pid = int(forking.stdout.readline())
            end = time.monotonic() + 60
            while (file.stat().st_size if file.exists() else 0) <= before and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
            assert int(forking.stdout.readline()) == -signal.SIGKILL, Path("log.txt").read_text()
            assert before < file.stat().st_size, "each start brings something"
            before = file.stat().st_size
        forking.stdin.close()
    assert not Path("broken/r/predict/done.json").exists()
    for runs in ("broken", "whole"):
        code, _, err = command("run", "r.yaml", "--runs", runs)
        assert code == 0, err
    broken, whole = predictions("broken"), predictions("whole")
    assert [p.case_id for p in broken] == [f"test{n}" for n in range(count)]
    assert list(map(settled, broken)) == list(map(settled, whole))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", f", endpoint: {TEXTBOOK}"])
def test_a_worker_of_ray_that_is_killed_loses_no_case(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    count, file = 200, Path("runs/r/predict/predictions.jsonl")
    cases(count)
    tiny.save(tiny.qwen(), Path("tiny"))
    recipe(f"models: [./tiny], max_tokens: 60, batch: 4, concurrency: 2, ray: {{cpus: 0.5}}{engine}")
    process = start()
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.01)
    both = workers()
    os.kill(both[0], signal.SIGKILL)
    told = process.communicate()[0].decode()
    assert (len(both), process.returncode) == (2, 0), told
    found = predictions()
    assert [p.case_id for p in found] == [f"test{n}" for n in range(count)]
    kinds = {p.failure.kind.value for p in found if p.failure}
    assert kinds <= {"truncated"}, "nothing failed for the worker's sake"
    assert not ours("ray::|raylet|gcs_server")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_ray_does_not_outlive_us(tmp_path, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    cases(200)
    tiny.save(tiny.qwen(), Path("tiny"))
    recipe("models: [./tiny], max_tokens: 60, batch: 2, ray: {cpus: 0.5}")
    process, file = start(), Path("runs/r/predict/predictions.jsonl")
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.01)
    assert ours("raylet")
    process.send_signal(sign)
    process.communicate()
    end = time.monotonic() + 15
    while ours("ray::|raylet|gcs_server") and time.monotonic() < end:
        time.sleep(0.2)
    assert not ours("ray::|raylet|gcs_server")
    told = (again := start()).communicate()[0].decode()
    assert again.returncode == 0, told
    assert [p.case_id for p in predictions()] == [f"test{n}" for n in range(200)]


def workers():
    return ours("^ray::Worker")


def ours(pattern):
    """Processes of a name that were started from this folder, by their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_text().replace("\0", " ")
            mine = f"STARTED_IN={Path.cwd()}" in (entry / "environ").read_text(errors="replace").split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if line and mine and re.search(pattern, line):
            found.append(int(entry.name))
    return found


# --- what is wrong with the weights, and with the memory -------------------------------------------------------------


def test_an_adapter_cut_short(command):
    adapter = trained(Path.cwd(), noise=0.1, target_modules="all-linear")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    cases(2)
    recipe(f"models: [{adapter}]")
    code, _, err = command("run", "r.yaml")
    told = last(err)
    assert (code, "damaged safetensors" in told, told.endswith("; fetch or make it again")) == (2, True, True), err
    assert not list(Path("runs/r/predict").glob("predictions.jsonl"))


def test_a_model_that_never_stops(command):
    tiny.save(tiny.qwen(), Path("tiny"))
    cases(3)
    recipe("models: [./tiny], max_tokens: 5")
    code, out, err = command("run", "r.yaml")
    assert (code, "0 of 3 answered, 0 abstained, 3 failed (3 truncated)" in " ".join(out.split())) == (0, True), err
    assert [p.usage.completion_tokens for p in predictions()] == [5, 5, 5]


@pytest.mark.parametrize("most", [1, 0])
def test_memory_that_runs_out(command, monkeypatch, most):
    """With room for one row each is answered alone; with room for none the run ends, or every case fails."""
    import torch
    from transformers import Qwen3ForCausalLM

    forward = Qwen3ForCausalLM.forward

    def starved(self, input_ids=None, **rest):
        if input_ids is not None and input_ids.shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", starved)
    tiny.save(tiny.qwen(), Path("tiny"))
    cases(5)
    recipe("models: [./tiny], max_tokens: 5, batch: 4")
    code, out, err = command("run", "r.yaml")
    if most:
        assert (code, "5 failed (5 truncated)" in " ".join(out.split())) == (0, True), err
    else:
        assert (code, "memory" in last(err)) == (1, True), err
