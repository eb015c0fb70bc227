"""The data sheet: where the cases and labels came from that a model learned, how they were split, what was left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from preceptor.data.hub import PREFIX
from preceptor.report.facts import LEAST, TEXTBOOK, Facts
from preceptor.report.markdown import rendered
from preceptor.report.summary import Words, percent

MOST = 20
"""Diseases, or kinds of cases, that are shown."""
UNSAID = "–"
"""What prepare counts where a case doesn't say."""
VOTE = "self_consistency"
_KINDS = ("language", "specialty", "risk_level", "complexity", "lang_style", "characters")
"""Of cases, as prepare counts them."""


@dataclass(frozen=True)
class Source:
    """A file that cases were read from, or the textbook."""

    name: str
    drawn: bool = False
    """Generated, and so to be had again."""
    layout: str = ""
    rows: int | None = None
    license: str = ""
    sha256: str = ""


def datasheet(facts: Facts) -> str:
    """The data sheet as Markdown, in the language of the facts."""
    words, learned, prepared = Words(facts.language), facts.learned, facts.prepared
    told = prepared.distributions if prepared else {}
    marked = told.get("is_deidentified", {})
    return rendered(
        "datasheet",
        facts.language,
        facts=facts,
        words=words,
        percent=percent,
        stated=facts.stated,
        learned=learned,
        prepared=prepared,
        languages=[words.group("language", name) for name in facts.languages],
        synthetic=learned.synthetic,
        unknown=learned.sources.get("", 0),
        only_textbook=learned.about_nobody,
        least=LEAST,
        sources=_sources(facts),
        marked={"yes": marked.get("True", 0), "no": marked.get("False", 0), "unknown": marked.get(UNSAID, 0)},
        provenance=_provenance(facts),
        diseases=list(learned.diseases.items())[:MOST],
        named=len(learned.diseases),
        kinds=[(words(f"of:{kind}"), _commonest(told[kind])) for kind in _KINDS if set(told.get(kind, ())) - {UNSAID}],
        count=facts.count,
        share=lambda part, whole: percent(part / whole) if whole else percent(0),
    )


def _sources(facts: Facts) -> list[Source]:
    """The files that prepare read, with what the user says of their licences; the textbook last."""
    if facts.prepared is None:
        return []
    found = [
        Source(
            name=(name := _file(one.name)),
            layout=_file(one.layout),
            rows=one.rows,
            license=facts.stated.licenses.get(name, ""),
            sha256=facts.raw.get(one.name, ""),
        )
        for one in facts.prepared.sources
    ]
    drawn = facts.prepared.gold.get(TEXTBOOK, 0) if facts.textbook else 0
    return [*found, *([Source(TEXTBOOK, drawn=True, rows=drawn)] if drawn else [])]


def _file(path: str) -> str:
    """The name of a file without its folders; what lies on a hub keeps its owner."""
    return path if path.startswith(PREFIX) else PurePath(path).name


def _commonest(counts: Mapping[str, int]) -> dict[str, int]:
    """In their order, those beyond as one under the empty name."""
    shown, rest = list(counts.items())[:MOST], sum(list(counts.values())[MOST:])
    return dict([*shown, *([("", rest)] if rest else [])])


def _provenance(facts: Facts) -> Mapping[str, int | None]:
    """Rows by who wrote their answers. `vote` is None where only some of the sections that label let samples vote."""
    curated, rows = facts.curated, facts.learned.rows
    human, mixed = curated.get("reviewed", {}).get("edited", 0), curated.get("mixed", {}).get("rows", 0)
    teacher = max(0, rows - human - mixed) if facts.labelled else 0
    voted = {one.strategy == VOTE for one in facts.labelled}
    return {
        "teacher": teacher,
        "vote": None if len(voted) > 1 else teacher * (True in voted),
        "human": human,
        "kept": curated.get("reviewed", {}).get("kept", 0),
        "mixed": mixed,
        "unknown": rows - teacher - human - mixed,
    }
