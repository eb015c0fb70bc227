"""What a teacher believed of each token that is learned: a store, made from the ledger or by a local teacher."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from preceptor.core.errors import UserError
from preceptor.core.records import Diagnosis, Prediction, Reply, Row
from preceptor.llm.ledger import Ledger
from preceptor.stages.asking import TWO_STAGE
from preceptor.stages.base import LEDGER, Context, read_records

if TYPE_CHECKING:
    from preceptor.train.batches import Adjust
    from preceptor.train.store import Beliefs

STORE = "beliefs"
_THOUGHT = "</think>\n\n"
_WHOLE = 1e-3
"""Mean mass of all other tokens, where there is a choice, up to which the alternatives are the whole distribution."""
_GIVE = "label with `logprobs: 5` at an endpoint that gives log-probabilities, or name a `local_teacher`"
_READ = "name a `local_teacher`, which reads what is learned"
_GIVEN = (
    "labels were asked for in two stages: the probabilities of diseases are those of the second turn, which reads the "
    "first one's answer, and a language model repeats that nearly for certain; to distil doubt, label otherwise"
)
_DRAWN = "divergence: sampled: tokens can be drawn from a whole distribution alone"


@dataclass(frozen=True)
class Making:
    """How a store is made."""

    folder: Path
    tokenizer: Any
    """The student's, whose ids are kept."""
    student: str
    k: int
    """Tokens that are kept of each position, the likeliest."""
    draws: int = 0
    """So many are drawn in their stead; 0: none."""
    temperature: float = 1.0
    """At which they are drawn, and at which a local teacher believes."""
    seed: int = 0

    def writer(self, teacher: str) -> Any:
        """The store to add to; a drawn position has room for the token that was written too."""
        from preceptor.train.align import fingerprint
        from preceptor.train.store import Header, Writer

        drawn = f", {self.draws} drawn at {self.temperature:g} by {self.seed}" if self.draws else ""
        k = self.draws + 1 if self.draws else self.k
        return Writer(self.folder, Header(k, fingerprint(self.tokenizer), teacher + drawn))


@contextmanager
def unbound(folder: Path) -> Iterator[None]:
    """A store that a refused request has only just begun goes, so that a mended one may begin in its place."""
    begun = folder.exists()
    try:
        yield
    except UserError:
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def from_ledger(making: Making, rows: Sequence[Row], context: Context, adjust: Sequence["Adjust"]) -> dict[str, float]:
    """Make the store of the replies that the rows were made of; returns what became of their tokens.

    Where tokens are drawn, they are from what `adjust` makes of the probabilities.

    Raises:
        UserError: no reply has log-probabilities, they are another tokenizer's, or there are too few to draw from.
    """
    from preceptor.model import tokens
    from preceptor.train.align import WAY_OUT, Tally, aligned, spells
    from preceptor.train.scorer import drawn_from

    replies = _replies(context)
    tally, missing, strange, unseen = Tally(), 0, 0, list[float]()
    with (
        Ledger(context.runs / LEDGER) as ledger,
        making.writer("ledger") as writer,
        context.progress(f"{context.section}: the teacher's tokens", len(rows)) as tick,
    ):
        for row in rows:
            tick()
            answer = tokens.answer_ids(making.tokenizer, row)
            said = [reply for key in replies[row.case_id] if isinstance(reply := ledger.find(key), Reply)]
            said = [reply for reply in said if reply.tokens]
            if not said:
                missing += 1
                continue
            found = _first(aligned(making.tokenizer, answer, reply.tokens, making.k, tally) for reply in said)
            if found is None:
                tally.texts += 1
                strange += not any(spells(making.tokenizer, reply) for reply in said)
                continue
            if making.draws:
                unseen += found.rest[np.isfinite(found.logprobs).sum(axis=1) > 1].tolist()
                found = drawn_from(found, making.draws, f"{making.seed} {row.sample} {row.case_id}", adjust)
            if (row.case_id, row.sample) not in writer:
                writer.add(row.case_id, row.sample, found)
    if not tally.believed and strange:
        raise UserError(f"{context.section}: the teacher's ids are not those of {making.student}'s tokens; {WAY_OUT}")
    if not tally.believed:
        why, way = ("have no log-probabilities in the ledger", _GIVE)
        if tally.texts:
            why, way = ("are written otherwise than what is learned", _READ)
        raise UserError(f"{context.section}: all replies {why}: nothing is known to distil; {way}")
    tally.check("the teacher", making.student)
    if unseen and (share := fmean(unseen)) > _WHOLE:
        raise UserError(
            f"{context.section}: {_DRAWN}, and {share:.1%} of the mass is beyond the {making.k} alternatives "
            "that are kept; raise k and the label section's logprobs, or name a `local_teacher`"
        )
    _tell(context, tally, missing)
    return {
        "answer_tokens": tally.tokens,
        "believed": tally.believed,
        "silent": tally.silent,
        "apart": tally.apart,
        "foreign": sum(tally.foreign.values()),
        "texts": tally.texts,
        "missing": missing,
    }


def from_teacher(
    making: Making, rows: Sequence[Row], context: Context, teacher: str | Path, max_length: int
) -> dict[str, float]:
    """Make the store by a teacher on this machine, which reads all rows; returns how many it read.

    Raises:
        UserError: its tokens are not the student's, or it can't be loaded.
    """
    from preceptor.model import tokens
    from preceptor.model.load import load
    from preceptor.model.resolve import digest
    from preceptor.train.scorer import believe, check_tokens

    loaded = load(teacher)
    check_tokens(loaded, making.tokenizer, making.student)
    examples = {}
    for row in rows:
        try:
            examples[row.case_id, row.sample] = tokens.example(making.tokenizer, row, max_length)
        except tokens.TooLongError:  # training says which
            continue
    long = 0
    k = making.draws + 1 if making.draws else making.k
    soft = f", at {making.temperature:g}" if making.temperature != 1 and not making.draws else ""
    with (
        making.writer(digest(loaded.folder) + soft) as writer,
        context.progress(f"{context.section}: the teacher reads", len(examples)) as tick,
    ):
        told = believe(
            loaded,
            examples,
            k,
            drawn=bool(making.draws),
            temperature=making.temperature,
            seed=making.seed,
            done=writer,
        )
        tick(sum(key in writer for key in examples))
        for key, found in told:
            tick()
            if found is None:
                long += 1
                context.log.warning("%s: longer than the teacher's context: its label alone is learned", key[0])
            else:
                writer.add(*key, found)
    if long:
        context.say(f"{context.section}: {long} of {len(examples)} rows are longer than the teacher's context")
    return {"read": len(examples) - long, "too_long": long}


def as_written(rows: Sequence[Row], context: Context) -> list[Row]:
    """The rows with each answer as the teacher wrote it, where that says the same in JSON with other spaces.

    What it believed is of its own words; a label in another form has no probabilities.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        waiting[row.case_id].append(at)
    found = list(rows)
    for path in context.inputs["predictions.jsonl"]:
        for prediction in read_records(path, Prediction):
            if not isinstance(prediction.output, Diagnosis) or prediction.repaired:
                continue
            said = prediction.text[prediction.text.find("{") : prediction.text.rfind("}") + 1]
            for at in waiting.get(prediction.case_id, ()):
                thought, mark, learned = rows[at].answer.rpartition(_THOUGHT)
                if said != learned and _same(said, learned):
                    found[at] = rows[at].model_copy(update={"answer": thought + mark + said})
    if changed := sum(one is not other for one, other in zip(found, rows, strict=True)):
        context.say(
            f"{context.section}: {changed} answers are learned as the teacher wrote them, in its own form of JSON"
        )
    return found


def _same(said: str, learned: str) -> bool:
    """Whether two texts are JSON that says the same."""
    try:
        return bool(json.loads(said) == json.loads(learned))
    except ValueError:
        return False


def check_keys(rows: Sequence[Row], where: str, *, by_prompt: bool) -> None:
    """Refuse rows that a store, which knows a row by case and sample, would take for one another.

    `by_prompt`: what is believed of an answer depends on the row's prompt too.

    Raises:
        UserError: two rows of one key differ.
    """
    known: dict[tuple[str, int], Row] = {}
    for row in rows:
        first = known.setdefault((row.case_id, row.sample), row)
        if first.answer != row.answer or (by_prompt and first.messages != row.messages):
            raise UserError(
                f"{where}: rows {first.id} and {row.id} differ, and both are sample {row.sample} of case {row.case_id}"
                "; give each answer to a case a `sample` of its own"
            )


def _replies(context: Context) -> Mapping[str, list[str]]:
    """Of each case the ledger's keys of the replies to it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in context.inputs["predictions.jsonl"]:
        for prediction in read_records(path, Prediction):
            if prediction.reply and prediction.output is not None:
                found[prediction.case_id].append(prediction.reply)
    return found


def _asked_twice(section: Path) -> bool:
    """Whether a section's answers came in two turns."""
    config = section / "config.json"
    return config.exists() and json.loads(config.read_text("utf-8"))["config"]["strategy"] == TWO_STAGE


def _first(found: Iterator["Beliefs | None"]) -> "Beliefs | None":
    return next((one for one in found if one is not None), None)


def _tell(context: Context, tally: Any, missing: int) -> None:
    known = tally.believed / max(1, tally.tokens)
    context.say(
        f"{context.section}: of {tally.tokens:,} tokens the teacher's beliefs are known of {known:.1%}; the others' "
        "labels alone are learned"
    )
    for count, why in (
        (missing, "have no log-probabilities in the ledger"),
        (tally.texts, "are written otherwise in the row than in the reply"),
    ):
        if count:
            context.say(f"{context.section}: {count} answers {why}: their labels alone are learned")
    if tally.apart:
        context.say(f"{context.section}: {tally.apart} tokens are cut otherwise by the teacher")
    if foreign := sum(tally.foreign.values()):
        commonest = ", ".join(repr(text.decode(errors="replace")) for text, _ in tally.foreign.most_common(3))
        context.say(f"{context.section}: {foreign} alternatives are no tokens of the student's, such as {commonest}")
    if any(_asked_twice(path.parent) for path in context.inputs["predictions.jsonl"]):
        context.say(f"{context.section}: {_GIVEN}")
