"""A conversation under way, held to what every strategy must do: it may be the user's own."""

from collections.abc import Generator
from dataclasses import dataclass, field

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Failure, Message, Prediction, Request, UnansweredError, Usage
from preceptor.tasks.strategies import Asking, Conversation, Strategy, failed
from preceptor.tasks.sureness import with_confidence


@dataclass
class Talk:
    """About one case."""

    case: Case
    asking: Asking
    messages: tuple[Message, ...] = ()
    """That were sent last."""
    served: list[str] = field(default_factory=list)
    """What each reply said that the model is called."""
    usage: Usage = field(default_factory=Usage)
    """Of the replies so far."""

    def held(self, strategy: Strategy, name: str) -> Conversation:
        """The conversation of a strategy, with the confidence that is wanted; `name` is what the recipe calls it."""
        conversation = with_confidence(_checked(strategy, name))(self.case, self.asking)
        try:
            request = next(conversation)
            while True:
                if not isinstance(request, Request):
                    raise _not_a_strategy(name, f"it yields {type(request).__name__}, not a Request")
                self.messages = request.messages
                try:
                    reply = yield request
                except UnansweredError as lost:
                    request = conversation.throw(lost)
                    continue
                self.served.append(reply.model)
                self.usage += reply.usage
                request = conversation.send(reply)
        except StopIteration as end:
            prediction: Prediction = end.value
            return prediction

    def failed(self, failure: Failure) -> Prediction:
        """The prediction of a conversation that a failure ended."""
        return failed(self.case, self.asking, failure, self.messages).model_copy(update={"usage": self.usage})


def _checked(strategy: Strategy, name: str) -> Strategy:
    """The same, which ends at once where it gives what is no prediction about what was asked."""

    def checked(case: Case, asking: Asking) -> Conversation:
        conversation = strategy(case, asking)
        if not isinstance(conversation, Generator):
            raise _not_a_strategy(name, f"it gives {type(conversation).__name__}, not a generator")
        made = yield from conversation
        if not isinstance(made, Prediction):
            raise _not_a_strategy(name, f"it returns {type(made).__name__}, not a Prediction")
        told = {"model": made.model, "case": made.case_id, "sample": made.sample}
        asked = {"model": asking.model, "case": case.id, "sample": asking.sample}
        for what, value in told.items():
            if value != asked[what]:
                raise _not_a_strategy(name, f"asked about {what} {asked[what]!r}, its prediction is about {value!r}")
        return made

    return checked


def _not_a_strategy(name: str, why: str) -> UserError:
    return UserError(f"strategy {name!r}: {why}; preceptor/tasks/strategies.py shows one")
