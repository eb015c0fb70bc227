"""Raw files, or the textbook, become cases in splits; what is wrong with a row is written down."""

import glob
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from preceptor.clinical.textbook.sampler import draw
from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Issue, Language, Task
from preceptor.data import hub, redteam
from preceptor.data.copies import SHORT
from preceptor.data.files import Ids
from preceptor.data.sections import boilerplate, stripped, unknown, variants
from preceptor.data.similar import Groups, families
from preceptor.data.splits import SPLITS, Member, Split, assign, benchmark, crossings, family_key, joined, member
from preceptor.data.tables import Columns
from preceptor.report import prepared
from preceptor.stages.base import (
    Context,
    Lines,
    Need,
    Stage,
    StageConfig,
    replacing,
    write_records,
)
from preceptor.stages.gather import AUTO, Rows, cases

TEXTBOOK = "textbook"
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
    task: Task = "diagnosis"
    """Of the textbook's gold: diseases, or advice."""
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


@dataclass(frozen=True, slots=True)
class _Place:
    """The group of a case, and the splits that it goes to: none if it is left out."""

    group: str
    splits: tuple[str, ...] = ()


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes a file for each split, issues.jsonl and report.html."""
    textbook = config.source == (TEXTBOOK,)
    if textbook and config.target:
        raise UserError("prepare.target: beside the textbook's cases there are no target's; name files as the source")
    splits = [*SPLITS, *["benchmark"] * bool(config.benchmark), *["target"] * bool(config.target)]
    listed, waiting = context.folder / "issues.jsonl", context.folder / ".cases.jsonl"
    for path in (listed, waiting):
        path.unlink(missing_ok=True)
    with Lines(listed) as issues, ExitStack() as files:
        rows = Rows(waiting, prepared.Tally(), issues, unmet=unknown(config.drop_sections))
        files.callback(waiting.unlink, missing_ok=True)
        places = _of_textbook(config, context, rows) if textbook else _of_files(config, context, rows)
        out = {split: files.enter_context(_written(context.folder / f"{split}.jsonl")) for split in splits}
        for case, place in zip(rows.cases(), places, strict=True):
            if place.splits:
                rows.tally.case(case := _in_group(case, place.group), place.splits)
            for split in place.splits:
                out[split](case)
        summary = rows.tally.summary(splits, len(rows.redteam))
        with replacing(context.folder / "report.html") as beside:
            beside.write_text(prepared.render(summary, context.recipe, config.language), "utf-8")
        context.say(prepared.table(summary))
        _refuse_if_bad(config, context, rows, summary)
    write_records(context.folder / "redteam.jsonl", [] if textbook else [*redteam.items(), *rows.redteam])
    return summary.model_dump(mode="json")


@contextmanager
def _written(path: Path) -> Iterator[Callable[[Case], Any]]:
    """Takes cases for a file, which is there once all went well."""
    with replacing(path) as beside, beside.open("wb") as file:
        yield lambda case: file.write(case.model_dump_json().encode() + b"\n")


def _in_group(case: Case, group: str) -> Case:
    return case if case.group == group else case.model_copy(update={"group": group})


def _refuse_if_bad(config: Config, context: Context, rows: Rows, summary: prepared.Summary) -> None:
    first = rows.tally.first
    told = f"; the first: {first.file}:{first.line}: {first.problem}" if first else ""
    if not summary.cases and not rows.redteam:
        raise UserError(f"{context.section}: {', '.join(config.source)} gives no case{told}")
    if rows.refused > config.most_dropped * summary.rows:
        raise UserError(
            f"{context.section}: {rows.refused} of {summary.rows} rows make no case, more than most_dropped="
            f"{config.most_dropped} allows{told}; see {context.folder / 'issues.jsonl'}"
        )


def _of_textbook(config: Config, context: Context, rows: Rows) -> list[_Place]:
    """Each split has a seed of its own, so that one can grow while the others stay. No text stands in two of them."""
    taken: dict[str, Split] = {}
    places: list[_Place] = []
    with Lines(rows.waiting) as waiting, context.progress(context.section, sum(config.sizes.values())) as tick:
        for place, split in reversed(list(enumerate(SPLITS))):  # what is tested on has the first choice
            number = min(config.sizes[split], config.limit or config.sizes[split])
            seed = len(SPLITS) * config.seed + place

            def drawn(split: Split = split, number: int = number, seed: int = seed) -> Iterator[Case]:
                for case in draw(2 * number + len(taken), seed, config.language, config.style, config.task):
                    if taken.setdefault(family_key(case.text), split) == split:
                        yield case

            for case in islice(drawn(), number):
                waiting.write(case)
                places.append(_Place(case.group, (split,)))
                tick()
    return places


def _of_files(config: Config, context: Context, rows: Rows) -> list[_Place]:
    members: list[Member] = []
    origins: list[tuple[str, int]] = []
    with Lines(rows.waiting) as waiting, context.progress(context.section, None) as tick:

        def gather(name: str, sources: Sequence[str], limit: int | None) -> None:
            met = Ids()
            found = cases(config, [*context.inputs.get(name, ()), *filter(_on_hub, sources)], rows, met, tick)
            targets = {one.id: one.text for one in members}
            for origin, case in islice(found, limit):
                taken = targets.get(case.id, key := family_key(case.text)) != key
                mine = _renamed(case, targets, met, origin, rows) if taken else case
                waiting.write(mine)
                members.append(member(mine))
                origins.append(origin)

        gather("target", config.target, None)
        first = len(members)
        gather("source", config.source, config.limit)
    if config.target and not first:
        raise UserError(f"{context.section}: {', '.join(config.target)} gives no target case")
    rows.refused = rows.tally.dropped
    if rows.unmet and members:
        raise UserError(f"{context.section}.drop_sections: no record has a section {rows.unmet[0]!r}; mend the label")
    planted = {family_key(case.text) for case in rows.redteam}  # the same words elsewhere, without the mark
    out = {place for place, one in enumerate(members) if place >= first and one.text in planted}
    with context.progress(f"{context.section}: near-duplicates", None):
        labels, copies = _families(rows, members, out, context)
        _tell_copies(rows, members, labels, origins)
        members = joined(members, labels)
    out |= {place for place in copies if place >= first}
    rows.redteam = [_in_group(case, family_key(case.text)) for case in (*rows.redteam, *_chosen(rows.cases(), out))]
    wanted = {one.group for one in members[:first]}
    for place, one in enumerate(members):
        if place >= first and one.group in wanted and place not in out:  # it would give the target case away
            file, line = origins[place]
            reason = f"{one.id!r} is a near copy of a target case"
            rows.issue(Issue(file=file, line=line, field="text", reason=reason, action="dropped"))
            out.add(place)
    apart = [place for place in range(first, len(members)) if place not in out]
    if first and not apart and len(members) > first:
        raise UserError(
            f"{context.section}: every case of source is one of target too, or a near copy; name other files"
        )
    assigned = assign([members[place] for place in apart], config.sizes, config.by, config.seed) if apart else []
    splits: dict[int, tuple[str, ...]] = {place: (split,) for place, split in zip(apart, assigned, strict=True)}
    _warn(config, context, [members[place] for place in apart], assigned)
    splits.update((place, ("target",)) for place in range(first))
    _prove(context, members, splits)
    if config.benchmark:
        held = {place for place, (split,) in splits.items() if split in ("validation", "test")}
        best = set(benchmark(_chosen(rows.cases(), held, members), config.benchmark))
        splits.update((place, (*splits[place], "benchmark")) for place in held if members[place].id in best)
    return [_Place(one.group, splits.get(place, ())) for place, one in enumerate(members)]


def _tell_copies(
    rows: Rows, members: Sequence[Member], labels: Sequence[int], origins: Sequence[tuple[str, int]]
) -> None:
    """An issue for each text that repeats an earlier one, or nearly: they are kept, and stay together."""
    texts: dict[str, int] = {}
    for place, (one, label) in enumerate(zip(members, labels, strict=True)):
        same = texts.setdefault(one.text, place)
        other = min(same, label)
        if other < place:
            file, line = origins[place]
            what = "has the text of" if same < place else "is a near copy of"
            reason = f"{one.id!r} {what} {members[other].id!r}: they stay in one split"
            rows.issue(Issue(file=file, line=line, field="text", reason=reason, action="kept"))


def _warn(config: Config, context: Context, members: Sequence[Member], assigned: Sequence[Split]) -> None:
    """Says which split got nothing though it was to have a share, and what is in the way."""
    empty = [split for split, share in config.sizes.items() if share and split not in assigned]
    if members and empty:
        group, largest = Counter(one.group for one in members).most_common(1)[0]
        context.say(
            f"{context.section}: no case for {' and '.join(empty)}: {len(members)} cases are "
            f"{len({one.group for one in members})} families, the largest ({group}) has {largest}"
        )


def _renamed(case: Case, targets: Container[str], met: Ids, origin: tuple[str, int], rows: Rows) -> Case:
    """The case under another id than a target's of another text: what one wants predicted keeps its ids."""
    file, line = origin
    name = met.next(case.id)
    while name in targets:
        name = met.next(case.id)
    reason = f"{case.id!r} is a target case's id; here it is {name!r}"
    rows.issue(Issue(file=file, line=line, field="id", reason=reason, action="changed"))
    renamed = case.model_copy(update={"id": name})
    met.first(renamed, file, line)
    return renamed


def _on_hub(source: str) -> bool:
    return source.startswith(hub.PREFIX)


def _chosen(cases: Iterable[Case], places: Collection[int], members: Sequence[Member] | None = None) -> Iterator[Case]:
    """The cases at some places, in the groups of their members."""
    if places:
        for place, case in enumerate(cases):
            if place in places:
                yield _in_group(case, members[place].group) if members else case


def _prove(context: Context, members: Sequence[Member], splits: Mapping[int, tuple[str, ...]]) -> None:
    roles: dict[str, list[Member]] = {}
    for place, (split,) in splits.items():
        roles.setdefault(split, []).append(members[place])
    if crossed := crossings(roles):
        raise WorkError(f"{context.section}: families cross the splits: {'; '.join(crossed[:3])}")


def _families(
    rows: Rows, members: Sequence[Member], out: Collection[int], context: Context
) -> tuple[list[int], set[int]]:
    """A number for each case, the same for near copies; and the places of near copies of red-team rows."""
    common = boilerplate(case.text for case in rows.cases())
    alike, first_of = Groups(len(members)), dict[int, int]()
    long: list[int] = []
    texts: list[str] = []
    left = whole = 0
    for place, case in enumerate(rows.cases()):
        text = stripped(case.text, common)
        left, whole = left + len(text), whole + len(stripped(case.text, ()))
        if place in out:
            continue
        if len(text) >= SHORT:
            long.append(place)
            texts += [text] if len(texts) < MOST else []
        elif len(stripped(case.text, ())) >= SHORT:
            for key in variants(case.text):
                alike.merge(first_of.setdefault(key, place), place)
    labels = [alike.of(place) for place in range(len(members))]
    rows.tally.boilerplate = 1 - left / whole if whole else 0.0
    if len(long) > MOST:
        context.say(f"{context.section}: {len(long):,} texts are too many to compare each with each: equal ones alone")
        return labels, set()
    planted = [text for case in rows.redteam if len(text := stripped(case.text, ())) >= SHORT]
    found = families([*texts, *planted])
    marked = set(found[len(texts) :])
    for place, first in zip(long, found, strict=False):
        labels[place] = long[first]
    near = {one.text for one, label in zip(members, labels, strict=True) if members[label].text != one.text}
    rows.tally.near = len(near)
    return labels, {place for place, first in zip(long, found, strict=False) if first in marked}


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
