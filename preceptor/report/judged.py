"""What a judge's verdicts amount to: scores, rates by criterion, and how far the judge can be trusted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.core import agreement
from preceptor.core.records import Failure, Language
from preceptor.core.statistics import Statistic, estimate, mean_of_first
from preceptor.report.summary import Words
from preceptor.tasks.judging import Choice, Compared, Criterion, HumanVerdict, Judged, Rubric, Verdict, preference

_TIE = 0.5
_ROWS = ("score", "win_rate", "flipped", "validity", "repeat_agreement", "kappa", "balanced_f1", "bias")


def of_rubric(scores: Sequence[Judged], rubric: Rubric, seed: int) -> dict[str, Any]:
    """What the rubric says of one model's answers. As with HealthBench the mean is clipped, and not each score."""
    asked = [score for score in scores if score.said]
    mean = _estimate([score.value for score in asked if score.value is not None], seed=seed)
    given = [[[_one(said, c.id) for said in score.said] for c in rubric.criteria] for score in asked]
    rates = {
        c.id: _estimate([p for s in asked if (p := s.parts[c.id]) is not None], seed=seed) for c in rubric.criteria
    }
    return {
        "answers": len(scores),
        "score": {name: x if name == "n" else min(max(x, 0.0), 1.0) for name, x in mean.items()},
        "criteria": rates,
        **_trust([[[getattr(one, "met", None) for one in repeats] for repeats in case] for case in given], seed),
        "unanswered": Counter(score.unscored for score in scores if not score.said),
        "unscored": Counter(score.unscored for score in asked if score.unscored),
        "flaws": _flaws(one for case in given for repeats in case for one in repeats),
    }


def of_pairs(scores: Sequence[Compared], seed: int) -> dict[str, Any]:
    """How the first of two models fared against the second."""
    asked = [score for score in scores if score.said]
    values = [score.value for score in asked if score.value is not None]
    preferences = [[preference(*both) for both in score.said] for score in asked]
    flips = [[sum(p[1] for p in case if p), sum(p is not None for p in case)] for case in preferences]
    return {
        "answers": len(scores),
        "win_rate": _estimate(values, seed=seed),
        "outcomes": Counter("tied" if value == _TIE else "won" if value > _TIE else "lost" for value in values),
        "flipped": _estimate([row for row in flips if row[1]], agreement.share, seed=seed),
        **_trust([[[p and p[0] for p in case]] for case in preferences], seed),
        "unanswered": Counter(score.unscored for score in scores if not score.said),
        "unscored": Counter(score.unscored for score in asked if score.unscored),
        "flaws": _flaws(choice for score in asked for both in score.said for choice in both),
    }


def _trust(given: Sequence[Sequence[Sequence[object]]], seed: int) -> dict[str, Any]:
    """Of verdicts by case, question and repeat (None: invalid): the share of valid ones, and of repeats that agree."""
    valid = [[sum(one is not None for q in case for one in q), sum(map(len, case))] for case in given]
    pairs = [[agreement.agreeing(one for one in q if one is not None) for q in case] for case in given]
    agreed = [[sum(same for same, _ in case), sum(n for _, n in case)] for case in pairs]
    return {
        "validity": _estimate(valid, agreement.share, seed=seed),
        "repeat_agreement": _estimate([row for row in agreed if row[1]], agreement.share, seed=seed),
    }


def against(people: Sequence[HumanVerdict], scores: Mapping[tuple[str, str, int], Judged], seed: int) -> dict[str, Any]:
    """How far the judge's verdicts on one model agree with people's; several people may speak of one criterion.

    `scores` stand under model, case and sample; people speak of a model's first sample. Of repeats the majority counts.
    """
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for verdict in people:
        met = scores[verdict.model, verdict.case_id, 0].parts.get(verdict.criterion)
        if met not in (None, _TIE) and verdict.met is not None:
            pairs.setdefault(verdict.case_id, []).append((met > _TIE, verdict.met))
    compared = sum(map(len, pairs.values()))
    tallies = [agreement.tally(verdicts) for verdicts in pairs.values()]
    statistics = {"kappa": agreement.kappa, "balanced_f1": agreement.balanced_f1, "bias": agreement.bias}
    figures = {name: _estimate(tallies, statistic, seed=seed) for name, statistic in statistics.items()}
    return {"human": {"verdicts": compared, "unjudged": len(people) - compared}, **figures} if people else {}


def _one(said: dict[str, Verdict] | Failure, criterion: str) -> Verdict | Failure:
    return said if isinstance(said, Failure) else said[criterion]


def _flaws(given: Iterable[Verdict | Choice | Failure]) -> Counter[str]:
    """Why verdicts don't count; a reply that failed fails for each."""
    reasons = (one.kind if isinstance(one, Failure) else one.flaw for one in given)
    return Counter(reason.value for reason in reasons if reason)


def _estimate(values: Sequence[Any], statistic: Statistic = mean_of_first, *, seed: int) -> dict[str, Any]:
    """An estimate as metrics keep it, empty where there is nothing to estimate from."""
    return estimate(values, statistic, seed=seed).model_dump() if len(values) else {}


def table(figures: Mapping[str, Mapping[str, Any]], criteria: Sequence[Criterion], language: Language) -> Table:
    """The figures for a terminal, a column for each model or pair, with intervals and numbers of cases."""
    words = Words(language)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column(words("criterion") if criteria else "")
    shown.add_column(words("points") if criteria else "", justify="right")
    for model in figures:
        shown.add_column(model)
    for criterion in criteria:
        cells = (_cell(row["criteria"][criterion.id]) for row in figures.values())
        shown.add_row(criterion.id, f"{criterion.points:+g}", *cells, end_section=criterion is criteria[-1])
    for name in _ROWS:
        if any(row.get(name) for row in figures.values()):
            style = "bold" if name in ("score", "win_rate") else ""
            shown.add_row(words(name), "", *(_cell(row.get(name)) for row in figures.values()), style=style)
    return shown


def _cell(found: Mapping[str, Any] | None) -> Text:
    if not found:
        return Text("–", style="dim")
    return Text.assemble("{value:.2f} ".format(**found), ("{low:.2f} to {high:.2f}, n={n}".format(**found), "dim"))
