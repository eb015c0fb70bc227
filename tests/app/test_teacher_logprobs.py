"""The textbook teacher's log-probabilities, against sums over all that it may say."""

import json
from collections.abc import Iterator
from math import exp, log
from pathlib import Path

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from preceptor.clinical.textbook.exact import CONFIDENCES, Confidence, exact
from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Language
from preceptor.core.statistics import ece
from preceptor.tasks import prompts
from tests.app import textbook


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with textbook.teacher() as it:
        yield it


def ask(
    client: openai.OpenAI, text: str, language: Language, prompt: str = "zero_shot", **settings: object
) -> openai.types.chat.ChatCompletion:
    messages = [m.model_dump() for m in prompts.load("diagnosis", prompt, language).render(text)]
    return client.chat.completions.create(model="textbook", messages=messages, **settings)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("style", ["short", "full"])
def test_every_log_probability_is_the_enumerated_one(client: openai.OpenAI, language: Language, style) -> None:
    drawn, sure = 0, 0
    for number, case in enumerate(sample(12, 17, language, style)):
        said = textbook.answers(case.text, language)
        reply = ask(client, case.text, language, temperature=2, n=4, seed=number, logprobs=True, top_logprobs=20)
        greedy = ask(client, case.text, language, temperature=0, logprobs=True, top_logprobs=20)
        for choice in (*reply.choices, *greedy.choices):
            assert choice.logprobs is not None
            textbook.check(choice.logprobs.content or [], choice.message.content or "", said)
            drawn += 1
            sure += len(said) == 1
    assert drawn == 60
    assert sure < drawn / 2


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [c for c in CONFIDENCES if c != "honest"])
def test_the_misjudging_readers_tell_their_own_posterior(confidence: Confidence) -> None:
    with textbook.teacher("--confidence", confidence) as client:
        differ = 0
        for case in sample(8, 23, "zh", "short"):
            said = textbook.answers(case.text, "zh", confidence)
            reply = ask(client, case.text, "zh", temperature=1, seed=1, logprobs=True, top_logprobs=20).choices[0]
            textbook.check(reply.logprobs.content, reply.message.content, said)
            differ += said != textbook.answers(case.text, "zh")
        assert differ >= 6


@pytest.mark.slow
def test_too_sure_and_not_sure_enough() -> None:
    """Entropy of the posterior, and how far the first disease's probability is from how often it is right."""
    cases = sample(1500, 29, "en", "short")
    entropies, gaps, errors = {}, {}, {}
    for confidence in CONFIDENCES:
        answerer = exact(confidence)
        posteriors = [answerer.posterior(case.text) for case in cases]
        entropies[confidence] = np.mean([textbook.entropy(p.probabilities.tolist()) for p in posteriors])
        first = [next(iter(p.marginals.items())) for p in posteriors]
        right = [
            answerer.book.diseases[disease].en in case.gold.diseases
            for (disease, _), case in zip(first, cases, strict=True)
        ]
        gaps[confidence] = np.mean([p for _, p in first]) - np.mean(right)
        errors[confidence] = ece([p for _, p in first], right)
    assert entropies["over"] < 0.95 * entropies["honest"]
    assert entropies["under"] > 1.5 * entropies["honest"]
    assert abs(gaps["honest"]) < 0.02 < gaps["over"]
    assert gaps["under"] < -0.08
    assert errors["over"] > 1.3 * errors["honest"]
    assert errors["under"] > 3 * errors["honest"]


def test_temperature_changes_the_draw_and_not_the_log_probabilities(client: openai.OpenAI) -> None:
    case = next(c for c in sample(99, 4, "en", "short") if 0.5 < max(c.differential.values()) < 0.65)
    said = textbook.answers(case.text, "en")
    for temperature in (0.5, 1.0, 2.0):
        for choice in ask(client, case.text, "en", temperature=temperature, n=16, seed=3, logprobs=True).choices:
            total = sum(entry.logprob for entry in choice.logprobs.content)
            assert total == pytest.approx(log(said[choice.message.content]), abs=1e-6)
            assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)


def test_abstention_is_certain(client: openai.OpenAI) -> None:
    choice = ask(client, "Woman, 40.", "en", temperature=1, logprobs=True, top_logprobs=2).choices[0]
    assert choice.message.content == '{"diseases": [], "reason": []}'
    for entry in choice.logprobs.content:
        assert (entry.logprob, len(entry.top_logprobs), entry.top_logprobs[0].token) == (0.0, 1, entry.token)


def test_what_is_thought_aloud_is_certain_and_the_answer_is_not(client: openai.OpenAI) -> None:
    case = next(c for c in sample(99, 4, "zh", "short") if 0.5 < max(c.differential.values()) < 0.65)
    choice = ask(client, case.text, "zh", "thinking", temperature=0, logprobs=True).choices[0]
    thought, answer = choice.message.content.split("\n\n")
    said, at = textbook.answers(case.text, "zh"), 0
    for entry in choice.logprobs.content:
        assert at >= len(f"{thought}\n\n".encode()) or entry.logprob == 0
        at += len(entry.bytes)
    assert sum(e.logprob for e in choice.logprobs.content) == pytest.approx(log(said[answer]), abs=1e-6)


def test_the_first_of_two_turns_has_the_probabilities_of_lists(client: openai.OpenAI) -> None:
    case = next(c for c in sample(99, 8, "en", "short") if 0.5 < max(c.differential.values()) < 0.7)
    messages = [{"role": "user", "content": f"[act: diseases]\n<record>\n{case.text}\n</record>"}]
    drawn = client.chat.completions.create(
        model="textbook", messages=messages, temperature=1, n=8, seed=1, logprobs=True
    )
    said = {tuple(json.loads(text)["diseases"]): p for text, p in textbook.answers(case.text, "en").items()}
    for choice in drawn.choices:
        found = json.loads(choice.message.content)
        assert set(found) == {"diseases"}
        total = exp(sum(entry.logprob for entry in choice.logprobs.content))
        assert total == pytest.approx(said[tuple(found["diseases"])], abs=1e-6)


def bytewise(folder: Path) -> Path:
    """A tokenizer with a token for each byte: every Chinese character is three."""
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_what_cuts_the_text_cuts_the_tokens_and_no_character(tmp_path: Path) -> None:
    text = "女，31岁，发热3天。\n伴咽痛、流清涕、肌肉酸痛、寒战。"
    with textbook.teacher("--tokenizer", str(bytewise(tmp_path))) as client:
        whole = ask(client, text, "zh", temperature=0, logprobs=True).choices[0]
        raw = whole.message.content.encode()
        assert [bytes(entry.bytes) for entry in whole.logprobs.content] == [raw[at : at + 1] for at in range(len(raw))]
        for limit in range(1, len(raw) + 2, 7):
            reply = ask(client, text, "zh", temperature=0, logprobs=True, max_tokens=limit)
            cut = reply.choices[0]
            assert cut.message.content == raw[:limit].decode(errors="ignore")
            assert bytes(b for entry in cut.logprobs.content for b in entry.bytes) == cut.message.content.encode()
            assert reply.usage.completion_tokens == len(cut.logprobs.content)
            assert cut.finish_reason == ("length" if limit < len(raw) else "stop")


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (None, "no such folder"),
        ("not json", "is no tokenizer"),
        ("lossy", "don't join to the text"),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_one_line(command, tmp_path: Path, made, complaint: str) -> None:
    folder = tmp_path / "it"
    if made:
        folder.mkdir()
        lossy = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        (folder / "tokenizer.json").write_text(made if made == "not json" else lossy.to_str())
    code, _, error = command("teacher", "--tokenizer", str(folder), "--port", "0")
    assert (code, len(error.splitlines())) == (2, 1)
    assert complaint in error


def test_a_stop_string_cuts_within_a_token(client: openai.OpenAI) -> None:
    text = sample(1, 5, "en")[0].text
    whole = ask(client, text, "en", temperature=0, logprobs=True).choices[0]
    for stop in ("reason", "eases", '"], ', '"reason"', "}"):
        cut = ask(client, text, "en", temperature=0, logprobs=True, stop=stop).choices[0]
        assert cut.message.content == whole.message.content.split(stop)[0]
        assert b"".join(bytes(e.bytes) for e in cut.logprobs.content) == cut.message.content.encode()
        assert cut.finish_reason == "stop"


def test_usage_counts_the_tokenizers_tokens(client: openai.OpenAI) -> None:
    text = sample(1, 5, "zh")[0].text
    messages = prompts.load("diagnosis", "zero_shot", "zh").render(text)
    reply = ask(client, text, "zh", temperature=0)
    assert reply.usage.prompt_tokens == sum(len(textbook.ids(m.content)) for m in messages)
    assert reply.usage.completion_tokens == len(textbook.ids(reply.choices[0].message.content))
