"""Asking a model about cases: what label and predict share.

Answers stream into one file as they come, so that a kill loses none, and no case is asked about twice. Of cases and
answers only keys and places in files are kept.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, model_validator

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import (
    Case,
    Diagnosis,
    Failure,
    FailureKind,
    Language,
    Prediction,
    Sampling,
    Task,
)
from preceptor.stages import solved
from preceptor.stages.account import Account, Names
from preceptor.stages.base import (
    FAILED,
    Context,
    How,
    Lines,
    Need,
    StageConfig,
    read_records,
    replacing,
    resolve_callable,
    write_records,
)
from preceptor.stages.candidates import CANDIDATES, candidates
from preceptor.stages.candidates import needs as candidate_needs
from preceptor.stages.talk import Talk
from preceptor.stages.teacher import Answerer, converse
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import CLOSINGS
from preceptor.tasks.examples import Choice, Examples
from preceptor.tasks.prompts import Prompt
from preceptor.tasks.strategies import STRATEGIES, Asking, Conversation, Source

PREDICTIONS = "predictions.jsonl"
TEACHER = "teacher"
"""The name that its predictions carry."""
FEW_SHOT, TWO_STAGE, VOTE = "few_shot", "two_stage", "self_consistency"
CHAIN, STATED = "chain", "stated"
_ASK_AGAIN = {FailureKind.PROVIDER, FailureKind.TIMEOUT}
"""Failures of the moment: a resumed run tries them once more."""
_ROUND = 1_000_000
"""Between the numbers of a sample's draw and of its next, when it is tried again."""
_Key = tuple[str, str, int]
"""Model, case and sample of an answer."""


class AskingConfig(StageConfig):
    """How models are asked."""

    task: Task = "diagnosis"
    language: Language = "en"
    strategy: str = "zero_shot"
    """`zero_shot`, `few_shot`, `two_stage`, `self_consistency`, or `path/to/file.py:function` of your own."""
    prompt: str = ""
    """One of the package's, the path of a text file, or a section that designs one; by default the strategy's own."""
    examples: Choice = "nearest"
    """Which examples few_shot shows: the same ones always (`fixed`), by lot (`random`), or the likest (`nearest`)."""
    shots: int = Field(default=3, gt=0)
    """How many examples are shown."""
    examples_from: str = ""
    """A file of solved cases, or a section (`label`: its answers are taken as right); by default the training cases
    that have gold."""
    votes: int = Field(default=5, gt=1)
    """Samples that self_consistency draws for one answer, and from which `confidence: samples` is taken."""
    confidence: Source | None = None
    """Whence each disease's confidence: the `chain` of its tokens' probabilities (the default of models on this
    machine, which alone have it for certain), sequence probabilities of `candidates` (on this machine alone), the share
    of `samples` that name it, or what the reply itself has `stated`, asked by a prompt with `[act: stated]`."""
    candidates: str = ""
    """A file with one disease a line, # before comments; by default those of the training rows, the commonest."""
    reasons: int | None = Field(default=None, gt=0)
    """Most reasons that are asked for."""
    reason_characters: int | None = Field(default=None, gt=0)
    """Length of a reason that is asked for, at most."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 is greedy; several samples of one answer need more."""
    max_tokens: Annotated[int, How()] = Field(default=512, gt=0)
    """Most tokens of a reply; one that ends by itself is the same under any such limit."""
    seed: int = 0
    """Of the lots by which examples are drawn."""
    concurrency: Annotated[int, How()] = Field(default=16, gt=0)
    """Requests to an endpoint at once."""

    @model_validator(mode="after")
    def _sensible(self) -> "AskingConfig":
        if self.strategy == VOTE and not self.temperature:
            raise ValueError("temperature: at 0 all samples of a vote are the same; give one above 0, such as 0.7")
        if self.task == "consult" and (self.reasons or self.reason_characters):
            raise ValueError("reasons: advice has none; leave out `reasons` and `reason_characters`")
        if self.confidence and self.task == "consult":
            raise ValueError("confidence: advice names no diseases to be sure of; leave it out")
        if self.confidence and self.strategy == VOTE:
            raise ValueError(f"confidence: {VOTE} has its own, the share of the votes; leave it out")
        if self.confidence == STATED and self.strategy == FEW_SHOT:
            raise ValueError(f"confidence: the examples of {FEW_SHOT} state none; leave out `strategy`")
        if self.candidates and self.confidence != CANDIDATES:
            raise ValueError(f"candidates: they are for confidence: {CANDIDATES}; say so, or leave them out")
        return self

    def own_files(self) -> tuple[Need, ...]:
        """The prompt where it is the user's file or a section's, the user's own strategy, solved cases, candidates."""
        needs = []
        if self.prompt.endswith(".txt"):
            needs.append(Need("prompt", paths=(self.prompt,)))
        elif self.prompt:
            needs.append(Need("prompt", files=("prompt.txt",), section=self.prompt, required=False))
        if file := self.strategy.rpartition(":")[0]:
            needs.append(Need("strategy", paths=(file,)))
        if self.strategy == FEW_SHOT or self.examples_from:
            needs += solved.needs(self.examples_from)
        if self.confidence == CANDIDATES:
            needs.append(candidate_needs(self.candidates))
        return tuple(needs)


@dataclass(frozen=True)
class Cases:
    """The cases of files, in their order, the first `limit` of all: read anew each time, and never held."""

    paths: Sequence[Path]
    limit: int | None

    def __iter__(self) -> Iterator[Case]:
        return islice(chain.from_iterable(read_records(path, Case) for path in self.paths), self.limit)


@dataclass(frozen=True)
class Answers:
    """The file of a section's answers, by model, case and sample."""

    config: AskingConfig
    context: Context
    cases: Cases
    samples: int = 1
    given: set[_Key] = field(default_factory=set)
    failures: "Counter[str]" = field(default_factory=Counter)
    """Among those given, by model."""
    rounds: "Counter[_Key]" = field(default_factory=Counter)
    """How often an answer was given up that the ledger has, and would give again."""

    @classmethod
    def begun(cls, config: AskingConfig, context: Context, cases: Cases, samples: int = 1) -> "Answers":
        """With the answers that an earlier start left.

        Raises:
            UserError: there are no cases, or two of one id.
        """
        ids: set[str] = set()
        for case in cases:
            if case.id in ids:
                where = " or ".join(map(str, cases.paths))
                raise UserError(f"{where}: two cases have the id {case.id!r}; give each its own")
            ids.add(case.id)
        if not ids:
            raise UserError(f"{cases.paths[0]}: no cases here; mend the section that leaves it")
        answers = cls(config, context, cases, samples)
        if (path := context.folder / PREDICTIONS).exists():
            with Lines(path):
                pass  # what a kill cut short is cut off
            for prediction in read_records(path, Prediction):
                if not _of_the_moment(prediction):
                    answers.given.add(_key(prediction))
                    answers.failures[prediction.model] += prediction.failure is not None
        if (given_up := context.folder / FAILED).exists():
            failed = read_records(given_up, Prediction)
            answers.rounds.update(_key(one) for one in failed if not _of_the_moment(one))
        return answers

    def about(self, paths: Sequence[Path]) -> "Answers":
        """The same about the cases of some of the files."""
        return replace(self, cases=replace(self.cases, paths=paths))

    def owed(self, model: str) -> Iterator[tuple[Case, int]]:
        """The cases that a model has not answered, with the number of the sample."""
        for case in self.cases:
            for sample in range(self.samples):
                if (model, case.id, sample) not in self.given:
                    yield case, sample

    def ask(self, answerer: Answerer, concurrency: int, asking: Asking) -> None:
        """Ask a model what it owes.

        Raises:
            UserError: it is to tell probabilities of candidates, and is not on this machine.
            WorkError: it answered nothing at all.
        """
        context, model = self.context, asking.model
        if asking.confidence == CANDIDATES and any(one.zone for one in answerer.completers):
            raise UserError(
                f"{context.section}.confidence: {CANDIDATES} are for models on this machine, and {answerer.name} "
                f"answers elsewhere; take samples, or {STATED}"
            )
        name = self.config.strategy
        strategy = resolve_callable(name, STRATEGIES, "strategy")
        names = Names(context.folder, model)
        total = self.samples * sum(1 for _ in self.cases)
        owed = sum(1 for _ in self.owed(model))
        talks: dict[tuple[str, int], Talk] = {}
        counts = Counter(failed=self.failures[model])
        broken, last = 0, ""

        def conversations() -> Iterator[tuple[tuple[str, int], Conversation]]:
            for case, sample in self.owed(model):
                talk = talks[case.id, sample] = Talk(case, replace(asking, sample=sample))
                yield (case.id, sample), talk.held(strategy, name)

        def draw(key: tuple[str, int]) -> int:
            return key[1] + _ROUND * self.rounds[model, *key]

        def keep(key: tuple[str, int], result: Prediction | Failure) -> None:
            nonlocal broken, last
            talk = talks.pop(key)
            prediction = talk.failed(result) if isinstance(result, Failure) else result
            lines.write(prediction)
            for served in talk.served:
                names.add(served)
            self.given.add((model, *key))
            counts.update(
                corrected=prediction.corrected, revised=prediction.revised, unsure=_unsure(prediction, asking)
            )
            if prediction.failure:
                counts["failed"] += 1
                broken, last = broken + _of_the_moment(prediction), prediction.failure.detail
            tick(1, ", ".join(f"{n} {what}" for what, n in counts.items() if n))

        with (
            Lines(context.folder / PREDICTIONS) as lines,
            context.progress(f"{context.section}: {model}", total) as tick,
        ):
            tick(total - owed)
            converse(conversations(), answerer, context, concurrency, keep, sample=draw)
        if unsure := counts["unsure"]:
            context.say(
                f"{context.section}: {model}: {unsure} answers name a disease without confidence in it "
                f"(confidence: {asking.confidence})"
            )
        if total == broken:
            reason = f"{answerer.name} answered none of {broken} cases, the last one: {last}"
            raise WorkError(f"{context.section}: {reason}; mend that and run it again")

    def finish(
        self,
        models: Iterable[str],
        settles: Mapping[str, Callable[[Case, Prediction], Prediction]] = MappingProxyType({}),
    ) -> dict[str, Account]:
        """Write the answers in the order of models and cases; returns what became of them, by model.

        What `settles` has for a model has the last word on each of its answers, early ones and late ones alike.
        """
        path = self.context.folder / PREDICTIONS
        path.touch()
        places: dict[_Key, int] = {}
        accounts: dict[str, Account] = {}
        with path.open("rb") as file, replacing(path) as beside, beside.open("wb") as ordered:
            start = 0
            for line in file:
                places[_key(Prediction.model_validate_json(line))] = start  # the last of a key counts
                start += len(line)
            for model in models:
                accounts[model] = Account(Names(self.context.folder, model).known)
                for case, n in ((case, n) for case in self.cases for n in range(self.samples)):
                    if (place := places.get((model, case.id, n))) is not None:
                        file.seek(place)
                        prediction = Prediction.model_validate_json(file.readline())
                        if settle := settles.get(model):
                            prediction = settle(case, prediction)
                        ordered.write(prediction.model_dump_json().encode() + b"\n")
                        accounts[model].add(prediction)
        return accounts


def put_back(folder: Path) -> int:
    """Take the failures out of a section's answers, so that they are owed; returns how many there were."""
    path, given_up = folder / PREDICTIONS, folder / FAILED
    if not path.exists():
        return 0
    with Lines(path):
        pass
    failed = [one for one in read_records(path, Prediction) if one.failure]
    known = {one.model_dump_json() for one in read_records(given_up, Prediction)} if given_up.exists() else set()
    with Lines(given_up) as lines:
        for one in failed:
            if one.model_dump_json() not in known:  # a kill came between this and what follows
                lines.write(one)
    write_records(path, (one for one in read_records(path, Prediction) if not one.failure))
    return len(failed)


def _unsure(prediction: Prediction, asking: Asking) -> bool:
    """Whether a disease is named whose confidence was asked for and is not known."""
    output = prediction.output if asking.confidence else None
    return isinstance(output, Diagnosis) and any(name not in prediction.confidence for name in output.diseases)


def _key(prediction: Prediction) -> _Key:
    return prediction.model, prediction.case_id, prediction.sample


def _of_the_moment(prediction: Prediction) -> bool:
    return prediction.failure is not None and prediction.failure.kind in _ASK_AGAIN


def asking_of(
    config: AskingConfig,
    context: Context,
    model: str,
    logprobs: int | None,
    *,
    corrects: bool,
    constrained: bool = True,
) -> Asking:
    """How a model is asked. `model` is the name that its predictions carry.

    `logprobs` are the alternatives a token that come with log-probabilities, None for none at all; `corrects` is
    whether a reply that can't be read is asked for once more; `constrained`, whether it is held to a JSON schema.
    """
    task = config.task
    examples = None
    if "examples" in context.inputs:
        shown = [_as_asked(case, config) for case in solved.solved(config, context)]
        examples = Examples(shown, config.examples, config.shots, config.seed)
    return Asking(
        _prompt(config, context),
        model,
        Sampling(temperature=config.temperature, max_tokens=config.max_tokens),
        logprobs=CLOSINGS if logprobs is None and config.confidence == CHAIN else logprobs,
        task=task,
        correction=prompts.words(task, "correction", config.language) if corrects else "",
        examples=examples,
        votes=config.votes,
        confidence=config.confidence,
        candidates=candidates(config.candidates, context) if config.confidence == CANDIDATES else (),
        constrained=constrained,
    )


def _prompt(config: AskingConfig, context: Context) -> Prompt:
    """The prompt with what is asked of the reasons.

    Raises:
        UserError: it asks in stages, and the strategy asks once; or it doesn't ask for the confidence that is wanted.
    """
    staged = config.strategy == TWO_STAGE
    usual = TWO_STAGE if staged else STATED if config.confidence == STATED else "zero_shot"
    name = str(context.optional("prompt") or config.prompt or usual)
    prompt = prompts.load(config.task, name, config.language)
    if len(prompt.stages) > 1 and not staged and config.strategy in STRATEGIES:
        raise UserError(f"{context.section}: {name} asks in stages and {config.strategy} once; choose {TWO_STAGE}")
    if config.confidence == STATED and STATED not in map(prompts.act_in, prompt.stages):
        raise UserError(
            f"{context.section}.confidence: {name} asks for no confidence; name a `prompt` with a line "
            f"[act: {STATED}], such as {STATED}"
        )
    for words, number in (("reasons", config.reasons), ("characters", config.reason_characters)):
        if number:
            asked = prompts.words(config.task, words, config.language)
            prompt = prompt.with_words(asked.replace("{number}", str(number)))
    return prompt


def _as_asked(case: Case, config: AskingConfig) -> Case:
    """A solved case with no more and no longer reasons than are asked for."""
    if not isinstance(case.gold, Diagnosis) or not (config.reasons or config.reason_characters):
        return case
    most = config.reason_characters
    fitting = [reason for reason in case.gold.reason if most is None or len(reason) <= most]
    gold = case.gold.model_copy(update={"reason": tuple(fitting[: config.reasons])})
    return case.model_copy(update={"gold": gold})
