"""A conversation driven by hand: the replies are a script, what was asked comes back."""

from collections.abc import Generator, Iterable

from preceptor.core.records import Case, Reply, Request, Usage

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3, thinking_tokens=1)


def case(text="cough and fever for 3 days", **more):
    fields = {"id": "c", "text": text, "language": "en", "source": "test", "group": "g"}
    return Case(**{**fields, **more})


def reply(text="", number=0, **more):
    return Reply(text=text, **{"key": f"k{number}", "usage": USAGE, **more})


def drive(talk: Generator[Request, Reply, object], replies: Iterable[Reply | str]) -> tuple[object, list[Request]]:
    """What the conversation returns, and the requests that it made; it must take all the replies."""
    asked = [next(talk)]
    script = [reply(one, n) if isinstance(one, str) else one for n, one in enumerate(replies)]
    for n, one in enumerate(script):
        try:
            asked.append(talk.send(one))
        except StopIteration as end:
            assert n == len(script) - 1, f"it ended after {n + 1} of {len(script)} replies"
            return end.value, asked
    raise AssertionError("it asks once more")
