"""Labels in, rows, pairs, dropped labels and a review file out; and what a spreadsheet makes of that file."""

import csv
import io
import json
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Case, Consultation, Diagnosis, Failure, FailureKind, Pair, Prediction, Row
from preceptor.stages.base import read_records
from preceptor.stages.portions import kept_apart
from preceptor.stages.review_file import guarded, plain
from preceptor.tasks import prompts

TEXT = "Cough for three days.\nNo fever. Green sputum; since Monday"
ZH = "患者咳嗽、咳黄痰3天；体温38.6℃，\n无胸痛。"
COUGH, LIE = "Cough for three days", "blood in the urine"
OUT = Path("runs/r/curate")


def case(number, text=TEXT, **fields):
    identity = str(number)
    return Case(id=identity, text=text, language="zh" if text == ZH else "en", source="s", group=identity, **fields)


def label(number, *reasons, diseases=("cold",), sample=0, **fields):
    output = fields.pop("output", None) or Diagnosis(diseases=diseases, reason=reasons or (COUGH,))
    return Prediction(case_id=str(number), sample=sample, model="teacher", prompt_sha="", output=output, **fields)


def put(path, *records):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(record.model_dump_json() + "\n" for record in records), "utf-8")


def lines(name, folder=OUT):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def learned(folder=OUT):
    rows = read_records(folder / "rows.jsonl", Row)
    return {row.id: (row.answer if "<think>" in row.answer else json.loads(row.answer)) for row in rows}


def dropped(folder=OUT):
    return {(row["case_id"], row["sample"]): row["reason"] for row in lines("dropped.jsonl", folder)}


def metrics(folder=OUT):
    return json.loads((folder / "metrics.json").read_text())


def sheet(folder=OUT):
    with (folder / "review.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def curate(command):
    """Runs the section with these fields; returns its exit code and what it said."""

    def run(*overrides, recipe="curate: {from: ./own}\n"):
        Path("r.yaml").write_text(recipe)
        code, out, err = command("run", "r.yaml", "--fresh", *(f"curate.{one}" for one in overrides))
        return code, " ".join(out.split()), err

    return run


def test_every_label_is_counted_once(curate):
    put("own/train.jsonl", *(case(number) for number in range(5)), case("t2", "Rash.\nCough for three days, he says"))
    put("own/test.jsonl", case("t", "Itching"), case("9", "rash: cough for three days, HE says!"))
    put("own/target.jsonl", case("a", "Nausea. Cough for three days."))
    put(
        "own/predictions.jsonl",
        label(0, sample=0, repaired=True),
        label(0, COUGH, LIE, sample=1),
        label(1, COUGH, LIE, revised=True),
        label(2, LIE),
        label(3, agreement=0.4),
        label(4, diseases=(), sample=2),
        *(label(name) for name in ("t", "t2", "a", "nobody")),
    )
    code, out, _ = curate()
    assert code == 0
    assert list(learned()) == ["0#0", "1#0", "3#0", "4#2"]
    assert learned()["1#0"]["reason"] == [COUGH]
    lost = {"2": "ungrounded", "t": "held_out", "t2": "held_out", "a": "held_out", "nobody": "unknown_case"}
    assert dropped() == {("0", 1): "repeated", **{(name, 0): why for name, why in lost.items()}}
    found = metrics()
    assert found["labels"] == 10 == found["rows"] + sum(found["dropped"].values()) + found["review"]
    counted = {name: found[name] for name in ("rows", "named", "abstained", "repaired", "revised", "trimmed", "review")}
    assert list(counted.values()) == [4, 3, 1, 1, 1, 2, 0]
    assert found["pairs"] == {"n": 1, "by_record": 1}
    assert "4 rows kept (2 trimmed, 1 repaired, 1 revised); dropped: held_out 3," in out
    (pair,) = read_records(OUT / "pairs.jsonl", Pair)
    prompt = prompts.load("diagnosis", "zero_shot", "en")
    assert (pair.id, pair.messages) == ("0#0>1", prompt.render(TEXT))
    assert next(read_records(OUT / "rows.jsonl", Row)).messages == pair.messages

    # Target cases are learned where that is asked for, and a limit counts cases.
    assert curate("include_target=true")[0] == 0
    assert list(learned()) == ["0#0", "1#0", "3#0", "4#2", "a#0"]
    assert curate("include_target=true", "limit=2")[0] == 0
    assert list(learned()) == ["0#0", "1#0"]
    assert curate("include_target=true", "agreement=0.5")[0] == 1
    assert {row["case_id"]: row["why"] for row in sheet()} == {
        "3": "agreement 0.40",
        **dict.fromkeys("014a", "agreement unknown"),
    }


HOSTILE = "=1+1\n@home; 'so' -\"he\" said,\ttwice\n+86 次"


def hand_back(rows, path, kind):
    """The table as a spreadsheet saves it."""
    names = list(rows[0])
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for row in (names, *(list(row.values()) for row in rows)):
            book.active.append([int(value) if str(value).isdecimal() else value or None for value in row])
        for cells in book.active.iter_rows():
            for cell in cells:
                cell.data_type = "s" if cell.data_type == "f" else cell.data_type
        book.save(path)
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=";" if kind == "gbk" else ",")
    writer.writerows([names, *(row.values() for row in rows)])
    Path(path).write_bytes(text.getvalue().encode("gb18030" if kind == "gbk" else "utf-8-sig"))


@pytest.mark.parametrize("kind", ["csv", "xlsx", "gbk"])
def test_a_person_decides(curate, kind):
    ids = ["007", "=cmd", "13", "DEC-12", "病例5", "1e5", "9", "8"]
    put("own/train.jsonl", *(case(name, ZH) for name in ids[:-1]), case("8", HOSTILE))
    reason = "咳嗽、咳黄痰3天；体温38.6℃"
    labels = [label(name, reason, "无胸痛", diseases=("肺炎", "糖尿病, 2型"), agreement=0.2) for name in ids[:-2]]
    labels.append(label("9", reason, diseases=("肺炎",), agreement=0.2))
    put("own/predictions.jsonl", *labels, label("8", "=1+1", "@home", agreement=0.2))
    assert curate("agreement=0.5")[0] == 1
    assert (OUT / "review.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    rows = sheet()
    assert [plain(row["case_id"]) for row in rows] == ids
    assert [row["case_id"] for row in rows if row["case_id"] in ids] == ["13", "病例5", "9", "8"]
    assert not [value for row in rows for value in row.values() if value[:1] in "=+-@\t" and value]
    assert plain(rows[-1]["text"]) == HOSTILE
    assert rows[0]["text"] == ZH
    for row, verdict in zip(rows, ("keep", " 删除 ", "修改", "EDIT", "edit", "", "edit", "保留"), strict=True):
        row["verdict"] = verdict
    rows[2]["diseases"] = "1. 支气管炎；2. 高血压"
    rows[2]["reason"] += "\n体温39.9℃"
    rows[3] |= {"diseases": "", "reason": ""}
    rows[4]["reason"] = "1. 咳黄痰3天；2. 无胸痛"
    rows[6]["diseases"] = "肺炎、2型糖尿病"
    hand_back(rows, f"back.{'xlsx' if kind == 'xlsx' else 'csv'}", kind)
    code, out, _ = curate("agreement=0.5", f"review=back.{'xlsx' if kind == 'xlsx' else 'csv'}")
    assert code == 0
    whole = {"diseases": ["肺炎", "糖尿病, 2型"], "reason": [reason, "无胸痛"]}
    assert learned() == {
        "007#0": whole,
        "13#0": {"diseases": ["支气管炎", "高血压"], "reason": [reason, "无胸痛"]},
        "DEC-12#0": {"diseases": [], "reason": []},
        "病例5#0": {"diseases": whole["diseases"], "reason": ["咳黄痰3天", "无胸痛"]},
        "9#0": {"diseases": ["肺炎", "2型糖尿病"], "reason": [reason]},
        "8#0": {"diseases": ["cold"], "reason": ["=1+1", "@home"]},
    }
    assert dropped() == {("=cmd", 0): "reviewer"}
    assert [plain(row["case_id"]) for row in sheet()] == ["1e5"], "without a verdict it waits on"
    (issue,) = lines("issues.jsonl")
    assert (issue["field"], issue["action"]) == ("reason", "changed")
    assert issue["reason"] == "'体温39.9℃' does not stand in the record: taken out"
    assert metrics()["reviewed"] == {"kept": 2, "dropped": 1, "edited": 4, "undecided": 1, "issues": 1}
    assert "does not stand in the record" in out


def test_what_cannot_be_used_of_a_reviewed_file_is_told_by_line(curate):
    put("own/train.jsonl", *(case(number) for number in range(6)))
    put("own/predictions.jsonl", *(label(number, agreement=0.1) for number in range(6)), label(0, sample=1))
    head = "case_id,sample,text,diseases,reason,agreement,why,verdict,note"
    given = [
        "0,0,,cold,Cough for three days,,,keep,",
        "1,0,,cold,Cough for three days,,,maybe,who knows",
        "0,0,,flu,Cough for three days,,,edit,",
        "nobody,0,,cold,Cough for three days,,,keep,",
        "2,one,,cold,Cough for three days,,,keep,",
        "2,7,,cold,Cough for three days,,,keep,",
        "3,0,,,Cough for three days,,,edit,",
        "4,0,,cold,blood in the urine,,,edit,",
        "5,0,,cold,keep",
        "5,0,,flu,Cough for three days,,,,",
    ]
    Path("back.csv").write_text("\n".join([head, *given]) + "\n")
    code, out, _ = curate("agreement=0.5", "review=back.csv")
    assert (code, list(learned())) == (0, ["0#0"])
    told = {(issue["line"], issue["field"]): issue["reason"] for issue in lines("issues.jsonl")}
    assert {key: why.split(";")[0][:44] for key, why in told.items()} == {
        (3, "verdict"): "'maybe' is none of keep, drop, edit, 保留, 删除,",
        (4, "case_id"): "the verdict on this label in line 2 stands",
        (5, "case_id"): "no label 0 of a case 'nobody' can be learned",
        (6, "sample"): "'one' is no sample's number: leave it as it ",
        (7, "case_id"): "no label 7 of a case '2' can be learned",
        (8, "diseases"): "empty, and there are reasons",
        (9, "reason"): "'blood in the urine' does not stand in the r",
        (9, ""): "not learned: ungrounded: 0 of 1 reasons stan",
        (10, ""): "5 fields where the header has 9",
        (11, "verdict"): "empty, though the answer was changed: write ",
    }
    assert "9 reviewed rows need mending" in out
    assert dropped() == {("0", 1): "repeated", ("4", 0): "ungrounded"}
    # What could not be used is there to be mended.
    kept = [[row[name] for name in ("case_id", "diseases", "reason", "verdict", "note")] for row in sheet()]
    assert kept == [
        ["1", "cold", COUGH, "maybe", "who knows"],
        ["2", "cold", COUGH, "", ""],
        ["3", "", COUGH, "edit", ""],
        ["5", "flu", COUGH, "", ""],
    ]

    Path("back.csv").write_text("case_id,sample,diseases,reason,verdct\n0,0,cold,x,keep\n")
    code, _, err = curate("review=back.csv")
    assert code == 2
    told = "back.csv: no column 'verdict' among case_id, sample, diseases, reason, verdct: edit the review.csv"
    assert told in err.splitlines()[-1]
    code, _, err = curate("review=nothing.csv")
    assert (code, err.splitlines()[-1]) == (2, "preceptor: curate.review: no file nothing.csv")


def reviewed(path, *rows, head="case_id,sample,diseases,reason,verdict,note"):
    with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([head.split(","), *rows])


def test_a_second_round_of_review_keeps_the_first(curate):
    put("own/train.jsonl", *(case(number) for number in range(7)))
    put("own/predictions.jsonl", *(label(number, agreement=0.1) for number in range(7)))
    reviewed(
        "1.csv",
        (0, 0, "cold", COUGH, "keep", ""),
        (1, 0, "cold", COUGH, "drop", "no cold"),
        (2, 0, "cold", COUGH, "", "=ask the ward"),
        (3, 0, "", COUGH, "edit", "half done"),
        (4, 0, "cold", COUGH, "保留", ""),
        (5, 0, "cold", COUGH, "perhaps", ""),
        (6, 0, "cold", COUGH, "keep", "sure"),
    )
    assert curate("agreement=0.5", "review=1.csv")[0] == 0
    assert list(learned()) == ["0#0", "4#0", "6#0"]
    waiting = [[row[name] for name in ("case_id", "diseases", "reason", "verdict", "note")] for row in sheet()]
    assert waiting == [
        ["2", "cold", COUGH, "", "'=ask the ward"],
        ["3", "", COUGH, "edit", "half done"],
        ["5", "cold", COUGH, "perhaps", ""],
    ]
    # The sheet as it was left says the same again, and no more.
    Path("as_it_was.csv").write_bytes((OUT / "review.csv").read_bytes())
    assert curate("agreement=0.5", "review=[1.csv, as_it_was.csv]")[0] == 0
    assert [[row[name] for name in ("case_id", "diseases", "reason", "verdict", "note")] for row in sheet()] == waiting
    assert metrics()["reviewed"] == {"undecided": 1, "kept": 3, "dropped": 1, "issues": 2}
    reviewed(
        "2.csv",
        (2, 0, "cold", COUGH, "keep", ""),
        (3, 0, "flu", COUGH, "修改", ""),
        (4, 0, "cold", COUGH, "drop", "on second thoughts"),
        (5, 0, "cold", COUGH, "", "still perhaps"),
        (0, 0, "cold", COUGH, "", ""),
        (6, 0, "flu", COUGH, "", ""),
    )
    code, out, _ = curate("agreement=0.5", "review=[1.csv, 2.csv]")
    assert code == 0
    assert {name: answer["diseases"] for name, answer in learned().items()} == {
        **{name: ["cold"] for name in ("0#0", "2#0", "6#0")},
        "3#0": ["flu"],
    }
    assert dropped() == {("1", 0): "reviewer", ("4", 0): "reviewer"}
    assert [(row["case_id"], row["verdict"], row["note"]) for row in sheet()] == [("5", "perhaps", "still perhaps")]
    assert [(issue["file"], issue["line"]) for issue in lines("issues.jsonl")] == [("1.csv", 7), ("2.csv", 7)]
    assert "curate: 1.csv, 2.csv: " in out
    assert "curate: 2 reviewed rows need mending" in out
    # The order says which is later.
    assert curate("agreement=0.5", "review=[2.csv, 1.csv]")[0] == 0
    assert (list(learned()), [row["case_id"] for row in sheet()]) == (["0#0", "2#0", "4#0", "6#0"], ["3", "5"])
    # A recipe's file can be left out again.
    recipe = "curate: {from: ./own, agreement: 0.5, review: 1.csv}\n"
    assert curate("review=null", recipe=recipe)[0] == 1
    code, _, err = curate("review=[1.csv, nothing.csv]")
    assert (code, err.splitlines()[-1]) == (2, "preceptor: curate.review: no file nothing.csv")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("1", "9" * 5000, "cold", COUGH, "keep"), f"sample: '{'9' * 40}' is no sample's number: leave it as it was"),
        (("1", "９" * 19, "cold", COUGH, "keep"), f"sample: '{'９' * 19}' is no sample's number: leave it as it was"),
        (("1", "-0", "cold", COUGH, "keep"), "sample: '-0' is no sample's number: leave it as it was"),
        (("1", "0", "cold", "咳嗽，\n" * 60_000, "edit"), "reason: 240000 characters, where a cell holds 32767"),
        (("1", "0", "cold", COUGH, "k" * 140_000), "verdict: 140000 characters, where a cell holds 32767"),
        (("1" * 200_000, "0", "cold", COUGH, "keep"), "case_id: 200000 characters, where a cell holds 32767"),
        (("1" * 5000, "0", "cold", COUGH, "keep"), f"case_id: no label 0 of a case '{'1' * 100}' can be learned"),
        (("1", "0", "cold", COUGH, "k" * 5000), f"verdict: '{'k' * 40}' is none of keep, drop, edit"),
    ],
)
def test_one_huge_cell_is_one_issue(curate, row, problem):
    put("own/train.jsonl", case(0), case(1), case(2))
    put("own/predictions.jsonl", *(label(number, agreement=0.1) for number in range(3)))
    limit = csv.field_size_limit()
    reviewed("back.csv", row, (0, 0, "cold", COUGH, "keep"), (2, 0, "cold", COUGH, "keep"), head=HEAD)
    code, out, _ = curate("agreement=0.5", "review=back.csv")
    assert (code, list(learned()), [line["case_id"] for line in sheet()]) == (0, ["0#0", "2#0"], ["1"])
    (issue,) = lines("issues.jsonl")
    assert (issue["line"], f"{issue['field']}: {issue['reason']}"[: len(problem)]) == (2, problem)
    assert "1 reviewed rows need mending" in out
    assert csv.field_size_limit() == limit


HEAD = "case_id,sample,diseases,reason,verdict"


def test_a_huge_cell_that_nobody_reads_harms_nothing(curate):
    put("own/train.jsonl", case(0))
    put("own/predictions.jsonl", label(0, agreement=0.1))
    text = "No fever, he says.\n" * 50_000
    reviewed("back.csv", (text, "0", "0", "cold", COUGH, "keep"), head=f"text,{HEAD}")
    assert curate("agreement=0.5", "review=back.csv")[0] == 0
    assert (list(learned()), lines("issues.jsonl")) == (["0#0"], [])


FAILED = Failure(kind=FailureKind.TRUNCATED, detail="cut")


def test_a_threshold_that_no_label_can_meet_is_refused(curate):
    put("own/train.jsonl", case(0), case(1))
    put("own/predictions.jsonl", label(0), label(1))
    code, _, err = curate("agreement=0.6")
    told = (
        "preceptor: curate.agreement: 0.6 can be held against no label, as none in own/predictions.jsonl says how far "
        "samples agree: leave it out, or label with a strategy that draws several samples, strategy: self_consistency"
    )
    assert (code, err.splitlines()[-1]) == (2, told)
    assert not (OUT / "rows.jsonl").exists()
    assert not (OUT / "review.csv").exists()
    put("own/predictions.jsonl", label(0), label(1, agreement=0.9))
    assert curate("agreement=0.6")[0] == 0
    assert (list(learned()), [row["why"] for row in sheet()]) == (["1#0"], ["agreement unknown"])
    failed = Prediction(case_id="0", model="teacher", prompt_sha="", failure=FAILED)
    put("own/predictions.jsonl", failed)
    assert curate("agreement=0.6")[0] == 1, "where nothing was answered, nothing could agree"


WAIT = "; {n} wait for a person: write the verdicts into a copy of runs/r/curate/review.csv and name it: curate.review="


@pytest.mark.parametrize(
    ("labels", "overrides", "told"),
    [
        ((label(0, agreement=0.4), label(1, agreement=0.4)), ["agreement=0.5"], "agreement (2 of 2 labels, by "
         "curate.agreement)" + WAIT.format(n=2)),
        ((label(0), label(0, "No fever", sample=1), label(0, "Green sputum", sample=2)), ["review_score=1", "score=0.1",
         "grounded=1", "hallucinated=0", "known=true"], "unmapped (3 of 3 labels, by curate.known); see "),
        ((label(0, COUGH, LIE), label(0, "No fever", LIE, sample=1), label(0, COUGH, LIE, sample=2)),
         ["review_score=0.9"], "score (1 of 3 labels, by curate.review_score); see runs/r/curate/dropped.jsonl" +
         WAIT.format(n=1)),
        ((label(0, LIE), label(1, LIE), label(2, agreement=0.1)), ["agreement=0.5"], "ungrounded (2 of 3 labels, by "
         "curate.grounded); see runs/r/curate/dropped.jsonl" + WAIT.format(n=1)),
        ((label(0, COUGH, LIE),), ["score=0.9"], "low_score (1 of 1 labels, by curate.score); see "),
        ((label(0, COUGH, LIE),), ["hallucinated=0.1"], "hallucinated (1 of 1 labels, by curate.hallucinated); see "),
        ((label(0, repaired=True),), ["repaired=drop"], "repaired (1 of 1 labels, by curate.repaired); see "),
        ((label(0),), ["think=true"], "unthought (1 of 1 labels, by curate.think); see "),
        ((label(0),), ["task=consult"], "other_task (1 of 1 labels, by curate.task); see "),
        ((label("nobody"),), [], "unknown_case (1 of 1 labels); see runs/r/curate/dropped.jsonl"),
    ],
)  # fmt: skip
def test_a_run_without_rows_says_why(curate, labels, overrides, told):
    put("own/train.jsonl", *(case(number) for number in range(3)))
    put("own/predictions.jsonl", *labels)
    code, _, err = curate(*overrides)
    line = f"preceptor: curate: no label is left to learn; the commonest reason is {told}"
    assert (code, err.splitlines()[-1][: len(line)]) == (1, line)


def test_a_further_round_of_review_is_named_beside_the_first(curate):
    put("own/train.jsonl", case(0))
    put("own/predictions.jsonl", label(0, agreement=0.1))
    for before, named in (((), "curate.review=COPY.csv"), (("1.csv",), "'curate.review=[1.csv,COPY.csv]'")):
        reviewed("1.csv", (0, 0, "cold", COUGH, "", "later"))
        code, _, err = curate("agreement=0.5", *(f"review={name}" for name in before))
        copy = f"write the verdicts into a copy of {OUT / 'review.csv'} and name it: {named}"
        assert (code, err.splitlines()[-1].partition("1 wait for a person: ")[2]) == (1, copy)


def test_the_reviewed_file_belongs_to_the_request_and_is_not_overwritten(command, curate):
    put("own/train.jsonl", case(0), case(1))
    put("own/predictions.jsonl", label(0, agreement=0.1), label(1, agreement=0.9))
    assert curate("agreement=0.5")[0] == 0
    recipe = "curate: {from: ./own, agreement: 0.5}\ncurate_reviewed: {from: ./own, review: runs/r/curate/review.csv}\n"
    Path("r.yaml").write_text(recipe)
    written = (OUT / "review.csv").read_text("utf-8-sig")
    (OUT / "review.csv").write_text(written.replace(",,\n", ",keep,\n"), "utf-8-sig")
    assert command("run", "r.yaml", "curate_reviewed")[0] == 0
    assert list(learned(Path("runs/r/curate_reviewed"))) == ["0#0", "1#0"]
    (OUT / "review.csv").write_text(written.replace(",,\n", ",drop,\n"), "utf-8-sig")
    code, _, err = command("run", "r.yaml", "curate_reviewed")
    assert (code, "inputs.review changed" in err) == (2, True)
    Path("kept.csv").write_bytes((OUT / "review.csv").read_bytes())
    code, _, err = command("curate", "r.yaml", "--fresh", "curate.review=kept.csv")
    assert (code, dropped()) == (0, {("0", 0): "reviewer"})
    code, _, err = command("curate", "r.yaml", "--fresh", "curate.review=runs/r/curate/review.csv")
    assert (code, "this section writes runs/r/curate/review.csv anew: copy it" in err.splitlines()[-1]) == (2, True)
    assert Path("runs/r/curate.2/review.csv").exists(), "nothing that a person wrote is lost"


def test_rounds_mix(curate):
    put("own/train.jsonl", *(case(number) for number in range(6)))
    put("own/test.jsonl", case("held", "Itching at night"))
    put("one/predictions.jsonl", label(0), label(1, COUGH, LIE), label(2, diseases=("flu",)), label(3, LIE))
    put("two/predictions.jsonl", label(0, COUGH, LIE), label(1, "No fever"), label(2, diseases=("croup",)))
    prompt = prompts.load("diagnosis", "zero_shot", "en")

    def row(name, answer, text=TEXT, **fields):
        messages = fields.get("messages", prompt.render(text))
        return Row(id=f"{name}#0", messages=messages, answer=json.dumps(answer), case_id=str(name))

    other = prompts.load("diagnosis", "brief", "en").render(TEXT)
    put("old/1.jsonl", row(0, "old"), row(3, "first"), row(4, "first", messages=other), row("held", "x"))
    put("old/2.jsonl", row(3, "second"), row("elsewhere", "x", "itching, at NIGHT"))
    recipe = (
        "curate: {from: [one/predictions.jsonl, two/predictions.jsonl, own/train.jsonl, own/test.jsonl], "
        "mix: [old/1.jsonl, old/2.jsonl]}\n"
    )
    code, out, _ = curate(recipe=recipe)
    assert code == 0
    answers = learned()
    assert list(answers) == ["0#0", "1#1", "2#1", "3#0", "4#0"], "of equals the later file's"
    assert (answers["3#0"], answers["4#0"]) == ("second", "first")
    assert answers["1#1"]["reason"] == ["No fever"]
    found = metrics()
    assert found["labelled_again"] == 3
    assert found["mixed"] == {"rows": 2, "held_out": 2, "superseded": 2, "with another prompt": 1}
    assert found["dropped"] == {"repeated": 1, "outdone": 2, "ungrounded": 1}
    assert found["labels"] == 7
    assert "3 cases are labelled in several files" in out
    assert "of earlier rounds: 2 rows, 2 held_out, 2 superseded, 1 with another prompt" in out
    assert [line["detail"] for line in lines("dropped.jsonl") if line["reason"] == "superseded"] == [
        "old/1.jsonl: a later round decides",
        "old/1.jsonl: a later round decides",
    ]

    # What a person would not have comes back from no earlier round.
    Path("back.csv").write_text("case_id,sample,diseases,reason,verdict\n0,0,,,drop\n0,1,,,drop\n")
    assert curate("review=back.csv", recipe=recipe)[0] == 0
    assert "0#0" not in learned()
    assert curate("mix=old/1.jsonl", recipe=recipe)[0] == 0, "one needs no list"
    assert json.loads(next(read_records(OUT / "rows.jsonl", Row)).answer)["diseases"] == ["cold"]
    assert learned()["4#0"] == "first"
    assert metrics()["mixed"] == {"superseded": 1, "rows": 2, "with another prompt": 1, "held_out": 1}
    Path("old/2.jsonl").write_text('{"id": "x"}\n')
    code, _, err = curate(recipe=recipe)
    assert (code, "old/2.jsonl:1: messages: Field required" in err.splitlines()[-1]) == (2, True)


def test_advice_is_curated_and_reviewed(curate):
    text = "我胸痛半小时，出冷汗，左臂发麻，怎么办？"
    think = "患者胸痛半小时，出冷汗，左臂发麻，需要先排除急性心肌梗死，属于急症。"
    advice = "这些表现要警惕心梗，请立即拨打120去急诊，途中不要走动。"
    answers = [
        Consultation(think=think, answer=advice),
        Consultation(think=think, answer="不用打120，在家休息。"),
        Consultation(answer=advice),
        Consultation(think="嗯，胸痛。", answer=advice),
    ]
    put("own/train.jsonl", *(case(n, text + "。" * n, meta={"risk_level": "critical"}) for n in range(4)))
    put(
        "own/predictions.jsonl",
        *(label(n, output=answer) for n, answer in enumerate(answers)),
        label(0, output=answers[1], sample=1),
    )
    recipe = "curate: {from: ./own, task: consult, language: zh, review_score: 0.8}\n"
    assert curate(recipe=recipe)[0] == 0
    assert learned() == {"0#0": f"<think>{think}</think>\n{advice}"}
    assert dropped() == {("0", 1): "severe_miss", ("1", 0): "severe_miss", ("2", 0): "unthought"}
    (pair,) = read_records(OUT / "pairs.jsonl", Pair)
    assert (pair.chosen_score, pair.rejected_score) == (1.0, 0.0)
    (row,) = sheet()
    assert (row["case_id"], row["think"], row["why"]) == ("3", "嗯，胸痛。", "score 0.50")
    row |= {"verdict": "修改", "answer": advice + "\n请家人陪同。"}
    unsafe = {**row, "case_id": "1", "answer": "不用打120。"}
    hand_back([row, unsafe], "back.csv", "csv")
    assert curate("review=back.csv", recipe=recipe)[0] == 0
    assert learned()["3#0"] == f"<think>嗯，胸痛。</think>\n{advice}\n请家人陪同。"
    assert dropped()["1", 0] == "severe_miss"
    assert metrics()["reviewed"] == {"refused": 1, "edited": 1, "issues": 1}


@given(st.text(st.sampled_from("'=+-@\t ＝1.2e/:ab肺JAN")) | st.text())
def test_a_cell_is_read_back_as_it_was(text):
    cell = guarded(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t") or not cell
    file = io.StringIO(newline="")
    csv.writer(file).writerow([cell])
    file.seek(0)
    assert plain(next(csv.reader(file))[0]) == text.replace("_x000D_", "").replace("\r\n", "\n").replace("\r", "\n")


def test_a_bad_label_file_is_refused_by_its_line(curate):
    put("own/train.jsonl", case(0))
    put("own/predictions.jsonl", label(0))
    with Path("own/predictions.jsonl").open("a") as file:
        file.write('{"case_id": 1}\n')
    code, _, err = curate()
    assert code == 2
    assert "own/predictions.jsonl:2: case_id: " in err.splitlines()[-1]


def validated(folder=OUT):
    return list(read_records(folder / "validation_rows.jsonl", Row))


def gold(number, text, answer, **fields):
    return case(number, text, gold=answer, gold_source="human", **fields)


def test_validation_cases_with_gold_are_rows_to_validate_on(curate):
    known = Diagnosis(diseases=("肺炎", "2型糖尿病"), reason=("咳黄痰3天",))
    put("own/train.jsonl", *(case(number, f"{number} days.\n{TEXT}") for number in range(20)))
    put("own/predictions.jsonl", *(label(number) for number in range(20)))
    put(
        "own/validation.jsonl",
        case("bare", "No gold here."),
        gold("advice", "Advice?", Consultation(answer="Go.")),
        gold("tested", "Itching at night", known),
        gold("red", "A planted item.", known),
        gold("known", ZH, known),
        gold("none", "Says nothing.", Diagnosis()),
        gold("third", "One more.", known),
    )
    put("own/test.jsonl", case("elsewhere", "itching, at NIGHT!"))
    put("own/redteam.jsonl", case("red", "something else"))
    code, out, _ = curate("validation=2")
    assert (code, "curate: to validate on: 2 cases with gold" in out) == (0, True)
    prompt = prompts.load("diagnosis", "zero_shot", "en")
    assert validated() == [
        Row(
            id="known#0",
            messages=prompt.render(ZH),
            answer='{"diseases": ["肺炎", "2型糖尿病"], "reason": ["咳黄痰3天"]}',
            case_id="known",
        ),
        Row(
            id="none#0",
            messages=prompt.render("Says nothing."),
            answer='{"diseases": [], "reason": []}',
            case_id="none",
        ),
    ]
    assert (len(learned()), metrics()["validation"]) == (20, {"gold": 2, "labels": 0})
    assert curate("limit=1")[0] == 0, "a try of one case is validated on one"
    assert [row.case_id for row in validated()] == ["known"]
    assert curate("validation=0")[0] == 0
    assert (validated(), len(learned()), metrics()["validation"]) == ([], 20, {"gold": 0, "labels": 0})
    assert curate()[0] == 0
    assert [row.case_id for row in validated()] == ["known", "none", "third"]
    code, _, err = curate("validation=-1")
    assert (code, "curate.validation: Input should be greater than or equal to 0" in err) == (2, True)


def test_without_gold_labels_of_whole_families_are_kept_apart(curate):
    texts = [f"{number} days.\n{TEXT}" for number in range(40)]
    cases = [case(number, text) for number, text in enumerate(texts)]
    cases[:20] = [one.model_copy(update={"group": f"patient {number // 2}"}) for number, one in enumerate(cases[:20])]
    cases[30] = cases[30].model_copy(update={"text": f"29 DAYS. {TEXT}"})  # a copy that goes by another group
    labels = [label(number, COUGH) for number in range(40)]
    labels += [label(number, "No fever", LIE, sample=1) for number in range(40)]
    put("own/train.jsonl", *cases)
    put("own/validation.jsonl", case("v", "Without gold."))
    put("own/predictions.jsonl", *labels)
    code, out, _ = curate("samples=all")
    assert code == 0
    ids = [row.case_id for row in validated()]
    assert len(ids) == 4 == len(set(ids)), "a tenth"
    assert f"{len(ids)} training cases (no validation case has gold that is not tested on too" in out
    rows, pairs = list(read_records(OUT / "rows.jsonl", Row)), list(read_records(OUT / "pairs.jsonl", Pair))
    assert {row.case_id for row in rows}.isdisjoint(ids)
    assert {pair.case_id for pair in pairs}.isdisjoint(ids)
    assert (len(rows), len({row.case_id for row in rows}), len(pairs)) == (72, 36, 36)
    apart = {cases[int(name)].group for name in ids}
    assert apart.isdisjoint(cases[int(row.case_id)].group for row in rows)
    assert ("29" in ids) == ("30" in ids)
    found = metrics()
    assert found["validation"] == {"gold": 0, "labels": 4}
    assert found["labels"] == 80 == found["rows"] + found["validation"]["labels"] + sum(found["dropped"].values())
    first = validated()[0]
    assert (first.messages, json.loads(first.answer)["reason"]) == (
        prompts.load("diagnosis", "zero_shot", "en").render(cases[int(ids[0])].text),
        [COUGH],
    )

    # The same ones whatever the order, and no earlier round brings them back, under whatever id.
    put("own/train.jsonl", *reversed(cases))
    copy = first.model_copy(update={"case_id": "x", "id": "x#0"})
    put("old.jsonl", first, copy, rows[0])
    assert curate("samples=all", "mix=old.jsonl")[0] == 0
    assert {row.case_id for row in validated()} == set(ids)
    assert metrics()["mixed"] == {"held_out": 2, "superseded": 1}
    put("own/train.jsonl", *cases)
    assert curate("validation=2")[0] == 0
    assert len(validated()) == 2
    assert curate("limit=9")[0] == 0, "of fewer than ten cases none is spared"
    assert (validated(), metrics()["validation"]) == ([], {"gold": 0, "labels": 0})


@given(
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from(["cough", "rash", "fever", "无胸痛", "咳嗽"])), max_size=60),
    st.integers(0, 12),
)
def test_what_is_kept_apart_shares_nothing_with_the_rest(made, most):
    cases = [
        case(number, f"{text} {number // 3}").model_copy(update={"group": str(group)})
        for number, (group, text) in enumerate(made)
    ]
    apart = kept_apart(cases, most)
    assert len(apart) <= min(most, len(cases) // 10)
    inside, outside = ([one for one in cases if (one.id in apart) is kept] for kept in (True, False))
    assert len(inside) == len(apart)
    assert {one.group for one in inside}.isdisjoint(one.group for one in outside)
    assert {one.text for one in inside}.isdisjoint(one.text for one in outside)
    assert kept_apart(cases[::-1], most) == apart


def test_advice_with_gold_is_validated_on(curate):
    text = "我胸痛半小时，出冷汗，左臂发麻，怎么办？"
    think, advice = "患者胸痛半小时，出冷汗，需要先排除急性心肌梗死。", "请立即拨打120去急诊。"
    put("own/train.jsonl", case(0, text))
    put("own/predictions.jsonl", label(0, output=Consultation(think=think, answer=advice)))
    put(
        "own/validation.jsonl",
        gold("a", "胸闷一天。", Consultation(think=think, answer=advice)),
        gold("b", "头晕一天。", Consultation(answer=advice)),
        gold("c", "咳嗽一天。", Diagnosis(diseases=("感冒",))),
    )
    recipe = "curate: {from: ./own, task: consult, language: zh}\n"
    assert curate(recipe=recipe)[0] == 0
    thought = f"<think>{think}</think>\n{advice}"
    assert [(row.case_id, row.answer) for row in validated()] == [("a", thought), ("b", advice)]
    assert curate("think=false", recipe=recipe)[0] == 0
    assert [row.answer for row in validated()] == [advice, advice]


def test_the_answers_that_came_with_the_cases_are_learned(curate):
    """By the same rules as labels; a case without one is no label, and nobody was asked."""
    known = Diagnosis(diseases=("cold",), reason=(COUGH, LIE))
    put("own/train.jsonl", gold(0, TEXT, known), case(1, "No answer came."), gold(2, "Two.", Diagnosis()))
    assert curate("gold=true")[0] == 0
    assert learned() == {
        "0#0": {"diseases": ["cold"], "reason": [COUGH]},
        "2#0": {"diseases": [], "reason": []},
    }
    assert metrics()["labels"] == 2
    assert metrics()["trimmed"] == 1, "a reason that the record does not hold is taken out"
    put("own/train.jsonl", case(1, "No answer came."))
    code, _, err = curate("gold=true")
    told = "curate: no label is left to learn; no training case came with an answer: leave gold out, and label them"
    assert (code, told in err) == (1, True)


def test_a_prompt_that_asks_for_numbers_makes_rows_that_state_them(curate):
    put("own/train.jsonl", *(case(number) for number in range(4)))
    put("own/validation.jsonl", case("v", "Rash since Monday.", gold=Diagnosis(diseases=("measles",))))
    sure = {"confidence": {"cold": 0.678}}
    put("own/predictions.jsonl", label(0, **sure), label(1), label(2, diseases=()), label(3, diseases=("flu",), **sure))
    code, out, _ = curate("prompt=stated")
    assert code == 0
    assert learned() == {
        "0#0": {"diseases": ["cold"], "confidence": [0.68], "reason": [COUGH]},
        "2#0": {"diseases": [], "confidence": [], "reason": []},
    }
    assert dropped() == {("1", 0): "unstated", ("3", 0): "unstated"}
    assert "dropped: unstated 2" in out
    prompt = prompts.load("diagnosis", "stated", "en")
    assert next(read_records(OUT / "rows.jsonl", Row)).messages == prompt.render(TEXT)
    (golden,) = read_records(OUT / "validation_rows.jsonl", Row)
    assert golden.answer == '{"diseases": ["measles"], "confidence": [1.00], "reason": []}'

    # A recipe may say otherwise, for any prompt.
    assert curate("prompt=stated", "states=false")[0] == 0
    assert list(learned()["0#0"]) == ["diseases", "reason"]
    assert curate("states=true")[0] == 0
    assert list(learned()) == ["0#0", "2#0"]


def test_labels_without_numbers_are_told(curate):
    put("own/train.jsonl", case(0), case(1))
    put("own/predictions.jsonl", label(0), label(1))
    code, _, err = curate("prompt=stated")
    assert code == 1
    assert "no label is left to learn; the commonest reason is unstated (2 of 2 labels, by curate.states)" in err
    assert {row["detail"] for row in lines("dropped.jsonl")} == {
        "how sure the teacher is of cold is not known; label with logprobs: 5, or with confidence: stated"
    }
