"""A student learns what its teacher believes: token by token from stored log-probabilities, or on its own answers."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import Field, field_validator, model_validator

from preceptor.core.errors import UserError
from preceptor.core.recalibration import Recalibration
from preceptor.core.records import Row
from preceptor.stages import beliefs, recalibrating
from preceptor.stages.base import RECALIBRATION, Context, Need, Stage, folder, nearest, needs_torch, resolve_callable
from preceptor.stages.beliefs import STORE, Making
from preceptor.stages.training import LEAVES, TrainingConfig, Validation, learn, rows_of
from preceptor.train import world
from preceptor.train.config import DivergenceName, Mix, OnPolicyConfig, SftConfig

if TYPE_CHECKING:
    from preceptor.train.batches import Adjust
    from preceptor.train.fit import On

DIVERGENCES = get_args(DivergenceName)
_OF_STORED = ("divergence", "share", "k", "draws")
_OF_OWN = ("max_tokens", "beta")


class Config(TrainingConfig):
    """Who learns, what of the teacher is known, and how the two are held against each other."""

    divergence: str = "bucket"
    """Of student and teacher: `renormalised` (FIRST), `bucket`, `decoupled`, `reverse` or `sampled`, as
    `preceptor.train.divergence` has them; or `path/to/file.py:function` of your own, like those."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Of the divergence in the loss of a token whose probabilities are known; the rest is cross-entropy's."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Softens both; with `on_policy` the student answers at it."""
    k: int = Field(default=5, gt=0, le=255)
    """Tokens whose probabilities are kept of each position."""
    draws: int = Field(default=50, gt=0, lt=255)
    """With `divergence: sampled`: tokens that are drawn from the teacher's distribution at each position."""
    local_teacher: str = ""
    """A section, a folder, or a name on the hub: a model on this machine that scores the answers in one pass; by
    default the log-probabilities are those of the replies to `label`."""
    on_policy: bool = False
    """The student answers itself, and learns what the local teacher would have written in its place."""
    max_tokens: int = Field(default=512, gt=0)
    """Of such an answer."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """With `on_policy`: 1 is KL(student || teacher), 0 is KL(teacher || student)."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        """Its own answers are written by the whole student."""
        return {"dropout": 0.0, **values} if isinstance(values, dict) and values.get("on_policy") else values

    @field_validator("divergence")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DIVERGENCES and ":" not in value:
            raise ValueError(
                f"no divergence {value!r}{nearest(value, DIVERGENCES)} (or name your own: path/to/file.py:function)"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.on_policy and not self.local_teacher:
            raise ValueError("on_policy: a teacher here must read what the student writes; name a `local_teacher`")
        idle = _OF_STORED if self.on_policy else _OF_OWN
        for name in {*idle, *(() if self.divergence == "sampled" else ("draws",))}:
            if getattr(self, name) != type(self).model_fields[name].default:
                wants = "divergence: sampled" if name == "draws" else f"on_policy: {not self.on_policy}".lower()
                raise ValueError(f"{name}: it belongs to {wants}; say so, or leave it out")
        if self.local_teacher and self.divergence == "sampled" and self.k != type(self).model_fields["k"].default:
            raise ValueError("k: a local teacher's tokens are drawn from all that it believes; leave it out")
        if self.on_policy:
            self.how()
        return self

    def needs(self) -> tuple[Need, ...]:
        """What training needs, and the teacher: its replies with what recalibrates them, or its weights."""
        file = self.divergence.rpartition(":")[0]
        own = (Need("divergence", paths=(file,)),) if file else ()
        if self.local_teacher:
            paths = folder(self.local_teacher)
            left = Need("local_teacher", files=LEAVES[:2], section=self.local_teacher, paths=paths, required=False)
            return (*super().needs(), *own, left)
        known = Need("predictions.jsonl", stages=("label",))
        return (*super().needs(), *own, known, Need(RECALIBRATION, stages=("calibrate",), required=False))

    def how(self) -> SftConfig | OnPolicyConfig:
        """What training is told."""
        kind = OnPolicyConfig if self.on_policy else SftConfig
        return kind.model_validate(self.model_dump(include=set(kind.model_fields)))


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes the store beliefs/, then adapter/ or model/, metrics.jsonl, and checkpoints/ on the way."""
    rows, transductive = rows_of(config, context)
    needs_torch(context.section)
    how, student = config.how(), context.optional("student") or config.student
    if isinstance(how, OnPolicyConfig):
        return learn(config, how, context, transductive, partial(_on_own_answers, config, context, student, rows))
    rows = rows if config.local_teacher else beliefs.as_written(rows, context)
    beliefs.check_keys(rows, str(context.input("rows.jsonl")), by_prompt=bool(config.local_teacher))
    own = resolve_callable(config.divergence, {}, "divergence") if ":" in config.divergence else None
    adjust = _adjust(config, context)
    told = json.loads(world.agree(lambda: json.dumps(_make(config, context, student, rows, adjust))))
    if config.divergence == "sampled":
        adjust = ()  # it was done before any were drawn

    def train(validation: Validation | None, on: "On") -> dict[str, float]:
        from preceptor.train import sft
        from preceptor.train.batches import Teaching
        from preceptor.train.divergence import of_a_user
        from preceptor.train.store import Store

        divergence: Any = of_a_user(own, config.divergence) if own else config.divergence
        mix = Mix(divergence=divergence, share=config.share, temperature=config.temperature)
        teaching = Teaching(Store(context.folder / STORE), mix, adjust)
        return sft.train(student, rows, context.folder, how, validation, on, teaching)

    return {**learn(config, how, context, transductive, train), **told}


def _on_own_answers(
    config: Config,
    context: Context,
    student: str | Path,
    rows: Sequence[Row],
    validation: Validation | None,
    on: "On",
) -> dict[str, float]:
    from preceptor.model.load import load
    from preceptor.train import on_policy

    how = config.how()
    assert isinstance(how, OnPolicyConfig)
    teacher = load(context.optional("local_teacher") or config.local_teacher)
    return on_policy.train(student, teacher, rows, context.folder, how, validation, on)


def _adjust(config: Config, context: Context) -> Sequence["Adjust"]:
    """What is made of the probabilities in the ledger: what recalibrates them, and what softens them.

    A local teacher softens all of its own, and not the likeliest alone.
    """
    if config.local_teacher:
        return ()
    found = recalibrating.read(context.optional(RECALIBRATION))
    if found and found.k != config.k:
        raise UserError(
            f"{context.section}.k: the teacher's probabilities of {config.k} tokens would be mended by what "
            f"{context.input(RECALIBRATION)} learned of {found.k}; set logprobs: {config.k} there, or k: {found.k} here"
        )
    by = f"by {found.chosen.method}, {found.chosen.value:.2f}" if found else "with no section that learned how"
    of = f", as learned of {found.teacher}" if found else ""
    context.say(f"{context.section}: the teacher's probabilities are {'' if found else 'not '}recalibrated, {by}{of}")
    adjust: list[Adjust] = [found.chosen.apply] if found else []
    if config.temperature != 1:
        adjust.append(Recalibration(method="temperature", value=config.temperature).apply)
    return tuple(adjust)


def _make(
    config: Config, context: Context, student: str | Path, rows: Sequence[Row], adjust: Sequence["Adjust"]
) -> dict[str, float]:
    """Make the store, or what is lacking of it."""
    from preceptor.model import load, tokens
    from preceptor.model.resolve import resolve

    tokenizer = load.load_tokenizer(resolve(student))
    tokens.with_thinking(tokenizer, on=tokens.thinks(rows))
    making = Making(
        context.folder / STORE,
        tokenizer,
        config.student,
        config.k,
        config.draws if config.divergence == "sampled" else 0,
        config.temperature,
        config.seed,
    )
    with beliefs.unbound(making.folder):
        if config.local_teacher:
            teacher = context.optional("local_teacher") or config.local_teacher
            return beliefs.from_teacher(making, rows, context, teacher, config.max_length)
        return beliefs.from_ledger(making, rows, context, adjust)


STAGE = Stage("distill", Config, run, leaves=LEAVES, grows=False)
