"""How well the safety rules tell the pairs apart; `python -m tests.safety` prints it by rule and language."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from preceptor.clinical.safety import Kind, dismissals, risky_prescription, urgent

PAIRS = Path(__file__).parent / "clinical" / "safety_pairs.yaml"
BLIND = PAIRS.with_name("safety_blind.yaml")
TITLES = {
    PAIRS: "Pairs that the rules were fitted to",
    BLIND: "Pairs by another author, never looked at while the rules were written",
}


def found(kind: Kind, text: str, case: str = "") -> bool:
    """Whether a rule holds of a text."""
    if kind is Kind.URGENT:
        return bool(urgent(text))
    if kind is Kind.DISMISSAL:
        return bool(dismissals(text))
    return any(hit.kind is kind for hit in risky_prescription(text, case))


def examples(pairs_at: Path = PAIRS) -> Iterator[tuple[Kind, str, str, str, bool]]:
    """Rule, language, text, case and whether the rule should hold, of both halves of every pair."""
    for rule, languages in yaml.safe_load(pairs_at.read_text("utf-8")).items():
        for language, pairs in languages.items():
            for pair in pairs:
                for side in ("hit", "miss"):
                    text, case = pair.get("answer", pair[side]), pair.get("case", "")
                    if "answer" in pair:
                        case = pair[side]
                    yield Kind(rule), language, text, case, side == "hit"


def counts(pairs_at: Path = PAIRS) -> dict[tuple[str, str], Counter[str]]:
    """Right and wrong by rule and language, with ("all", "all") at the end."""
    table: dict[tuple[str, str], Counter[str]] = {}
    for kind, language, text, case, expected in examples(pairs_at):
        said = found(kind, text, case)
        name = ("true" if said == expected else "false") + (" positive" if said else " negative")
        for key in ((kind.value, language), ("all", language), ("all", "all")):
            table.setdefault(key, Counter())[name] += 1
    return dict(sorted(table.items(), key=lambda item: item[0][0] == "all"))


def rates(count: Counter[str]) -> tuple[float, float]:
    """Precision and recall."""
    right = count["true positive"]
    return right / max(1, right + count["false positive"]), right / max(1, right + count["false negative"])


def table(pairs_at: Path = PAIRS) -> str:
    """The figures, and below them each text that the rules get wrong."""
    lines = [TITLES[pairs_at], f"{'rule':18}{'language':10}{'pairs':>6}{'precision':>11}{'recall':>8}"]
    for (rule, language), count in counts(pairs_at).items():
        precision, recall = rates(count)
        lines.append(f"{rule:18}{language:10}{count.total() // 2:6}{precision:11.3f}{recall:8.3f}")
    for kind, _, text, case, expected in examples(pairs_at):
        if found(kind, text, case) != expected:
            lines.append(f"{'missed' if expected else 'false'} {kind}: {text}" + f"  [{case}]" * bool(case))
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(path) for path in TITLES if path.exists()))  # noqa: T201 - a command prints
