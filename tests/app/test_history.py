"""The table of versions: runs of ours, scores from elsewhere, and whether the two agree."""

import json
from pathlib import Path

from preceptor.core.records import Diagnosis, Prediction
from preceptor.stages.base import write_records


def evaluated(name: str, top1: float, reason: tuple[str, ...] = ("cough",), **sft: object) -> None:
    run = Path("runs", name)
    for section, stage, metrics in (
        ("sft", "sft", {"rows": 1200.0, **sft}),
        ("evaluate", "evaluate", {"student": {"top1": {"value": top1}}, "exact": {"top1": {"value": 1.0}}}),
    ):
        (run / section).mkdir(parents=True)
        inputs = {"predictions": [{"path": str(run / "p.jsonl")}]} if stage == "evaluate" else {}
        config = {"student": "mini", "method": "lora"}
        started = {"stage": stage, "started": f"2026-01-0{len(name)}T00:00:00", "inputs": inputs, "config": config}
        (run / section / "config.json").write_text(json.dumps(started))
        (run / section / "metrics.json").write_text(json.dumps(metrics))
        (run / section / "done.json").write_text("{}")
    (run / "evaluate" / "scores.jsonl").write_text("")
    output = Diagnosis(diseases=("asthma", "cold"), reason=reason)
    answers = [Prediction(case_id="1", model=m, prompt_sha="", output=output) for m in ("student", "base")]
    write_records(run / "p.jsonl", answers)


def lines(out: str) -> dict[str, list[str]]:
    rows = [row.split() for row in out.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("a", "bb", "ccc", "v9")}


def test_a_version_has_its_scheme_its_figures_and_its_lengths(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    evaluated("a", 0.5, ("cough", "fever"))
    evaluated("bb", 0.75, transductive_rows=4)
    code, out, _ = command("history")
    assert code == 0
    found = lines(out)
    assert list(found) == ["a", "bb"]
    assert out.index("2026-01-01") < out.index("2026-01-02")
    assert found["a"] == ["mini,", "lora,", "1,200", "rows", "50%", "—", "2.0", "10", "2.0"]
    assert "transductive" in " ".join(found["bb"])


def test_a_terminal_of_eighty_columns_shows_all_of_them(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    evaluated("quickstart-zh", 0.5)
    figures = {name: {"value": 0.5} for name in ("top1", "disease_f1", "evidence_grounded")}
    Path("runs/quickstart-zh/evaluate/metrics.json").write_text(json.dumps({"student": figures}))
    command("history", "add", "quickstart-zh", "--score", "2810.25")
    out = command("history")[1]
    named = "version scheme top-1 F1 grounded score reasons chars diseases".split()  # noqa: SIM905  a line of the table
    assert out.splitlines()[1].split() == named
    assert max(map(len, out.splitlines())) <= 80


def test_scores_from_elsewhere_stand_beside_ours_and_rank_them(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for number, name in enumerate(("a", "bb", "ccc")):
        evaluated(name, 0.5 + number / 10)
        code, out, _ = command("history", "add", name, "--score", str(2700 + 50 * number))
        assert (code, out) == (0, "")
    Path("submitted.jsonl").write_text(
        json.dumps({"id": 1, "feature_content": "主诉: 咳", "diseases": "肺炎", "reason": "1. 咳嗽；2. 发热"})
    )
    assert (
        command("history", "add", "v9", "--score", "2810", "--scheme", "few-shot", "--answers", "submitted.jsonl")[0]
        == 0
    )
    code, out, _ = command("history")
    found = lines(out)
    assert found["ccc"][-4:] == ["2800", "1.0", "5", "2.0"]
    assert found["v9"] == ["few-shot", "—", "2810", "2.0", "4", "1.0"]
    assert "top-1 and the score from elsewhere rank 3 versions alike: Spearman +1.00" in out
    command("history", "add", "ccc", "--score", "2600")
    assert "Spearman -0.50" in command("history")[1], "the last score given counts"


def test_what_is_missing_is_told(command):
    for words, told in (
        ((), "runs: no version here"),
        (("add", "x"), "give --score, --scheme or --answers"),
        (("add", "x", "--answers", "none.jsonl"), "none.jsonl: no such file"),
    ):
        code, _, err = command("history", *words)
        assert (code, told in err) == (2, True), err
