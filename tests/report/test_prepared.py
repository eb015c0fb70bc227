"""The page on prepared files: figures that add up, issues by kind, data that stays data."""

from preceptor.core.records import Case, Issue
from preceptor.report import prepared


def case(number: int, text: str, group: str, **meta: object) -> Case:
    return Case(id=str(number), text=text, language="zh", source="s", group=group, meta=meta)


SPLITS = {
    "train": [
        case(1, "咳嗽三天", "a", specialty="<b>x</b>"),
        case(2, "咳嗽三天", "a"),
        case(3, "咳嗽三天半", "a", leaks=["主诉"]),
    ],
    "test": [case(4, "腹痛" * 100, "b")],
    "benchmark": [case(4, "腹痛" * 100, "b")],
}
ISSUES = [
    Issue(file="a.jsonl", line=2, field="id", reason="'x' was met before, at a.jsonl:1", action="dropped"),
    Issue(file="a.jsonl", line=9, field="id", reason="'y' was met before, at a.jsonl:3", action="dropped"),
    Issue(file="a.jsonl", line=4, field="text", reason="the answer is stated in 主诉: <script>", action="kept"),
]


def tally(file: str) -> prepared.Tally:
    counts = prepared.Tally()
    counts.rows[file], counts.layouts[file], counts.boilerplate, counts.near = 6, "healthai", 0.25, 1
    for issue in ISSUES:
        counts.issue(issue)
    for one in (*SPLITS["train"], *SPLITS["test"]):
        counts.case(one, [split for split, cases in SPLITS.items() if one in cases])
    return counts


def test_figures_add_up() -> None:
    summary = tally("a.jsonl").summary(SPLITS, redteam=0)
    assert (summary.rows, summary.cases, summary.dropped) == (6, 4, 2)
    assert (summary.repeated, summary.near, summary.leaks) == (1, 1, 1)
    assert summary.families == {"train": 1, "test": 1, "benchmark": 1}
    assert [(kind.count, kind.places) for kind in summary.issues] == [
        (2, ("a.jsonl:2", "a.jsonl:9")),
        (1, ("a.jsonl:4",)),
    ]
    assert summary.distributions["characters"] == {"0–49": 3, "200–299": 1}
    assert summary.distributions["specialty"] == {"–": 3, "<b>x</b>": 1}


def test_the_page_escapes_data_and_speaks_both_languages() -> None:
    summary = tally("<i>.jsonl").summary(SPLITS, redteam=0)
    for language, headline in (("en", "6 rows gave 4 cases; 2 were dropped"), ("zh", "6 行得到 4 个病例；剔除 2 行")):
        html = prepared.render(summary, "run", language)
        assert headline in html
        assert "<b>x</b>" not in html
        assert "<i>.jsonl" not in html
        assert "http" not in html
