"""Raw files, or the textbook, become cases in splits; what is wrong with a row is written down."""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from preceptor.clinical.textbook.sampler import draw
from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Issue, Language
from preceptor.data import hub, redteam
from preceptor.data.check import check
from preceptor.data.files import Ids, Imported, head, importer_of, read, sniff
from preceptor.data.layouts import DDXPLUS, LAYOUTS, Importer
from preceptor.data.metadata import metadata
from preceptor.data.sections import boilerplate, stripped
from preceptor.data.similar import families
from preceptor.data.splits import SPLITS, Split, assign, benchmark, crossings, family_key, joined
from preceptor.data.tables import Columns
from preceptor.report import prepared
from preceptor.stages.base import Context, Need, Stage, StageConfig, replacing, resolve_callable, write_records

TEXTBOOK = "textbook"
AUTO = "auto"
SHORT = 20
"""Among fewer characters, one that differs may make another patient: such texts are copies only if they are equal."""
MOST = 100_000
"""Texts that are compared each with each: the time grows with their square."""


class Config(StageConfig):
    """Where cases come from and how they are split."""

    source: tuple[str, ...] = Field(min_length=1)
    """Path, glob, `hub:owner/name` or a list of them; or `textbook`."""
    importer: str = AUTO
    """The layout of the files' rows; `auto` finds it out for each file."""
    columns: Columns | None = None
    """Of a table: which column holds what."""
    target: tuple[str, ...] = ()
    """Files of the unlabelled inputs that one wants predicted, as in a competition."""
    drop_sections: tuple[str, ...] = ()
    """Sections that are taken out of every record, since they state the answer."""
    by: Literal["family", "patient", "date"] = "family"
    """What keeps the splits apart."""
    benchmark: int = Field(default=0, ge=0)
    """The best so many of the held-out cases, as a set of their own."""
    most_dropped: float = Field(default=0.1, ge=0, le=1)
    """Largest share of rows that may make no case; beyond it the files are refused."""
    language: Language = "en"
    """Of the textbook's cases and of the report; files speak for themselves."""
    style: Literal["short", "full"] = "full"
    """Of the textbook's records: two or three lines, or all sections of a hospital's."""
    train: int = Field(default=2400, ge=0)
    """Cases of the textbook; of files, the share of each split is as these numbers are to one another."""
    validation: int = Field(default=300, ge=0)
    test: int = Field(default=300, ge=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("source", "target", "drop_sections", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _some_cases(self) -> "Config":
        if not any(self.sizes.values()):
            raise ValueError("no cases wanted: give train, validation or test a number")
        if self.columns and self.importer != AUTO:
            raise ValueError("columns: they say how rows are read, and so does importer; leave out one of them")
        return self

    @property
    def sizes(self) -> dict[Split, int]:
        """Number or share of each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def needs(self) -> tuple[Need, ...]:
        """The files that `source` and `target` name, and the importer's."""
        file = self.importer.rpartition(":")[0]
        needs = [Need("importer", paths=(file,))] if file else []
        for name in ("source", "target"):
            named = [source for source in getattr(self, name) if not source.startswith(hub.PREFIX)]
            if named and named != [TEXTBOOK]:
                needs.append(Need(name, paths=_expand(name, named)))
        return tuple(needs)


def _expand(name: str, sources: Iterable[str]) -> tuple[str, ...]:
    paths: list[str] = []
    for source in sources:
        found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  a pattern may be absolute
        files = [path for path in found if Path(path).is_file()]
        if not files:
            raise UserError(f"prepare.{name}: no file at {source} (seen from {Path.cwd()}); mend the path")
        paths += files
    return tuple(dict.fromkeys(paths))


@dataclass
class _Found:
    """What came of the rows."""

    rows: Counter[str] = field(default_factory=Counter)
    """Of each file."""
    layouts: dict[str, str] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    redteam: list[Case] = field(default_factory=list)
    boilerplate: float = 0.0
    """Share of the characters that stands in many records alike."""
    near: int = 0
    """Texts that are near copies of an earlier one."""


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes a file for each split, issues.jsonl and report.html."""
    found = _Found()
    splits = _from_textbook(config, context) if config.source == (TEXTBOOK,) else _from_files(config, context, found)
    write_records(context.folder / "issues.jsonl", found.issues)
    redteamed = [*redteam.items(), *found.redteam] if found.rows else []
    summary = prepared.summarise(
        splits, found.redteam, found.issues, found.rows, found.layouts, boilerplate=found.boilerplate, near=found.near
    )
    with replacing(context.folder / "report.html") as beside:
        beside.write_text(prepared.render(summary, context.recipe, config.language), "utf-8")
    context.say(prepared.table(summary))
    _refuse_if_bad(config, context, found, splits)
    if crossed := crossings({**splits, "redteam": redteamed}):
        raise WorkError(f"{context.section}: families cross the splits: {'; '.join(crossed[:3])}")
    for split, cases in splits.items():
        write_records(context.folder / f"{split}.jsonl", cases)
    write_records(context.folder / "redteam.jsonl", redteamed)
    return summary.model_dump(mode="json")


def _refuse_if_bad(config: Config, context: Context, found: _Found, splits: Mapping[str, list[Case]]) -> None:
    dropped = sum(issue.action == "dropped" for issue in found.issues)
    where = f"see {context.folder / 'issues.jsonl'}"
    first = next((issue for issue in found.issues if issue.action == "dropped"), None)
    told = f"; the first: {first.file}:{first.line}: {first.problem}" if first else ""
    if not any(splits.values()) and not found.redteam:
        raise UserError(f"{context.section}: {', '.join(config.source)} gives no case{told}")
    rows = found.rows.total()
    if dropped > config.most_dropped * rows:
        raise UserError(
            f"{context.section}: {dropped} of {rows} rows make no case, more than most_dropped={config.most_dropped} "
            f"allows{told}; {where}"
        )


def _from_textbook(config: Config, context: Context) -> dict[str, list[Case]]:
    """Each split has a seed of its own, so that one can grow while the others stay. No text stands in two of them."""
    splits: dict[str, list[Case]] = {}
    taken: dict[str, Split] = {}
    with context.progress(context.section, sum(config.sizes.values())) as tick:
        for place, split in reversed(list(enumerate(SPLITS))):  # what is tested on has the first choice
            number = min(config.sizes[split], config.limit or config.sizes[split])
            seed = len(SPLITS) * config.seed + place

            def drawn(split: Split = split, number: int = number, seed: int = seed) -> Iterator[Case]:
                for case in draw(2 * number + len(taken), seed, config.language, config.style):
                    if taken.setdefault(family_key(case.text), split) == split:
                        yield case

            splits[split] = []
            for case in islice(drawn(), number):
                splits[split].append(case)
                tick()
    return {split: splits[split] for split in SPLITS}


def _from_files(config: Config, context: Context, found: _Found) -> dict[str, list[Case]]:
    met = Ids()
    with context.progress(context.section, None) as tick:
        cases = list(
            islice(_cases(config, config.source, context.inputs.get("source", ()), found, met, tick), config.limit)
        )
        target = list(_cases(config, config.target, context.inputs.get("target", ()), found, met, tick))
    planted = {family_key(case.text) for case in found.redteam}  # the same words elsewhere, without the mark
    found.redteam += [case for case in cases if family_key(case.text) in planted]
    cases = [case for case in cases if family_key(case.text) not in planted]
    with context.progress(f"{context.section}: near-duplicates", None):
        every = cases + target
        every = joined(every, _families(every, context, found))
    cases, target = every[: len(cases)], every[len(cases) :]
    wanted = {case.group for case in target}
    apart = [case for case in cases if case.group not in wanted]  # a near copy of a target case would give it away
    for case in cases:
        if case.group in wanted:
            reason = f"{case.id!r} is a near copy of a target case"
            found.issues.append(Issue(file=", ".join(config.source), line=0, reason=reason, action="dropped"))
    splits: dict[str, list[Case]] = {split: [] for split in SPLITS}
    for case, split in zip(apart, assign(apart, config.sizes, config.by, config.seed) if apart else [], strict=True):
        splits[split].append(case)
    if config.benchmark:
        splits["benchmark"] = benchmark(splits["validation"] + splits["test"], config.benchmark)
    if config.target:
        splits["target"] = target
    return splits


def _families(cases: Sequence[Case], context: Context, found: _Found) -> list[int]:
    """A number for each case, the same for near copies."""
    common = boilerplate(case.text for case in cases)
    texts = [stripped(case.text, common) for case in cases]
    whole = sum(len(stripped(case.text, ())) for case in cases)
    found.boilerplate = 1 - sum(map(len, texts)) / max(1, whole)
    labels = list(range(len(cases)))
    long = [place for place, text in enumerate(texts) if len(text) >= SHORT]
    if len(long) > MOST:
        context.say(f"{context.section}: {len(long):,} texts are too many to compare each with each: equal ones alone")
        return labels
    for place, first in zip(long, families([texts[place] for place in long]), strict=True):
        labels[place] = long[first]
    keys = [family_key(case.text) for case in cases]
    found.near = len({key for key, label in zip(keys, labels, strict=True) if keys[label] != key})
    return labels


def _cases(
    config: Config, sources: Iterable[str], paths: Iterable[Path], found: _Found, met: Ids, tick: Any
) -> Iterator[Case]:
    """The cases of the sources, checked; what is wrong with a row goes to `found`."""
    named: list[Path | str] = [*paths, *(source for source in sources if source.startswith(hub.PREFIX))]
    for source in named:
        importer, found.layouts[str(source)] = _importer(config, source)
        for row in read(source, importer, met):
            if isinstance(row, Issue):
                found.issues.append(row)
            if isinstance(row, Imported) or row.action == "dropped":
                tick()
                found.rows[str(source)] += 1
            if isinstance(row, Issue):
                continue
            case, findings = check(row.case, config.drop_sections)
            found.issues += [
                Issue(file=str(source), line=row.line, field=f.field, reason=f.reason, action=f.action)
                for f in findings
            ]
            if case is not None and redteam.is_redteam(case):
                found.redteam.append(metadata_of(case))
            elif case is not None:
                yield metadata_of(case)


def metadata_of(case: Case) -> Case:
    """The case with what rules say of it where the file says nothing."""
    return case.model_copy(update={"meta": metadata(case)})


def _importer(config: Config, source: Path | str) -> tuple[Importer, str]:
    """Who reads the rows of a source, and the name of its layout."""
    if config.columns:
        return config.columns.importer(head(source)), "columns"
    layout = sniff(source) if config.importer == AUTO else config.importer
    if layout == DDXPLUS:
        return importer_of(layout, source), layout
    return resolve_callable(layout, LAYOUTS, "importer"), layout


STAGE = Stage(
    "prepare",
    Config,
    run,
    leaves=(
        *(f"{split}.jsonl" for split in (*SPLITS, "benchmark", "target", "redteam")),
        "issues.jsonl",
        "report.html",
    ),
)
