"""What a bad server does, and what the endpoint makes of it; where text may go."""

import asyncio
import contextlib
import json
import socket
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import FailureKind, Reply, Usage
from preceptor.llm.chat import _parted, _tokens, _usage, is_called, reply_of
from preceptor.llm.completer import ProviderError
from preceptor.llm.config import EndpointConfig, presets
from preceptor.llm.endpoint import Endpoint, _retry_after, _span
from preceptor.llm.packing import pack, unpack
from tests.llm.conftest import ask
from tests.llm.server import ANSWER, Hostile, completion


def complete(url: str, text: str = "hello", logprobs_: int | None = None, **config: Any) -> Reply:
    async def main() -> Reply:
        endpoint = Endpoint(EndpointConfig.model_validate({"url": url, "timeout": 1, **config}), "m")
        try:
            return await endpoint.complete(ask(text, logprobs_))
        except ProviderError as error:
            raise error.ends or error from error
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
        ("503", FailureKind.PROVIDER, True),
        ("429now", FailureKind.PROVIDER, True),
        ("drip", FailureKind.TIMEOUT, True),
        ("utf8", FailureKind.PROVIDER, True),
        ("short", FailureKind.PROVIDER, True),
        ("other", FailureKind.PROVIDER, True),
    ],
)
def test_each_misbehaviour_has_a_name(hostile: Hostile, act: str, kind: FailureKind, retryable: bool) -> None:
    with pytest.raises(ProviderError) as caught:
        complete(hostile.url, f"do: {act}", timeout=1 if act in ("hang", "drip") else 20)
    assert (caught.value.kind, caught.value.retryable, caught.value.sent) == (kind, retryable, True)
    assert caught.value.detail
    assert "\n" not in caught.value.detail
    assert caught.value.retry_after == {"429": 0.2, "503": 0.1, "429now": 1.0}.get(act)


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


@pytest.mark.parametrize("act", ["think", "reasoning", "reasoning2"])
def test_thinking_is_kept_apart(hostile: Hostile, act: str) -> None:
    reply = complete(hostile.url, f"do: {act}")
    assert (reply.thinking, reply.text) == ("hm", ANSWER)


@pytest.mark.parametrize("act", ["logprobs", "thinkprobs"])
def test_tokens_spell_the_text(hostile: Hostile, act: str) -> None:
    reply = complete(hostile.url, f"do: {act}", logprobs_=5)
    assert b"".join(token.utf8 for token in reply.tokens).decode() == reply.text == ANSWER
    assert reply.tokens[3].alternatives[0][0] == reply.tokens[3].utf8
    assert hostile.bodies[0]["top_logprobs"] == 5


def test_ids_in_place_of_bytes_are_kept_as_they_are(hostile: Hostile) -> None:
    """All of them, thinking and the end of the turn too; packed they stay the same."""
    reply = complete(hostile.url, "do: ids", logprobs_=5, extra={"return_tokens_as_token_ids": True})
    assert hostile.bodies[0]["return_tokens_as_token_ids"] is True
    assert (reply.text, reply.thinking) == (ANSWER, "hm")
    assert [token.utf8 for token in reply.tokens] == [b"token_id:%d" % n for n in range(len(reply.tokens))]
    assert len(reply.tokens) > len(ANSWER.encode()) // 2 + 1
    assert reply.tokens[3].alternatives == ((b"token_id:3", -0.5), (b"token_id:1003", -0.5))
    assert unpack(pack(reply)).tokens == reply.tokens
    with pytest.raises(ProviderError, match="don't spell"):
        complete(hostile.url, "do: oddids", logprobs_=5)


def test_missing_logprobs_are_told_apart(hostile: Hostile) -> None:
    with pytest.raises(UserError, match="gives no log-prob"):
        complete(hostile.url, "hello", logprobs_=0)
    with pytest.raises(ProviderError, match="don't spell"):
        complete(hostile.url, "do: misspelt", logprobs_=0)


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
    with pytest.raises(ValueError, match=r"url|start|Port|no endpoint"):
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


def test_a_second_answer_is_never_the_next_ones(hostile: Hostile) -> None:
    """A server that answers twice leaves a reply on the wire: it must not be taken for the next request's."""

    async def main() -> list[str]:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, timeout=2), "m")
        said = []
        for number in range(6):
            request = ask(f"question {number} do: {'twice' if number % 2 else 'echo'}")
            try:
                said.append((await endpoint.complete(request)).text)
            except ProviderError as error:
                assert error.retryable  # noqa: PT017  either is right, and no wrong reply
                said.append((await endpoint.complete(request)).text)
        await endpoint.close()
        return said

    assert [text.partition(" do:")[0] for text in asyncio.run(main())] == [f"question {n}" for n in range(6)]


def test_a_server_whose_ids_tell_nothing_loses_no_reply(hostile: Hostile) -> None:
    async def main() -> list[str]:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, timeout=2), "m")
        said = [(await endpoint.complete(ask(f"constant {n} do: echo"))).text for n in range(6)]
        await endpoint.close()
        return said

    assert [text.partition(" do:")[0] for text in asyncio.run(main())] == [f"constant {n}" for n in range(6)]


def test_whitespace_without_end_is_a_cut_reply(hostile: Hostile) -> None:
    assert complete(hostile.url, "do: white").finish == "length"


def test_what_is_not_known_of_a_token_costs_no_reply(hostile: Hostile) -> None:
    tokens = complete(hostile.url, "do: gaps", logprobs_=5).tokens
    assert [token.logprob for token in tokens[:4]] == [None, None, 0.0, -0.5]
    assert [len(token.alternatives) for token in tokens[:4]] == [0, 1, 1, 1]


def test_another_model_is_told_from_another_name(hostile: Hostile) -> None:
    with pytest.raises(ProviderError, match=r"asked for 'm', and 'another-7b' answered.*answers_as"):
        complete(hostile.url, "do: other")
    assert complete(hostile.url, "do: other", answers_as="another-7b").text == ANSWER

    async def main() -> None:
        endpoint = Endpoint(EndpointConfig(url=hostile.url), "m")
        for _ in range(19):
            with pytest.raises(ProviderError) as caught:
                await endpoint.complete(ask("do: other"))
            assert caught.value.ends is None
        with pytest.raises(ProviderError) as caught:
            await endpoint.complete(ask("do: other"))
        assert isinstance(caught.value.ends, UserError)
        await endpoint.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("asked", "said", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b-instruct", True),
        ("/models/mini", "/models/mini@main", True),
        ("smollm2", "/cache/smollm2.Q8_0.gguf", True),
        ("deepseek-v4-pro", "", True),
        ("deepseek-v4-pro", "deepseek-v4-flash", False),
        ("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-7B-Instruct", False),
    ],
)
def test_names_of_models(asked: str, said: str, same: bool) -> None:
    assert is_called(asked, said) is same


def test_usage_in_all_its_forms(hostile: Hostile) -> None:
    details = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 4}
    assert _usage(details) == Usage(prompt_tokens=9, completion_tokens=5, cached_tokens=4)
    nested = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert _usage(nested) == Usage(prompt_tokens=9, completion_tokens=5, cached_tokens=8, thinking_tokens=3)
    assert _usage({"prompt_tokens": "9", "completion_tokens": -1, "prompt_tokens_details": []}) == Usage()
    assert complete(hostile.url, "do: nousage").usage == Usage()


SCHEMA = '{"type": "object"}'


@pytest.mark.parametrize(
    ("mode", "sent"),
    [
        ("none", None),
        ("object", {"type": "json_object"}),
        (
            "schema",
            {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}}},
        ),
    ],
)
def test_the_schema_goes_where_it_is_understood(hostile: Hostile, mode: str, sent: Any) -> None:
    async def main() -> str:
        config = EndpointConfig.model_validate({"url": hostile.url, "json_mode": mode, "name": "e"})
        endpoint = Endpoint(config, "m")
        await endpoint.complete(ask("hello").model_copy(update={"json_schema": SCHEMA}))
        await endpoint.close()
        return endpoint.name

    name = asyncio.run(main())
    assert hostile.bodies[0].get("response_format") == sent
    assert (name == "e") is (mode == "none")  # replies under another format are other replies


def test_presets() -> None:
    for name in presets():
        config = EndpointConfig.model_validate(name)
        assert config.name == name
        assert config.privacy == "private"  # no preset attests anything for the user
    known = EndpointConfig.model_validate("deepseek").of("deepseek-v4-flash")
    assert known.price is not None
    assert (known.price.currency, known.price.output, known.distillation) == ("USD", 0.28, True)
    assert known.price.cost(Usage(prompt_tokens=10**6, cached_tokens=5 * 10**5, completion_tokens=10**6)) == (
        pytest.approx((0.07 + 0.0014 + 0.28, "USD")[0]),
        "USD",
    )
    assert EndpointConfig.model_validate("deepseek").of("who-knows").price is None
    own = {"currency": "CNY", "input": 1, "output": 2, "as_of": "2026-01-01"}
    mine = EndpointConfig.model_validate({"preset": "deepseek", "price": own}).of("deepseek-v4-flash")
    assert mine.price is not None
    assert mine.price.currency == "CNY"
    assert not presets()["openai"]["distillation"]


def test_the_thinking_switch() -> None:
    off = EndpointConfig.model_validate({"preset": "vllm", "thinking": False, "extra": {"top_k": 1}})
    assert off.extra == {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 1}
    assert EndpointConfig.model_validate("vllm").extra == {}
    with pytest.raises(ValueError, match="how it is switched here is not known"):
        EndpointConfig.model_validate({"url": "http://h/v1", "thinking": True})
    with pytest.raises(ValueError, match="no endpoint 'deepsek'"):
        EndpointConfig.model_validate("deepsek")


def test_what_an_endpoint_lacks_is_said_before_a_byte_is_sent(hostile: Hostile) -> None:
    with pytest.raises(UserError, match="gives no log-probabilities"):
        complete(hostile.url, logprobs_=5, logprobs=0)
    with pytest.raises(UserError, match="gives 5 alternatives a token at most"):
        complete(hostile.url, logprobs_=6, logprobs=5)
    assert not hostile.bodies


def test_spans() -> None:
    assert [_span(value) for value in ("1s", "6m0s", "20ms", "2.5", "1h2m", "")] == [1, 360, 0.02, 2.5, 3720, 1]


def test_the_most_that_a_send_can_cost() -> None:
    price = {"currency": "CNY", "input": 2, "output": 8, "as_of": "2026-01-01"}
    endpoint = Endpoint(EndpointConfig.model_validate({"url": "http://127.0.0.1/v1", "price": price}), "m")
    most = endpoint.most(ask("咳嗽"))  # six bytes, sixteen of the template, 512 to come
    assert most == (pytest.approx((22 * 2 + 512 * 8) / 1e6), "CNY")
    assert endpoint.cost(Usage(prompt_tokens=10, completion_tokens=20)) == (pytest.approx(180e-6), "CNY")
    assert endpoint.cost(Usage()) is None  # nobody counted
    for extra, most in (
        ({"max_tokens": 4000}, 22 * 2 + 4000 * 8),
        ({"max_tokens": None, "max_completion_tokens": 100, "n": 2}, 22 * 2 + 200 * 8),
    ):
        config = {"url": "http://127.0.0.1/v1", "price": price, "extra": extra}
        assert Endpoint(EndpointConfig.model_validate(config), "m").most(ask("咳嗽")) == (
            pytest.approx(most / 1e6),
            "CNY",
        )
    unbounded = {"url": "http://127.0.0.1/v1", "price": price, "extra": {"max_tokens": None}}
    assert Endpoint(EndpointConfig.model_validate(unbounded), "m").most(ask("x")) is None
    assert Endpoint(EndpointConfig(url="http://127.0.0.1/v1"), "m").most(ask("x")) is None


WORDS = "头痛，发热3天"


@given(cuts=st.lists(st.integers(1, len(WORDS.encode()) - 1), unique=True), end=st.booleans())
def test_tokens_of_which_the_halves_of_characters_are_left_out(cuts: list[int], end: bool) -> None:
    """A server that gives `""` for a token that is no whole character: the bytes and the sum come out right."""
    data = WORDS.encode()
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[low:high] for low, high in pairwise(edges)]
    content = [{"token": _told(piece), "bytes": None, "logprob": -0.25, "top_logprobs": []} for piece in pieces]
    content += [{"token": "<|im_end|>", "bytes": None, "logprob": -0.5}] * end
    tokens = _tokens({"content": content}, WORDS, WORDS)
    assert b"".join(token.utf8 for token in tokens) == data
    assert sum(token.logprob or 0 for token in tokens) == -0.25 * len(pieces)


def _told(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize(
    "echo",
    [
        "Bearer sk-abc/def/ghi-SECRET",
        "Bearer sk-abc\\/def\\/ghi-SECRET",
        "\\u0073k-abc/def/ghi-SECRET",
        "s\0k\0-\0a\0b\0c\0/\0d\0e\0f\0/\0g\0h\0i\0-\0S\0E\0C\0R\0E\0T\0",
        "illegal header line: bytearray(b'Authorization Bearer sk-abc/def/ghi-SECRET')",
    ],
)
def test_a_key_that_comes_back_is_withheld_in_any_writing(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-abc/def/ghi-SECRET")
    endpoint = Endpoint(EndpointConfig(url="http://127.0.0.1:1/v1", key_env="SOME_KEY"), "m")
    assert "SECRET" not in endpoint._without_key(echo).replace("\0", "")
    assert endpoint._without_key("the server is busy") == "the server is busy"


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("\n <think>a", "a", ""),
        ('{"x": "</think>"}', "", '{"x": "</think>"}'),
        ("b", "", "b"),
        ("<think></think>\n\nb", "", "\n\nb"),
    ],
)
def test_thinking_before_the_answer(text: str, thinking: str, rest: str) -> None:
    assert _parted(text) == (thinking, rest)


def test_a_flood_of_whitespace_is_read_at_once() -> None:
    began = time.process_time()
    assert _parted("\n" * 1_000_000 + "<think>" + " " * 1_000_000) == ("", "")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "message",
    [
        {"logprobs": {"content": [{"token": "x", "logprob": 10**400}]}},
        {"logprobs": {"content": [{"token": "x", "logprob": -1, "bytes": 10**30}]}},
        {"logprobs": {"content": [{"token": "x", "logprob": -1, "bytes": 6 * 10**9}]}},
    ],
)
def test_absurd_numbers_cost_one_reply_at_most(message: dict[str, Any]) -> None:
    answer = completion("x")
    answer["choices"][0].update(message)
    body = json.dumps(answer).encode()
    with contextlib.suppress(ProviderError):
        assert reply_of(body, ask("hello", 2)).text == "x"


def test_half_a_character_in_a_models_name() -> None:
    answer = {**completion("x"), "model": "m-1\ud800"}
    assert reply_of(json.dumps(answer).encode(), ask("hello")).model.startswith("m-1")


def test_what_a_useless_reply_took_is_told(hostile: Hostile) -> None:
    for act in ("null", "choices", "other"):
        with pytest.raises(ProviderError) as caught:
            complete(hostile.url, f"do: {act}")
        assert (caught.value.usage.prompt_tokens, caught.value.usage.completion_tokens) == (7, 3)


def test_one_reply_without_logprobs_among_others_is_one_failure(hostile: Hostile) -> None:
    async def main() -> None:
        endpoint = Endpoint(EndpointConfig(url=hostile.url), "m")
        await endpoint.complete(ask("do: logprobs", 0))
        with pytest.raises(ProviderError) as caught:
            await endpoint.complete(ask("do: ok", 0))
        assert caught.value.retryable
        assert caught.value.ends is None
        await endpoint.close()

    asyncio.run(main())


def test_a_late_second_answer_is_never_the_next_ones(hostile: Hostile) -> None:
    async def main() -> list[str]:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, timeout=2), "m")
        said = [
            (await endpoint.complete(ask(f"question {n} do: {'late' if n == 1 else 'echo'}"))).text for n in range(9)
        ]
        await endpoint.close()
        return said

    assert [text.partition(" do:")[0] for text in asyncio.run(main())] == [f"question {n}" for n in range(9)]
