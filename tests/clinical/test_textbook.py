"""The textbook: its loading finds mistakes, its posterior is exact, its records say what was drawn."""

import subprocess
import sys
from importlib.resources import files
from itertools import product
from math import comb

import numpy as np
import pytest

from preceptor.clinical.textbook import book as books
from preceptor.clinical.textbook.exact import Exact, exact
from preceptor.clinical.textbook.posterior import World
from preceptor.clinical.textbook.reader import Mention, Reader, Reading
from preceptor.clinical.textbook.sampler import Patient, Told, draw_patient, sample, tell, write
from preceptor.core.records import Case, Language
from preceptor.core.statistics import ece, ece_floor

LANGUAGES: tuple[Language, ...] = ("zh", "en")


@pytest.fixture(scope="module")
def book() -> books.Textbook:
    return books.load()


@pytest.fixture(scope="module")
def many() -> list[Case]:
    return sample(5000, seed=11, language="en", style="short")


def source(name: str) -> str:
    return files("preceptor.clinical.textbook").joinpath(f"{name}.yaml").read_text("utf-8")


def test_it_has_twenty_diseases_and_eighty_findings(book: books.Textbook) -> None:
    assert (len(book.diseases), len(book.findings)) == (20, 80)
    assert 2 <= len(book.world.groups) <= 3


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (
            "diseases",
            "runny_nose: 0.77",
            "runny_noze: 0.77",
            "diseases.yaml, common_cold, findings: 'runny_noze'",
        ),
        ("diseases", "runny_nose: 0.77", "runny_nose: 1.72", "less than or equal to 1"),
        (
            "diseases",
            "red_flags: [dyspnoea, spo2_low]",
            "red_flags: [dyspnoeia]",
            "influenza, red_flags: 'dyspnoeia'",
        ),
        ("diseases", "excludes: [influenza, pneumonia]", "excludes: [grip]", "common_cold, excludes: 'grip'"),
        ("diseases", "zh: 普通感冒", "zh: 流感", "the name '流感' is used twice"),
        ("diseases", "icd10: J00", "icd10: '00'", "icd10"),
        ("findings", "groups: {systemic: 0.75}", "groups: {sistemic: 0.75}", "findings.yaml, fever, groups"),
        ("findings", "clear: [发热, 体温升高, 发烧, 体温39℃]", "clear: [发热]", "at least 3"),
        (
            "findings",
            "negated: [no fever, denies fever",
            "negated: [fever, denies fever",
            "'fever' is used 2 times",
        ),
        ("world", "[fever, chills,", "[chills,", "'fever' is in 0 blurs"),
        ("world", "age_weights: {child: 0.12", "age_weights: {child: 0.22", "sum to 1"),
        ("world", "abstain_below: 0.45", "abstain_below: 1.45", "abstain_below"),
    ],
)
def test_loading_names_a_mistake(file: str, old: str, new: str, complaint: str) -> None:
    texts = {name: source(name) for name in ("world", "findings", "diseases")}
    assert old in texts[file]
    texts[file] = texts[file].replace(old, new, 1)
    with pytest.raises(ValueError, match="textbook") as error:
        books.parse(**texts)
    assert complaint in str(error.value)


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_phrase_is_read_as_what_it_means(book: books.Textbook, language: Language) -> None:
    reader = Reader(book)
    for subject, phrase, form in books.spoken(book, language):
        assert reader.read(phrase).mentions == (Mention(subject, form, 0, len(phrase)),), phrase


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("style", ["full", "short"])
def test_the_reader_finds_what_the_sampler_wrote(book: books.Textbook, language: Language, style: books.Style) -> None:
    answerer = exact()
    for number in range(400):
        rng = np.random.default_rng([3, number])
        patient = draw_patient(answerer.world, rng)
        told = tell(book, patient.present, book.world.styles[style], rng)
        text, mentions = write(book, patient, told, language, style)
        expected = Reading(patient.sex, patient.age, style, tuple(mentions))
        assert answerer.reader.read(text) == expected, text


@pytest.mark.parametrize(
    ("language", "listed"),
    [("en", "denies fever, chills, dysuria"), ("zh", "否认发热、寒战、尿痛")],
)
def test_one_cue_denies_a_list(book: books.Textbook, language: Language, listed: str) -> None:
    """The first item and its cue are a phrase of their own, the others are named by the words that affirm them."""
    told = [Told(f, "negated", 0.0, listed=True) for f in ("fever", "chills", "dysuria")]
    text, mentions = write(book, Patient("male", 40, 3, (), frozenset()), told, language, "short")
    assert listed in text
    assert [(m.subject, m.form) for m in mentions] == [(t.subject, "negated") for t in told]
    assert Reader(book).read(text).mentions == tuple(mentions)
    alone = [Told(t.subject, "negated", 0.0) for t in told]
    assert listed not in write(book, Patient("male", 40, 3, (), frozenset()), alone, language, "short")[0]


def test_both_languages_say_the_same(book: books.Textbook) -> None:
    names = {d.zh: d.en for d in book.diseases.values()}
    for style in ("full", "short"):
        zh, en = (sample(200, seed=5, language=language, style=style) for language in LANGUAGES)
        for one, other in zip(zh, en, strict=True):
            assert one.gold is not None
            assert other.gold is not None
            assert {names[d]: p for d, p in (one.differential or {}).items()} == other.differential
            assert [names[d] for d in one.gold.diseases] == list(other.gold.diseases)
            evidence = [
                [(e.finding, names.get(str(e.disease), e.disease)) for e in case.gold.evidence] for case in (one, other)
            ]
            assert evidence[0] == evidence[1]


def test_sampling_is_a_pure_function_of_the_seed() -> None:
    assert sample(30, 7, "zh") == sample(30, 7, "zh")
    assert sample(30, 7, "en")[:10] == sample(10, 7, "en")
    assert sample(10, 7, "en") != sample(10, 8, "en")


@pytest.mark.slow
def test_every_process_draws_the_same_to_the_last_digit() -> None:
    program = (
        "import hashlib; from preceptor.clinical.textbook.sampler import sample;"
        "print(hashlib.sha256(repr(sample(40, 5, 'en', 'short')).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_evidence_stands_where_it_says(many: list[Case]) -> None:
    for case in many[:500]:
        assert case.gold is not None
        for evidence in case.gold.evidence:
            assert case.text[evidence.start : evidence.end] == evidence.text
        assert tuple(e.text for e in case.gold.evidence) == case.gold.reason


def test_the_limit_leaves_something_to_know_and_something_not_to_be_known(many: list[Case]) -> None:
    right = [_first(case) in case.gold.diseases or case.expects_abstention for case in many]
    assert 0.75 < np.mean(right) < 0.92
    assert 0.02 < np.mean([case.expects_abstention for case in many]) < 0.13
    assert 0.1 < np.mean([len(case.gold.diseases) == 2 for case in many]) < 0.14


def test_the_posterior_is_calibrated(many: list[Case]) -> None:
    """All marginals of all cases, at the noise floor of a perfect forecaster."""
    pairs = [(p, d in case.gold.diseases) for case in many for d, p in (case.differential or {}).items()]
    confidence, correct = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert ece(confidence, correct) < 1.5 * ece_floor(confidence)
    first = np.array([next(iter((case.differential or {}).values())) for case in many])
    right = np.array([_first(case) in case.gold.diseases for case in many], dtype=float)
    assert ece(first, right) < 1.5 * ece_floor(first)


def _first(case: Case) -> str:
    return next(iter(case.differential or {}))


def test_exact_agrees_with_the_sampler(many: list[Case]) -> None:
    answerer = exact()
    for case in many[:300]:
        names = {answerer.book.diseases[d].en: p for d, p in answerer.posterior(case.text).marginals.items()}
        assert names == case.differential
        answer = answerer.answer(case.text, "en")
        assert answer.abstained == case.expects_abstention
        if not answer.abstained:
            assert answer.diseases[0] == _first(case)
            assert all(names[d] >= 0.5 for d in answer.diseases[1:])


def test_answers_are_drawn_from_the_posterior(many: list[Case]) -> None:
    """At temperature 1 a disease is named as often as its marginal says, within four standard errors."""
    answerer, draws = exact(), 400
    unsure = [case for case in many if not case.expects_abstention and max((case.differential or {}).values()) < 0.7][
        :3
    ]
    for case in unsure:
        answers = [answerer.answer(case.text, "en", temperature=1.0, seed=s).diseases for s in range(draws)]
        name, p = next(iter((case.differential or {}).items()))
        assert abs(np.mean([name in a for a in answers]) - p) < 4 * (p * (1 - p) / draws) ** 0.5
        assert answers[:20] == [answerer.answer(case.text, "en", temperature=1.0, seed=s).diseases for s in range(20)]
        greedy = answerer.answer(case.text, "en")
        cold = {answerer.answer(case.text, "en", temperature=0.01, seed=s).diseases for s in range(20)}
        assert len(cold) == 1
        assert greedy.diseases[0] in next(iter(cold))


SMALL = """
note: a toy
ages: {young: [0, 39], old: [40, 90]}
age_weights: {young: 0.4, old: 0.6}
pairs: 0.2
abstain_below: 0.5
styles: {full: {present: 0.8, absent: 1.0, listed: 0.5}, short: {present: 0.6, absent: 0.5, listed: 0.0}}
forms: {clear: 0.5, lay: 0.3, blurred: 0.2}
denials: {symptom: {zh: [否认], en: ["denies "]}}
groups: {g: {base: 0.1, zh: 甲, en: a}, h: {base: 0.05, zh: 乙, en: b}}
blurs:
  ab: {findings: [a, b], zh: [子丑], en: [vague one]}
  cde: {findings: [c, d, e], zh: [寅卯], en: [vague two]}
"""


def toy() -> books.Textbook:
    """Three diseases, five findings, two groups: small enough to enumerate every state."""
    words = "{name: %s, clear: [%s one, %s two, %s three], negated: [no %s], lay: [my %s]}"
    findings = "\n".join(
        f"{f}: {{kind: symptom, leak: 0.0{i + 1}, groups: {{{'g' if i < 3 else 'h'}: 0.{i + 3}}}, "
        f"absent_mention: 0.{i + 1}, "
        f"zh: {words.replace('%s', f'天{f}')}, en: {words.replace('%s', f'{f}{f}')}}}"
        for i, f in enumerate("abcde")
    )
    diseases = "\n".join(
        f"{d}: {{zh: 病{d}, en: disease {d}, aliases: {{zh: [别名{d}], en: [alias {d}]}}, icd10: A0{i}, "
        f"specialty: s, severity: 1, "
        f"prevalence: 0.{i + 1}, age: {{young: 1, old: {i + 1}}}, sex: {{male: 1, female: {2 - i / 2}}}, "
        f"groups: {{g: 0.{i * 3}}}, "
        f"findings: {{{'abcde'[i]}: 0.7, {'abcde'[i + 1]}: 0.4}}, excludes: [{'z' * (i == 0)}]}}"
        for i, d in enumerate("xyz")
    )
    return books.parse(SMALL, findings, diseases)


@pytest.mark.parametrize("seed", range(6))
def test_the_posterior_agrees_with_brute_force(seed: int) -> None:
    """Enumerates diseases, groups, findings, mentions and forms, and keeps what yields the same reading."""
    book = toy()
    answerer = Exact(book)
    rng = np.random.default_rng(seed)
    patient = draw_patient(answerer.world, rng)
    style: books.Style = "full" if seed % 2 else "short"
    told = tell(book, patient.present, book.world.styles[style], rng)
    text, _ = write(book, patient, told, "en", style)
    said = {(t.subject, t.form if t.form in ("negated", "blurred") else "said") for t in told}
    weights = np.array(
        [_joint(answerer.world, h, patient.sex, patient.age, style, said) for h in answerer.world.hypotheses]
    )
    posterior = answerer.posterior(text)
    np.testing.assert_allclose(posterior.probabilities, weights / weights.sum(), rtol=1e-9)
    assert len(posterior.hypotheses) == 3 + comb(3, 2) - 1


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_what_to_ask_agrees_with_brute_force(seed: int) -> None:
    """The fall of entropy when a finding is known, averaged over both answers, from the same enumeration."""
    answerer = Exact(toy())
    world = answerer.world
    rng = np.random.default_rng(seed)
    patient = draw_patient(world, rng)
    style: books.Style = "full" if seed % 2 else "short"
    told = tell(answerer.book, patient.present, world.book.world.styles[style], rng)
    text, _ = write(answerer.book, patient, told, "en", style)
    said = {(t.subject, t.form if t.form in ("negated", "blurred") else "said") for t in told}
    known = {subject for subject, form in said if form != "blurred"}

    def weights(there: str = "") -> np.ndarray:
        given = [_joint(world, h, patient.sex, patient.age, style, said, there) for h in world.hypotheses]
        return np.array(given)

    def entropy(w: np.ndarray) -> float:
        p = w[w > 0] / w.sum()
        return float(-(p * np.log(p)).sum())

    both, expected = weights(), {}
    for finding in set(world.findings) - known:
        yes = weights(finding)
        no, share = both - yes, yes.sum() / both.sum()
        expected[finding] = entropy(both) - share * entropy(yes) - (1 - share) * entropy(no)
    worth = world.worth_asking(answerer.reader.read(text))
    assert worth == pytest.approx(expected, abs=1e-9)
    assert list(worth.values()) == sorted(worth.values(), reverse=True)


def test_what_would_help_most_is_asked_for_by_name() -> None:
    answerer = exact()
    for text, language, expected in (
        ("Man, 70, breathlessness on exertion for 7 days.", "en", "exertional chest pain"),
        ("男，70岁，活动后气促7天。", "zh", "劳力性胸痛"),
        ("性别: 男\n年龄: 48\n主诉: 乙肝阳性\n现病史: ", "zh", ""),
    ):
        assert answerer.ask(text, language) == expected
    known = "Man, 70, breathlessness on exertion for 7 days; denies exertional chest pain."
    assert "exertional_chest_pain" not in answerer.world.worth_asking(answerer.reader.read(known))


def _joint(
    world: World,
    hypothesis: tuple[str, ...],
    sex: str,
    age: int,
    style: books.Style,
    said: set[tuple[str, str]],
    there: str = "",
) -> float:
    """P(hypothesis, what is said | sex, age) by enumeration of everything hidden, straight from the definition.

    With `there` only where that finding is.
    """
    book, writing = world.book, world.book.world.styles[style]
    names, blurred = list(book.findings), book.world.forms.blurred
    blur_of = {f: name for name, blur in book.world.blurs.items() for f in blur.findings}
    total = 0.0
    for state in product((0, 1), repeat=len(book.world.groups)):
        p_state = 1.0
        for on, (name, group) in zip(state, book.world.groups.items(), strict=True):
            quiet = 1 - group.base
            for disease in hypothesis:
                quiet *= 1 - book.diseases[disease].groups.get(name, 0.0)
            p_state *= 1 - quiet if on else quiet
        active = [name for on, name in zip(state, book.world.groups, strict=True) if on]
        # Of each finding: there and said, there and blurred, there and silent, absent and denied, absent and silent.
        outcomes = []
        for f in names:
            absent = 1 - book.findings[f].leak
            for disease in hypothesis:
                absent *= 1 - book.diseases[disease].findings.get(f, 0.0)
            for name in active:
                absent *= 1 - book.findings[f].groups.get(name, 0.0)
            m1, m0 = writing.present, book.findings[f].absent_mention * writing.absent
            outcomes.append(
                [
                    ((f, "said"), (1 - absent) * m1 * (1 - blurred)),
                    ((blur_of[f], "blurred"), (1 - absent) * m1 * blurred),
                    (None, (1 - absent) * (1 - m1)),
                    ((f, "negated"), absent * m0),
                    (None, absent * (1 - m0)),
                ][: 3 if f == there else 5]
            )
        for combination in product(*outcomes):
            if {thing for thing, _ in combination if thing} == said:
                total += p_state * float(np.prod([p for _, p in combination]))
    prior = dict(zip(world.hypotheses, world.prior(sex, age).tolist(), strict=True))
    return total * float(prior[hypothesis])


def test_the_prior_follows_age_and_sex(book: books.Textbook) -> None:
    world = exact().world
    for sex, age in (("male", 10), ("female", 80)):
        prior = world.prior(sex, age)
        assert prior.sum() == pytest.approx(1)
        singles = {h[0]: p for h, p in zip(world.hypotheses, prior.tolist(), strict=True) if len(h) == 1}
        assert sum(singles.values()) == pytest.approx(1 - book.world.pairs)
        expected = {d.id: d.prevalence * d.age[book.band(age)] * d.sex[sex] for d in book.diseases.values()}
        one, other = (
            "acute_cystitis" if "acute_cystitis" in singles else next(iter(singles)),
            list(singles)[-1],
        )
        assert singles[one] / singles[other] == pytest.approx(expected[one] / expected[other])
    assert world.prior(None, None).sum() == pytest.approx(1)


def test_a_record_that_says_nothing_known_is_still_read() -> None:
    posterior = exact().posterior("性别: 男\n年龄: 48\n主诉: 乙肝阳性\n现病史: ")
    assert posterior.probabilities.sum() == pytest.approx(1)
    assert exact().answer("hello", "en").abstained
