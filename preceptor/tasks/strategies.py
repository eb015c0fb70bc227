"""Prompting strategies: generators that yield requests, receive replies and return what they make of them.

A strategy is a pure function of the case, its settings and the replies so far, so a conversation can be replayed
from stored replies. The same strategies serve teacher and student.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from preceptor.core.records import Case, Diagnosis, Failure, FailureKind, Prediction, Reply, Request, Sampling
from preceptor.tasks import diagnosis
from preceptor.tasks.prompts import Prompt, prompt_sha

Conversation = Generator[Request, Reply, Prediction]


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    prompt: Prompt
    model: str
    """The name that predictions carry."""
    sampling: Sampling
    sample: int = 0
    confidence: bool = False
    """Ask for the log-probabilities of the chosen tokens, and take each disease's probability from them."""


Strategy = Callable[[Case, Asking], Conversation]


def zero_shot(case: Case, asking: Asking) -> Conversation:
    """One question, one answer."""
    request = Request(
        messages=asking.prompt.render(case.text),
        sampling=asking.sampling,
        logprobs=0 if asking.confidence else None,
    )
    return conclude(case, asking, request, (yield request))


def conclude(case: Case, asking: Asking, request: Request, reply: Reply) -> Prediction:
    """The prediction that the last reply of a conversation makes."""
    parsed = diagnosis.parse(reply.text, reply.finish)
    output = None if parsed.output is None else diagnosis.ground(parsed.output, case)
    return Prediction(
        case_id=case.id,
        sample=asking.sample,
        model=asking.model,
        prompt_sha=prompt_sha(request.messages),
        reply=reply.key,
        text=reply.text,
        thinking=reply.thinking,
        output=output,
        failure=None if output else Failure(kind=FailureKind(parsed.outcome), detail=parsed.detail),
        repaired=parsed.outcome is diagnosis.Outcome.REPAIRED,
        confidence=_confidence(reply, output),
        usage=reply.usage,
    )


def failed(case: Case, asking: Asking, failure: Failure) -> Prediction:
    """The prediction of a conversation that a failure ended."""
    messages = asking.prompt.render(case.text)
    return Prediction(
        case_id=case.id,
        sample=asking.sample,
        model=asking.model,
        prompt_sha=prompt_sha(messages),
        failure=failure,
    )


def _confidence(reply: Reply, output: Diagnosis | None) -> dict[str, float]:
    return diagnosis.chain_probability(reply, output) if output and reply.tokens else {}


STRATEGIES: dict[str, Strategy] = {"zero_shot": zero_shot}
