"""A small run, as facts, for the tests of the card and of the data sheet."""

from preceptor.core.statistics import Estimate
from preceptor.report.facts import Asked, Facts, Labelled, Learned
from preceptor.report.prepared import Kind, Source, Summary


def estimate(value: float, low: float | None = None, high: float | None = None, *, n: int = 40) -> Estimate:
    """A figure; without bounds as sure as can be."""
    return Estimate(value=value, low=value if low is None else low, high=value if high is None else high, n=n)


PREPARED = Summary(
    rows=110,
    cases=100,
    dropped=10,
    sources=(Source(name="raw/cases.jsonl", layout="competition", rows=110),),
    splits={"train": 75, "test": 25},
    families={"train": 70, "test": 20},
    dates={"test": ("2024-01-01", "2024-06-30")},
    repeated=4,
    near=6,
    leaks=2,
    boilerplate=0.25,
    redteam=1,
    gold={"human": 25, "none": 75},
    issues=(Kind(field="text", reason="it is empty", action="dropped", count=10, places=("cases.jsonl:3",)),),
    distributions={
        "characters": {"50–99": 100},
        "language": {"en": 90, "zh": 10},
        "risk_level": {"high": 97, "critical": 3},
        "specialty": {f"s{n}": 100 - n for n in range(22)},
        "complexity": {"–": 100},
        "lang_style": {"–": 100},
        "is_deidentified": {"True": 60, "False": 3, "–": 37},
    },
)
FACTS = Facts(
    recipe="flu",
    section="sft",
    language="en",
    task="diagnosis",
    adapter=True,
    base="tiny",
    weights={"adapter/adapter_model.safetensors": "a" * 64},
    data=(("prepare: cases.jsonl", "b" * 64), ("curate/rows.jsonl", "c" * 64)),
    raw={"raw/cases.jsonl": "b" * 64},
    seed=3,
    code={"version": "0.1.0", "commit": "abc", "changed": True},
    settings={"method": "lora", "rank": 8, "alpha": 16, "lr": 1e-3},
    trained={
        "rows": 38.0,
        "refused": 2.0,
        "cut": 0.0,
        "steps": 1200.0,
        "loss": 0.25,
        "chosen_step": 200.0,
        "chosen_grade": 0.75,
        "last_grade": 0.7,
    },
    asked=(Asked("label", "label", "big", ("dashscope",), distillation=True, served=("big-0901",)),),
    labelled=(
        Labelled(
            "label",
            "big",
            "zero_shot",
            1,
            {"cases": 50, "answered": 48, "abstained": 3, "repaired": 2, "failed": 2, "agreement": None},
        ),
    ),
    curated={
        "labels": 50,
        "review": 4,
        "dropped": {"failed": 2, "ungrounded": 4},
        "reviewed": {"kept": 5, "edited": 3, "issues": 0},
        "mixed": {"rows": 7, "superseded": 1},
    },
    learned=Learned(
        rows=40,
        diseases={"Influenza": 25, "Common cold": 12, "Pneumonia": 3},
        abstained=2,
        sources={"cases.jsonl": 35, "textbook": 5},
        sexes={"male": 18, "female": 20, "": 2},
        ages={"0–17": 3, "65+": 30, "": 7},
        held_out=25,
        about_held_out=1,
    ),
    prepared=PREPARED,
    answers={
        "cases": 30,
        "answered": 28,
        "abstained": 3,
        "repaired": 1,
        "failed": 2,
        "failures": {"truncated": 1, "unparsed": 1},
    },
)
