"""The textbook teacher as a stranger meets it: a real server, and the official client unchanged."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from preceptor.clinical.textbook.exact import exact
from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Language
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import canonical
from tests.app import textbook

BAD = 400


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with textbook.teacher() as it:
        yield it


def messages(text: str, language: Language) -> list[dict[str, str]]:
    return [m.model_dump() for m in prompts.load("diagnosis", "zero_shot", language).render(text)]


def ask(
    client: openai.OpenAI, text: str, language: Language = "en", **settings: object
) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="textbook", messages=messages(text, language), **settings)


def test_it_lists_its_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["textbook"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_at_temperature_0_it_gives_the_exact_answer(client: openai.OpenAI, language: Language) -> None:
    for case in sample(20, 3, language, "full"):
        reply = ask(client, case.text, language, temperature=0)
        answer = exact().answer(case.text, language)
        said = json.loads(reply.choices[0].message.content or "")
        assert said == {"diseases": list(answer.diseases), "reason": list(answer.reason)}
        assert all(quote in case.text for quote in said["reason"])
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 0


def test_it_thinks_aloud_where_the_prompt_wants_it(client: openai.OpenAI) -> None:
    text = "Woman, 46, sour eructation for 12 days; denies tickly cough.\nPast: some personal predisposition."
    asked = [m.model_dump() for m in prompts.load("diagnosis", "thinking", "en").render(text)]
    reply = client.chat.completions.create(model="textbook", messages=asked, temperature=0)
    said = reply.choices[0].message.content or ""
    thought = "<think>\nWoman, 46\n+acid regurgitation\n-dry cough\n?some personal predisposition\n</think>\n\n"
    assert said == thought + canonical(exact().answer(text, "en"))


@pytest.mark.parametrize(
    ("text", "language", "thought"),
    [
        ("男，60岁，咳嗽。", "zh", "男，60岁"),
        ("nothing that it has words for", "en", ""),
        ("Age: 50", "en", "50"),
    ],
)
def test_its_thinking_tells_only_what_the_record_says(text: str, language: Language, thought: str) -> None:
    assert exact().thinking(text, language).partition("\n")[0] == thought


def test_it_samples_at_a_temperature_and_repeats_a_seed(client: openai.OpenAI) -> None:
    case = next(
        c for c in sample(200, 4, "en", "short") if not c.expects_abstention and max(c.differential.values()) < 0.65
    )
    drawn = ask(client, case.text, temperature=1.0, n=64, seed=1)
    answers = Counter(json.loads(c.message.content or "")["diseases"][0] for c in drawn.choices)
    assert len(drawn.choices) == 64
    assert len(answers) > 1
    again = ask(client, case.text, temperature=1.0, n=64, seed=1)
    assert [c.message.content for c in again.choices] == [c.message.content for c in drawn.choices]
    other = ask(client, case.text, temperature=1.0, n=64, seed=2)
    assert [c.message.content for c in other.choices] != [c.message.content for c in drawn.choices]


def test_max_tokens_and_stop(client: openai.OpenAI) -> None:
    text = sample(1, 5, "en")[0].text
    cut = ask(client, text, temperature=0, max_tokens=3).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("length", '{"diseases": []')
    stopped = ask(client, text, temperature=0, stop=['"reason"']).choices[0]
    assert stopped.finish_reason == "stop"
    assert '"reason"' not in str(stopped.message.content)


def test_json_object_format_is_understood(client: openai.OpenAI) -> None:
    reply = ask(client, sample(1, 5, "en")[0].text, temperature=0, response_format={"type": "json_object"})
    assert set(json.loads(str(reply.choices[0].message.content))) == {"diseases", "reason"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, r"needs a line such as '\[act: diagnosis\]'"),
        (
            {"messages": [{"role": "user", "content": "[act: cook]\n<record>x</record>"}]},
            "doesn't know the act 'cook'; it knows diagnosis, stated, thinking, diseases, evidence",
        ),
        (
            {"messages": [{"role": "user", "content": "[act: diagnosis]\nno record"}]},
            "between <record> and </record>",
        ),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages: each needs"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages: each needs"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 5}, "top_logprobs: only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (
            {"messages": [{"role": "user", "content": "[act: diagnosis]\n[reasons: few]\n<record>x</record>"}]},
            r"\[reasons: few\]: write a whole number",
        ),
        ({"messages": [{"role": "user", "content": "[act: design]\nx"}]}, "diagnosis, consult"),
        ({"messages": [{"role": "user", "content": "[act: design]\n[task: consult]"}]}, "the messages show none"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"response_format": {"type": "poem"}}, "response_format"),
    ],
)
def test_errors_say_what_is_wrong(client: openai.OpenAI, change: dict[str, object], complaint: str) -> None:
    settings = {"model": "textbook", "messages": messages("Woman, 30, cough.", "en")} | change
    with pytest.raises(openai.BadRequestError, match=complaint) as error:
        client.chat.completions.create(**settings)
    assert error.value.status_code == BAD


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'textbook'"):
        client.chat.completions.create(model="gpt", messages=messages("x", "en"))


def test_half_a_character_is_refused(client: openai.OpenAI) -> None:
    text = "[act: diagnosis] <record>\\ud800</record>"
    body = f'{{"model": "textbook", "messages": [{{"role": "user", "content": "{text}"}}]}}'
    request = urllib.request.Request(f"{client.base_url}chat/completions", body.encode())
    request.add_header("Content-Type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == BAD


def test_a_port_that_is_taken_or_none_is_one_line(client: openai.OpenAI) -> None:
    for port in (str(client.base_url.port), "99999"):
        command = [sys.executable, "-m", "preceptor", "teacher", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "port" in done.stderr
