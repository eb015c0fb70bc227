"""Figures as a page: tables in Markdown below a line above which a person writes what they mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan

from benchmarks.results.figures import DIFFERENTIAL, Mean, Run, means, overall
from preceptor.clinical.textbook.exact import Confidence
from preceptor.core.statistics import Estimate

MARK = "<!-- `make results` writes all that stands between this line and the next such, and nothing above it. -->"
PRETRAINED = "<!-- `make results STUDENT=smollm2` writes all that stands below this line. -->"
BEGINNING = "# What a student gains from its teacher's probabilities\n\nNobody has written yet what the tables mean."
BEST = "sft"
"""The student that learns the teacher's best labels, against which the others are held."""
_YARDSTICKS = {
    "exact": "the limit: the exact posterior",
    "teacher": "the teacher",
    "bag_of_words": "bag of words, best labels",
    "base": "the student before",
    "few_shot": "the student before, few-shot",
}
_OTHERS = {
    "sft_sampled": "SFT, sampled labels",
    "distill_first_alone": "FIRST alone",
    "distill_first": "FIRST",
    "distill_first_resoftmax": "FIRST, re-softmax",
    "distill_bucket": "tail bucket",
    "distill_bucket_temperature": "tail bucket, temperature",
    "distill_decoupled": "tail-decoupled",
    "distill_sampled": "random sampling",
    "distill_full": "full distillation",
}
METHODS = {**_YARDSTICKS, BEST: "SFT, best labels", **_OTHERS}
_TEACHERS: Mapping[Confidence, str] = {"over": "over-confident", "honest": "honest", "under": "under-confident"}
_COLUMNS: Mapping[str, str] = {
    "parsed": "parsed",
    "top1": "top-1",
    DIFFERENTIAL: "differential F1",
    "ece": "ECE (floor)",
    "brier": "Brier",
    "augrc": "AUGRC",
}


@dataclass(frozen=True)
class About:
    """What else is told of the runs."""

    command: str
    machine: str


def page(runs: Sequence[Run], about: About) -> str:
    """Every table of the runs with three teachers."""
    order = sorted(runs, key=lambda run: (list(_TEACHERS).index(run.teacher), run.seed))
    parts = [_about(order, about)]
    rows, gains = means(order), means(order, BEST)
    for teacher in (one for one in _TEACHERS if one in rows):
        seeds = [run.seed for run in order if run.teacher == teacher]
        parts += [
            f"## A teacher who is {_TEACHERS[teacher]}\n\nSeeds {', '.join(map(str, seeds))}.",
            _table(METHODS, {model: _means(row) for model, row in rows[teacher].items()}),
            f"Differences to {METHODS[BEST]}, run by run:",
            _table(_OTHERS, {model: _gains(row) for model, row in gains[teacher].items()}),
        ]
    if len(rows) > 1:
        parts += [
            f"## All teachers\n\nDifferences to {METHODS[BEST]}, each teacher counted alike:",
            _table(_OTHERS, {model: _gains(row) for model, row in overall(order, BEST).items()}),
        ]
    return "\n\n".join(parts)


def pretrained(run: Run, about: About) -> str:
    """The table of the pretrained student."""
    cells = {model: _estimates(row) for model, row in run.figures.items()}
    return (
        f"## A pretrained student\n\nSmolLM2-135M-Instruct, by `{about.command}` in {run.seconds / 3600:.1f} hours. "
        f"Machine: {about.machine}. One seed of the over-confident teacher, {run.cases:,} cases, over which the "
        f"intervals are.\n\n{_table(METHODS, cells)}"
    )


def written(old: str, tables: str, mark: str = MARK) -> str:
    """The page with other tables below one of the marks; the other's, and what a person wrote above, are kept."""
    above, _, rest = (old or BEGINNING).partition(MARK)
    parts = dict(zip((MARK, PRETRAINED), rest.partition(PRETRAINED)[::2], strict=True)) | {mark: tables}
    below = (f"{line}\n\n{text.strip()}" for line, text in parts.items() if text.strip())
    return "\n\n".join([above.rstrip(), *below]) + "\n"


def _about(runs: Sequence[Run], about: About) -> str:
    hours = sum(run.seconds for run in runs) / 3600
    sizes = sorted({run.cases for run in runs})
    return (
        f"## How\n\n`{about.command}`: {len(runs)} runs of `recipes/results.yaml`, together {hours:.1f} hours of one "
        f"thread each, two at a time. Machine: {about.machine}. "
        f"Each run has cases of its own, and is tested on {' or '.join(f'{size:,}' for size in sizes)}. "
        "A simulation: **illustrative, not for care**.\n\n"
        "A figure is the mean over the seeds, ± half its 95 % interval (Student's t, the variance among seeds pooled "
        "over the teachers). A top-1 that is right counts an abstention that was expected; ECE, Brier and AUGRC are of "
        "the disease named first, where the answer names one, so that a student who is hardly parsed may seem well "
        "calibrated. The floor is the ECE of perfect confidence on as many answers; differences have none. "
        "Differential F1 holds the diseases that a model believes with more than 1 % against those that the exact "
        "posterior does, in cases where an answer is expected."
    )


def _table(names: Mapping[str, str], cells: Mapping[str, list[str]]) -> str:
    """A row for each of these models of which anything is known."""
    head = ["", *_COLUMNS.values()]
    lines = [head, ["---"] * len(head), *([name, *cells[model]] for model, name in names.items() if model in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _means(row: Mapping[str, Mean]) -> list[str]:
    cells = [_mean(row.get(metric), "") for metric in _COLUMNS]
    return _floored(cells, row["ece_floor"].value if "ece_floor" in row else None)


def _gains(row: Mapping[str, Mean]) -> list[str]:
    return [_mean(row.get(metric), "+") for metric in _COLUMNS]


def _estimates(row: Mapping[str, Estimate]) -> list[str]:
    cells = [
        f"{_number(one.value)} ({_number(one.low)} to {_number(one.high)})" if (one := row.get(metric)) else ""
        for metric in _COLUMNS
    ]
    return _floored(cells, row["ece_floor"].value if "ece_floor" in row else None)


def _floored(cells: list[str], floor: float | None) -> list[str]:
    place = list(_COLUMNS).index("ece")
    if floor is None or not cells[place]:
        return cells
    return [*cells[:place], f"{cells[place]} ({_number(floor)})", *cells[place + 1 :]]


def _mean(mean: Mean | None, sign: str) -> str:
    if mean is None:
        return ""
    return _number(mean.value, sign) + ("" if isnan(mean.half) else f" ± {_number(mean.half)}")


def _number(value: float, sign: str = "") -> str:
    """Three digits, with no zero before the point."""
    told = format(value, f"{sign}.3f").replace("-", "−")
    return told.replace("0.", ".", 1)
