import random

import pytest

from preceptor.clinical.textbook.sampler import sample
from preceptor.data.copies import copies

ZH = "主诉：转移性右下腹痛1天。现病史：患者昨日饭后脐周隐痛，今晨移至右下腹，伴恶心，无呕吐腹泻。"
EN = "Woke twice last night with wheeze and a tight chest; the inhaler helped for an hour. No fever, no sputum."
OTHER = "Knee gave way on the stairs, swollen by the evening, and has clicked whenever it bends since the fall in May."


@pytest.mark.parametrize(
    ("text", "held", "near"),
    [
        (f"{EN} OK", EN, True),
        (f"{ZH}好的", ZH, True),
        (f"ok: {EN.upper()}", EN, True),
        (ZH.replace("昨日饭后", "两天前"), ZH, True),
        (EN.replace(". ", "\n\n"), EN, True),
        (OTHER, EN, False),
        (ZH, EN, False),
        (f"{EN} {OTHER}", EN, False),
        ("发热三天", "发热五天", False),  # too short to tell
        ("", EN, False),
    ],
)
def test_a_copy_is_told_from_another_record(text, held, near):
    assert copies([OTHER, text], [held]) == ({1} if near else set())
    assert copies([text], []) == set()
    assert copies([], [held]) == set()


def test_many_copies_don_t_hide_as_boilerplate():
    texts = [f"{EN} OK {'x' * n}" for n in range(50)]
    assert copies([*texts, OTHER], [EN]) == set(range(50))


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("style", ["short", "full"])
def test_records_of_the_textbook(language, style):
    texts = list(dict.fromkeys(case.text for case in sample(120, 4, language, style)))
    held, own = texts[:60], texts[60:]
    mixed = [*own, *(f"{text} OK" for text in held)]
    random.Random(1).shuffle(mixed)
    assert {mixed[number] for number in copies(mixed, held)} == {f"{text} OK" for text in held}
