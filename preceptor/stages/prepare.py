"""Raw files, or the textbook, become cases in splits; what is wrong with a row is written down."""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from preceptor.clinical.textbook.sampler import draw
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Issue, Language
from preceptor.data import healthai
from preceptor.data.files import Split, read, split_of
from preceptor.stages.base import Context, Need, Stage, StageConfig, resolve_callable, write_records

TEXTBOOK = "textbook"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
IMPORTERS = {"healthai": healthai.import_row}


class Config(StageConfig):
    """Where cases come from and how they are split."""

    source: tuple[str, ...] = Field(min_length=1)
    """Path, glob or list of both; or `textbook`."""
    importer: str = "healthai"
    """How a row of a file is read."""
    language: Language = "en"
    """Of the textbook's cases; files speak for themselves."""
    style: Literal["short", "full"] = "full"
    """Of the textbook's records: two or three lines, or all sections of a hospital's."""
    train: int = Field(default=2400, ge=0)
    """Cases of the textbook; of files, the share of each split is as these numbers are to one another."""
    validation: int = Field(default=100, ge=0)
    test: int = Field(default=200, ge=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _some_cases(self) -> "Config":
        if not any(self.sizes.values()):
            raise ValueError("no cases wanted: give train, validation or test a number")
        return self

    @property
    def sizes(self) -> dict[Split, int]:
        """Number or share of each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def needs(self) -> tuple[Need, ...]:
        """The files that `source` names, and the importer's."""
        file = self.importer.rpartition(":")[0]
        own = (Need("importer", paths=(file,)),) if file else ()
        return () if self.source == (TEXTBOOK,) else (Need("source", paths=_expand(self.source)), *own)


def _expand(sources: Iterable[str]) -> tuple[str, ...]:
    paths: list[str] = []
    for source in sources:
        found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  a pattern may be absolute
        files = [path for path in found if Path(path).is_file()]
        if not files:
            raise UserError(f"prepare.source: no file at {source} (seen from {Path.cwd()}); mend the path")
        paths += files
    return tuple(dict.fromkeys(paths))


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes a file for each split, and issues.jsonl."""
    issues: list[Issue] = []
    if config.source == (TEXTBOOK,):
        splits = _from_textbook(config, context)
    else:
        splits, issues = _from_files(config, context)
    if not any(splits.values()):
        first = f"; the first issue: {issues[0].problem}" if issues else ""
        raise UserError(f"prepare: {', '.join(config.source)} gives no case{first}")
    for split, cases in splits.items():
        write_records(context.folder / f"{split}.jsonl", cases)
    write_records(context.folder / "issues.jsonl", issues)
    if issues:
        context.say(f"{context.section}: {len(issues)} rows left out, see {context.folder / 'issues.jsonl'}")
    every = [case for cases in splits.values() for case in cases]
    return {
        **{split: len(cases) for split, cases in splits.items()},
        "issues": dict(Counter(f"{issue.field or 'row'}: {issue.action}" for issue in issues)),
        "repeated_texts": len(every) - len({case.group for case in every}),
    }


def _from_textbook(config: Config, context: Context) -> dict[Split, list[Case]]:
    """Each split has a seed of its own, so that one can grow while the others stay."""
    splits: dict[Split, list[Case]] = {}
    with context.progress(context.section, sum(config.sizes.values())) as tick:
        for place, split in enumerate(SPLITS):
            number = min(config.sizes[split], config.limit or config.sizes[split])
            seed = len(SPLITS) * config.seed + place
            splits[split] = []
            for case in draw(number, seed, config.language, config.style):
                splits[split].append(case)
                tick()
    return splits


def _from_files(config: Config, context: Context) -> tuple[dict[Split, list[Case]], list[Issue]]:
    importer = resolve_callable(config.importer, IMPORTERS, "importer")
    issues: list[Issue] = []
    splits: dict[Split, list[Case]] = {split: [] for split in SPLITS}

    def cases() -> Iterator[Case]:
        with context.progress(context.section, None) as tick:
            for found in read(context.inputs["source"], importer):
                tick()
                if isinstance(found, Issue):
                    issues.append(found)
                else:
                    yield found

    for case in islice(cases(), config.limit):
        splits[split_of(case.group, config.sizes)].append(case)
    return splits, issues


STAGE = Stage("prepare", Config, run, leaves=(*(f"{split}.jsonl" for split in SPLITS), "issues.jsonl"))
