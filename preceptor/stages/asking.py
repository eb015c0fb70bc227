"""Asking a model about cases: what label and predict share.

Answers stream into one file as they come, so that a kill loses none, and no case is asked about twice.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Diagnosis, Failure, FailureKind, Language, Prediction, Request, Sampling
from preceptor.llm.completer import Completer
from preceptor.stages.base import (
    Context,
    How,
    Lines,
    Need,
    StageConfig,
    read_records,
    resolve_callable,
    write_records,
)
from preceptor.stages.teacher import converse
from preceptor.tasks import prompts
from preceptor.tasks.strategies import STRATEGIES, Asking, Conversation, Strategy, failed

PREDICTIONS = "predictions.jsonl"
TEACHER = "teacher"
"""The name that its predictions carry."""
_ASK_AGAIN = {FailureKind.PROVIDER, FailureKind.TIMEOUT}
"""Failures of the moment: a resumed run tries them once more."""


class AskingConfig(StageConfig):
    """How models are asked."""

    language: Language = "en"
    strategy: str = "zero_shot"
    prompt: str = "zero_shot"
    """One of the package's, or the path of a text file."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_tokens: int = Field(default=512, gt=0)
    concurrency: Annotated[int, How()] = Field(default=16, gt=0)
    """Requests to an endpoint at once."""

    def own_files(self) -> tuple[Need, ...]:
        """Prompt and strategy where they are the user's files."""
        needs = [Need("prompt", paths=(self.prompt,))] if self.prompt.endswith(".txt") else []
        file = self.strategy.rpartition(":")[0]
        return (*needs, *([Need("strategy", paths=(file,))] if file else []))


@dataclass(frozen=True)
class Answers:
    """The file of a section's answers, by model and case."""

    config: AskingConfig
    context: Context
    cases: Sequence[Case]
    given: dict[tuple[str, str], Prediction]

    @classmethod
    def begun(cls, config: AskingConfig, context: Context, cases: Sequence[Case]) -> "Answers":
        """With the answers that an earlier start left."""
        path = context.folder / PREDICTIONS
        if path.exists():
            with Lines(path):
                pass  # what a kill cut short is cut off
        before = read_records(path, Prediction) if path.exists() else ()
        kept = (p for p in before if not (p.failure and p.failure.kind in _ASK_AGAIN))
        return cls(config, context, cases, {(p.model, p.case_id): p for p in kept})

    def owed(self, model: str) -> list[Case]:
        """The cases that a model has not answered."""
        return [case for case in self.cases if (model, case.id) not in self.given]

    def ask(self, model: str, completer: Completer, *, confidence: bool, concurrency: int) -> None:
        """Ask a model what it owes. `model` is the name that its predictions carry."""
        config, context = self.config, self.context
        strategy = resolve_callable(config.strategy, STRATEGIES, "strategy")
        asking = Asking(
            prompts.load("diagnosis", config.prompt, config.language),
            model,
            Sampling(temperature=config.temperature, max_tokens=config.max_tokens),
            confidence=confidence,
        )
        owed = {case.id: case for case in self.owed(model)}
        failures = sum(1 for p in self.given.values() if p.model == model and p.failure)
        with (
            Lines(context.folder / PREDICTIONS) as lines,
            context.progress(f"{context.section}: {model}", len(self.cases)) as tick,
        ):
            tick(len(self.cases) - len(owed))

            def keep(identity: str, result: Prediction | Failure) -> None:
                nonlocal failures
                case = owed[identity]
                prediction = failed(case, asking, result) if isinstance(result, Failure) else result
                lines.write(prediction)
                self.given[model, identity] = prediction
                failures += prediction.failure is not None
                tick(1, f"{failures} failed" if failures else "")

            conversations = (
                (identity, _conversation(strategy, config.strategy, case, asking)) for identity, case in owed.items()
            )
            converse(conversations, completer, context, concurrency, keep)
        answers = [prediction for (name, _), prediction in self.given.items() if name == model]
        broken = [p.failure.detail for p in answers if p.failure and p.failure.kind in _ASK_AGAIN]
        if owed and len(broken) == len(answers):
            reason = f"{completer.name} answered none of {len(broken)} cases, the last one: {broken[-1]}"
            raise WorkError(f"{context.section}: {reason}; mend that and run it again")

    def finish(self, models: Iterable[str]) -> dict[str, Any]:
        """Write the answers in the order of models and cases; returns what became of them, by model."""
        order = {model: [(model, case.id) for case in self.cases if (model, case.id) in self.given] for model in models}
        path = self.context.folder / PREDICTIONS
        write_records(path, (self.given[key] for keys in order.values() for key in keys))
        return {model: _account([self.given[key] for key in keys]) for model, keys in order.items()}


def _conversation(strategy: Strategy, name: str, case: Case, asking: Asking) -> Conversation:
    """The conversation of a strategy that may be the user's own, held to what every strategy must do."""
    conversation = strategy(case, asking)
    try:
        if not isinstance(conversation, Generator):
            raise _not_a_strategy(name, f"it gives {type(conversation).__name__}, not a generator")
        request = next(conversation)
        while True:
            if not isinstance(request, Request):
                raise _not_a_strategy(name, f"it yields {type(request).__name__}, not a Request")
            request = conversation.send((yield request))
    except StopIteration as end:
        result = end.value
    if not isinstance(result, Prediction):
        raise _not_a_strategy(name, f"it returns {type(result).__name__}, not a Prediction")
    if (result.case_id, result.model) != (case.id, asking.model):
        raise _not_a_strategy(name, f"asked about {case.id!r}, its prediction is about {result.case_id!r}")
    return result


def _not_a_strategy(name: str, why: str) -> UserError:
    return UserError(f"strategy {name!r}: {why}; preceptor/tasks/strategies.py shows one")


def _account(predictions: Sequence[Prediction]) -> Mapping[str, Any]:
    outputs = [p.output for p in predictions if isinstance(p.output, Diagnosis)]
    failures = Counter(p.failure.kind.value for p in predictions if p.failure)
    return {
        "cases": len(predictions),
        "answered": len(outputs),
        "abstained": sum(output.abstained for output in outputs),
        "repaired": sum(p.repaired for p in predictions),
        "failed": failures.total(),
        "failures": dict(failures),
        "prompt_tokens": sum(p.usage.prompt_tokens for p in predictions),
        "completion_tokens": sum(p.usage.completion_tokens for p in predictions),
    }


def cases_of(paths: Sequence[Path], limit: int | None) -> list[Case]:
    """The cases to ask about: the first `limit` of all the files'."""
    cases = list(islice((case for path in paths for case in read_records(path, Case)), limit))
    if not cases:
        raise UserError(f"{paths[0]}: no cases here; mend the section that leaves it")
    return cases
