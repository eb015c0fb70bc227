import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path

import pytest

from preceptor.llm.counting import counting
from preceptor.llm.ledger import Ledger
from preceptor.stages.teacher import TeacherConfig
from preceptor.tasks import prompts

TODAY = datetime.now(UTC).date()
RECIPE = """
language: en
seed: 1
teacher: {model: textbook, endpoint: textbook}
prepare: {source: textbook, style: short, train: 6, validation: 2, test: 3}
label: {}
predict_teacher: {models: [teacher]}
"""
ANSWER = '{"diseases": ["Common cold"], "reason": ["Cough for three days"]}'


def text_of(recipe, **teacher):
    return recipe.replace("{model: textbook, endpoint: textbook}", json.dumps(teacher))


def rows(shown):
    """The table's cells by section: requests, at most, tokens in, at most, tokens out, at most."""
    lines = shown.rpartition("─")[2].splitlines()[1:]
    cells = map(str.split, takewhile(str.strip, lines))
    return {name: tuple(int(c.replace(",", "")) if c[0].isdigit() else c for c in rest) for name, *rest in cells}


def summary(run):
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        return ledger.summary(run)


def everything():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture
def command(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return command


@pytest.fixture
def count():
    """Tokens of messages as the textbook teacher counts them."""
    config = TeacherConfig(model="textbook", endpoint="textbook")
    return counting("textbook", config.endpoint[0])


@pytest.fixture
def endpoint(count):
    """A server that counts as the textbook does and gives one answer to all; its URL and the bodies it got."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            prompt = sum(count.of(message["content"]) for message in body["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": count.of(ANSWER)}
            choice = {"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
            reply = {"id": str(len(bodies)), "model": "textbook", "choices": [choice], "usage": usage}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    server.shutdown()
    server.server_close()


def test_what_is_announced_is_what_is_asked(command):
    """Before anything is prepared, and the textbook teacher, a real process, then counts the same."""
    Path("r.yaml").write_text(RECIPE)
    code, out, _ = command("plan", "r.yaml")
    assert code == 0
    assert not Path("runs").exists()
    before = rows(out)
    assert [before[name][0] for name in before] == [6, 3]
    assert before["label"][1::2] == (12, before["label"][3], 2 * 6 * 512)
    assert before["label"][4] == "?"
    assert "not known yet: their most alone is told" in out
    assert "no price: textbook runs on this machine" in out
    assert max(map(len, out.partition("label: ")[0].splitlines())) <= 80

    assert command("run", "r.yaml")[0] == 0
    for name, planned in before.items():
        asked = summary(f"r/{name}")
        assert (asked.requests, asked.tokens_in) == (planned[0], planned[2])
        assert asked.tokens_out <= planned[5]

    there = everything()
    code, out, _ = command("plan", "r.yaml")
    assert (code, everything() == there) == (0, True)
    assert rows(out) == dict.fromkeys(before, (0, 0, 0, 0, 0, 0))
    assert "label, predict_teacher: done; it would ask nothing" in out


@pytest.mark.slow
def test_replies_at_hand_cost_nothing(command):
    Path("r.yaml").write_text(RECIPE)
    assert command("run", "r.yaml", "prepare", "label", "label.limit=2")[0] == 0
    one = command("plan", "r.yaml", "label.limit=3")[1]
    assert rows(one)["label"][0] == 1
    assert "label: 1 of 3 conversations are owed" in one

    # Another run asks the same: the ledger has two of its six replies, though its folder has none.
    Path("s.yaml").write_text(RECIPE)
    there = everything()
    out = command("plan", "s.yaml")[1]
    assert everything() == there
    assert rows(out)["label"][0] == 4
    assert "label: 4 of 6 conversations are owed; the ledger gives 2 replies for nothing" in out
    planned = rows(out)["label"]
    assert command("run", "s.yaml", "prepare", "label")[0] == 0
    assert (summary("s/label").requests, summary("s/label").tokens_in) == (4, planned[2])

    # The folder alone does it too.
    for file in Path("runs").glob("ledger.sqlite*"):
        file.unlink()
    Path("runs/s/label/done.json").unlink()
    assert rows(command("plan", "s.yaml")[1])["label"] == (0, 0, 0, 0, 0, 0)


def test_money_is_what_was_announced(command, endpoint):
    """Where the ledger knows how long replies are, the announced sum is spent to the last token."""
    url, bodies = endpoint
    price = {"currency": "CNY", "input": 2.0, "output": 8.0, "as_of": str(TODAY)}
    Path("r.yaml").write_text(text_of(RECIPE, model="textbook", endpoint={"url": url, "price": price}))
    out = command("plan", "r.yaml")[1]
    most = rows(out)["label"]
    assert re.search(r"label: [\d.]+ CNY at most", out)
    assert (command("run", "r.yaml", "prepare", "label", "label.limit=2")[0], len(bodies)) == (0, 2)
    out = command("plan", "r.yaml")[1]
    _, _, tokens_in, _, tokens_out, _ = rows(out)["label"]
    assert f"label: {announced(out, tokens_in, tokens_out)} CNY expected, " in out
    before = summary("r/label").spent["CNY"]
    assert command("run", "r.yaml", "label")[0] == 0
    spent = summary("r/label").spent["CNY"]
    assert spent - before == pytest.approx((tokens_in * 2 + tokens_out * 8) / 1e6, abs=1e-12)
    assert 0 < spent <= (most[3] * 2 + most[5] * 8) / 1e6
    assert (len(bodies), most[2]) == (6, summary("r/label").tokens_in)


def announced(out, tokens_in, tokens_out):
    assert f"price of {TODAY}: 2 in, 8 out CNY a million\n" in out
    return f"{(tokens_in * 2 + tokens_out * 8) / 1e6:.4g}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "section", "requests"),
    [
        ("language: zh", "label: {strategy: two_stage}", 8),
        ("language: en", "label: {strategy: self_consistency, votes: 3, temperature: 0.7}", 12),
        ("language: zh\ntask: consult", "label: {strategy: two_stage, samples: 2, temperature: 0.5}", 16),
        ("language: en\ntask: consult", "label: {}", 4),
        ("language: zh", "label: {strategy: few_shot, shots: 2, reasons: 2, reason_characters: 12}", 4),
        ("language: en", "refine: {}", 7),
        ("language: en", "calibrate: {model: teacher}", 2),
        ("language: en", "design: {candidates: 2}", 2 + 3 * 2),
    ],
)
def test_every_way_to_ask_stays_within_its_bounds(command, head, section, requests):
    recipe = RECIPE.replace("train: 6, validation: 2, test: 3", "train: 4, validation: 2, test: 1")
    recipe = recipe.replace("language: en", head).replace("label: {}", section).partition("predict")[0]
    Path("r.yaml").write_text(recipe)
    name = section.partition(":")[0]
    plan = rows(command("plan", "r.yaml")[1])[name]
    assert plan[0] == requests
    assert command("run", "r.yaml")[0] == 0
    asked = summary(f"r/{name}")
    least = int(str(plan[2]).lstrip("≥").replace(",", ""))
    assert (asked.requests == requests) or name == "design"  # a prompt that can't be used is not tried
    assert asked.requests <= plan[1]
    if name != "design":
        assert least <= asked.tokens_in
    assert asked.tokens_in <= plan[3]
    assert asked.tokens_out <= plan[5]
    assert rows(command("plan", "r.yaml")[1])[name] == (0, 0, 0, 0, 0, 0)


def test_later_turns_are_counted_with_the_replies_that_they_hold(command, endpoint, count):
    url, bodies = endpoint
    recipe = RECIPE.replace("label: {}", "label: {strategy: two_stage}").partition("predict")[0]
    Path("r.yaml").write_text(text_of(recipe, model="textbook", endpoint=url))
    out = command("plan", "r.yaml")[1]
    without = int(rows(out)["label"][2].lstrip("≥").replace(",", ""))
    assert command("run", "r.yaml", "prepare", "label", "label.limit=1")[0] == 0
    out = command("plan", "r.yaml")[1]
    plan = rows(out)["label"]
    assert command("run", "r.yaml")[0] == 0
    tokens = [sum(count.of(message["content"]) for message in body["messages"]) for body in bodies]
    assert len(bodies) == 12
    assert without == sum(tokens) - 6 * count.of(ANSWER)
    assert plan == (10, 20, sum(tokens[2:]), plan[3], 10 * count.of(ANSWER), 20 * 512)
    assert f"{count.of(ANSWER):.1f} a reply, as in 2 replies to this section" in out
    # At worst each of the replies is 512 tokens long and asked for once more, and the second turn holds all that.
    complaint = count.of(prompts.words("diagnosis", "correction", "en"))
    first = sum(n for n, body in zip(tokens[2:], bodies[2:], strict=True) if len(body["messages"]) == 2)
    second = sum(tokens[2:]) - 2 * first - 5 * count.of(ANSWER)
    worst = 4 * first + 2 * second + 5 * (6 * 512 + 4 * complaint)
    assert worst <= plan[3] <= worst + 5 * 4 * 128


def test_a_cap_that_does_not_suffice(command, endpoint):
    """The plan says so, the run stops before it passes the cap, and status agrees."""
    url, bodies = endpoint
    price = {"currency": "USD", "input": 0, "output": 1000, "as_of": str(TODAY)}
    recipe = RECIPE.partition("predict")[0].replace("label: {}", "label: {max_tokens: 20, concurrency: 1}")
    made = {"model": "textbook", "endpoint": {"url": url, "price": price, "name": "e"}}
    Path("r.yaml").write_text(text_of(recipe, **made))
    for cap, verdict in (
        ("5", "5.00 USD suffices: 5.00 USD is left of it, and the most is 0.24 USD"),  # 20 tokens, six times, and again
        ("0.25", "0.25 USD may not suffice: 0.25 USD is left of it, and the most is 0.24 USD"),
        ("0.015", "0.015 USD does not suffice: 0.015 USD is left of it, and one request may cost 0.02 USD; raise"),
    ):
        assert f"\nthe cap of {verdict}" in command("plan", "r.yaml", f"teacher.cap={cap}")[1]
    assert command("run", "r.yaml", "prepare", "label", "label.limit=1")[0] == 0
    cost = summary("r/label").spent["USD"]
    cap = 4 * cost
    out = command("plan", "r.yaml", f"teacher.cap={cap}")[1]
    left = f"{3 * cost:.4g} USD is left of it"
    assert f"does not suffice: {left}, and {5 * cost:.4g} USD is expected up to label" in out
    code, _, err = command("run", "r.yaml", "label", f"teacher.cap={cap}")
    assert (code, "raise it with teacher.cap=" in err.splitlines()[-1]) == (1, True)
    spent = summary("r/label").spent["USD"]
    assert cap - 0.02 < spent <= cap
    assert len(bodies) == round(spent / cost) == 3
    told = " ".join(command("status", "r")[1].split())
    assert f"{cap - spent:.4f} USD left of the cap of {cap:.4f} USD" in told


OLD = {"currency": "CNY", "input": 1, "output": 2, "as_of": str(TODAY - timedelta(days=200))}
USD = {**OLD, "currency": "USD"}
FAR = {"url": "https://api.example.com/v1", "privacy": "public", "name": "far"}
UNKNOWN = "label, predict_teacher: price unknown: give teacher.endpoint.price of far: {currency: CNY, input: …"
MONEY = r"label: 0\.\d+ CNY at most\n"


@pytest.mark.parametrize(
    ("teacher", "told", "not_told"),
    [
        ({"endpoint": FAR}, [UNKNOWN, r"text goes to api\.example\.com \(public\)"], ["all:", "refused", "no price"]),
        ({"endpoint": {**FAR, "price": OLD}}, ["look it up again", MONEY, r"all: 0\.\d+ CNY at most\n"], ["unknown:"]),
        (
            {"endpoint": [{**FAR, "price": OLD}, {**FAR, "name": "b", "price": USD}]},
            ["money not known: the endpoints' prices are in several currencies"],
            ["at most\n", "all:"],
        ),
        ({"endpoint": [{**FAR, "price": OLD}, {**FAR, "name": "b"}]}, ["give teacher.endpoint.price of b"], ["all:"]),
        (
            {"endpoint": [{**FAR, "price": OLD}, {**FAR, "name": "b", "price": {**OLD, "output": 9}}]},
            [r"CNY at most \(at the dearest price\)", "1 in, 2 out CNY a million", "1 in, 9 out CNY a million"],
            [],
        ),
        (
            {"endpoint": {**FAR, "privacy": "private", "key_env": "NO_SUCH_KEY"}},
            [
                "text would go to api.example.com, which is refused where that is outside, as the text is private",
                "list the host under `inside` if it may see patients' text, or attest `privacy: public`",
                "far needs a key in the environment variable NO_SUCH_KEY, which is not set",
            ],
            ["text goes to"],
        ),
        (
            {"endpoint": {"url": "http://10.1.2.3/v1", "inside": ["10.0.0.0/8"]}},
            [r"text goes to 10\.1\.2\.3 \(inside: 10\.0\.0\.0/8\)", "price unknown"],
            ["refused"],
        ),
        ({"endpoint": {"url": "http://10.1.2.3/v1", "inside": ["11.0.0.0/8"]}}, ["refused where"], ["text goes"]),
        ({"endpoint": "http://localhost:1/v1"}, ["no price: localhost runs on this machine"], ["unknown:", "refused"]),
    ],
)
def test_money_and_zones_are_said_and_never_guessed(command, teacher, told, not_told):
    Path("r.yaml").write_text(text_of(RECIPE, model="m", **teacher))
    code, out, _ = command("plan", "r.yaml")
    assert code == 0
    for pattern in told:
        assert re.search(pattern.replace("{", r"\{"), out), pattern
    for words in not_told:
        assert words not in out


def test_without_a_tokenizer_it_is_called_an_estimate(command):
    Path("r.yaml").write_text(text_of(RECIPE, model="nobody/has-it", endpoint="http://127.0.0.1:1/v1"))
    out = command("plan", "r.yaml")[1]
    assert rows(out)["label"][2].startswith("~")
    assert "no tokenizer of the model is on this disk: estimated, 0.6 a Chinese character, 0.3 any other" in out
    out = command("plan", "r.yaml", "teacher.tokenizer=mini")[1]
    assert isinstance(rows(out)["label"][2], int)
    assert "tokens by the tokenizer of mini; " in out
    code, _, err = command("plan", "r.yaml", "teacher.tokenizer=./none")
    assert (code, err.count("\n"), "no tokenizer.json at './none'" in err) == (2, 1, True)


def test_a_strategy_of_ones_own(command):
    Path("own.py").write_text(
        "from preceptor.tasks.strategies import zero_shot\n"
        "def twice(case, asking):\n"
        "    yield from zero_shot(case, asking)\n"
        "    return (yield from zero_shot(case, asking))\n"
    )
    Path("r.yaml").write_text(RECIPE.replace("label: {}", "label: {strategy: 'own.py:twice'}"))
    out = command("plan", "r.yaml")[1]
    plan = rows(out)["label"]
    assert (plan[0], plan[1], plan[3:]) == ("≥6", "?", ("?", "?", "?"))
    assert "label: the strategy is your own: first requests are counted, more may follow" in out


def test_what_is_not_known_yet_is_said(command):
    Path("a.jsonl").write_text('{"id": 1, "feature_content": "咳嗽3天"}\n')
    recipe = RECIPE.replace("source: textbook", "source: a.jsonl").replace("label: {}", "label: {}\nrefine: {}")
    Path("r.yaml").write_text(recipe)
    code, out, _ = command("plan", "r.yaml")
    assert (code, rows(out)["label"]) == (0, ("?",) * 6)
    assert "not known yet: r.yaml: train.jsonl comes from section 'prepare', which is not done; run it first" in out
    assert not Path("runs").exists()
    Path("none.yaml").write_text("prepare: {source: textbook}\n")
    code, _, err = command("plan", "none.yaml")
    assert (code, err) == (2, "preceptor: none.yaml: no section asks a teacher or trains; there is nothing to plan\n")
    code, _, err = command("plan", "r.yaml", "label")
    assert (code, err.count("\n")) == (2, 1)


def test_a_section_made_from_another_request(command):
    Path("r.yaml").write_text(RECIPE)
    assert command("run", "r.yaml", "prepare", "label", "label.limit=2")[0] == 0
    out = command("plan", "r.yaml", "label.temperature=0.5")[1]
    assert (
        "label: as it stands, a start refuses: runs/r/label was made from another request: temperature was 0.0" in out
    )
    assert rows(out)["label"][0] == 6


def test_a_ledger_that_is_in_use_or_was_at_a_crash(command):
    Path("r.yaml").write_text(RECIPE)
    assert command("run", "r.yaml", "prepare", "label")[0] == 0
    Path("runs/r/label/done.json").unlink()
    Path("runs/r/label/predictions.jsonl").unlink()
    with Ledger(Path("runs/ledger.sqlite"), "r/label") as ledger:
        ledger.attest("e", "public")  # into the write-ahead log
        there = sorted(Path("runs").iterdir())
        out = command("plan", "r.yaml")[1]
        assert rows(out)["label"][0] == 0
        assert "label: 0 of 6 conversations are owed; the ledger gives 6 replies for nothing" in out
        assert sorted(Path("runs").iterdir()) == there
    Path("runs/ledger.sqlite").write_bytes(b"no database" * 1000)
    code, _, err = command("plan", "r.yaml")
    assert (code, err.count("\n"), "`preceptor status` mends" in err) == (1, 1, True)


def test_one_text_twice_is_asked_once(command, endpoint):
    url, bodies = endpoint
    Path("own").mkdir()
    made = [
        {"id": str(n), "text": f"Cough for {days} days.", "language": "en", "source": "s", "group": str(n)}
        for n, days in enumerate((2, 3, 2, 2))
    ]
    Path("own/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    Path("r.yaml").write_text(
        text_of("teacher: {model: textbook, endpoint: textbook}\n", model="textbook", endpoint=url)
    )
    with Path("r.yaml").open("a") as recipe:
        recipe.write("label: {from: ./own, strategy: two_stage}\n")
    plan = rows(command("plan", "r.yaml")[1])["label"]
    assert plan[0] == 4
    assert (command("run", "r.yaml")[0], len(bodies)) == (0, 4)


def test_how_long_it_takes_at_the_pace_so_far(command, endpoint):
    url, _ = endpoint
    recipe = RECIPE.partition("predict")[0].replace("train: 6", "train: 30")
    Path("r.yaml").write_text(text_of(recipe, model="textbook", endpoint={"url": url, "name": "e"}))
    assert "replies a minute" not in command("plan", "r.yaml")[1]
    assert command("run", "r.yaml", "prepare", "label", "label.limit=12")[0] == 0
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        ledger._submit(lambda: ledger._db.execute("UPDATE outcomes SET at = id * 6000")).result()
    assert "label: about 2 min at 10 replies a minute\n" in command("plan", "r.yaml")[1]  # 18 are owed
    assert "label: about 9 min at 2 replies a minute\n" in command("plan", "r.yaml", "teacher.endpoint.rpm=2")[1]


def test_what_a_cache_can_save(command, endpoint):
    """Votes ask the same again, and a provider with a cache may charge less for it."""
    url, bodies = endpoint
    price = {"currency": "CNY", "input": 10, "cached": 1, "output": 0, "as_of": str(TODAY)}
    recipe = RECIPE.partition("predict")[0].replace(
        "label: {}", "label: {strategy: self_consistency, votes: 3, temperature: 1}"
    )
    Path("r.yaml").write_text(text_of(recipe, model="textbook", endpoint={"url": url, "price": price}))
    assert command("run", "r.yaml", "prepare", "label", "label.limit=1")[0] == 0
    Path("s.yaml").write_text(Path("r.yaml").read_text())
    assert command("run", "s.yaml", "prepare")[0] == 0
    out = command("plan", "s.yaml", "label.limit=2")[1]
    assert ".0 a reply, as in 3 replies to other sections" in out
    plan = rows(out)["label"]
    assert (plan[0], len(bodies)) == (3, 3), "the other case's replies are at hand"
    one = plan[2] // 3
    assert f"label: {2 * one:,} tokens of the prompts begin as an earlier one" in out
    assert f"label: {3 * one * 10 / 1e6:.4g} CNY expected, " in out
    assert f"label: of that, a cache that serves all it can saves {2 * one * 9 / 1e6:.4g} CNY\n" in out
