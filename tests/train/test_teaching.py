"""Learning from a teacher's beliefs: they stand at the tokens that they are about, and the student moves to them."""

import math

import numpy as np
import pytest
import torch

from preceptor.core.errors import WorkError
from preceptor.model import load, tokens
from preceptor.model.tokens import IGNORED
from preceptor.train import sft
from preceptor.train.align import fingerprint
from preceptor.train.batches import Teaching, collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.config import Mix, SftConfig
from preceptor.train.store import Beliefs, Header, Store, Writer
from preceptor.train.trainer import learns
from tests.model import tiny

ROWS = [tiny.row(number) for number in range(6)]
CONFIG = SftConfig(method="full", batch_size=3, epochs=2, lr=1e-3, accumulation=1)


def store(folder, rows, believe, k=2):
    """What `believe` says of each answer's tokens, but for the last, of which nothing is known."""
    words = tiny.tokenizer()
    with Writer(folder, Header(k, fingerprint(words), "t")) as writer:
        for row in rows:
            ids = tokens.answer_ids(words, row)
            found = np.zeros((len(ids), k), np.int64), np.full((len(ids), k), -np.inf, np.float32)
            rest, place = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int64)
            for at, token in enumerate(ids):
                found[0][at, 0] = token
                if at < len(ids) - 1:
                    found[0][at], found[1][at], rest[at] = believe(token)
            writer.add(row.case_id, row.sample, Beliefs(*found, rest, place))
    return Store(folder)


def sure(token):
    return [token, 0], [0.0, -np.inf], 0.0


def torn(token):
    """Half of the mass is another token's."""
    return [token, (token + 1) % 400], [math.log(0.5), math.log(0.5)], 0.0


@pytest.mark.parametrize("make", [unpacked, pack])
def test_beliefs_stand_at_their_tokens(tmp_path, make):
    """Rows in any order, packed or not; of a row that the store has not, and of the prompt, nothing is known."""
    known = store(tmp_path / "s", ROWS[::-1][:4], torn)
    teaching = Teaching(known)
    examples = sft._examples(tiny.tokenizer(), ROWS, CONFIG, None, teaching)
    batch = collate(make(examples), teaching)
    ids, logprobs, rest = batch["soft"]
    seen = 0
    for line in range(len(batch["labels"])):
        for at, label in enumerate(batch["labels"][line].tolist()):
            here = logprobs[line, at].isfinite().any()
            seen += int(here)
            if here:
                assert ids[line, at].tolist() == [label, (label + 1) % 400]
                assert rest[line, at] == 0
    learnt = [sum(label != IGNORED for label in example.labels) for example in examples]
    assert seen == sum(learnt[2:]) - 4, "all but the ends of the four turns"


def test_beliefs_are_adjusted_on_their_way(tmp_path):
    def less(logprobs, rest):
        return logprobs - 1, np.where(np.isfinite(logprobs).any(axis=1), rest + 0.25, rest)

    teaching = Teaching(store(tmp_path / "s", ROWS, torn), Mix(), [less])
    (example, *_) = sft._examples(tiny.tokenizer(), ROWS, CONFIG, None, teaching)
    _, logprobs, rest = collate(unpacked([example]), teaching)["soft"]
    known = logprobs.isfinite().any(-1)
    assert logprobs[known].exp().sum().item() == pytest.approx(int(known.sum()) / math.e, rel=1e-3)
    assert set(rest[known].tolist()) == {0.25}
    assert set(rest[~known].tolist()) == {0.0}


@pytest.mark.parametrize("divergence", ["renormalised", "bucket", "sampled"])
def test_a_teacher_that_is_sure_of_the_labels_teaches_them(tmp_path, divergence):
    """It is supervised training then: cross-entropy is top-k with k = 1."""
    if divergence == "renormalised":
        return_to = Mix(divergence=divergence, share=0.0)  # of one token alone it says nothing
    else:
        return_to = Mix(divergence=divergence, share=0.7)
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    taught = Teaching(store(tmp_path / "s", ROWS, sure), return_to)
    sft.train(base, ROWS, tmp_path / "plain", CONFIG)
    sft.train(base, ROWS, tmp_path / "taught", CONFIG, teaching=taught)
    one, other = (load.load(tmp_path / name / "model").model.state_dict() for name in ("plain", "taught"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_student_comes_to_believe_what_its_teacher_does(tmp_path):
    """After training its mass at each token is near the teacher's halves; on the labels alone it is sure."""
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    taught = Teaching(store(tmp_path / "s", ROWS[:1], torn), Mix(share=1.0))
    config = CONFIG.model_copy(update={"epochs": 150, "batch_size": 1, "lr": 3e-3})
    masses = []
    for name, teaching in (("plain", None), ("taught", taught)):
        sft.train(base, ROWS[:1], tmp_path / name, config, teaching=teaching)
        model = load.load(tmp_path / name / "model", dtype="float32").model
        (example,) = sft._examples(tiny.tokenizer(), ROWS[:1], CONFIG, None)
        logits = model(torch.tensor([example.ids])).logits[0].softmax(-1)
        at = [n for n, label in enumerate(example.labels) if label != IGNORED][:-1]
        masses.append(sum(logits[n - 1, example.labels[n]].item() for n in at) / len(at))
    assert masses[0] > 0.95
    assert masses[1] == pytest.approx(0.5, abs=0.05)


def test_a_store_about_other_answers_is_refused(tmp_path):
    base = tiny.save(tiny.qwen(), tmp_path / "base")
    known = store(tmp_path / "s", ROWS, torn)
    other = [ROWS[0].model_copy(update={"answer": "another"}), *ROWS[1:]]
    with pytest.raises(WorkError, match=r"it has another answer than row .*; start over with --fresh"):
        sft.train(base, other, tmp_path / "out", CONFIG, teaching=Teaching(known))


def test_the_loss_of_a_batch_is_the_mixture_by_hand(tmp_path):
    """Half cross-entropy and half the divergence where the teacher is known; at the end of the turn the label alone."""
    model = tiny.qwen()
    teaching = Teaching(store(tmp_path / "s", ROWS, torn), Mix(share=0.5))
    examples = sft._examples(tiny.tokenizer(), ROWS, CONFIG, None, teaching)
    total, count = 0.0, 0
    for example in examples:
        logs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        learnt = [n for n, label in enumerate(example.labels) if label != IGNORED]
        for n in learnt:
            label = example.labels[n]
            own, other = logs[n - 1, label].item(), logs[n - 1, (label + 1) % 400].item()
            apart = math.log(0.5) - (own + other) / 2  # the rest is nothing
            total += -own if n == learnt[-1] else 0.5 * -own + 0.5 * apart
        count += len(learnt)
    learns(model, teaching.mix)
    batch = collate(unpacked(examples), teaching)
    del batch["tokens"]
    assert model(**batch).item() == pytest.approx(total / count, rel=2e-3)
