"""What a trained model's card says, to people and to a hub."""

import pytest
import yaml

from preceptor.report.card import card

SETTINGS = {"method": "lora", "lr": 5e-5}


def test_a_hub_reads_its_header():
    told = card("healthai: sft", "Qwen/Qwen2.5-7B-Instruct", SETTINGS, adapter=True, rows=1200, transductive=40)
    _, head, text = told.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "tags": ["preceptor", "clinical", "transductive"],
    }
    assert "**Learned from**: 1,200 rows" in text
    assert "**Transductive**: 40 of them are about the target cases" in text
    assert yaml.safe_load(text.split("```")[1].removeprefix("yaml")) == SETTINGS


@pytest.mark.parametrize("base", ["own/model", "modelscope:Qwen/Qwen3-1.7B", "./a/b", "~/model"])
def test_what_is_on_no_hub_of_theirs_is_no_base_model(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert "base_model" not in card("r: sft", base, SETTINGS, adapter=True, rows=8, transductive=0)


def test_it_claims_only_what_is_so():
    told = card("r: sft", "mini", SETTINGS, adapter=False, rows=8, transductive=0)
    assert "base_model" not in told
    assert "ransductive" not in told
    assert "Not for care" in told
