from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from preceptor.app.recipe import _apply, load
from preceptor.core.errors import UserError

TEACHER = "teacher: {model: m, endpoint: textbook}"


def write(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return str(path)


def sections(recipe):
    return {section.name: section.config for section in recipe.sections}


def test_sections_take_the_head_and_their_own(tmp_path):
    path = write(
        tmp_path,
        f"{TEACHER}\nlanguage: zh\nseed: 7\nlimit: 24\n"
        "prepare: {source: textbook}\nlabel: {}\n"
        "label_second: {from: prepare, limit: 5, teacher: {model: other}, language: en}\n",
    )
    recipe = load(path)
    found = sections(recipe)
    assert recipe.name == "r"
    assert list(found) == ["prepare", "label", "label_second"]
    assert (found["prepare"].seed, found["prepare"].language, found["prepare"].limit) == (7, "zh", 24)
    assert (found["label"].teacher.model, found["label"].limit) == ("m", 24)
    second = found["label_second"]
    assert (second.teacher.model, second.teacher.endpoint[0].name) == ("other", "textbook")
    assert (second.limit, second.language, second.from_) == (5, "en", ("prepare",))
    assert recipe.of_stage("label") == ["label", "label_second"]
    assert [section.name for section in recipe.chosen(["label", "prepare"])] == ["prepare", "label"]


@pytest.mark.parametrize(
    ("overrides", "section", "field", "expected"),
    [
        (["label.concurrency=64"], "label", "concurrency", 64),
        (["label.temperature=5e-1"], "label", "temperature", 0.5),
        (["limit=3"], "label", "limit", 3),
        (["limit=3", "limit=null"], "label", "limit", None),
        (["prepare.source=[a.jsonl,b.jsonl]"], "prepare", "source", ("a.jsonl", "b.jsonl")),
        (["label.prompt=a=b"], "label", "prompt", "a=b"),
        (["label.strategy=路径/我的.py:ask"], "label", "strategy", "路径/我的.py:ask"),
    ],
)
def test_overrides(tmp_path, monkeypatch, overrides, section, field, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, "", name)
    recipe = load(write(tmp_path, f"{TEACHER}\nprepare: {{source: textbook}}\nlabel: {{}}"), overrides)
    assert getattr(sections(recipe)[section], field) == expected


def test_an_override_replaces_a_word_by_fields(tmp_path):
    path = write(tmp_path, f"{TEACHER}\nlabel: {{}}")
    url = "http://127.0.0.1:1/v1"
    found = sections(load(path, [f"teacher.endpoint.url={url}", "label.teacher.model=x"]))["label"].teacher
    assert (found.endpoint[0].url, found.endpoint[0].start, found.model) == (url, None, "x")


@given(
    st.one_of(
        st.integers(1, 10**9),
        st.floats(0, 1e6, allow_nan=False),
        st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1),
    )
)
def test_any_value_survives_an_override(value):
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    assert _apply("r", OmegaConf.create({"label": {}}), [f"label.x={text}"]) == {"label": {"x": value}}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "label: {concurency: 3}\n" + TEACHER,
            (),
            "r.yaml: label.concurency: unknown key; did you mean 'concurrency'?",
        ),
        ("labl: {}", (), "r.yaml: unknown key 'labl'; did you mean 'label'?"),
        ("stduent: mini\nprepare: {source: textbook}", (), "unknown key 'stduent'; did you mean 'student'?"),
        (
            "teacher: {model: m, endpint: textbook}\nlabel: {}",
            (),
            "teacher.endpint: unknown key; did you mean 'endpoint'?",
        ),
        (
            "teacher: {model: m, endpoint: {start: x, tmeout: 3}}\nlabel: {}",
            (),
            "teacher.endpoint.tmeout: unknown key; did you mean 'timeout'?",
        ),
        ("label: {}", (), "label.teacher: missing; add it to the section, or to the top"),
        (
            f"{TEACHER}\nlabel: {{concurrency: many}}",
            (),
            "label.concurrency: Input should be a valid integer",
        ),
        (f"{TEACHER}\nlabel: {{concurrency: 0}}", (), "(got 0)"),
        (f"{TEACHER}\nlabel: {{from: prepar}}", (), "label.from: no earlier section 'prepar'"),
        ("prepare: {source: textbook}\ncurate: {from: [prepar]}", (), "did you mean 'prepare'?"),
        (f"{TEACHER}\npredict: {{models: [teacher, sft_x]}}", (), "predict: no earlier section 'sft_x'"),
        ("predict: {models: [base]}", (), "name it as `student`"),
        ("language: fr\nprepare: {source: textbook}", (), "language: Input should be 'zh' or 'en'"),
        ("label:\n\tconcurrency: 3", (), "r.yaml:2: a tab begins a word; indent with spaces"),
        ("label: {}\nlabel: {}", (), "r.yaml:2: found duplicate key label"),
        ("label: {a: 1", (), "r.yaml:"),
        ("- label", (), "it must hold keys with values"),
        ("just words", (), "unknown key 'just words'"),
        ("", (), "no sections; add some of prepare"),
        ("name: x", (), "no sections"),
        ("label: 3", (), "a section holds keys with values, not 3"),
        ("label_../../x: {}", (), "r.yaml: unknown key 'label_../../x'"),
        ("prepare: {source: []}", (), "prepare.source: Tuple should have at least 1 item"),
        (f"{TEACHER}\npredict: {{models: teacher}}", (), "predict.models: write a list, such as [a, b]"),
        (f"{TEACHER}\nlabel: {{temperature: .inf}}", (), "label.temperature: Input should be a finite number"),
        ("name: ../x\nprepare: {source: textbook}", (), "name: String should match"),
        ('prepare: {source: "${nothing}"}', (), "nothing"),
        ("prepare: {source: nowhere.jsonl}", (), "prepare.source: no file at nowhere.jsonl"),
        ("prepare: {source: textbook}", ["prepar.seed=3"], "no key 'prepar' in"),
        ("prepare: {source: textbook}", ["prepare.sed=3"], "prepare.sed: unknown key; did you mean 'seed'?"),
        ("prepare: {source: textbook}", ["=3"], "write it as key=value"),
        ("prepare: {source: textbook}", ["prepare.seed=[1"], "override 'prepare.seed=[1'"),
        ("prepare: {source: textbook}", ["prepare.seed.x=1"], "prepare.seed"),
        ("prepare: {source: textbook, train: 0, validation: 0, test: 0}", (), "no cases wanted"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, text, overrides, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(write(tmp_path, text), overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    write(tmp_path, "", "quickstart.yaml")
    with pytest.raises(UserError, match=r"no such recipe; did you mean '.*quickstart\.yaml'"):
        load(str(tmp_path / "quikstart.yaml"))


def test_a_folder_or_a_binary_file_is_no_recipe(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path, tmp_path / "x.yaml"):
        with pytest.raises(UserError):
            load(str(path))


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_load(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = OmegaConf.select(OmegaConf.load(path), "prepare.source", default="textbook")
    if source != "textbook" and not source.startswith("hub:"):
        write(tmp_path, "", source)
    assert load(str(path)).name == path.stem


def test_a_key_in_the_wrong_place_is_not_shown(tmp_path):
    path = write(tmp_path, "teacher: {endpoint: {url: 'http://h/v1', key_env: sk-planted-1234}}\nlabel: {}")
    with pytest.raises(UserError, match="key_env") as error:
        load(path)
    assert "planted" not in str(error.value)
