"""Stage distill over the real textbook teacher and a real small student."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from preceptor.core.errors import UserError
from preceptor.core.recalibration import Figures, Recalibrated, Recalibration
from preceptor.core.records import Diagnosis, Message, Prediction, Reply, Row
from preceptor.llm.ledger import Ledger
from preceptor.model import pieces
from preceptor.model.load import load_tokenizer
from preceptor.model.resolve import resolve
from preceptor.stages import beliefs
from preceptor.stages.base import read_records, write_records
from preceptor.stages.beliefs import check_keys
from preceptor.train.store import TOKENS, Store
from tests.model import tiny

RECIPE = """
language: {language}
seed: 1
student: mini
teacher: {teacher}
prepare: {{source: textbook, style: short, train: 10, validation: 0, test: 1}}
label: {label}
curate: {{}}
distill: {distill}
"""
HONEST = "{model: textbook, endpoint: textbook}"
TRAIN = "method: full, batch_size: 5, epochs: 1, accumulation: 1"


def write(label="{logprobs: 5}", distill="", language="en", teacher=HONEST):
    Path("r.yaml").write_text(
        RECIPE.format(label=label, distill=f"{{{TRAIN}{distill}}}", language=language, teacher=teacher)
    )


def only(err):
    """The one line that is told of a failure."""
    (line,) = [line for line in err.splitlines() if line.startswith("preceptor: ")]
    return line


@pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=pytest.mark.slow)])
def test_what_is_learned_is_what_the_teacher_said_of_each_token(command, language):
    write(language=language)
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    rows = list(read_records(Path("runs/r/curate/rows.jsonl"), Row))
    said = {p.case_id: p for p in read_records(Path("runs/r/label/predictions.jsonl"), Prediction)}
    known = Store(Path("runs/r/distill/beliefs"))
    assert len(known) == len(rows) > 5
    piece = pieces.reader(load_tokenizer(resolve("mini")))
    choices = 0
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        for row in reversed(rows):
            reply = ledger.find(said[row.case_id].reply)
            assert isinstance(reply, Reply)
            found = known[row.case_id, row.sample]
            assert [piece(token) for token in found.written[:-1].tolist()] == [token.utf8 for token in reply.tokens]
            for place, token in enumerate(reply.tokens):
                alternatives = dict(token.alternatives)
                choices += len(alternatives) > 1
                for number, logprob in zip(found.ids[place].tolist(), found.logprobs[place].tolist(), strict=True):
                    if np.isfinite(logprob):
                        assert logprob == pytest.approx(alternatives[piece(number)], rel=1e-3, abs=1e-3)
    assert choices > len(rows) / 2
    metrics = json.loads(Path("runs/r/distill/metrics.json").read_text())
    assert metrics["believed"] == metrics["answer_tokens"] - len(rows), "all but the ends of turns"
    assert (metrics["apart"], metrics["texts"], metrics["missing"]) == (0, 0, 0)
    assert "the teacher's probabilities are not recalibrated" in out
    assert (Path("runs/r/distill/model/model.safetensors")).is_file()
    code, _, err = command("run", "r.yaml")
    assert (code, err.count("done already")) == (0, 4)


@pytest.mark.slow
def test_thinking_has_no_beliefs_and_the_answer_behind_it_has(command):
    write(label="{logprobs: 5, prompt: thinking}")
    text = Path("r.yaml").read_text().replace("curate: {}", "curate: {prompt: thinking, think: true}")
    Path("r.yaml").write_text(text)
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    metrics = json.loads(Path("runs/r/distill/metrics.json").read_text())
    assert 0 < metrics["believed"] < metrics["answer_tokens"] / 2
    assert metrics["apart"] == 0


def test_labels_without_log_probabilities_are_told(command):
    write(label="{}")
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert only(err) == (
        "preceptor: distill: all replies have no log-probabilities in the ledger: nothing is known to distil; label "
        "with `logprobs: 5` at an endpoint that gives log-probabilities, or name a `local_teacher`"
    )
    assert not Path("runs/r/distill/beliefs").exists()  # so that a mended request is no other one


@pytest.mark.slow
def test_a_teacher_of_another_tokenizer_is_refused_with_the_way_out(command, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    start = f"{{python}} -m preceptor teacher --port {{port}} --tokenizer {tmp_path / 'words'}"
    write(teacher=f'{{model: textbook, endpoint: {{name: t, start: "{start}", logprobs: 20}}}}')
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert "another tokenizer, whose probabilities can't be learned token by token; " in only(err)
    assert "distil on text (sft: the labels alone)" in err


@pytest.mark.slow
def test_a_kill_costs_no_store_and_a_flipped_byte_is_found(command, monkeypatch):
    """Training ends at once; what was built stays, and is looked at before it is learned from."""
    from preceptor.train import sft

    write()
    with monkeypatch.context() as broken:
        broken.setattr(sft, "student", None)
        code, _, _ = command("run", "r.yaml")
        assert code == 1
    path = Path("runs/r/distill/beliefs") / TOKENS
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    code, _, err = command("run", "r.yaml")
    assert code == 1
    assert "is damaged; delete the folder, and it is made anew" in only(err)
    path.write_bytes(whole)
    before = path.stat().st_ino
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    assert (path.stat().st_ino, path.read_bytes()) == (before, whole)


@pytest.mark.slow
def test_tokens_are_drawn_from_a_whole_distribution_alone(command):
    write(distill=", divergence: sampled, draws: 20")
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert "tokens can be drawn from a whole distribution alone" in only(err)
    assert "raise k and the label section's logprobs, or name a `local_teacher`" in only(err)
    write(label="{logprobs: 20}", distill=", divergence: sampled, draws: 20, k: 20")
    code, _, err = command("run", "r.yaml", "label", "curate", "--fresh")
    assert code == 0, err
    code, _, err = command("run", "r.yaml", "distill")
    assert code == 0, err
    known = Store(Path("runs/r/distill/beliefs"))
    row = next(read_records(Path("runs/r/curate/rows.jsonl"), Row))
    found = known[row.case_id, row.sample]
    assert found.ids.shape[1] == 21
    assert not found.rest.any()
    assert np.exp(found.logprobs[:-1]).sum(axis=1) == pytest.approx(1, abs=2e-3)


@pytest.mark.slow
def test_of_labels_in_two_stages_it_is_said_what_their_probabilities_are(command):
    write(label="{logprobs: 5, strategy: two_stage}")
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    told = " ".join(out.split())
    assert "labels were asked for in two stages: the probabilities of diseases are those of the second turn" in told


@pytest.mark.slow
def test_a_teacher_on_this_machine_reads_the_rows(command):
    """Its beliefs are the ones that it has when it is asked, the end of the turn among them."""
    write(label="{}", distill=", local_teacher: mini, k: 3")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    known = Store(Path("runs/r/distill/beliefs"))
    rows = list(read_records(Path("runs/r/curate/rows.jsonl"), Row))
    assert len(known) == len(rows)
    found = known[rows[0].case_id, rows[0].sample]
    assert np.isfinite(found.logprobs).all()
    assert np.exp(found.logprobs).sum(axis=1) + found.rest == pytest.approx(1, abs=2e-3)
    # Softened are all probabilities, and not those of the likeliest beside the others' as one.
    write(label="{}", distill=", local_teacher: mini, k: 3, temperature: 2")
    code, _, err = command("run", "r.yaml", "distill", "--fresh")
    assert code == 0, err
    soft = Store(Path("runs/r/distill/beliefs"))[rows[0].case_id, rows[0].sample]
    ratio = soft.logprobs - found.logprobs / 2
    assert np.allclose(ratio, ratio[:, :1], atol=1e-2)
    assert (soft.rest > found.rest).mean() > 0.9
    assert np.exp(soft.logprobs).sum(axis=1) + soft.rest == pytest.approx(1, abs=2e-3)


@pytest.mark.slow
def test_a_student_learns_on_its_own_answers(command):
    write(label="{}", distill=", local_teacher: mini, on_policy: true, max_tokens: 8")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    assert (Path("runs/r/distill/model/model.safetensors")).is_file()
    assert json.loads(Path("runs/r/distill/metrics.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_a_teacher_s_recalibration_is_applied(command):
    write()
    text = Path("r.yaml").read_text()
    text = text.replace("validation: 0", "validation: 80")
    Path("r.yaml").write_text(text.replace("distill:", "calibrate: {model: teacher}\ndistill:"))
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    chosen = json.loads(Path("runs/r/calibrate/recalibration.json").read_text())["chosen"]
    assert f"the teacher's probabilities are recalibrated, by temperature, {chosen['value']:.2f}" in out


def test_what_was_learned_of_other_alternatives_is_not_applied(command):
    """Beside a recalibration of 3 tokens a teacher's 5 would be mended by the wrong constant."""
    Path("own").mkdir()
    figures = Figures(ece=0.1, ece_floor=0.0, nll=0.1, reliability=())
    chosen = Recalibration(method="temperature", value=2.0)
    found = Recalibrated(teacher="t", k=3, chosen=chosen, n=1, cases=1, before=figures, methods={})
    Path("own/recalibration.json").write_text(found.model_dump_json())
    write(distill=", from: [prepare, label, curate, ./own]")
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert only(err) == (
        "preceptor: distill.k: the teacher's probabilities of 5 tokens would be mended by what own/recalibration.json "
        "learned of 3; set logprobs: 5 there, or k: 3 here"
    )


@pytest.mark.slow
def test_a_divergence_of_one_s_own(command):
    """The bucket by another name learns what the bucket does."""
    Path("own.py").write_text("from preceptor.train.divergence import bucket\nmine = lambda *told: bucket(*told)\n")
    write(distill=", divergence: own.py:mine")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    own = Path("runs/r/distill/model/model.safetensors").read_bytes()
    write()
    code, _, err = command("run", "r.yaml", "distill", "--fresh")
    assert code == 0, err
    assert Path("runs/r/distill/model/model.safetensors").read_bytes() == own


def test_rows_that_a_store_would_take_for_one_another_are_refused():
    """As in a file of one's own that numbers no samples."""
    row = tiny.row(1)
    check_keys([row, row, row.model_copy(update={"sample": 1, "answer": "{}"})], "rows.jsonl", by_prompt=True)
    asked_otherwise = row.model_copy(update={"id": "x", "messages": tiny.messages("another record")})
    check_keys([row, asked_otherwise], "rows.jsonl", by_prompt=False)
    for other, by_prompt in ((asked_otherwise, True), (row.model_copy(update={"id": "x", "answer": "{}"}), False)):
        with pytest.raises(UserError, match=r"^rows.jsonl: rows r1 and x differ, and both are sample 0 of case c1; "):
            check_keys([row, other], "rows.jsonl", by_prompt=by_prompt)


@pytest.mark.parametrize(
    ("distill", "told"),
    [
        (", on_policy: true", "on_policy: a teacher here must read what the student writes; name a `local_teacher`"),
        (", beta: 0.5", "beta: it belongs to on_policy: true; say so, or leave it out"),
        (", draws: 9", "draws: it belongs to divergence: sampled; say so, or leave it out"),
        (", k: 9, local_teacher: mini, on_policy: true", "k: it belongs to on_policy: false; say so, or leave it out"),
        (", divergence: sampled, k: 9, local_teacher: mini", "k: a local teacher's tokens are drawn from all that"),
        (", divergence: buckets", "no divergence 'buckets'; did you mean 'bucket'? (or name your own"),
        (", share: 0", "share: Input should be greater than 0"),
        (
            ", local_teacher: mini, on_policy: true, dropout: 0.1",
            "dropout: with it another student would write than learns; leave it out",
        ),
        (", k: 300", "k: Input should be less than or equal to 255"),
    ],
)
def test_settings_that_nothing_comes_of_are_refused(command, distill, told):
    write(distill=distill)
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert told in only(err)
    assert "distill" in only(err)


COMPACT = '{"diseases":["Influenza"],"reason":["fever"]}'
PLAIN = '{"diseases": ["Influenza"], "reason": ["fever"]}'


@pytest.mark.parametrize(
    ("text", "answer", "learned"),
    [
        (COMPACT, PLAIN, COMPACT),
        (f"```json\n{COMPACT}\n```", PLAIN, COMPACT),
        (COMPACT, f"<think>\ncough\n</think>\n\n{PLAIN}", f"<think>\ncough\n</think>\n\n{COMPACT}"),
        (PLAIN, PLAIN, PLAIN),
        (COMPACT.replace("fever", "cough"), PLAIN, PLAIN),  # a reason was taken out, say
        ("Influenza, since {fever}", PLAIN, PLAIN),
    ],
)
def test_what_says_the_same_is_learned_as_the_teacher_wrote_it(tmp_path, text, answer, learned):
    """Its probabilities are of its own words."""
    turn = Message(role="user", content="fever")
    row = Row(id="a#0", messages=(turn,), answer=answer, case_id="a", sample=0)
    output = Diagnosis(diseases=("Influenza",), reason=("fever",))
    said = Prediction(case_id="a", model="teacher", prompt_sha="", text=text, output=output)
    write_records(tmp_path / "predictions.jsonl", [said])
    told = []
    context = SimpleNamespace(
        inputs={"predictions.jsonl": (tmp_path / "predictions.jsonl",)}, section="distill", say=told.append
    )
    assert [one.answer for one in beliefs.as_written([row], context)] == [learned]
    assert told == ["distill: 1 answers are learned as the teacher wrote them, in its own form of JSON"] * (
        learned != answer
    )
