"""What a recipe's training would take, before it is started: memory by part, time, disk, and what to change.

Nothing is fetched, connected to or written. What is not known is said, never guessed.
"""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import preceptor
from preceptor.app.console import Show
from preceptor.app.recipe import Recipe, Section, inputs
from preceptor.core.errors import UserError
from preceptor.core.records import Row
from preceptor.model.resolve import resolve
from preceptor.stages.base import needs_torch, read_records
from preceptor.stages.prepare import TEXTBOOK
from preceptor.train.config import SftConfig

if TYPE_CHECKING:  # torch takes seconds to load
    from preceptor.train.measure import Card
    from preceptor.train.memory import Batch, Memory

_GIB = 2**30
_LOOKED_AT = 256
"""Rows whose tokens are counted, beside as many of the longest."""
_SLACK = 0.95
"""Share of a card that is planned with: what is freed between two steps is not always found again."""


@dataclass(frozen=True)
class _Rows:
    """What is known of the rows."""

    told: str
    number: int | None
    longest: int
    typical: int
    answer: int
    """Tokens of an answer."""

    def with_answers_of(self, most: int, max_length: int) -> "_Rows":
        """The same prompts with answers that are yet to be written."""
        longest, typical = (min(length + most, max_length) for length in (self.longest, self.typical))
        told = f"{self.told}; answers of at most {most:,} are written to them, which takes time of its own"
        return _Rows(told, self.number, longest, typical, most)


@dataclass(frozen=True)
class _Teacher:
    """A teacher on this machine."""

    told: str
    size: int
    """Bytes of its weights; 0 where that is not known."""
    stays: bool
    """Beside the student, as long as it learns."""


def trainings(recipe: Recipe) -> list[Section]:
    """The sections that train as `sft` does."""
    return [section for section in recipe.sections if issubclass(type(section.config), SftConfig)]


def plan(recipe: Recipe, runs: Path, show: Show, card: float | None) -> None:
    """Show what each training section takes. `card` is the memory of a GPU in GiB; by default this machine's device.

    Raises:
        UserError: a library is missing.
    """
    for section in trainings(recipe):
        needs_torch(section.name)
        try:
            with show.progress(f"planning {section.name}", None):
                told = list(_told(recipe, section, runs, card))
        except UserError as error:
            told = [f"{section.name}: {error}"]
        for thing in told:
            show.result(thing)


def _told(recipe: Recipe, section: Section, runs: Path, wanted: float | None) -> Iterator[Any]:
    from preceptor.train.blank import parameters
    from preceptor.train.measure import Card, precision
    from preceptor.train.memory import estimate

    name = section.name
    how = SftConfig.model_validate(section.config.model_dump(include=set(SftConfig.model_fields)))
    model, folder = _model(recipe, str(section.config.student), runs)  # type: ignore[attr-defined]  # each has one
    config, how = _shape(model, folder, how)
    rows, card = _rows(recipe, section, runs, folder, how), Card.of(wanted)
    teacher = _teacher(recipe, section, runs, how, card)
    if teacher and teacher.stays:
        rows = rows.with_answers_of(section.config.max_tokens, how.max_length)  # type: ignore[attr-defined]  # distill's
    compute = precision(folder, gpu=card.gpu)
    yield (
        f"{name}: {model}: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"vocabulary {config.vocab_size:,}, {parameters(config):,} parameters"
    )
    yield f"{name}: {rows.told}"
    if teacher:
        yield f"{name}: {teacher.told}"
    batch = _batch(how, rows, rows.longest)
    memory = _with_rest(estimate(config, how, batch, compute, gpu=card.gpu), card, teacher)
    yield f"{name}: {how.method} trains {memory.trained:,}; {batch.rows} × {batch.length:,} tokens a batch"
    yield _table(memory)
    if memory.total <= card.size * _SLACK:
        yield f"{name}: fits {card.name}: {_gib(card.size - memory.total)} of {_gib(card.size)} are left"
    else:
        change = _change(config, how, rows, card, compute, teacher)
        yield f"{name}: does not fit {card.name} ({_gib(card.size)}): {change}"
    if memory.paged:
        yield f"{name}: the optimizer's state, {_gib(memory.paged)}, leaves the card for this machine's memory"
    if (how.devices or 1) > 1:
        yield f"{name}: each of {how.devices} devices takes all of it; only FSDP and ZeRO share the weights"
    _, updates = _counts(how, rows)
    yield f"{name}: {_time(config, how, rows, memory, folder)}"
    yield f"{name}: {_disk(how, memory, updates, runs, whole=compute.itemsize)}"


def _teacher(recipe: Recipe, section: Section, runs: Path, how: SftConfig, card: "Card") -> _Teacher | None:
    """The teacher that a section loads, if it does."""
    from preceptor.train.blank import parameters
    from preceptor.train.measure import precision

    named = str(getattr(section.config, "local_teacher", ""))
    if not named:
        return None
    stays = bool(getattr(section.config, "on_policy", False))
    when = "all the time beside the student" if stays else "while it reads the rows, before the student is there"
    try:
        model, folder = _model(recipe, named, runs)
        config, _ = _shape(model, folder, how)
    except UserError as error:
        return _Teacher(f"its teacher takes memory too, {when}; how much is not known: {error}", 0, stays)
    size = parameters(config) * precision(folder, gpu=card.gpu).itemsize
    told = f"its teacher {model}, {parameters(config):,} parameters, takes {_gib(size)} {when}"
    if size > card.size * _SLACK:
        told += f"; it does not fit {card.name}: choose a smaller one"
    return _Teacher(told + ("; how long it takes is not known" if not stays else ""), size, stays)


def _with_rest(memory: "Memory", card: "Card", teacher: _Teacher | None) -> "Memory":
    if teacher and teacher.stays:
        memory = replace(memory, parts={**memory.parts, "teacher": teacher.size})
    if card.gpu:
        return memory
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return replace(memory, parts={**memory.parts, "rest": taken})


def _model(recipe: Recipe, name: str, runs: Path) -> tuple[str, Path | None]:
    """A model's name, and its folder where it is on this disk."""
    named = {one.name: one for one in recipe.sections}
    if name in named:
        found = [runs / recipe.name / name / kind for kind in ("model", "adapter")]
        if left := next((path for path in found if path.is_dir()), None):
            return name, left
        if named[name] in trainings(recipe):
            return _model(recipe, str(named[name].config.student), runs)  # type: ignore[attr-defined]  # each has one
        raise UserError(f"the shape of {name!r} is known once it has run: preceptor run {recipe.path} {name}")
    if name == "smollm2":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preceptor" / name
        return name, cache if cache.is_dir() else None  # to unpack it takes a minute
    if name == "mini" or Path(name).expanduser().is_dir():
        return name, resolve(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached_file = try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # no hub's name
        raise UserError(f"{name}: no such folder") from error
    return name, Path(cached_file).parent if isinstance(cached_file, str) else None


def _shape(model: str, folder: Path | None, how: SftConfig) -> tuple[Any, SftConfig]:
    """The model's configuration; an adapter that learns on has a rank already."""
    from preceptor.train.blank import shape

    if folder is None:
        known = json.loads((Path(preceptor.__file__).parent / "train" / "shapes.json").read_text("utf-8"))
        if model not in known:
            raise UserError(f"{model}: its shape is not known here; fetch the model, or name a folder with config.json")
        return shape(known[model]), how
    adapter = folder / "adapter_config.json"
    try:
        if adapter.is_file():
            said = json.loads(adapter.read_text("utf-8"))
            under = said["base_model_name_or_path"]
            is_folder = under == "mini" or Path(under).is_dir()
            config, _ = _shape(under, resolve(under) if is_folder else None, how)
            return config, how.model_copy(update={"rank": said["r"]})
        return shape(folder), how
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a model that can be read: {str(error).splitlines()[0]}") from error


def _rows(recipe: Recipe, section: Section, runs: Path, folder: Path | None, how: SftConfig) -> _Rows:
    limit = section.config.limit
    unread = how.max_length
    try:
        path = inputs(recipe, section, runs)["rows.jsonl"][0]
    except UserError:  # what it reads is not made yet
        number, source = _cases(recipe, runs)
        number = min(number, limit) if number and limit else number
        known = f"{number:,} cases {source}; one row each" if number else f"how many is not known yet: {source}"
        told = f"no rows yet: {known}; at most, if all are of max_length, {unread:,} tokens, a quarter of them answer"
        return _Rows(told, number, unread, unread, unread // 4)
    rows = list(read_records(path, Row, limit))
    if folder is None or not rows:
        told = f"{len(rows):,} rows; no tokenizer is here: at most, if all are of max_length, {unread:,} tokens"
        return _Rows(told, len(rows), unread, unread, unread // 4)
    lengths, answers = _lengths(folder, rows, how.max_length)
    longest, typical = max(lengths), round(sum(lengths) / len(lengths))
    told = f"{len(rows):,} rows, the longest of {longest:,} tokens, about {typical:,} on average"
    return _Rows(told, len(rows), longest, typical, max(round(sum(answers) / len(answers)), 1))


def _lengths(folder: Path, rows: Sequence[Row], most: int) -> tuple[list[int], list[int]]:
    """Tokens of some rows and of the longest, and of their answers."""
    from preceptor.model import load, tokens

    tokenizer = load.load_tokenizer(load.base_of(folder) if (folder / "adapter_config.json").is_file() else folder)
    by_size = sorted(rows, key=lambda row: -sum(len(m.content) for m in row.messages) - len(row.answer))
    lengths, answers = [1], [1]
    for row in (by_size[0], *rows[:: max(len(rows) // _LOOKED_AT, 1)]):
        try:
            example = tokens.example(tokenizer, row, most)
        except tokens.TooLongError:
            continue
        lengths.append(len(example.ids))
        answers.append(sum(label != tokens.IGNORED for label in example.labels))
    return lengths, answers


def _cases(recipe: Recipe, runs: Path) -> tuple[int | None, str]:
    """How many training cases there are or will be, and whence that is known."""
    for section in recipe.sections:
        if section.stage.name != "prepare":
            continue
        left = runs / recipe.name / section.name / "train.jsonl"
        if left.is_file():
            with left.open("rb") as file:
                return sum(1 for _ in file), "prepared"
        if section.config.source == (TEXTBOOK,):  # type: ignore[attr-defined]  # prepare's own
            return int(section.config.train), "to be prepared"  # type: ignore[attr-defined]  # as above
        return None, f"run {section.name} first"
    return None, "no section prepares cases"


def _batch(how: SftConfig, rows: _Rows, length: int) -> "Batch":
    from preceptor.train.batches import _PACK
    from preceptor.train.memory import Batch

    if not how.packing:
        return Batch(how.batch_size, length, how.batch_size * min(rows.answer, length))
    width = max(_PACK, rows.longest)
    packed = max(1, round(how.batch_size * rows.typical / width))
    return Batch(packed, width, max(packed * width * rows.answer // max(rows.typical, 1), 1), packed=True)


def _table(memory: "Memory") -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("memory at most")
    shown.add_column("GiB", justify="right")
    for part, size in memory.parts.items():
        if size:
            shown.add_row(_MEANING[part], f"{size / _GIB:.2f}")
    shown.add_row("all", f"{memory.total / _GIB:.2f}")
    return shown


_MEANING = {
    "weights": "weights",
    "copies": "weights in half precision",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "loss": "logits and the head's gradient",
    "buckets": "gradients on their way between devices",
    "rest": "what runs it: libraries, workspaces",
    "teacher": "the teacher's weights",
}


def _change(config: Any, how: SftConfig, rows: _Rows, card: "Card", compute: Any, teacher: _Teacher | None) -> str:
    """The least change that fits, tried: smaller batches first, then checkpointing, then other methods."""

    def fits(changed: SftConfig) -> bool:
        from preceptor.train.memory import estimate

        batch = _batch(changed, rows, rows.longest)
        found = _with_rest(estimate(config, changed, batch, compute, gpu=card.gpu), card, teacher)
        return found.total <= card.size * _SLACK

    methods = {"full": ("full", "lora", "qlora"), "lora": ("lora", "qlora"), "qlora": ("qlora",)}[how.method]
    for method in methods:
        for checkpointing in dict.fromkeys((how.gradient_checkpointing, True)):
            way = how.model_copy(update={"method": method, "gradient_checkpointing": checkpointing})
            if not fits(_in_batches(way, how, 1)):
                continue
            sizes = [how.batch_size >> by for by in range(how.batch_size.bit_length())]
            size = next(size for size in sizes if size == 1 or fits(_in_batches(way, how, size)))
            return "set " + ", ".join(_differences(how, _in_batches(way, how, size))) + "; that fits"
    return "nothing here makes it fit; choose a smaller model, lower max_length, or share it (FSDP, ZeRO)"


def _in_batches(way: SftConfig, how: SftConfig, size: int) -> SftConfig:
    """The same rows a step, in batches of another size."""
    accumulation = max(round(how.batch_size * how.accumulation / size), 1)
    return way.model_copy(update={"batch_size": size, "accumulation": accumulation})


def _differences(before: SftConfig, after: SftConfig) -> Iterator[str]:
    for field in ("method", "gradient_checkpointing", "batch_size", "accumulation"):
        if getattr(before, field) != getattr(after, field):
            yield f"{field}: {str(getattr(after, field)).lower()}"


def _counts(how: SftConfig, rows: _Rows) -> tuple[int | None, int | None]:
    """Batches and steps of the whole training."""
    if not rows.number:
        return None, None
    batches = math.ceil(rows.number / how.batch_size)
    return math.ceil(batches * how.epochs), math.ceil(math.ceil(batches / how.accumulation) * how.epochs)


def _time(config: Any, how: SftConfig, rows: _Rows, memory: "Memory", folder: Path | None) -> str:
    from preceptor.train.measure import Card, precision, seconds

    here = Card.of(None)
    if memory.total > here.size:
        return f"no step was timed: it does not fit {here.name}"
    compute = precision(folder, gpu=here.gpu)
    batch = _batch(how, rows, rows.typical)
    found = seconds(config, how, batch, compute)
    tokens = batch.rows * batch.length / found.batch
    told = f"{found.batch:.2g} s a batch of {batch.rows} × {batch.length:,} tokens, {tokens:,.0f} tokens/s"
    whose = f"from one and two layers timed at {found.tokens:,} tokens on this machine"
    batches, updates = _counts(how, rows)
    if batches is None or updates is None:
        return f"{told} ({whose})"
    total = batches * found.batch + updates * found.update
    return f"{_duration(total)} for {updates:,} steps, {told} ({whose})"


def _disk(how: SftConfig, memory: "Memory", updates: int | None, runs: Path, whole: int) -> str:
    """Checkpoints with the optimizer's state, and the final weights, against what is free."""
    made = math.ceil(updates / how.checkpoint_steps) if updates else None
    kept = min(x for x in (made, how.checkpoints) if x is not None) if made or how.checkpoints else None
    final = memory.parameters * whole if how.method == "full" else memory.saved
    each = memory.saved + memory.state
    free = shutil.disk_usage(next(p for p in (runs, *runs.resolve().parents) if p.exists())).free
    if kept is None:
        return f"disk: {_gib(each)} a checkpoint, all of which are kept, and {_gib(final)}; {_gib(free)} are free"
    # The new one is whole before an old one goes.
    need = each * (kept + (made is None or made > kept)) + final
    fewer = "keep fewer checkpoints, or " if kept > 2 else ""  # noqa: PLR2004  the best and the last
    verdict = "" if need < free else f"; it does not suffice: {fewer}choose another --runs, or free some"
    return f"disk: {_gib(need)}, {kept} checkpoints of {_gib(each)} kept; {_gib(free)} are free{verdict}"


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
