"""What a trained model's card says, to people and to a hub."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from preceptor.report.card import BESIDE, CONFIDENCE, EVIDENCE, OVERALL, SAFETY, card, short_card
from preceptor.report.facts import Asked, Judgement, Learned, Stated
from preceptor.report.summary import Words
from tests.report.facts import FACTS, estimate

SETTINGS = {"method": "lora", "lr": 5e-5}
OWN = {
    "parsed": estimate(0.9, 0.8, 1.0),
    "failed": estimate(0.1, 0.0, 0.2),
    "top1": estimate(0.5, 0.25, 0.75),
    "disease_f1": estimate(0.4),
    "micro_f1": estimate(0.45),
    "abstained": estimate(0.05, 0.0, 0.1),
    "hallucinated": estimate(0.02, 0.0, 0.04),
    "evidence_grounded": estimate(0.96),
    "ece": estimate(0.123, 0.1, 0.2, n=36),
    "ece_floor": estimate(0.05),
    "top1[sex=female]": estimate(0.6, 0.2, 0.9, n=22),
    "top1[sex=male]": estimate(0.4, n=18),
    "top1[age=65+]": estimate(0.3, n=7),
    "top1[age=40–64]": estimate(0.3, n=7),
}
MEASURED = replace(FACTS, name="student", metrics={"student": OWN, "teacher": {"top1": estimate(0.8)}})
CONSULT = replace(
    FACTS,
    task="consult",
    name="student",
    metrics={"student": {name: OWN[name] for name in ("parsed", "failed")} | {"severe_miss": estimate(0.05, n=40)}},
    severe={"cardiology · critical": 1, "": 1},
)
JUDGED = Judgement(
    {
        "model": "big",
        "temperature": 0.0,
        "repeats": 2,
        "rubric": "diagnosis",
        "rubric_sha256": "r" * 64,
        "prompt_sha256": "p" * 64,
    },
    {"score": estimate(0.7, 0.6, 0.8).model_dump(), "validity": {}, "human": {"verdicts": 120, "unjudged": 0}},
)
NEVER = ("Not a medical device. Not clinically validated.", "不是医疗器械，未经临床验证。")


def part(text: str, heading: str) -> str:
    """What stands under a heading."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_a_hub_reads_the_header_and_the_figures():
    facts = replace(MEASURED, adapter=True, base="Qwen/Qwen2.5-7B-Instruct", license="apache-2.0")
    told = ModelCard(card(facts))
    assert told.data.to_dict() == {
        "library_name": "peft",
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "tags": ["preceptor", "clinical", "not-for-care"],
        "model-index": told.data.to_dict()["model-index"],
    }
    assert [(r.task_type, r.dataset_type, r.metric_type, r.metric_value) for r in told.data.eval_results] == [
        ("text-generation", "flu", "parsed", 0.9),
        ("text-generation", "flu", "top1", 0.5),
        ("text-generation", "flu", "disease_f1", 0.4),
        ("text-generation", "flu", "evidence_grounded", 0.96),
        ("text-generation", "flu", "ece", 0.123),
    ]


def test_without_figures_a_hub_is_told_none():
    head = yaml.safe_load(
        card(replace(FACTS, textbook=True, trained={**FACTS.trained, "transductive_rows": 2})).split("---\n")[1]
    )
    assert "model-index" not in head
    assert "base_model" not in head
    assert "license" not in head
    assert head["tags"] == ["preceptor", "clinical", "not-for-care", "simulation", "transductive"]


@pytest.mark.parametrize("facts", [FACTS, MEASURED, CONSULT, replace(FACTS, stated=Stated(use="everything, safely"))])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_always_says_that_it_is_no_medical_device(facts, language):
    assert NEVER[language == "zh"] in card(replace(facts, language=language))


LINES = {
    "the watermark": (replace(FACTS, watermark="For research alone"), "> **For research alone**"),
    "a licence": (replace(FACTS, license="mit"), "- **Base model**: tiny; licence: mit"),
    "no licence": (
        FACTS,
        "- **Base model**: tiny; licence: *not stated* (the base has no card and no licence file at hand; ",
    ),
    "a base of this machine": (replace(FACTS, base="/home/me/models/tiny"), "- **Base model**: tiny; licence"),
    "an earlier section": (replace(FACTS, earlier=("sft_more", "sft")), "- **Trained before by**: sft, then sft_more"),
    "all weights": (replace(FACTS, adapter=False, settings={"method": "full"}), "- **What was trained**: all weights"),
    "a merged adapter": (
        replace(FACTS, adapter=False),
        "- **What was trained**: an adapter over the base (lora, rank 8, alpha 16), merged into it here\n",
    ),
    "an adapter": (FACTS, "- **What was trained**: an adapter over the base (lora, rank 8, alpha 16)\n"),
    "refused rows": (
        FACTS,
        "- **Trained on**: 38 rows; 2 more were refused as too long; 1,200 steps, loss at the end 0.250",
    ),
    "a checkpoint on gold": (
        replace(FACTS, validation=(30, "gold")),
        "the best by the grader on 30 validation rows (grade 0.750; the last had 0.700). Their answers are gold.",
    ),
    "a checkpoint on labels": (
        replace(FACTS, validation=(30, "labels")),
        "this is agreement with the teacher, not accuracy.",
    ),
    "no validation": (
        replace(FACTS, trained={"rows": 1, "steps": 1, "loss": 0.1}),
        "- **Checkpoint**: the last one; none was graded",
    ),
    "the seed": (replace(FACTS, seed=1234), "- **Seed**: 1234"),
    "the code": (FACTS, "- **Code**: Preceptor 0.1.0, commit `abc`, changed since ("),
    "the weights": (FACTS, f"| weights as trained: adapter/adapter_model.safetensors | `{'a' * 64}` |"),
    "the base's digest": (
        replace(FACTS, base_digest="d" * 64),
        f"|---|---|\n| base: weights, configuration and tokenizer together | `{'d' * 64}` |\n| weights as trained",
    ),
    "two in turn": (replace(MEASURED, together="a+b"), "The figures are of two models that answer in turn, `a+b`:"),
    "the data": (FACTS, f"| data: prepare: cases.jsonl | `{'b' * 64}` |"),
    "terms that allow": (
        FACTS,
        "| label | big | dashscope | big-0901 | yes (the recipe attests it, or the service's entry) |",
    ),
    "terms that forbid": (
        replace(FACTS, asked=(Asked("label", "label", "big", (), False),)),
        "| label | big | an endpoint of one's own | *not stated* | **no: don't publish a model that learned from",
    ),
    "terms that nobody knows": (
        replace(FACTS, asked=(Asked("label", "label", "big", (), None),)),
        "| *not stated*: read the terms, then say so",
    ),
    "no teacher": (replace(FACTS, asked=()), "*Not stated*: no section of this run asked a teacher."),
    "children, few": (
        FACTS,
        "- children (of the rows learned, <5 are about patients under 18), pregnancy, emergencies;",
    ),
    "children, generated": (
        replace(FACTS, learned=replace(FACTS.learned, sources={"textbook": 40})),
        "- children (of the rows learned, 3 are about patients under 18), pregnancy, emergencies;",
    ),
    "not evaluated": (FACTS, "Let `predict` and `evaluate` follow `sft` in the recipe, run them, and export again."),
    "a share": (MEASURED, "| Top-1 | 50% | 25% – 75% | 40 |"),
    "a figure that is no share": (MEASURED, "| F1, micro | 0.450 | 0.450 – 0.450 | 40 |"),
    "a figure that is missing": (MEASURED, "| F1, macro | *not measured* | | |"),
    "the calibration error": (MEASURED, "| Calibration error (ECE) | 0.123 (floor 0.050) | 0.100 – 0.200 | 36 |"),
    "few answers": (
        MEASURED,
        "would show on as many answers; **on fewer than 1,000 answers ECE is biased upward**.",
    ),
    "a group": (MEASURED, "| female | 60% | 20% – 90% | 22 |"),
    "an axis that is missing": (
        MEASURED,
        "Specialty: *not measured* (fewer than two kinds with five cases each, or the cases don't say).",
    ),
    "others": (MEASURED, "| Teacher | 80% | — | — | — |"),
    "agreement": (
        replace(FACTS, name="student", metrics={"student": {"parsed": estimate(1), "agreement_top1": estimate(0.9)}}),
        "**Agreement is not accuracy.**",
    ),
    "what fails too much": (MEASURED, "- the share of failures exceeds 20%, the upper end measured here;"),
    "all that fails": (
        replace(FACTS, name="student", metrics={"student": {"failed": estimate(1)}}),
        "- there is an increase in failures (here up to all of the answers);",
    ),
    "a fall that can't be told": (
        replace(FACTS, name="student", metrics={"student": {"top1": estimate(0.1, 0.0)}}),
        "find more errors than before (the interval here begins at 0%, so no fall can be told);",
    ),
    "records that state the answer": (FACTS, "**records that state the answer: 2**, where reading is enough"),
    "a fall": (MEASURED, "- on cases that people have reviewed, Top-1 falls below 25%;"),
    "severe misses": (CONSULT, "**Severe misses: 2.**"),
    "a severe miss by kind": (CONSULT, "- cardiology · critical: 1"),
    "a severe miss of no kind": (CONSULT, "- kind not stated: 1"),
    "no severe miss": (replace(CONSULT, severe={}), "No severe miss among 40 cases with a red flag."),
    "no red flag": (
        replace(CONSULT, severe={}, metrics={"student": {"parsed": estimate(1)}}),
        "Severe misses: *not measured*; no case has a red flag.",
    ),
    "no figure by kind": (CONSULT, "*Not measured*: `evaluate` tells none of these figures by kind of case."),
    "no advice": (MEASURED, "Nothing here says whether it would send an emergency away."),
    "no judge": (FACTS, "*Not measured*: no section `judge` has judged answers of these weights."),
    "a judge's score": (replace(FACTS, judged=(JUDGED,)), "| score | 0.700 | 0.600 – 0.800 | 40 |"),
    "a judge who taught": (replace(FACTS, judged=(JUDGED,)), "**It is the teacher too, and may flatter its own.**"),
    "a judge and people": (replace(FACTS, judged=(JUDGED,)), "Agreement with people: 120 verdicts compared."),
    "contamination": (
        FACTS,
        "- Of 40 rows learned, **1** are about one of 25 held-out cases and red-team items, by id or by text",
    ),
    "no held-out cases": (
        replace(FACTS, learned=Learned(rows=3)),
        "- *Not measured*: the held-out cases are not at hand.",
    ),
    "failures": (
        FACTS,
        "3 of these by abstaining, 1 readable only after mending; **2 failed**: cut off 1, unreadable 1.",
    ),
    "the transductive": (
        replace(FACTS, trained={**FACTS.trained, "transductive_rows": 7}),
        "- **Transductive**: 7 rows are the teacher's labels of the very cases",
    ),
    "no contact": (FACTS, "**TO BE FILLED IN before the model is given to anybody:"),
    "a contact": (replace(FACTS, stated=Stated(contact="Ward 3, ext. 12")), "## Contact\n\nWard 3, ext. 12\n"),
}


@pytest.mark.parametrize(("facts", "line"), LINES.values(), ids=LINES)
def test_it_says(facts, line):
    assert line in card(facts)


def test_what_is_stated_takes_the_place_of_what_is_not():
    assert "*not stated* (say it in `export.stated.use`). It was built for study" in part(card(FACTS), "Use")
    assert "**For whom and what**: Ward 3\n" in part(card(replace(FACTS, stated=Stated(use="Ward 3"))), "Use")


def test_settings_are_told_but_for_where_the_base_lies():
    settings = part(
        card(replace(FACTS, settings={**SETTINGS, "rank": 8, "alpha": 16, "student": "/home/me/tiny"})), "Settings"
    )
    assert yaml.safe_load(settings.split("```")[1].removeprefix("yaml")) == {**SETTINGS, "rank": 8, "alpha": 16}


@pytest.mark.parametrize("facts", [FACTS, MEASURED, CONSULT, replace(MEASURED, judged=(JUDGED,), textbook=True)])
def test_both_languages_tell_the_same(facts):
    english, chinese = (card(replace(facts, language=language)).split("---\n", 2)[2] for language in ("en", "zh"))
    for mark in ("\n## ", "\n### ", "\n| ", "\n- ", "\n> ", "`"):
        assert english.count(mark) == chinese.count(mark), mark
    assert english.lower().count("*not measured*") == chinese.count("*未测量*")
    assert english.lower().count("*not stated*") == chinese.count("*未说明*")
    assert not {word for word in ("Base model", "not measured", "rows learned") if word in chinese}


@given(st.text(st.sampled_from("|`<>[]*_#\n\r\\&!-~:ab 病"), max_size=20))
def test_no_text_leaves_its_place(text):
    plain, hostile = (
        card(
            replace(
                MEASURED,
                watermark="x" + said,
                license=f"x{said}",
                asked=(Asked(f"x{said}", "label", f"x{said}", (f"x{said}",), None, (f"x{said}",)),),
                data=((f"x{said}", "b"),),
                metrics={**MEASURED.metrics, f"x{said}": {"top1": estimate(1)}},
                stated=Stated(contact=f"x{said}", use=f"x{said}"),
            )
        ).split("---\n", 2)[2]
        for said in ("", text)
    )
    assert [line.replace("\\|", "").count("|") for line in hostile.splitlines()] == [
        line.count("|") for line in plain.splitlines()
    ]
    assert "<" not in hostile.replace("<5", "").replace("&lt;", "")


def test_every_figure_has_its_words():
    names = {*CONFIDENCE, *EVIDENCE, *SAFETY, *(n for names in (*OVERALL.values(), *BESIDE.values()) for n in names)}
    for language in ("en", "zh"):
        words = Words(language)
        assert all(words(name) for name in names)


def test_the_short_card_has_a_hubs_header():
    told = short_card("healthai: sft", "Qwen/Qwen2.5-7B-Instruct", SETTINGS, adapter=True, rows=1200, transductive=40)
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
    assert "base_model" not in short_card("r: sft", base, SETTINGS, adapter=True, rows=8, transductive=0)
    assert "base_model" not in card(replace(FACTS, base=base)).split("---\n")[1]


def test_the_short_card_claims_only_what_is_so():
    told = short_card("r: sft", "mini", SETTINGS, adapter=False, rows=8, transductive=0)
    assert "base_model" not in told
    assert "ransductive" not in told
    assert "Not for care" in told
