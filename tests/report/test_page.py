"""The page: nothing from data is markup, nothing comes from elsewhere, everything is there."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from preceptor.core.records import Case, Diagnosis, Evidence, FailureKind, Language, Polarity, Prediction
from preceptor.core.statistics import Estimate
from preceptor.report import page
from preceptor.report.baseline import BAG_OF_WORDS, commonest, exact
from preceptor.report.metrics import Evaluator
from preceptor.report.summary import Words, find_student, summarise
from preceptor.tasks.diagnosis import textbook_namer
from tests.report.made import TEXT, answer, case, evidence, failure

ASTHMA, INFLUENZA = "Bronchial asthma", "Influenza"
BESIDE = page.Beside(
    curve=[(step, 4 / step) for step in range(1, 401)],
    normaliser=Estimate(value=0.97, low=0.95, high=0.98, n=320),
)
HOSTILE = "<script>alert('x')</script><img src=https://example.org/x onerror=alert(1)> {{ 7*7 }}"


def made(hostile: str = "") -> tuple[list[Case], list[Prediction]]:
    differential = {ASTHMA + hostile: 0.8, INFLUENZA: 0.3}
    cases = [
        case(
            i,
            ASTHMA + hostile,
            text=TEXT + hostile,
            differential=differential,
            source="textbook",
            meta={"sex": ("male", "female")[i % 2], "specialty": f"of{hostile} {i // 10}"},
        )
        for i in range(20)
    ]
    names = [ASTHMA + hostile if i % 4 else INFLUENZA + hostile for i in range(20)]
    predictions = [answer(i, names[i], confidence=0.5 + i / 50) for i in range(19)]
    predictions += [failure(19, text=hostile or "I am not sure")]
    predictions += [answer(i, INFLUENZA, model=BAG_OF_WORDS, confidence=0.6) for i in range(20)]
    predictions += [answer(1, ASTHMA, model="other" + hostile, reason=("never said" + hostile,), confidence=0.9)]
    return cases, [*predictions, *exact(cases)]


def rendered(
    cases: list[Case],
    predictions: list[Prediction],
    language: Language = "en",
    student: str = "",
    title: str = "run",
) -> str:
    evaluator = Evaluator(cases)
    for prediction in predictions:
        evaluator.add(prediction)
    evaluation, words = evaluator.evaluation(), Words(language)
    summary = summarise(evaluation, words, student)
    told = [p for p in predictions if p.model == summary.student]
    examples = page.collect(evaluator.cases, page.chosen(evaluation.ranking[summary.student]), told, textbook_namer())
    return page.render(evaluation, summary, words, title, examples, replace(BESIDE, notices=[words("simulation")]))


class Reader(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")


def test_what_comes_from_data_is_text() -> None:
    cases, predictions = made(HOSTILE)
    for student in ("student", "other" + HOSTILE):
        html = rendered(cases, predictions, student=student, title=HOSTILE)
        reader = Reader(html)
        assert not {"script", "img", "iframe", "object"} & set(reader.tags)
        assert not [name for name in reader.attributes if name.startswith("on")]
        assert "&lt;script&gt;" in html
        assert "{{ 7*7 }}" in html


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = rendered(*made())
    reader = Reader(html)
    assert not {"src", "href", "srcset", "data", "action"} & set(reader.attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    assert not {"script", "link"} & set(reader.tags)


def test_every_part_is_there() -> None:
    html = rendered(*made())
    assert "A simulation for engineering, illustrative, not for care." in html
    assert html.count("<article") == page.WORST + page.REST
    assert html.count("<svg viewBox") == 2 * 4 + 1
    assert "Loss over 400 steps: from 4.000 to 0.010." in html
    assert "F1, macro" in html
    assert "GTPA@1" in html
    assert html.count("<figcaption>Sex</figcaption>") == 1
    assert re.search(r'<th scope="row">female</th><td><span class="bar".*?<small>[\d–]+ · 10</small>', html, re.DOTALL)
    assert f'<tr><th scope="row">{ASTHMA}</th><td>{INFLUENZA}</td><td>5</td></tr>' in html
    assert "of 320 known variants of names, the matching leads 97% to where they belong" in html
    assert html.count("<h1>The student&#39;s first diagnosis is right in 70% of 20 held-out cases") == 1
    assert "points above a bag of words" in html
    assert "of the exact limit" in html
    assert "unreadable" in html
    assert "I am not sure" in html


def test_in_chinese_the_page_is_chinese() -> None:
    html = rendered(*made(), language="zh")
    assert '<html lang="zh">' in html
    assert "工程模拟，仅作示意，不可用于诊疗。" in html
    assert "首位诊断正确率为 70%" in html


def test_a_student_that_does_not_beat_a_bag_of_words_is_told_so() -> None:
    cases = [case(i, ASTHMA) for i in range(30)]
    for right, sentence in (
        (2, "points below a bag of words"),
        (14, "not clearly different from a bag of words"),
    ):
        student = [answer(i, ASTHMA if i < right else INFLUENZA) for i in range(30)]
        bag = [answer(i, ASTHMA if i >= 15 else INFLUENZA, model=BAG_OF_WORDS) for i in range(30)]
        assert sentence in rendered(cases, [*student, *bag])


def test_a_student_that_knows_no_more_than_what_is_common_is_told_so() -> None:
    cases = [case(i, ASTHMA if i % 2 else INFLUENZA) for i in range(30)]
    always = list(commonest([("x", (ASTHMA,))], cases))
    for right, told in ((16, True), (28, False)):
        student = [answer(i, c.gold.diseases[0] if i < right else "x") for i, c in enumerate(cases) if c.gold]
        html = rendered(cases, [*student, *always])
        assert ("not clearly better than naming the commonest disease" in html) is told


def test_what_is_not_known_is_a_dash_and_agreement_is_not_called_accuracy() -> None:
    cases = [case(i, gold=None, gold_source=None) for i in range(3)]
    predictions = [answer(i, ASTHMA) for i in range(3)]
    teacher = {c.id: Diagnosis(diseases=(ASTHMA,)) for c in cases}
    evaluator = Evaluator(cases, teacher)
    for prediction in [*predictions, answer(0, ASTHMA, model="teacher", reason=())]:
        evaluator.add(prediction)
    summary = summarise(evaluator.evaluation(), Words("en"))
    assert summary.columns == ("parsed", "agreement_top1", "agreement_disease_f1", "evidence_grounded", "ece")
    assert "that is agreement and not accuracy" in summary.headline
    assert [cell.text for cell in summary.lines[1].cells][1:] == ["—", "—", "—", "—"]


def test_words_are_cut_at_the_edges_of_evidence() -> None:
    denied = evidence("chest pain").model_copy(update={"polarity": Polarity.NEGATED})
    overlapping = Evidence(text="cough", start=TEXT.index("cough"), end=TEXT.index("cough") + 5)
    known = (evidence("productive cough"), evidence("Wheeze"))
    cut = page.segments(TEXT, (evidence("productive cough"), overlapping, denied), known)
    assert "".join(segment.text for segment in cut) == TEXT
    assert [(s.text, s.kind) for s in cut if s.kind] == [
        ("productive ", "affirmed"),
        ("cough", "affirmed"),
        ("chest pain", "negated"),
        ("Wheeze", "missed"),
    ]


def test_an_example_shows_what_was_found_and_what_was_not() -> None:
    shown = page.example(
        case(1, ASTHMA, INFLUENZA),
        answer(1, ASTHMA, "Migraine", reason=("productive cough", "platelets 12"), confidence=0.7),
        textbook_namer(),
    )
    assert shown.verdict == "partly"
    assert [(d.name, d.probability, d.shared) for d in shown.predicted] == [
        (ASTHMA, 0.7, True),
        ("Migraine", None, False),
    ]
    assert shown.gold is not None
    assert [d.shared for d in shown.gold] == [True, False]
    assert [s.text for s in shown.segments if s.kind == "affirmed"] == ["productive cough"]
    assert shown.lost == ("platelets 12",)


def test_rightful_abstention_is_right_and_misses_nothing() -> None:
    shown = page.example(case(1, ASTHMA, abstain=True), answer(1), textbook_namer())
    assert shown.verdict == "right"
    assert shown.gold is not None
    assert shown.gold[0].shared is None
    assert page.example(case(1, ASTHMA), answer(1), textbook_namer()).verdict == "abstained"
    assert page.example(case(1, ASTHMA), failure(1, FailureKind.TIMEOUT), textbook_namer()).verdict == "failed"


def test_cases_shown_are_the_worst_and_some_of_the_rest_up_to_the_best() -> None:
    names = [str(i) for i in range(100)]
    assert page.chosen(names) == ["0", "1", "2", "3", "4", "5", "6", "37", "68", "99"]
    assert page.chosen(names[:3]) == names[:3]


@pytest.mark.parametrize(
    ("models", "student"),
    [
        (["base", "student", "teacher", "exact"], "student"),
        (["base", "sft", "rl", "bag_of_words"], "rl"),
        (["base", "exact"], "base"),
    ],
)
def test_the_student_is_the_last_model_trained(models: list[str], student: str) -> None:
    assert find_student(models) == student


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path: Path, language: Language, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is missing: apt-get install chromium")
        pytest.skip("no chromium here")
    # The page has no script; a frame beside it of the width of a screen measures what it takes up.
    (tmp_path / "report.html").write_text(rendered(*made(), language=language), "utf-8")
    (tmp_path / "measure.html").write_text(
        f"<iframe id=f src=report.html style='width:{width}px;height:20000px;border:0'></iframe><p id=p></p>"
        "<script>f.onload = () => { const d = f.contentDocument; p.textContent ="
        "'width ' + d.documentElement.scrollWidth + ' height ' + d.body.offsetHeight; }</script>"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"file://{tmp_path / 'measure.html'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = re.search(r"width (\d+) height (\d+)", shown)
    assert found is not None, shown
    assert int(found[1]) == width
    assert int(found[2]) > 1500
