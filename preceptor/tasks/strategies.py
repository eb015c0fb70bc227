"""Prompting strategies: generators that yield requests, receive replies and return what they make of them.

A strategy is a pure function of the case, its settings and the replies so far, so a conversation can be replayed
from stored replies. The same strategies serve teacher and student, and both tasks.
"""

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

from preceptor.core.errors import UserError
from preceptor.core.records import (
    Case,
    Consultation,
    Diagnosis,
    Failure,
    FailureKind,
    Message,
    Prediction,
    Reply,
    Request,
    Sampling,
    Task,
    UnansweredError,
    Usage,
)
from preceptor.core.text import token_id
from preceptor.tasks import consult, diagnosis, voting
from preceptor.tasks.answer import Outcome
from preceptor.tasks.examples import Examples
from preceptor.tasks.prompts import Prompt, act_in, prompt_sha

Source = Literal["chain", "candidates", "samples", "stated"]
"""Where the confidence in a disease comes from."""
Conversation = Generator[Request, Reply, Prediction]
Parsed = diagnosis.Parsed | consult.Parsed
_TAG = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_CORRECTABLE = (Outcome.UNPARSED, Outcome.EMPTY, Outcome.TRUNCATED)


def _schema(**fields: tuple[str, str]) -> str:
    """The JSON schema of an object with lists of these types, and with nothing else."""
    lists = {
        name: {"type": "array", "items": {"type": kind}, "description": told} for name, (kind, told) in fields.items()
    }
    schema = {"type": "object", "properties": lists, "required": list(fields), "additionalProperties": False}
    return json.dumps(schema, ensure_ascii=False)


_DISEASES = "string", "Names, the likeliest first; none if the record does not say enough."
_SURE = "number", "Of each disease the probability that the patient has it, from 0 to 1."
_REASON = "string", "Quotes of the record's own words."
_ANSWER = _schema(diseases=_DISEASES, reason=_REASON)
SCHEMAS = {
    "diagnosis": _ANSWER,
    "evidence": _ANSWER,
    "diseases": _schema(diseases=_DISEASES),
    "stated": _schema(diseases=_DISEASES, confidence=_SURE, reason=_REASON),
}
"""By act, what replies are held to where the endpoint can. An act that thinks aloud first has none."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    prompt: Prompt
    model: str
    """The name that predictions carry."""
    sampling: Sampling
    sample: int = 0
    logprobs: int | None = None
    """Alternatives a token that are asked for with the log-probabilities, from which each disease's probability is
    taken; None for none of all that."""
    task: Task = "diagnosis"
    correction: str = ""
    """What is said to a reply that can't be read, with a place for the `{complaint}`; nothing is, if it is empty."""
    examples: Examples | None = None
    """Where few-shot's examples come from."""
    votes: int = 5
    """Samples of self-consistency, or from which the confidence is taken."""
    confidence: Source | None = None
    """Its source; None for the chain probability where there are log-probabilities."""
    candidates: tuple[str, ...] = ()
    """Names of the diseases whose probabilities are asked for, where that is the source."""
    constrained: bool = True
    """Replies are held to the JSON schema of their act, where the one who answers can."""


Strategy = Callable[[Case, Asking], Conversation]


@dataclass(frozen=True)
class Said:
    """The last reply to a question, and what it says."""

    messages: tuple[Message, ...]
    """That were sent."""
    reply: Reply
    parsed: Parsed
    corrected: bool
    usage: Usage
    """Of all replies to the question."""


def zero_shot(case: Case, asking: Asking) -> Conversation:
    """One question, one answer."""
    return conclude(case, asking, (yield from ask(asking, asking.prompt.render(case.text))))


def few_shot(case: Case, asking: Asking) -> Conversation:
    """The same after solved cases, as earlier turns of the conversation."""
    if asking.examples is None:
        raise UserError("few_shot: no examples were given; name solved cases in `examples_from`")
    messages = asking.prompt.render(case.text, asking.examples.of(case))
    return conclude(case, asking, (yield from ask(asking, messages)))


def two_stage(case: Case, asking: Asking) -> Conversation:
    """Diseases, then the evidence for them, which may correct them; of advice the analysis, then the advice."""
    stages = asking.prompt.stages
    if len(stages) == 1:
        raise UserError("two_stage: the prompt asks once; a second turn '=== user' says what is asked then")
    read = _analysis if asking.task == "consult" else diagnosis.parse
    first = said = yield from ask(asking, asking.prompt.render(case.text), read)
    usage = said.usage
    for stage in stages[1:]:
        if said.parsed.output is None:
            break
        messages = (*said.messages, Message(role="assistant", content=said.reply.text), *stage)
        said = yield from ask(asking, messages)
        usage += said.usage
    corrected = first.corrected or said.corrected
    prediction = conclude(case, asking, replace(said, usage=usage, corrected=corrected))
    before, after = first.parsed.output, prediction.output
    named = _confidence(first.reply, before)  # a name given to the second turn is certain there
    confidence = {name: named.get(name, last) for name, last in prediction.confidence.items()}
    if isinstance(after, Consultation) and isinstance(before, Consultation) and not after.think:
        after = after.model_copy(update={"think": before.answer})
    return prediction.model_copy(update={"output": after, "confidence": confidence, "revised": _differ(before, after)})


def self_consistency(case: Case, asking: Asking) -> Conversation:
    """Several samples, and what they say together, with the share of the samples that name a disease as confidence.

    Samples that failed or can't be read have no vote, but count among those that don't agree; where none can, the last
    one's failure is the answer's.
    """
    said: list[Prediction] = []
    for _ in range(asking.votes):
        try:
            said.append((yield from zero_shot(case, asking)))
        except UnansweredError as lost:
            said.append(failed(case, asking, lost.failure))
    usage = sum((sample.usage for sample in said), Usage())
    valid = [sample for sample in said if sample.output]
    if not valid:
        return said[-1].model_copy(update={"usage": usage})
    outputs: list[Any] = [sample.output for sample in valid]
    vote = (
        voting.consultations(outputs)
        if asking.task == "consult"
        else voting.diagnoses(outputs, diagnosis.textbook_namer())
    )
    output = vote.output if isinstance(vote.output, Consultation) else diagnosis.ground(vote.output, case)
    update = {"output": output, "agreement": vote.votes / len(said), "usage": usage}
    confidence = {name: count / len(said) for name, count in vote.counts.items()}
    return valid[vote.chosen].model_copy(update={**update, "confidence": confidence})


def ask(
    asking: Asking, messages: tuple[Message, ...], read: Callable[[str, str], Parsed] | None = None
) -> Generator[Request, Reply, Said]:
    """One question; if its reply can't be read, the model is told why, once, and answers again.

    A refusal is not argued with, an empty reply leaves nothing to correct, and where the limit of tokens cut the reply
    the same would happen again. `read` reads replies, by default as answers to the task.
    """
    read = read or (consult.parse if asking.task == "consult" else diagnosis.parse)
    reply = yield _request(asking, messages)
    parsed = read(reply.text, reply.finish)
    spoke = reply.finish == "stop" and reply.text.strip()
    if not (asking.correction and spoke and parsed.outcome in _CORRECTABLE):
        return Said(messages, reply, parsed, corrected=False, usage=reply.usage)
    complaint = asking.correction.replace("{complaint}", parsed.detail)
    messages = (
        *messages,
        Message(role="assistant", content=reply.text),
        Message(role="user", content=complaint),
    )
    again = yield _request(asking, messages)
    return Said(messages, again, read(again.text, again.finish), corrected=True, usage=reply.usage + again.usage)


def _request(asking: Asking, messages: tuple[Message, ...]) -> Request:
    return Request(
        messages=messages,
        sampling=asking.sampling,
        json_schema=SCHEMAS.get(act_in(messages) or "", "")
        if asking.constrained and asking.task == "diagnosis"
        else "",
        logprobs=asking.logprobs,
    )


def conclude(case: Case, asking: Asking, said: Said) -> Prediction:
    """The prediction that the last reply of a conversation makes."""
    reply, output = said.reply, said.parsed.output
    if isinstance(output, Diagnosis):
        output = diagnosis.ground(output, case)
    elif output and not output.think:
        output = output.model_copy(update={"think": reply.thinking})
    return Prediction(
        case_id=case.id,
        sample=asking.sample,
        model=asking.model,
        prompt_sha=prompt_sha(said.messages),
        reply=reply.key,
        text=reply.text,
        thinking=reply.thinking,
        output=output,
        failure=None if output else _failure(asking, said),
        repaired=said.parsed.outcome is Outcome.REPAIRED or (output is not None and _was_closed(reply)),
        corrected=said.corrected,
        cut=reply.cut,
        confidence=_confidence(reply, output),
        usage=said.usage,
    )


def _was_closed(reply: Reply) -> bool:
    """Whether JSON was brought to its end because tokens ran out: one who went on talking was merely cut."""
    return reply.finish == "length" and reply.text.rstrip().endswith("}")


def failed(case: Case, asking: Asking, failure: Failure, messages: tuple[Message, ...] = ()) -> Prediction:
    """The prediction of a conversation that a failure ended. `messages`: what was sent last."""
    return Prediction(
        case_id=case.id,
        sample=asking.sample,
        model=asking.model,
        prompt_sha=prompt_sha(messages or asking.prompt.render(case.text)),
        failure=failure,
    )


def _failure(asking: Asking, said: Said) -> Failure:
    detail = said.parsed.detail
    if said.corrected:
        detail = f"{detail}, after a correction too"
    if said.reply.finish == "length":
        reply, most = said.reply, asking.sampling.max_tokens
        full = not (reply.text or reply.thinking or reply.usage.completion_tokens)
        detail += (
            ": its prompt leaves no room in the model's context; shorten it, or show fewer examples"
            if full
            else f": it has all of max_tokens={most}; raise that"
        )
    return Failure(kind=FailureKind(said.parsed.outcome), detail=detail)


def _analysis(text: str, finish: str) -> Parsed:
    """An analysis as an answer, whether or not it stands within the tags of thinking."""
    return consult.parse(_TAG.sub("", text), finish)


def _differ(before: Diagnosis | Consultation | None, after: Diagnosis | Consultation | None) -> bool:
    """Whether two answers name other diseases, or in another order. An analysis is no answer yet."""
    if not isinstance(before, Diagnosis) or not isinstance(after, Diagnosis):
        return False
    concept = diagnosis.textbook_namer().concept
    return [concept(name) for name in before.diseases] != [concept(name) for name in after.diseases]


def _confidence(reply: Reply, output: Diagnosis | Consultation | None) -> dict[str, float]:
    """That of the tokens; none where they are ids, in which no name is found."""
    if isinstance(output, Diagnosis) and reply.tokens and token_id(reply.tokens[0].utf8) is None:
        return diagnosis.chain_probability(reply, output)
    return {}


STRATEGIES: dict[str, Strategy] = {
    "zero_shot": zero_shot,
    "few_shot": few_shot,
    "two_stage": two_stage,
    "self_consistency": self_consistency,
}
