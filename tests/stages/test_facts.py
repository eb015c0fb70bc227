"""What is gathered from a run's folders of the model that a section trained."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Message, Row
from preceptor.core.statistics import Estimate
from preceptor.report.card import card
from preceptor.report.datasheet import datasheet
from preceptor.report.facts import Asked, Facts, Judgement, Labelled, Learned, Stated
from preceptor.report.metrics import ModelScore
from preceptor.stages.base import sha256, write_records
from preceptor.stages.facts import facts_of
from tests.report.facts import PREPARED

RUN = Path("runs/flu")
FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
ACCOUNT = {
    "cases": 2,
    "answered": 2,
    "abstained": 0,
    "repaired": 0,
    "failed": 0,
    "failures": {},
    "agreement": None,
    "models": ["big-0901"],
}
JUDGE = {
    "model": "big",
    "temperature": 0,
    "repeats": 1,
    "rubric": "diagnosis",
    "rubric_sha256": "r",
    "prompt_sha256": "p",
}
TEACHER = {"model": "big", "endpoint": [{"preset": "deepseek", "distillation": True}]}


def case(name: str, text: str = "", **fields: Any) -> Case:
    return Case.model_validate(
        {"id": name, "text": text or f"Cough {name}", "language": "en", "source": "a.jsonl", "group": name, **fields}
    )


def row(name: str, text: str = "", answer: str = '{"diseases": ["Influenza"], "reason": []}') -> Row:
    record = Message(role="user", content=f"<record>\n{text or f'Cough {name}'}\n</record>")
    return Row(id=name, messages=(record,), answer=answer, case_id=name)


def section(
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Iterable[Path]],
    metrics: Mapping[str, Any],
    started: str = "2026-01-01",
) -> Path:
    """The folder of a section that is done. What it left must lie there already."""
    folder = RUN / name
    folder.mkdir(parents=True, exist_ok=True)
    given = {need: [{"path": str(path), "sha256": sha256(path)} for path in paths] for need, paths in inputs.items()}
    config = {
        "section": name,
        "stage": name.partition("_")[0],
        "inputs": given,
        "code": {"version": "0.1.0", "commit": "abc", "changed": False},
        "started": started,
        "seed": 3,
        "config": {"from": [], "limit": None, **settings},
    }
    for file, value in (("config", config), ("metrics", metrics), ("done", {})):
        (folder / f"{file}.json").write_text(json.dumps(value))
    return folder


def left(path: str, records: Iterable[Any]) -> Path:
    """A file that a section left."""
    (RUN / path).parent.mkdir(parents=True, exist_ok=True)
    write_records(RUN / path, records)
    return RUN / path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run from raw file to judge, two rows small."""
    monkeypatch.chdir(tmp_path)
    raw = Path("ward/a.jsonl")
    raw.parent.mkdir()
    raw.write_text("{}\n")
    told = PREPARED.model_dump(mode="json") | {"sources": [{"name": str(raw), "layout": "preceptor", "rows": 2}]}
    train = left("prepare/train.jsonl", [case("1", meta={"sex": "male", "age": 70}), case("2", "Woman, 9, cough")])
    test = left(
        "prepare/test.jsonl", [case("3", meta={"specialty": "cardiology", "risk_level": "critical"}), case("4")]
    )
    held = left("prepare/validation.jsonl", [case("5", gold=Diagnosis(diseases=("Influenza",)), gold_source="human")])
    section("prepare", {"source": [str(raw)]}, {"source": [raw]}, told)
    labels = left("label/predictions.jsonl", [])
    section(
        "label",
        {"task": "diagnosis", "strategy": "zero_shot", "samples": 1, "teacher": TEACHER},
        {"cases": [train]},
        ACCOUNT,
    )
    rows, apart = (
        left("curate/rows.jsonl", [row("1"), row("2", "Woman, 9, cough")]),
        left("curate/validation_rows.jsonl", [row("5")]),
    )
    section(
        "curate",
        {"task": "diagnosis"},
        {"predictions.jsonl": [labels], "train.jsonl": [train], "test": [test], "validation": [held]},
        {"labels": 2, "review": 0, "dropped": {}},
    )
    (RUN / "sft/adapter").mkdir(parents=True)
    (RUN / "sft/adapter/adapter_model.safetensors").write_bytes(b"weights")
    (RUN / "sft/adapter/base.json").write_text('{"digest": "d"}')
    section(
        "sft",
        {"task": "diagnosis", "student": "tiny", "method": "lora", "rank": 8, "alpha": 16},
        {"rows.jsonl": [rows], "validation_rows.jsonl": [apart]},
        {"rows": 2.0, "steps": 1.0, "loss": 0.5, "transductive_rows": 0},
    )
    said = left("predict/predictions.jsonl", [])
    section(
        "predict",
        {"models": ["base", "student"], "called": "", "task": "diagnosis"},
        {"cases": [test], "student": [RUN / "sft/adapter"]},
        {"base": ACCOUNT, "student": ACCOUNT | {"failed": 1}},
    )
    parts = [("3", 1.0), ("4", None)]
    left(
        "evaluate/scores.jsonl",
        [ModelScore(case_id=name, value=0, parts={"severe_miss": missed}, model="student") for name, missed in parts],
    )
    section(
        "evaluate",
        {"task": "diagnosis"},
        {"cases": [test], "predictions": [said]},
        {"base": {}, "student": {"top1": FIGURE}},
    )
    section("judge", {}, {"predictions": [said]}, {"judge": JUDGE, "models": {"student": {"score": FIGURE}}})


def found(section: str = "sft", **more: Any) -> Facts:
    return facts_of(Path("runs"), "flu", section, language="en", **more)


def test_a_run_from_the_raw_file_to_the_judge(run):
    facts = found(stated=Stated(contact="Ward 3"), watermark="For research")
    rows, test = (sha256(RUN / name) for name in ("curate/rows.jsonl", "prepare/test.jsonl"))
    raw = sha256(Path("ward/a.jsonl"))
    assert facts.prepared is not None
    assert facts == Facts(
        recipe="flu",
        section="sft",
        language="en",
        task="diagnosis",
        adapter=True,
        base="tiny",
        base_digest="d",
        weights={"adapter/adapter_model.safetensors": sha256(RUN / "sft/adapter/adapter_model.safetensors")},
        data=(
            ("curate/rows.jsonl", rows),
            ("curate/validation_rows.jsonl", sha256(RUN / "curate/validation_rows.jsonl")),
            ("prepare: a.jsonl", raw),
            ("prepare/test.jsonl", test),
        ),
        raw={"ward/a.jsonl": raw},
        seed=3,
        code={"version": "0.1.0", "commit": "abc", "changed": False},
        settings={"task": "diagnosis", "student": "tiny", "method": "lora", "rank": 8, "alpha": 16},
        trained={"rows": 2.0, "steps": 1.0, "loss": 0.5, "transductive_rows": 0},
        validation=(1, "gold"),
        asked=(Asked("label", "label", "big", ("deepseek",), distillation=True, served=("big-0901",)),),
        prepared=facts.prepared,
        textbook=False,
        labelled=(Labelled("label", "big", "zero_shot", 1, ACCOUNT),),
        curated={"labels": 2, "review": 0, "dropped": {}},
        learned=Learned(
            rows=2,
            diseases={"Influenza": 2},
            sources={"a.jsonl": 2},
            sexes={"male": 1, "female": 1},
            ages={"0–17": 1, "65+": 1},
            held_out=3,
        ),
        name="student",
        metrics={"base": {}, "student": {"top1": Estimate(value=0.5, low=0.4, high=0.6, n=3)}},
        answers=ACCOUNT | {"failed": 1},
        severe={"cardiology · critical": 1},
        judged=(Judgement(JUDGE, {"score": FIGURE}),),
        stated=Stated(contact="Ward 3"),
        watermark="For research",
    )
    assert (facts.prepared.cases, [one.name for one in facts.prepared.sources]) == (100, ["ward/a.jsonl"])


def test_a_run_that_was_moved_tells_the_same(run, monkeypatch):
    before = found()
    Path("elsewhere").mkdir()
    shutil.move("runs", "elsewhere/runs")
    monkeypatch.chdir("elsewhere")
    assert found() == before


def test_figures_of_other_weights_are_none_of_ours(run):
    (RUN / "sft/adapter/adapter_model.safetensors").write_bytes(b"trained anew")
    facts = found()
    assert (facts.name, facts.metrics, facts.answers, facts.judged, facts.severe) == ("", {}, {}, (), {})
    assert "no section `evaluate` has graded answers of these weights" in card(facts)


def test_figures_of_other_answers_are_none_of_ours(run):
    left("predict/predictions.jsonl", [])
    (RUN / "predict/predictions.jsonl").write_text("\n")
    facts = found()
    assert (facts.name, facts.metrics, facts.judged) == ("student", {}, ())
    assert facts.answers["failed"] == 1


def test_the_latest_evaluation_is_told(run):
    said = RUN / "predict/predictions.jsonl"
    left("evaluate_2/scores.jsonl", [])
    section("evaluate_2", {}, {"predictions": [said]}, {"student": {"parsed": FIGURE}}, started="2026-01-02")
    assert list(found().figures) == ["parsed"]


def test_under_another_name(run):
    said = left("predict_2/predictions.jsonl", [])
    settings = {"models": ["sft"], "called": "v2", "task": "diagnosis"}
    (RUN / "predict_2/predictions.jsonl").write_text("\n")
    section("predict_2", settings, {"sft": [RUN / "sft/adapter"]}, {"v2": ACCOUNT}, started="2026-01-02")
    left("evaluate_2/scores.jsonl", [])
    section("evaluate_2", {}, {"predictions": [said]}, {"v2": {"parsed": FIGURE}}, started="2026-01-02")
    facts = found()
    assert (facts.name, list(facts.figures), facts.answers) == ("v2", ["parsed"], ACCOUNT)


def test_two_that_answer_in_turn(run):
    said = left("predict_2/predictions.jsonl", [])
    settings = {"models": ["sft+other", "sft_10+other"], "called": "", "task": "diagnosis"}
    (RUN / "predict_2/predictions.jsonl").write_text("\n")
    section("predict_2", settings, {"sft": [RUN / "sft/adapter"]}, {"sft+other": ACCOUNT}, started="2026-01-02")
    left("evaluate_2/scores.jsonl", [])
    section("evaluate_2", {}, {"predictions": [said]}, {"sft+other": {"parsed": FIGURE}}, started="2026-01-02")
    facts = found()
    assert (facts.name, facts.together, list(facts.figures)) == ("sft+other", "sft+other", ["parsed"])


def test_what_was_put_aside_or_never_finished_is_no_part_of_it(run):
    shutil.copytree(RUN / "evaluate", RUN / "evaluate.1")
    (RUN / "evaluate.1/metrics.json").write_text('{"student": {"old": 1}}')
    (RUN / "evaluate/done.json").unlink()
    assert found().metrics == {}


def test_another_label_file_than_was_learned_from_is_refused(run):
    (RUN / "label/predictions.jsonl").write_text("\n")
    with pytest.raises(UserError) as refused:
        found()
    assert str(refused.value) == (
        "runs/flu/curate was made from another label/predictions.jsonl than lies there now; "
        "run curate, and what follows it, again with --fresh"
    )


@pytest.mark.parametrize("name", ["curate", "sft_2"])
def test_what_trained_nothing_is_refused(run, name):
    with pytest.raises(UserError, match=f"runs/flu/{name}: no trained model here; run the section first"):
        found(name)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("evaluate/metrics.json", "{", "evaluate/metrics.json: it can't be read"),
        ("evaluate/metrics.json", '{"student": {"top1": 3}}', "evaluate/metrics.json: not what evaluate writes"),
        ("prepare/metrics.json", "{}", "prepare/metrics.json: not what prepare writes"),
        ("label/config.json", "[", "label/config.json: it can't be read"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(run, file, text, told):
    (RUN / file).write_text(text)
    with pytest.raises(UserError, match=told) as refused:
        found()
    assert "\n" not in str(refused.value)
    assert "--fresh" in str(refused.value)


def test_going_on_from_an_earlier_section_tells_its_teachers_and_its_base(run):
    (RUN / "sft_more/model").mkdir(parents=True)
    (RUN / "sft_more/model/model-1.safetensors").write_bytes(b"more")
    own = Path("own.jsonl")
    write_records(own, [row("9")])
    section("sft_more", {"student": "sft"}, {"rows.jsonl": [own], "student": [RUN / "sft/adapter"]}, {"rows": 1.0})
    facts = found("sft_more")
    assert (facts.base, facts.earlier, facts.adapter) == ("tiny", ("sft",), False)
    assert [one.model for one in facts.asked] == ["big"]
    assert list(facts.weights) == ["model/model-1.safetensors"]
    assert ("sft_more: own.jsonl", sha256(own)) in facts.data
    assert facts.learned.rows == 1
    assert (facts.validation, facts.name) == (None, "")


def test_rows_about_held_out_cases_are_found_by_id_and_by_text(run):
    rows = left("curate/rows.jsonl", [row("1"), row("3", "another text"), row("x", " COUGH  4."), row("y", "Cough 44")])
    section("sft", {"student": "tiny"}, {"rows.jsonl": [rows]}, {"rows": 4.0})
    learned = found().learned
    assert (learned.rows, learned.held_out, learned.about_held_out) == (4, 3, 2)
    assert learned.sources == {"": 3, "a.jsonl": 1}


def test_rows_beyond_a_limit_were_not_learned(run):
    section("sft", {"student": "tiny", "limit": 1}, {"rows.jsonl": [RUN / "curate/rows.jsonl"]}, {"rows": 1.0})
    assert found().learned.rows == 1


def test_answers_are_counted_as_what_they_are(run):
    answers = [
        '{"diseases": ["流感", "流感"], "reason": []}',
        '{"diseases": [], "reason": []}',
        "<think>a</think>",
        "流感；肺炎",
    ]
    rows = left("curate/rows.jsonl", [row(str(n), "男，45岁，咳嗽", said) for n, said in enumerate(answers)])
    section("sft", {"student": "tiny"}, {"rows.jsonl": [rows]}, {"rows": 4.0})
    learned = found().learned
    assert (learned.diseases, learned.abstained, learned.unread) == ({"流感": 2, "肺炎": 1}, 1, 1)
    assert (learned.sexes, learned.ages) == ({"male": 4}, {"40–64": 3, "65+": 1})


def test_labels_in_place_of_gold_are_told(run):
    apart = left("curate/validation_rows.jsonl", [row("5"), row("1")])
    section(
        "sft",
        {"student": "tiny"},
        {"rows.jsonl": [RUN / "curate/rows.jsonl"], "validation_rows.jsonl": [apart]},
        {"rows": 2.0},
    )
    assert found().validation == (2, "labels")


@pytest.mark.parametrize(
    ("endpoints", "services", "allowed"),
    [
        ([("deepseek", True), ("", True)], ("deepseek",), True),
        ([("deepseek", True), ("openai", False)], ("deepseek", "openai"), False),
        ([("", None), ("openai", False)], ("openai",), False),
        ([("vllm", None), ("vllm", True)], ("vllm",), None),
    ],
)
def test_the_terms_are_those_of_all_endpoints(run, endpoints, services, allowed):
    file = RUN / "label/config.json"
    config = json.loads(file.read_text())
    config["config"]["teacher"]["endpoint"] = [{"preset": p, "distillation": d} for p, d in endpoints]
    file.write_text(json.dumps(config))
    (one,) = found().asked
    assert (one.services, one.distillation) == (services, allowed)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\nA model"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: gemma\n---\n"}, "gemma"),
        (
            {
                "README.md": "---\nlicense: [a, b]\n---\n",
                "LICENSE": "\n  Apache License\n  Version 2.0, January 2004\n x",
            },
            "Apache License Version 2.0, January 2004",
        ),
        ({"README.md": "---\n: [\n---\n"}, ""),
        ({"README.md": "# no header"}, ""),
        ({}, ""),
    ],
)
def test_the_bases_licence_is_what_it_says_itself(run, files, licence):
    base = Path("models/tiny")
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    for name, text in files.items():
        (base / name).write_text(text)
    rows = [RUN / "curate/rows.jsonl"]
    section("sft", {"student": str(base)}, {"rows.jsonl": rows, "student": [base]}, {"rows": 2.0})
    assert found().license == licence


def test_the_licence_of_the_embedded_base(run):
    section("sft", {"student": "mini"}, {"rows.jsonl": [RUN / "curate/rows.jsonl"]}, {"rows": 2.0})
    assert found().license == "mit"


def test_folders_of_this_machine_are_not_told(run):
    base = Path("secret-ward/tiny").resolve()
    base.mkdir(parents=True)
    rows = [RUN / "curate/rows.jsonl"]
    section(
        "sft",
        {"student": str(base), "method": "lora", "rank": 1, "alpha": 1},
        {"rows.jsonl": rows, "student": [base]},
        {"rows": 2.0, "steps": 1.0, "loss": 1.0},
    )
    facts = found()
    for told in (card(facts), datasheet(facts)):
        assert "secret-ward" not in told
        assert "ward/" not in told


RECIPE = """
name: flu
student: mini
teacher: {model: textbook, endpoint: textbook}
prepare: {source: textbook, style: short, train: 12, validation: 3, test: 6}
label: {}
curate: {}
sft: {method: full, lr: 1e-3, epochs: 1, batch_size: 8}
predict: {models: [student, teacher], max_tokens: 48}
evaluate: {}
"""


@pytest.mark.slow
def test_what_the_stages_write_is_what_is_read(command):
    Path("r.yaml").write_text(RECIPE)
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    facts = found()
    own = json.loads((RUN / "evaluate/metrics.json").read_text())["student"]
    assert {name: figure.model_dump() for name, figure in facts.figures.items()} == own
    assert (facts.base, facts.license, facts.textbook, facts.learned.synthetic) == (
        "mini",
        "mit",
        True,
        facts.learned.rows,
    )
    assert facts.prepared is not None
    assert facts.prepared.splits == {"train": 12, "validation": 3, "test": 6}
    assert (facts.learned.held_out, facts.learned.about_held_out) == (9, 0)
    assert sum(facts.learned.ages.values()) == facts.learned.rows == facts.trained["rows"]
    assert facts.answers["cases"] == 6
    assert facts.validation == (3, "gold")
    assert facts.asked == (Asked("label", "label", "textbook", ("textbook",), distillation=True, served=("textbook",)),)
    told, sheet = card(facts), datasheet(facts)
    assert "| weights as trained: model/model.safetensors | `" in told
    assert "| Teacher | " in told
    assert "12 of 12 rows are about cases drawn from Preceptor's textbook" in sheet
    assert "| test | 6 | 6 |" in sheet
