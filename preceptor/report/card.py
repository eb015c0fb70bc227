"""The card of a trained model: what it is, what it learned from, how good it is, and what it may not be used for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from preceptor.core.statistics import Estimate
from preceptor.report.facts import MINORS, Facts, Judgement
from preceptor.report.grades import AGREEMENT, BINS, CONSULT, GROUPED, SHARES
from preceptor.report.groups import AXES
from preceptor.report.markdown import rendered
from preceptor.report.summary import UNKNOWN, Words, percent

OVERALL = {
    "diagnosis": (
        *("parsed", "failed", "top1", "disease_f1", *AGREEMENT, "precision", "recall"),
        *("micro_f1", "macro_f1", "category_f1", "exact_set", "unmapped"),
    ),
    "consult": ("parsed", "failed", "think_tag", "think_substantive", "rouge_l"),
}
CONFIDENCE = (
    *("ece", "ece_mass", "auroc", "brier", "nll", "trust"),
    *("abstained", "risk_at_80", "aurc", "augrc"),
)
EVIDENCE = ("evidence_grounded", "hallucinated", "supported")
SAFETY = CONSULT[2:]
BESIDE = {"diagnosis": ("top1", "disease_f1", *AGREEMENT, "evidence_grounded", "ece"), "consult": CONSULT}
"""What models are held against each other by, and what a hub is told."""
JUDGED = ("score", "validity", "repeat_agreement", "kappa", "balanced_f1", "bias")
_ENOUGH = 1_000
"""Answers below which the calibration error says too much."""
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""A hub's names of licences; what a licence's own text begins with is none."""
_SHORT = """\
---
{head}---

# {title}

A student that Preceptor trained. **Not for care**: nothing here says that it was tested on patients.

- **Base**: {base}
- **Learned from**: {rows:,} rows
{transductive}- **How good it is**: measured in its run, by `evaluate`; nothing here says so

## Settings

```yaml
{settings}```
"""


@dataclass(frozen=True)
class Row:
    """A line of a table of figures; without a value it is not measured."""

    label: str
    value: str = ""
    range: str = ""
    n: int = 0


def card(facts: Facts) -> str:
    """The card as Markdown with a hub's header, in the language of the facts."""
    words, own = Words(facts.language), facts.figures
    grouped = next((name for name in GROUPED if name in own), "")
    columns = [name for name in BESIDE[facts.task] if any(name in row for row in facts.metrics.values())]
    wanted = {"overall": OVERALL[facts.task], "confidence": CONFIDENCE if "ece" in own else ()}
    wanted |= {"evidence": EVIDENCE, "safety": ()} if facts.task == "diagnosis" else {"evidence": (), "safety": SAFETY}
    return rendered(
        "card",
        facts.language,
        facts=facts,
        words=words,
        percent=percent,
        head=_yaml(_head(facts, words)),
        base=named(facts.base),
        languages=[words.group("language", name) for name in facts.languages],
        minors=facts.count(facts.learned.ages.get(MINORS, 0)),
        own=own,
        agreement=any(name in own for name in AGREEMENT),
        tables={part: _rows(own, names, words) if own else [] for part, names in wanted.items()},
        columns=[words(name) for name in columns],
        beside=[
            (words.model(name), [_row(row, column, words).value or UNKNOWN for column in columns])
            for name, row in facts.metrics.items()
        ],
        grouped=words(grouped) if grouped else "",
        axes=[(words(f"axis:{axis}"), _groups(own, grouped, axis, words)) for axis in AXES],
        main=own.get(grouped),
        bins=BINS,
        few="ece" in own and own["ece"].n < _ENOUGH,
        severe=sum(facts.severe.values()),
        judged=[(one.judge, one.figures, _rows(_judgement(one), JUDGED, words)) for one in facts.judged],
        teachers={one.model for one in facts.asked},
        settings=_yaml({name: value for name, value in facts.settings.items() if name != "student"}),
    )


def short_card(
    title: str, base: str, settings: Mapping[str, Any], *, adapter: bool, rows: int, transductive: int
) -> str:
    """The card of a model that was trained just now, of which nothing is measured yet.

    `base` is a section, a folder, or a name on a hub (owner/name). `rows`: what was learned, of which `transductive`
    are about target cases.
    """
    head = _library(base, adapter=adapter)
    head["tags"] = ["preceptor", "clinical", *["transductive"] * bool(transductive)]
    said = f"- **Transductive**: {transductive:,} of them are about the target cases\n" if transductive else ""
    return _SHORT.format(
        head=yaml.safe_dump(head, sort_keys=False),
        title=title,
        base=f"`{base}`",
        rows=rows,
        transductive=said,
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )


def _library(base: str, *, adapter: bool) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if _ON_HUB.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    return head


def _head(facts: Facts, words: Words) -> dict[str, Any]:
    """What a hub reads (Hugging Face's model card metadata); without figures there is no model-index."""
    head = _library(facts.base, adapter=facts.adapter)
    if "base_model" in head:
        head["base_model_relation"] = "adapter" if facts.adapter else "finetune"
    if _LICENSE.fullmatch(facts.license):
        head["license"] = facts.license
    marks = {"simulation": facts.textbook, "transductive": facts.transductive}
    head["language"] = list(facts.languages)
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["preceptor", "clinical", "not-for-care", *(mark for mark, so in marks.items() if so)]
    own = facts.figures
    if own:
        name = f"{facts.recipe}-{facts.section}"
        task = {"type": "text-generation", "name": facts.task}
        cases = {"type": facts.recipe, "name": f"{facts.recipe}: held-out cases"}
        told = [
            {"type": metric, "name": words(metric), "value": round(own[metric].value, 4)}
            for metric in ("parsed", *BESIDE[facts.task])
            if metric in own
        ]
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": cases, "metrics": told}]}]
    return head


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1_000)


def named(base: str) -> str:
    """The base's name; of a folder the last part of its path alone, for the others are of one machine."""
    path = Path(base).expanduser()
    return path.name if path.is_absolute() or path.exists() or base.startswith(".") else base


def _rows(own: Mapping[str, Estimate], names: Iterable[str], words: Words) -> list[Row]:
    """A line for each figure; agreement is a stand-in, and missed by nobody."""
    return [_row(own, name, words) for name in names if name in own or name not in AGREEMENT]


def _row(own: Mapping[str, Estimate], name: str, words: Words, label: str = "") -> Row:
    metric = name.partition("[")[0]
    label = label or words(metric)
    if name not in own:
        return Row(label)
    figure = own[name]
    value, low, high = (percent(x) if metric in SHARES else f"{x:.3f}" for x in (figure.value, figure.low, figure.high))
    if floor := own.get(f"{name}_floor"):
        value += f" ({words('floor', value=f'{floor.value:.3f}')})"
    return Row(label, value, f"{low} – {high}", figure.n)


def _groups(own: Mapping[str, Estimate], metric: str, axis: str, words: Words) -> list[Row]:
    """The model's figures by the groups of an axis, in the order in which evaluate has them."""
    start = f"{metric}[{axis}="
    return [
        _row(own, name, words, words.group(axis, name.removeprefix(start).removesuffix("]")))
        for name in own
        if metric and name.startswith(start)
    ]


def _judgement(one: Judgement) -> dict[str, Estimate]:
    """The figures that were estimated: of nothing there is an empty one."""
    return {name: Estimate.model_validate(figure) for name in JUDGED if (figure := one.figures.get(name))}
