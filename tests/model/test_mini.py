"""The embedded student's weights: what was packed, and what it was taught."""

import hashlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from preceptor.clinical.textbook.book import load as textbook
from preceptor.core.records import Request, Sampling
from preceptor.model.generate import generate
from preceptor.model.load import Loaded, load
from preceptor.model.resolve import resolve
from preceptor.tasks import prompts
from preceptor.tasks.lessons import LANGUAGES, lessons

FOLDER = Path(resolve("mini"))
PRACTISED = ("list", "key", "write", "quote")
"""The lessons that it was taught last."""


@pytest.fixture(scope="module")
def mini() -> Loaded:
    torch.set_num_threads(1)
    return load("mini")


def test_the_files_are_those_of_the_checksum() -> None:
    listed = dict(reversed(line.split("  ")) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert "model.safetensors" in listed
    for name, digest in listed.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_it_is_small(mini: Loaded) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert 1_000_000 < sum(p.numel() for p in mini.model.parameters()) < 4_000_000


def test_it_has_a_card() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    assert "not for care" in card
    assert "recipes/mini.yaml" in card


def test_a_disease_is_one_token(mini: Loaded) -> None:
    """In both languages: so its probability is read off one place."""
    names = [disease.name(language) for disease in textbook().diseases.values() for language in LANGUAGES]
    assert {len(mini.tokenizer.encode(name, add_special_tokens=False)) for name in names} == {1}


@pytest.mark.slow
def test_it_has_learnt_its_lessons(mini: Loaded) -> None:
    """On lessons that it has not seen, in both languages."""
    rows = list(lessons(textbook(), dict.fromkeys(PRACTISED, 1), 240, seed=4242))
    asked = [Request(messages=row.messages, sampling=Sampling(max_tokens=160)) for row in rows]
    right = defaultdict(list)
    for row, reply in zip(rows, generate(mini, asked), strict=True):
        right[prompts.act_in(row.messages)].append(reply.text == row.answer)
    share = {act: sum(of) / len(of) for act, of in right.items()}
    assert share["write"] > 0.5, share
    assert share["list"] > 0.3, share
