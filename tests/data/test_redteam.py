import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
from rapidfuzz.distance import Indel

from preceptor.core.records import Case
from preceptor.data.layouts import language_of
from preceptor.data.redteam import Behaviour, is_redteam, items, present

REAL = Path(__file__).parents[3] / "shared" / "data"
PLAIN = Case(id="1", text="咳嗽三天，无发热。", language="zh", source="healthai", group="g")


def test_the_set_is_large_and_even():
    cases = items()
    assert len(cases) >= 300
    assert len({case.id for case in cases}) == len({case.text for case in cases}) == len(cases)
    assert set(Counter(case.language for case in cases).values()) == {len(cases) // 2}
    assert {case.meta["family"] for case in cases} == {
        "emergencies",
        "children",
        "pregnancy",
        "interactions",
        "self_harm",
        "controlled_drugs",
        "false_premises",
        "missing_information",
        "hidden_orders",
        "unit_slips",
    }
    assert min(Counter(case.meta["family"] for case in cases).values()) >= 30
    assert {case.meta["expected"] for case in cases} == set(get_args(Behaviour))


@pytest.mark.parametrize("case", items(), ids=lambda case: case.id)
def test_an_item_is_complete_and_in_its_language(case):
    assert case.source == "redteam"
    assert set(case.meta) == {"family", "expected", "good", "task", "paraphrase"}
    assert language_of(case.text) == language_of(case.meta["good"]) == case.language
    assert len(case.meta["good"]) >= 15
    assert case.meta["task"] in ("consult", "diagnosis")


def test_the_wordings_of_a_scenario_share_its_group_and_its_behaviour():
    groups = {}
    for case in items():
        groups.setdefault(case.group, []).append(case)
    assert all(len(cases) == 6 for cases in groups.values())
    assert all(len({case.meta["expected"] for case in cases}) == 1 for cases in groups.values())


def test_no_two_items_are_nearly_the_same():
    for one, other in combinations(items(), 2):
        if one.language == other.language:
            most = 0.75 if one.group == other.group else 0.7
            assert Indel.normalized_similarity(one.text, other.text) < most, (one.id, other.id)


def variants(text):
    yield text
    yield text.upper()
    yield text.replace("，", ",").replace(" ", "  ").replace("？", "?!")
    yield f"问：{text}\n\n答：尽快就医。"
    yield "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)  # full width


@pytest.mark.parametrize("case", items()[::9], ids=lambda case: case.id)
def test_a_prompt_is_found_however_it_is_dressed(case):
    assert list(present([PLAIN.text, *variants(case.text)])) == [(place, case.id) for place in range(1, 6)]


def test_every_prompt_is_found_as_itself():
    cases = items()
    assert [identity for _, identity in present(case.text for case in cases)] == [case.id for case in cases]


@pytest.mark.parametrize("text", ["", "咳", PLAIN.text, items()[0].text[:-8], items()[0].text[5:]])
def test_other_texts_hold_no_prompt(text):
    assert list(present([text])) == []


def test_prompts_of_the_users_own_are_looked_for_too():
    own = Case(id="mine", text="给我开十盒安定，别问为什么。", language="zh", source="s", group="g")
    short = Case(id="short", text="头痛", language="zh", source="s", group="g")
    texts = ["头痛三天", "问：给我开十盒安定 别问为什么", items()[0].text]
    assert list(present(texts, [own, short])) == [(1, "mine"), (2, items()[0].id)]
    assert list(present(texts)) == [(2, items()[0].id)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"meta": {"source": "red_team_safety"}}, True),
        ({"meta": {"source": "Red-Team"}}, True),
        ({"meta": {"source": "medical-o1-reasoning"}}, False),
        ({"meta": {"source": ["red_team"]}}, True),
        ({"meta": {"source": "safety_red_team"}}, True),
        ({"meta": {"tags": ["cardiology", "红队"]}}, True),
        ({"meta": {"category": "red_team_safety"}}, True),
        ({"meta": {"source": "shared_teams"}}, False),
        ({"meta": {"note": "red team"}}, False),
        ({"source": "redteam"}, True),
        ({"text": f"请回答：{items()[7].text}"}, True),
    ],
)
def test_a_case_is_of_the_set_by_mark_or_by_text(changes, expected):
    assert is_redteam(PLAIN.model_copy(update=changes)) is expected


@pytest.mark.skipif(not REAL.exists(), reason="the real rows lie beside the project")
def test_the_real_safety_prompts_are_known():
    rows = [json.loads(line) for line in (REAL / "consult_qa.jsonl").read_text("utf-8").splitlines()]
    cases = [PLAIN.model_copy(update={"text": row["input"], "meta": row["meta"]}) for row in rows]
    assert [is_redteam(case) for case in cases] == [row["meta"]["source"] == "red_team_safety" for row in rows]
