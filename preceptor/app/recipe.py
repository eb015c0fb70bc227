"""A recipe: one YAML file of sections, with dotted overrides, checked whole before any work begins.

Every mistake in it is one line: the file, the key, and the nearest thing that would have been right.
"""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preceptor.app.stages import STAGES
from preceptor.core.errors import UserError
from preceptor.core.records import Language, Task
from preceptor.stages.base import Need, Stage, StageConfig, nearest
from preceptor.stages.teacher import TeacherConfig

_SECTION = re.compile(r"\w[\w-]*")
"""It is a folder's name, and the first part of a dotted key."""

_CONSULT = ("prepare", "design", "label", "curate", "sft", "distill", "predict", "judge", "evaluate", "export")
"""The stages that serve advice too."""


class Head(BaseModel):
    """What a recipe says once for all its sections; one that says it itself is followed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    """The folder under `runs/`; by default the file's name."""
    task: Task = "diagnosis"
    language: Language = "en"
    seed: int = 0
    student: str | None = None
    """Model to train: `mini`, `smollm2`, a folder, or a name on the hub."""
    teacher: TeacherConfig | None = None
    rules: Literal["open-teacher"] | None = None
    """`open-teacher`, as competitions demand: a teacher whose terms do not let its replies train a model is refused."""
    limit: int | None = Field(default=None, gt=0)
    """The first n cases of every section, for a try."""
    include_target: bool = False
    """Teach the target cases too, on the teacher's labels: the run is then transductive, and says so."""


@dataclass(frozen=True)
class Section:
    """One stage of a recipe, configured."""

    name: str
    stage: Stage
    config: StageConfig


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    path: str
    name: str
    sections: tuple[Section, ...]

    def chosen(self, names: Iterable[str]) -> list[Section]:
        """The sections of these names in the file's order; all for no name."""
        wanted = list(names)
        known = [section.name for section in self.sections]
        for name in wanted:
            if name not in known:
                raise UserError(f"{self.path}: no section {name!r}{nearest(name, known)}")
        return [section for section in self.sections if not wanted or section.name in wanted]

    def of_stage(self, stage: str) -> list[str]:
        """The names of the sections of one stage."""
        names = [section.name for section in self.sections if section.stage.name == stage]
        if not names:
            raise UserError(f"{self.path}: no section of the stage {stage!r}; add one, or name another recipe")
        return names


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: anything in it is wrong.
    """
    raw = _apply(path, _read(path), overrides)
    head = {key: value for key, value in raw.items() if key in Head.model_fields}
    head.setdefault("name", Path(path).stem)
    sections: list[Section] = []
    checked = _check(path, "", Head, head)
    for name, values in raw.items():
        if name not in Head.model_fields:
            sections.append(_section(path, str(name), values, head))
            _check_names(path, sections)
    if not sections:
        raise UserError(f"{path}: no sections; add some of {', '.join(STAGES)}")
    if checked.rules:
        _hold_rules(path, sections)
    if checked.task == "consult" and (other := [s.name for s in sections if s.stage.name not in _CONSULT]):
        raise UserError(f"{path}: {other[0]}: of consult there are {', '.join(_CONSULT)} yet; leave the section out")
    return Recipe(path, checked.name, tuple(sections))


def _hold_rules(path: str, sections: Iterable[Section]) -> None:
    """Refuse teachers whose terms forbid distillation, and those of which that is not known."""
    for section in sections:
        teacher = getattr(section.config, "teacher", None)
        if not isinstance(teacher, TeacherConfig):
            continue
        for one in teacher.endpoint:
            if not one.distillation:
                why = "do not allow" if one.distillation is False else "are not known to allow"
                raise UserError(
                    f"{path}: {section.name}: rules: open-teacher: the terms of {one.model or teacher.model!r} at"
                    f" {one.name} {why} that its replies train a model; choose another teacher, or attest that they do"
                    " with endpoint.distillation: true"
                )


def inputs(recipe: Recipe, section: Section, runs: Path) -> dict[str, tuple[Path, ...]]:
    """Where the inputs of a section lie, by the name of the need.

    Raises:
        UserError: a required one is missing, or the section that should leave it has not been run.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for need in section.config.needs():
        earlier = recipe.sections[: [s.name for s in recipe.sections].index(section.name)]
        paths = _named(recipe, section, need, runs, earlier) or _nearest_earlier(recipe, need, runs, earlier)
        if paths:
            found[need.name] = paths
        elif need.required:
            what = " or ".join(need.any_of)
            whose = f"section {need.section!r}" if need.section else "an earlier section"
            raise UserError(
                f"{recipe.path}: {section.name} needs {what}, which {whose} should leave and does not; "
                f"name the section or path that has it in {section.name}.from"
            )
    names, used = {s.name for s in recipe.sections}, {path for paths in found.values() for path in paths}
    for source in section.config.from_:
        if source not in names and not any(Path(source) in (path, path.parent) for path in used):
            files = dict.fromkeys(file for need in section.config.needs() for file in need.any_of)
            raise UserError(f"{section.name}.from: {source} has nothing that {section.name} reads: {', '.join(files)}")
    return found


def _named(recipe: Recipe, section: Section, need: Need, runs: Path, earlier: Sequence[Section]) -> tuple[Path, ...]:
    """What `from:` gives for a need."""
    paths: list[Path] = []
    if need.section or need.paths:
        return tuple(map(Path, need.paths))
    for source in section.config.from_:
        from_section = next((s for s in earlier if s.name == source), None)
        if from_section is not None:
            paths += _left(recipe, need, runs, from_section)
            continue
        path = Path(source)
        if not path.exists():
            raise UserError(f"{section.name}.from: {source} does not exist")
        main = section.config.needs()[0]
        if path.is_dir():
            paths += [path / name for name in need.any_of if (path / name).exists()][:1]
        elif path.name in need.any_of or (need.name == main.name and not _serves(section, path.name)):
            paths.append(path)
    return tuple(paths)


def _serves(section: Section, file: str) -> bool:
    return any(file in need.any_of for need in section.config.needs())


def _nearest_earlier(recipe: Recipe, need: Need, runs: Path, earlier: Sequence[Section]) -> tuple[Path, ...]:
    for section in reversed(earlier):
        if need.section in (None, section.name) and (paths := _left(recipe, need, runs, section)):
            return tuple(paths)
    return ()


def _left(recipe: Recipe, need: Need, runs: Path, section: Section) -> list[Path]:
    """The file of a need that a section left; it must be done."""
    names = [name for name in need.any_of if name in section.stage.leaves]
    if not names or (need.stages and section.stage.name not in need.stages):
        return []
    folder = runs / recipe.name / section.name
    if not (folder / "done.json").exists():
        raise UserError(
            f"{recipe.path}: {need.name} comes from section {section.name!r}, which is not done; "
            f"run it first: preceptor run {recipe.path} {section.name}"
        )
    return [folder / name for name in names if (folder / name).exists()][:1]


def _read(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        beside = [str(file) for file in sorted(Path(path).parent.glob("*.yaml"))]
        raise UserError(f"{path}: no such recipe{nearest(path, beside)}") from error
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a YAML file: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context)
        if "start any token" in problem and mark and "\t" in Path(path).read_text("utf-8").splitlines()[mark.line]:
            problem = "a tab begins a word; indent with spaces"
        raise UserError(f"{path}{line}: {problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a recipe: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: not a recipe: it must hold keys with values, such as `prepare:`")
    return loaded


def _apply(path: str, raw: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe with its overrides, as plain values."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: write it as key=value")
        first = key.partition(".")[0]
        known = [*map(str, raw), *Head.model_fields]
        if first not in known:
            raise UserError(f"override {override!r}: no key {first!r} in {path}{nearest(first, known)}")
        try:
            merged = OmegaConf.merge(raw, OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"override {override!r}: {' '.join(str(error).split())}") from error
        assert isinstance(merged, DictConfig)
        raw = merged
    try:
        plain = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _section(path: str, name: str, values: Any, head: Mapping[str, Any]) -> Section:
    stage_name = max((s for s in STAGES if name == s or name.startswith(f"{s}_")), key=len, default=None)
    if stage_name is None or not _SECTION.fullmatch(name):
        known = [*Head.model_fields, *STAGES]
        how = "a section is called <stage> or <stage>_<name>"
        raise UserError(f"{path}: unknown key {name!r}{nearest(name, known)} ({how})")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: {name}: a section holds keys with values, not {values!r}")
    stage: Stage = importlib.import_module(f"preceptor.stages.{stage_name}").STAGE
    filled = dict(values)
    for key in stage.config.model_fields.keys() & head.keys():
        own = filled.get(key)
        if key not in filled:
            filled[key] = head[key]
        elif isinstance(own, dict) and isinstance(head[key], dict):
            filled[key] = {**head[key], **own}
    return Section(name, stage, _check(path, name, stage.config, filled))


def _check(path: str, section: str, model: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        # What may be one or several is told as one, until the second.
        at = ".".join([*([section] if section else []), *(str(part) for part in first["loc"] if part != 0)])
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, first["loc"][:-1])
            problem = f"unknown key{nearest(str(first['loc'][-1]), known)}"
        elif first["type"] == "missing":
            problem = "missing; add it to the section, or to the top of the recipe"
        elif first["type"] == "value_error":  # our own words; what was given may hold a key
            problem = first["msg"].removeprefix("Value error, ")
        elif first["type"] == "tuple_type":
            problem = f"write a list, such as [a, b] (got {first['input']!r})"
        else:
            problem = f"{first['msg']} (got {first['input']!r})"
        raise UserError(f"{path}: {at}: {problem}") from error


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys known at a place within a model; a part that is no field (a union's branch) is passed over."""
    for part in location:
        field = model.model_fields.get(str(part))
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)] if field else []
        if inner:
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _check_names(path: str, sections: Sequence[Section]) -> None:
    """The sections that the last one names must come before it."""
    *earlier, last = sections
    names = [section.name for section in earlier]
    for source in last.config.from_:
        looks_like_path = "/" in source or "." in source or Path(source).exists()
        if source not in names and not looks_like_path:
            raise UserError(f"{path}: {last.name}.from: no earlier section {source!r}{nearest(source, names)}")
    for need in last.config.needs():
        if need.section and need.required and need.section not in names:
            hint = nearest(need.section, names)
            raise UserError(f"{path}: {last.name}: no earlier section {need.section!r}{hint}")
