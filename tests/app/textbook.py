"""The textbook teacher as a process, and what a reply of it must be, by enumeration."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import exp, log

import openai
from tokenizers import Tokenizer

from preceptor.clinical.textbook.exact import Confidence, exact
from preceptor.core.records import Diagnosis, Language
from preceptor.model.resolve import resolve
from preceptor.tasks.diagnosis import canonical


@contextmanager
def teacher(*options: str) -> Iterator[openai.OpenAI]:
    """A client of a server of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "preceptor", "teacher", "--port", str(port), *options])
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/models", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the teacher stopped"
                time.sleep(0.1)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.terminate()
        server.wait(10)


def answers(text: str, language: Language, confidence: Confidence = "honest") -> dict[str, float]:
    """Every answer to a record with its probability, hypothesis by hypothesis."""
    answerer, found = exact(confidence), {}
    posterior = answerer.posterior(text)
    reading = answerer.reader.read(text)
    if max(posterior.marginals.values()) < answerer.book.world.abstain_below:
        return {'{"diseases": [], "reason": []}': 1.0}
    for hypothesis, p in zip(posterior.hypotheses, posterior.probabilities.tolist(), strict=True):
        named = tuple(sorted(hypothesis, key=lambda d: -posterior.marginals[d]))
        quoted = answerer.evidence(text, reading, named, language, 4)
        names = tuple(answerer.book.diseases[d].name(language) for d in named)
        answer = canonical(Diagnosis(diseases=names, reason=tuple(e.text for e in quoted)))
        found[answer] = found.get(answer, 0.0) + p
    return found


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve("mini") / "tokenizer.json"))


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def continuations(said: dict[str, float], reply: str) -> list[dict[int, float]]:
    """At each token of a reply the log-probability of every token that could stand there."""
    rows = {ids(text): p for text, p in said.items()}
    assert len(rows) == len(said)
    row, found = ids(reply), []
    for place in range(len(row)):
        options: dict[int, float] = {}
        for other, p in rows.items():
            if other[:place] == row[:place] and len(other) > place:
                options[other[place]] = options.get(other[place], 0.0) + p
        total = sum(options.values())
        found.append({token: log(p / total) for token, p in options.items() if p})
    return found


def entropy(probabilities: list[float]) -> float:
    return -sum(p * log(p) for p in probabilities if p)


def check(content: list[openai.types.chat.ChatCompletionTokenLogprob], reply: str, said: dict[str, float]) -> None:
    """Every log-probability of a reply with 20 alternatives a token is the enumerated one."""
    expected = continuations(said, reply)
    assert len(content) == len(expected)
    assert b"".join(bytes(entry.bytes) for entry in content) == reply.encode()
    for entry, token, options in zip(content, ids(reply), expected, strict=True):
        assert abs(exp(entry.logprob) - exp(options[token])) < 1e-6
        listed = [alternative.logprob for alternative in entry.top_logprobs]
        ranked = sorted(options.values(), reverse=True)[:20]
        assert listed == sorted(listed, reverse=True)
        assert len(listed) == len(ranked)
        assert all(abs(exp(one) - exp(other)) < 1e-6 for one, other in zip(listed, ranked, strict=True))
        spelt = {bytes(alternative.bytes): alternative.logprob for alternative in entry.top_logprobs}
        for other, logprob in options.items():
            if logprob > ranked[-1]:
                piece = tokenizer().decode([other]).encode()  # the mini's names are whole tokens
                if b"\xef\xbf\xbd" not in piece:
                    assert abs(exp(spelt[piece]) - exp(logprob)) < 1e-6
        if len(options) == 1:
            assert entry.logprob == 0.0
    assert abs(sum(entry.logprob for entry in content) - log(said[reply])) < 1e-6
