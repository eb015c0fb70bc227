"""What a recipe's sections would ask, without asking: they run in a folder of their own, on the replies at hand.

A conversation is replayed from the ledger. Where that ends, a stand-in that can be read takes the place of each reply
that is still to come, so that later turns are counted too, as if every reply were what was asked for.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from logging import getLogger
from os.path import commonprefix
from pathlib import Path
from typing import Any

from preceptor.app.console import Show
from preceptor.app.recipe import Recipe, Section, inputs
from preceptor.app.run import is_done, run
from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Message, Reply, Request
from preceptor.llm.counting import Counting, counting
from preceptor.llm.ledger import request_key
from preceptor.llm.stored import Lengths, Stored
from preceptor.stages.asking import TEACHER
from preceptor.stages.base import LEDGER, Ticks
from preceptor.stages.prepare import TEXTBOOK
from preceptor.stages.teacher import Answerer, Rehearsal, TeacherConfig
from preceptor.tasks import prompts

_CORRECTS = ("label", "predict", "design", "calibrate")
"""Stages that ask once more for a reply that can't be read."""
_COMPLAINT = 64
"""Tokens that the reason why it can't may have."""
_MARK = "a reply to come, "
_Conversations = Iterable[tuple[Any, Generator[Request, Reply, Any]]]


@dataclass
class Owed:
    """What a section would ask. Tokens of prompts are without those of `embedded` replies."""

    section: Section
    teacher: TeacherConfig
    counting: Counting
    correction: int = 0
    """Tokens of the turn that asks once more, 0 where there is none."""
    open_ended: bool = False
    """The strategy is the user's own: only first requests are known."""
    is_done: bool = False
    refused: str = ""
    """Why a start would refuse, or what must be run before anything can be said."""
    is_known: bool = True
    total: int = 0
    """Conversations in all."""
    drawn: int = 0
    """Of these, not answered in the section's folder."""
    conversations: int = 0
    """Of these, not answered in the ledger either."""
    replayed: int = 0
    """Replies that the ledger gives."""
    requests: int = 0
    prompt: int = 0
    embedded: int = 0
    """Replies to come that later prompts hold."""
    shared: int = 0
    """Tokens of prompts that begin as an earlier one does."""
    requests_most: int = 0
    prompt_most: int = 0
    completion_most: int = 0
    reserve: Money | None = None
    """The most that one request can cost."""
    lengths: Lengths | None = None
    pace: float | None = None
    """Replies a minute."""
    committed: float = 0.0
    """What the recipe has spent already, or may have, in the price's currency."""

    def add(self, request: Request, common: int) -> int:
        """One more request, whose first `common` tokens an earlier one has too; returns its tokens."""
        messages, most = request.messages, request.sampling.max_tokens
        stand_ins = sum(message.content.count(_MARK) for message in messages)
        tokens = self.counting.prompt(messages) - stand_ins * self.counting.of(_stand_in(0))
        self.requests += 1
        self.prompt += tokens
        self.embedded += stand_ins
        self.shared += min(common, tokens)
        again = most + self.correction if self.correction else 0
        longest = self.counting.most(messages) + stand_ins * (most + again)
        self.requests_most += 1 + bool(again)
        self.prompt_most += longest + (longest + again if again else 0)
        self.completion_most += most * (1 + bool(again))
        return tokens


def rehearse(recipe: Recipe, runs: Path, show: Show) -> Iterator[Owed]:
    """What each section that asks a teacher would ask, in the file's order. Nothing is written into `runs`.

    Raises:
        WorkError: the ledger can't be read.
    """
    asking = {section.name: asks for section in recipe.sections if (asks := _asking(section))}
    last = max((place for place, section in enumerate(recipe.sections) if section.name in asking), default=-1)
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix="preceptor-plan-") as folder, Stored(runs / LEDGER) as stored:
        beside = Path(folder) / "runs"
        (beside / recipe.name).mkdir(parents=True)
        for section in recipe.sections[: last + 1]:
            real = runs / recipe.name / section.name
            refused = ""
            try:
                done = is_done(recipe, section, beside, real)
            except UserError as error:
                done, refused = False, str(error)
            if done:
                (beside / recipe.name / section.name).symlink_to(real.resolve(), target_is_directory=True)
            elif _is_textbook(section):  # its cases are the same wherever they are drawn
                run(recipe, [section.name], beside, _Silent())
            if section.name in asking:
                owed = _owed(asking[section.name], stored, recipe.name)
                owed.is_done = done
                if not done:
                    _Rehearsed(recipe, owed, stored, seen, show).run(beside, real, refused)
                yield owed


class _Silent(Show):
    """Shows how far it is, and nothing else."""

    def line(self, text: str) -> None:
        """Nothing."""

    def result(self, thing: Any) -> None:
        """Nothing."""


def _asking(section: Section) -> Section | None:
    """The section, of several models with the teacher alone; None if it asks no teacher."""
    if not isinstance(getattr(section.config, "teacher", None), TeacherConfig):
        return None
    if section.stage.name != "predict":
        return section
    if TEACHER not in getattr(section.config, "models", ()):
        return None
    return replace(section, config=section.config.model_copy(update={"models": (TEACHER,)}))


def _is_textbook(section: Section) -> bool:
    config = section.config
    return section.stage.name == "prepare" and (config.source, config.target) == ((TEXTBOOK,), ())  # type: ignore[attr-defined]  # prepare's own


def _owed(section: Section, stored: Stored, recipe: str) -> Owed:
    config: Any = section.config
    teacher: TeacherConfig = config.teacher
    first = teacher.endpoint[0]
    count_ = counting(teacher.model, first, teacher.tokenizer)
    owed = Owed(section, teacher, count_, open_ended=":" in getattr(config, "strategy", ""))
    if section.stage.name in _CORRECTS:
        words = prompts.words(config.task, "correction", config.language)
        owed.correction = count_.most([Message(role="user", content=words)]) + _COMPLAINT
    if first.price:
        owed.committed = stored.committed(recipe, first.price.currency)
    return owed


def _stand_in(number: int) -> str:
    """A reply that every task can read, unlike any other."""
    return f'{{"diseases": ["{_MARK}{number:09}"], "reason": []}}'


class _Rehearsed:
    """One section on the replies at hand."""

    def __init__(self, recipe: Recipe, owed: Owed, stored: Stored, seen: set[bytes], show: Show) -> None:
        self._recipe, self._owed, self._stored, self._seen, self._show = recipe, owed, stored, seen, show
        self._numbers = count()

    def run(self, beside: Path, real: Path, refused: str) -> None:
        """Fill in what is owed. `real`: the section's folder; `beside`: where the inputs lie."""
        owed, section = self._owed, self._owed.section
        try:
            found = inputs(self._recipe, section, beside)
        except UserError as error:
            owed.is_known, owed.refused = False, str(error)
            return
        with suppress(UserError):
            inputs(self._recipe, next(s for s in self._recipe.sections if s.name == section.name), beside)
            owed.refused = refused
        with tempfile.TemporaryDirectory(dir=beside.parent) as name:
            folder = Path(name)
            if not owed.refused:
                for left in filter(Path.is_file, map(real.joinpath, section.stage.leaves)):
                    shutil.copy(left, folder)
            context = Rehearsal(
                self._recipe.name,
                section.name,
                folder,
                beside,
                found,
                getLogger(__name__),
                self._progress,
                lambda _: None,
                self._hold,
            )
            try:
                section.stage.run(section.config, context)
            except (UserError, WorkError) as error:
                if not owed.conversations:  # behind the first stand-in nothing is as it will be
                    owed.is_known, owed.refused = False, str(error)

    @contextmanager
    def _progress(self, what: str, total: int | None) -> Iterator[Ticks]:
        self._owed.total += total or 0
        yield lambda done=1, note="", total=None: None

    def _hold(
        self,
        conversations: _Conversations,
        answerer: Answerer,
        keep: Callable[[Any, Any], None],
        sample: Callable[[Any], int],
    ) -> None:
        owed, first = self._owed, answerer.completers[0]
        run_ = f"{self._recipe.name}/{owed.section.name}"
        owed.lengths = self._stored.lengths(first.name, first.model, run_)
        owed.pace = self._stored.pace(first.name, first.model)
        begun = _Begun()
        with self._show.progress(f"{owed.section.name}: counting", None) as tick:
            for name, conversation in conversations:
                owed.drawn += 1
                tick()
                repeats: Counter[Request] = Counter()
                reply: Reply | None = None
                try:
                    while True:
                        request = conversation.send(reply) if reply else next(conversation)
                        key = request_key(first.name, first.model, request, sample(name), repeats[request])
                        if (reply := self._stored.reply(key)) is None:
                            break
                        owed.replayed += 1
                        repeats[request] += 1
                except StopIteration as end:
                    keep(name, end.value)
                    continue
                new = key not in self._seen  # the same request elsewhere brings the reply for both
                self._seen.add(key)
                keep(name, self._went_on(request, conversation, answerer, begun if new else None))
        owed.shared += max(begun.number - 1, 0) * owed.counting.of(begun.text)

    def _went_on(
        self,
        request: Request,
        conversation: Generator[Request, Reply, Any],
        answerer: Answerer,
        begun: "_Begun | None",
    ) -> Any:
        """What a conversation comes to on stand-ins from a request on, which counts if `begun` is to know of it."""
        owed = self._owed
        before, tokens = "", 0
        if begun:
            owed.conversations += 1
            begun.add(_joined(request.messages))
        while True:
            if begun:
                text = _joined(request.messages)
                tokens = owed.add(request, tokens if before and text.startswith(before) else 0)
                before = text
                reserves = [most for lane in answerer.completers if (most := lane.most(request))]
                owed.reserve = max((*reserves, *filter(None, [owed.reserve])), default=None)
            if owed.open_ended:
                return Failure(kind=FailureKind.PROVIDER, detail="not asked yet")
            try:
                request = conversation.send(Reply(text=_stand_in(next(self._numbers))))
            except StopIteration as end:
                return end.value


@dataclass
class _Begun:
    """How the prompts of conversations begin, as far as all begin alike."""

    text: str = ""
    number: int = 0

    def add(self, text: str) -> None:
        """One more."""
        self.number += 1
        if self.number == 1:
            self.text = text
        elif not text.startswith(self.text):
            self.text = commonprefix([self.text, text])  # noqa: RUF071  of characters, and no paths


def _joined(messages: Sequence[Message]) -> str:
    return "".join(message.content for message in messages)
