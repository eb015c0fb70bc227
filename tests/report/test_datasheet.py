"""What the data sheet says of the cases and labels that a model learned from."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.report.datasheet import datasheet
from preceptor.report.facts import Labelled, Learned, Stated
from preceptor.report.prepared import Source
from tests.report.facts import FACTS, PREPARED

GENERATED = replace(FACTS, textbook=True, learned=replace(FACTS.learned, sources={"textbook": 40}))
STATED = Stated(
    origin="Two hospitals, 2020 to 2024",
    ethics="Waived, EC 2024-17",
    licenses={"cases.jsonl": "CC-BY-4.0"},
    deidentified="By hand",
    retention="Ten years",
    contact="Ward 3",
)


def voting(section: str, strategy: str, agreement: float | None = 0.875) -> Labelled:
    return Labelled(section, "big", strategy, 1, {**FACTS.labelled[0].account, "agreement": agreement})


LINES = {
    "a file": (
        FACTS,
        f"| cases.jsonl | competition | 110 | *not stated*; say it in `export.stated.licenses` | `{'b' * 64}` |",
    ),
    "a licence": (replace(FACTS, stated=STATED), f"| cases.jsonl | competition | 110 | CC-BY-4.0 | `{'b' * 64}` |"),
    "the textbook": (
        replace(GENERATED, prepared=PREPARED.model_copy(update={"sources": (), "gold": {"textbook": 100}})),
        "| textbook | — | 100 | that of Preceptor | drawn anew by the code and seed of the card |",
    ),
    "a hub": (
        replace(
            FACTS, prepared=PREPARED.model_copy(update={"sources": (Source(name="hub:o/n", layout="x.py:f", rows=1),)})
        ),
        "| hub:o/n | x.py:f | 1 | *not stated*; say it in `export.stated.licenses` | *not measured*; it came",
    ),
    "nothing prepared": (replace(FACTS, prepared=None), "*Not stated*: the cases were not prepared in this run."),
    "no origin": (
        FACTS,
        "- **Where the records come from**: *not stated*; say which institutions, years and departments",
    ),
    "an origin": (replace(FACTS, stated=STATED), "- **Where the records come from**: Two hospitals, 2020 to 2024\n"),
    "no origin to be had": (GENERATED, "- **Where the records come from**: nowhere: a program drew them\n"),
    "no consent": (FACTS, "- **Consent and ethics**: *not stated*; name the consent or its waiver"),
    "consent": (replace(FACTS, stated=STATED), "- **Consent and ethics**: Waived, EC 2024-17\n"),
    "no consent to be had": (GENERATED, "- **Consent and ethics**: none needed: no case is a person's\n"),
    "de-identified": (FACTS, "60 yes, 3 no, 37 not said, of 100"),
    "how": (replace(FACTS, stated=STATED), "- **How identities were taken out**: By hand\n"),
    "no leak test": (FACTS, "- **Test with planted identities**: *not measured*\n"),
    "the synthetic": (
        FACTS,
        "5 of 40 rows learned (12.5%) are about generated cases; the generator is the textbook of Preceptor 0.1.0.",
    ),
    "of unknown cases": (
        replace(FACTS, learned=replace(FACTS.learned, sources={"": 30, "a": 10})),
        "*Not measured* for 30 of 40 rows, whose cases are not at hand.",
    ),
    "a labelling": (FACTS, "| label | big | zero_shot | 1 | 50 | 48 | 3 | 2 | 2 | *not measured*; one sample a case |"),
    "a vote": (replace(FACTS, labelled=(voting("label", "self_consistency"),)), "| 3 | 2 | 2 | 0.88 |"),
    "who wrote": (
        FACTS,
        "30 a teacher (0 of them by a vote of several samples), 3 a person by correction, 7 earlier rounds, 0 *not st",
    ),
    "who voted": (
        replace(FACTS, labelled=(voting("label", "self_consistency"),)),
        "30 a teacher (30 of them by a vote of several samples)",
    ),
    "who voted in part": (
        replace(FACTS, labelled=(voting("label", "self_consistency"), voting("label_2", "zero_shot"))),
        "30 a teacher (some of them by a vote of several samples)",
    ),
    "who wrote is not known": (replace(FACTS, labelled=(), curated={}), "0 earlier rounds, 40 *not stated*;"),
    "gold": (FACTS, "- **Gold of the cases**: people's 25, none 75\n"),
    "a split": (FACTS, "| test | 25 | 20 | 2024-01-01 – 2024-06-30 |"),
    "a split without dates": (FACTS, "| train | 75 | 70 |  |"),
    "copies": (FACTS, "- **Repeated texts**: 4 of 100 cases (4%)\n- **Near copies** of another text: 6 (6%)\n"),
    "rows about held-out cases": (
        FACTS,
        "- **Rows learned about held-out cases**: 1 of 40, against 25 held-out cases and red-team items",
    ),
    "diseases": (
        FACTS,
        "3 different names in the answers learned; the 3 commonest, by rows. Answers that name none: <5.",
    ),
    "a disease": (FACTS, "| Influenza | 25 |\n| Common cold | 12 |\n| Pneumonia | <5 |\n"),
    "as many as may be told": (
        replace(FACTS, learned=replace(FACTS.learned, diseases={"Flu": 5, "Cold": 4, "Croup": 0})),
        "| Flu | 5 |\n| Cold | <5 |\n| Croup | 0 |\n",
    ),
    "a disease that nobody has": (GENERATED, "| Pneumonia | 3 |\n"),
    "no disease": (
        replace(FACTS, learned=Learned(rows=2, unread=2)),
        "*Not measured*: no answer that was learned names a disease.",
    ),
    "the sexes": (FACTS, "| male | 18 |\n| female | 20 |\n| not stated | <5 |\n"),
    "the ages": (FACTS, "| 0–17 | <5 |\n| 65+ | 30 |\n| not stated | 7 |\n"),
    "the rarest kinds together": (FACTS, "| s19 | 81 |\n| all others | 159 |\n"),
    "a rare kind": (FACTS, "| high | 97 |\n| critical | <5 |\n"),
    "what was left out": (FACTS, "| text | it is empty | dropped | 10 |"),
    "labels that were dropped": (
        FACTS,
        "Of 50 labels, 4 wait for a person, and these were dropped:\n\n- failed: 2\n- ungrounded: 4\n",
    ),
    "rows that were refused": (FACTS, "In training, 2 rows were refused as too long, and 0 records shortened."),
    "no retention": (FACTS, "- **Retention**: *not stated*; say how long"),
    "a retention": (replace(FACTS, stated=STATED), "- **Retention**: Ten years\n"),
    "no contact": (FACTS, "**TO BE FILLED IN: who answers for the data"),
    "a contact": (replace(FACTS, stated=STATED), "- **Contact**: Ward 3\n"),
}


@pytest.mark.parametrize(("facts", "line"), LINES.values(), ids=LINES)
def test_it_says(facts, line):
    assert line in datasheet(facts)


def test_the_twenty_commonest_diseases_are_told():
    names = {f"d{n}": 100 - n for n in range(30)}
    told = datasheet(replace(FACTS, learned=replace(FACTS.learned, diseases=names)))
    assert "30 different names in the answers learned; the 20 commonest" in told
    assert [line for line in told.splitlines() if line.startswith("| d")] == [
        f"| d{n} | {100 - n} |" for n in range(20)
    ]


def test_a_path_and_the_place_of_a_row_stay_at_home():
    told = datasheet(
        replace(
            FACTS,
            prepared=PREPARED.model_copy(update={"sources": (Source(name="/ward/3/a.csv", layout="table", rows=1),)}),
        )
    )
    assert "/ward" not in told
    assert "cases.jsonl:3" not in told


@pytest.mark.parametrize(
    "facts",
    [
        FACTS,
        GENERATED,
        replace(FACTS, stated=STATED),
        replace(FACTS, prepared=None, labelled=(), curated={}, learned=Learned()),
        replace(FACTS, prepared=PREPARED.model_copy(update={"dates": {}, "issues": ()})),
        replace(FACTS, task="consult", learned=replace(FACTS.learned, diseases={}, unread=40)),
    ],
)
def test_both_languages_tell_the_same(facts):
    english, chinese = (datasheet(replace(facts, language=language)) for language in ("en", "zh"))
    for mark in ("\n## ", "\n| ", "\n|---", "\n- ", "\n> ", "`"):
        assert english.count(mark) == chinese.count(mark), mark
    assert english.lower().count("*not measured*") == chinese.count("*未测量*")
    assert english.lower().count("*not stated*") == chinese.count("*未说明*")
    assert not {word for word in ("Section", "not measured", "Rows") if word in chinese}


@given(st.text(st.sampled_from("|`<>[]*_#\n\r\\&!-~:ab 病"), max_size=20))
def test_no_text_leaves_its_place(text):
    plain, hostile = (
        datasheet(
            replace(
                FACTS,
                learned=replace(FACTS.learned, diseases={f"x{said}": 9}),
                stated=Stated(origin=f"x{said}", licenses={"cases.jsonl": f"x{said}"}),
                prepared=PREPARED.model_copy(
                    update={"distributions": {**PREPARED.distributions, "specialty": {f"x{said}": 9}}}
                ),
            )
        )
        for said in ("", text)
    )
    assert [line.replace("\\|", "").count("|") for line in hostile.splitlines()] == [
        line.count("|") for line in plain.splitlines()
    ]
    assert "<" not in hostile.replace("<5", "").replace("&lt;", "")
