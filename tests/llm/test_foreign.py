"""Servers that we did not write label cases unchanged, with the embedded students as their models."""

from pathlib import Path
from typing import Any

import pytest

from preceptor.core.records import FailureKind, Language, Reply, Request, Sampling
from preceptor.model.generate import generate
from preceptor.model.load import load
from preceptor.model.resolve import resolve
from preceptor.model.smollm2 import _gguf
from preceptor.tasks import prompts
from tests.llm.foreign import DICTATION, Labelled, label

pytestmark = pytest.mark.slow

SERVE = {"start": "transformers serve {model} --device cpu --port {port}"}
LLAMA: dict[str, Any] = {
    "start": "{python} -m llama_cpp.server --model {model} --n_threads 1 --port {port}",
    "name": "llama-cpp-python",
    "extra": {"repeat_penalty": 1.0},  # its own default is 1.1, with which greedy is not the likeliest
}
DISEASES: dict[Language, list[str]] = {
    "en": ["Anxiety disorder", "Peptic ulcer", "Common cold"],
    "zh": ["焦虑障碍", "消化性溃疡", "普通感冒"],
}


def one_of(diseases: list[str]) -> dict[str, Any]:
    """The reply's form as this server takes it, with one or two of these diseases."""
    names = {"type": "array", "items": {"enum": diseases}, "minItems": 1, "maxItems": 2}
    reasons = {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 1}
    properties = {"diseases": names, "reason": reasons}
    return {"type": "json_object", "schema": {"type": "object", "properties": properties, "required": [*properties]}}


def dictation(language: Language, folder: Path) -> str:
    path = folder / "dictation.txt"
    path.write_text(DICTATION[language], "utf-8")
    return str(path)


def every_case_is_accounted_for(done: Labelled) -> None:
    assert [p.case_id for p in done.predictions] == [case.id for case in done.cases]
    kinds = {p.failure.kind for p in done.predictions if p.failure}
    assert kinds <= {FailureKind.UNPARSED, FailureKind.TRUNCATED, FailureKind.EMPTY, FailureKind.REFUSED}, kinds
    assert [reply.text for reply in done.replies] == [p.text for p in done.predictions if p.reply]
    assert done.summary.requests == done.summary.replies + sum(done.summary.failures.values())
    assert done.summary.requests >= len(done.cases)


def spells_itself(reply: Reply) -> None:
    assert b"".join(token.utf8 for token in reply.tokens) == reply.text.encode()
    assert all(token.logprob is not None and token.logprob <= 0 for token in reply.tokens)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_transformers_serve_says_what_our_own_engine_says(language: Language, tmp_path: Path) -> None:
    mini, told = str(resolve("mini")), dictation(language, tmp_path)
    done = label(tmp_path, mini, SERVE, 12, language=language, prompt=told, max_tokens=96)
    assert done.code == 0, done.shown
    every_case_is_accounted_for(done)
    prompt = prompts.load("diagnosis", told, language)
    asked = [Request(messages=prompt.render(case.text), sampling=Sampling(max_tokens=96)) for case in done.cases]
    ours = generate(load("mini", dtype="float32"), asked)
    assert [p.text for p in done.predictions] == [reply.text.strip() for reply in ours]
    assert [r.usage.prompt_tokens for r in done.replies] == [reply.usage.prompt_tokens for reply in ours]
    assert len({p.text for p in done.predictions}) > 6, "answers that depend on the record"
    assert all(p.output and p.output.diseases for p in done.predictions)
    assert (done.summary.requests, done.summary.failures) == (12, {})
    assert {reply.model for reply in done.replies} == {f"{mini}@main"}


def test_transformers_serve_has_no_log_probabilities(tmp_path: Path) -> None:
    told = dictation("en", tmp_path)
    done = label(tmp_path, str(resolve("mini")), SERVE, 3, prompt=told, max_tokens=96, logprobs=5)
    assert done.code == 2, done.shown
    said = [line for line in done.shown.splitlines() if line.startswith("preceptor: ")]
    mend = "write `logprobs: 0` among its fields, or use another endpoint"
    assert said == [f"preceptor: transformers gives no log-probabilities: {mend}"]
    assert done.predictions == []


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("logprobs", [None, 5])
def test_llama_cpp_held_to_a_schema_answers(logprobs: int | None, language: Language, tmp_path: Path) -> None:
    """A Chinese character is several of its tokens, none of which it can spell."""
    held = {**LLAMA["extra"], "response_format": one_of(DISEASES[language])}
    told = {"logprobs": logprobs} if logprobs else {}
    done = label(tmp_path, str(_gguf()), {**LLAMA, "extra": held}, 2, language=language, max_tokens=160, **told)
    assert done.code == 0, done.shown
    every_case_is_accounted_for(done)
    assert all(p.output and set(p.output.diseases) <= set(DISEASES[language]) for p in done.predictions)
    assert all(p.text.isascii() == (language == "en") for p in done.predictions)
    if logprobs is None:
        assert not any(reply.tokens for reply in done.replies)
        return
    for reply, prediction in zip(done.replies, done.predictions, strict=True):
        spells_itself(reply)
        assert max(len(token.alternatives) for token in reply.tokens) in (logprobs, logprobs + 1)
        assert prediction.output
        assert set(prediction.confidence) == set(prediction.output.diseases)
        assert all(0 < p < 1 for p in prediction.confidence.values())


@pytest.mark.parametrize("logprobs", [0, 5])
def test_llama_cpp_left_to_itself_says_why_there_is_no_answer(logprobs: int, tmp_path: Path) -> None:
    done = label(tmp_path, str(_gguf()), LLAMA, 2, max_tokens=48, logprobs=logprobs)
    assert done.code == 0, done.shown
    every_case_is_accounted_for(done)
    for reply in done.replies:
        spells_itself(reply)
        for token in reply.tokens:
            likeliest = max(token.alternatives, key=lambda pair: pair[1], default=(token.utf8, token.logprob))
            assert likeliest == (token.utf8, token.logprob)
