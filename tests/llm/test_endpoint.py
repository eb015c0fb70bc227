"""What a bad server does, and what the endpoint makes of it; where text may go."""

import asyncio
import socket
from typing import Any

import pytest

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import FailureKind, Reply, Usage
from preceptor.llm.completer import ProviderError
from preceptor.llm.endpoint import Endpoint, EndpointConfig, _retry_after
from tests.llm.conftest import ask
from tests.llm.server import ANSWER, Hostile


def complete(url: str, text: str = "hello", logprobs: int | None = None, **config: Any) -> Reply:
    async def main() -> Reply:
        endpoint = Endpoint(EndpointConfig.model_validate({"url": url, "timeout": 1, **config}), "m")
        try:
            return await endpoint.complete(ask(text, logprobs))
        finally:
            await endpoint.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("act", "kind", "retryable"),
    [
        ("429", FailureKind.PROVIDER, True),
        ("500", FailureKind.PROVIDER, True),
        ("400", FailureKind.PROVIDER, False),
        ("reset", FailureKind.PROVIDER, True),
        ("hang", FailureKind.TIMEOUT, True),
        ("cut", FailureKind.PROVIDER, True),
        ("spaces", FailureKind.PROVIDER, True),
        ("html", FailureKind.PROVIDER, True),
        ("list", FailureKind.PROVIDER, True),
        ("choices", FailureKind.EMPTY, True),
        ("null", FailureKind.EMPTY, True),
    ],
)
def test_each_misbehaviour_has_a_name(hostile: Hostile, act: str, kind: FailureKind, retryable: bool) -> None:
    with pytest.raises(ProviderError) as caught:
        complete(hostile.url, f"do: {act}", timeout=1 if act == "hang" else 20)
    assert (caught.value.kind, caught.value.retryable, caught.value.sent) == (kind, retryable, True)
    assert caught.value.detail
    assert "\n" not in caught.value.detail
    assert caught.value.retry_after == (0.2 if act == "429" else None)


@pytest.mark.parametrize("act", ["401", "404", "302"])
def test_what_fails_every_request_is_the_users_to_mend(hostile: Hostile, act: str) -> None:
    with pytest.raises(UserError, match=act) as caught:
        complete(hostile.url, f"do: {act}")
    assert "\n" not in str(caught.value)


def test_unpaid_bill_ends_the_work(hostile: Hostile) -> None:
    with pytest.raises(WorkError, match="payment"):
        complete(hostile.url, "do: 402")


def test_reply(hostile: Hostile) -> None:
    reply = complete(hostile.url)
    assert (reply.text, reply.finish, reply.model) == (ANSWER, "stop", "m-1")
    assert reply.usage.prompt_tokens == 7
    body = hostile.bodies[0]
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 512,
    }


@pytest.mark.parametrize(("act", "finish"), [("length", "length"), ("refusal", "refusal"), ("filter", "refusal")])
def test_paid_replies_are_replies(hostile: Hostile, act: str, finish: str) -> None:
    assert complete(hostile.url, f"do: {act}").finish == finish


def test_nonsense_for_usage_costs_no_reply(hostile: Hostile) -> None:
    reply = complete(hostile.url, "do: usage")
    assert (reply.text, reply.usage) == (ANSWER, Usage())


def test_half_a_character_can_be_written_down(hostile: Hostile) -> None:
    reply = complete(hostile.url, "do: half")
    assert Reply.model_validate_json(reply.model_dump_json()).text.startswith("half")


@pytest.mark.parametrize("act", ["think", "reasoning"])
def test_thinking_is_kept_apart(hostile: Hostile, act: str) -> None:
    reply = complete(hostile.url, f"do: {act}")
    assert (reply.thinking, reply.text) == ("hm", ANSWER)


@pytest.mark.parametrize("act", ["logprobs", "thinkprobs"])
def test_tokens_spell_the_text(hostile: Hostile, act: str) -> None:
    reply = complete(hostile.url, f"do: {act}", logprobs=5)
    assert b"".join(token.utf8 for token in reply.tokens).decode() == reply.text == ANSWER
    assert reply.tokens[3].alternatives[0][0] == reply.tokens[3].utf8
    assert hostile.bodies[0]["top_logprobs"] == 5


def test_missing_logprobs_are_told_apart(hostile: Hostile) -> None:
    with pytest.raises(UserError, match="gives no log-prob"):
        complete(hostile.url, "hello", logprobs=0)
    with pytest.raises(ProviderError, match="don't spell"):
        complete(hostile.url, "do: misspelt", logprobs=0)


def test_extra_fields_and_the_name(hostile: Hostile) -> None:
    complete(hostile.url, extra={"chat_template_kwargs": {"enable_thinking": False}, "top_p": None})
    assert hostile.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in hostile.bodies[0]
    plain = Endpoint(EndpointConfig(url="https://api.example.com:8443"), "m")
    other = Endpoint(EndpointConfig(url="https://api.example.com", extra={"top_k": 1}), "m")
    assert plain.name == "api.example.com" != other.name


def test_key_comes_from_the_environment_alone(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY"):
        complete(hostile.url, key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "sk-planted-123\n")
    with pytest.raises(ProviderError) as caught:  # this server echoes the headers
        complete(hostile.url, "do: 500", key_env="SOME_KEY")
    assert "Bearer sk-planted-123" in hostile.headers[-1]
    assert "planted" not in str(caught.value)
    assert "[key]" in str(caught.value)
    monkeypatch.setenv("SOME_KEY", "sk-ключ")
    with pytest.raises(UserError, match="characters") as wrong:
        complete(hostile.url, key_env="SOME_KEY")
    assert "ключ" not in str(wrong.value)


def test_dead_endpoint_says_how_to_mend() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ProviderError, match="start it, or mend `url`") as caught:
        complete(url)
    assert caught.value.retryable
    assert not caught.value.sent


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Names resolve to these, as a poisoned resolver would do."""
    ask_it = socket.getaddrinfo

    def fake(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host or "").endswith(".test"):
            return [found for address in addresses for found in ask_it(address, port, *args, **kwargs)]
        return ask_it(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", fake)


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("teacher.test", ["10.1.2.3"]),
        ("localhost.test", ["127.0.0.1", "8.8.8.8"]),  # one of them would be enough to leak
        ("8.8.8.8", []),
        ("[::ffff:8.8.8.8]", []),
        ("0.0.0.0", []),  # noqa: S104  nothing listens there
    ],
)
def test_text_stays_in_its_zone(monkeypatch: pytest.MonkeyPatch, host: str, addresses: list[str]) -> None:
    resolve_to(monkeypatch, *addresses)
    connected: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
    with pytest.raises(UserError, match=r"`inside`.*`privacy: public`"):
        complete(f"http://{host}:80/v1")
    assert not connected


def test_ways_through_the_gate(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1")
    url = hostile.url.replace("127.0.0.1", "teacher.test")
    complete(url)  # the name reaches this machine
    complete(url, inside=["Teacher.test"])
    complete(url, privacy="public")
    complete(url, inside=["127.0.0.0/24"])
    assert len(hostile.bodies) == 4


def test_private_text_takes_no_proxy(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    complete(hostile.url)
    complete(hostile.url, inside=["127.0.0.1"])
    with pytest.raises(ProviderError):
        complete(hostile.url, privacy="public")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"url": "http://a/v1", "start": "x"},
        {"start": " "},
        "host:8000",
        "http://host:99999/v1",
        "https://user:key@host/v1",
        "https://h/v1?key=1",
    ],
)
def test_wrong_configs(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"url|start|Port"):
        EndpointConfig.model_validate(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://h/v1", "key_env": "sk-planted-1234"},
        {"url": "http://h/v1", "key_env": "PLANTED", "extra": {"api_key": "sk-planted-1234"}},
        {"start": "vllm serve {model} --api-key sk-planted-1234", "key_env": "PLANTED"},
    ],
)
def test_a_key_in_the_recipe_is_refused(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "sk-planted-1234")
    with pytest.raises(ValueError, match="key"):
        EndpointConfig.model_validate(wrong)


def test_short_configs() -> None:
    textbook = EndpointConfig.model_validate("textbook")
    assert (textbook.name, textbook.start) == ("textbook", "{python} -m preceptor teacher --port {port}")
    assert EndpointConfig.model_validate("http://127.0.0.1:8000").name == "127.0.0.1"
    assert EndpointConfig(start="/opt/vllm serve {model} --port {port}").name == "vllm"


def test_retry_after() -> None:
    assert _retry_after("") is None
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("soon") == 1
