"""What became of a section's answers, counted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.core.records import Prediction, Usage

SERVED = "served.txt"
"""The name that predictions carry and the name that the endpoint gave its model, one pair a line."""
_MOST = 20
"""Names that are written down of one model: an endpoint that gives each reply another says nothing by them."""
_LONGEST = 200
"""Characters of a failure's words that are shown."""
_TOLD = ("corrected", "revised", "repaired")
_COUNTED = (*_TOLD, "cut")


class Names:
    """The names that the endpoint gave a model; each is written down when it is met, so that a kill loses none."""

    def __init__(self, folder: Path, model: str) -> None:
        self._path = folder / SERVED
        self._model = model
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else ()
        pairs = (line.partition("\t") for line in lines)
        self.known = [name for owner, _, name in pairs if owner == model]

    def add(self, name: str) -> None:
        """One more; the empty name is none."""
        name = " ".join(name.split())
        if name and name not in self.known and len(self.known) < _MOST:
            self.known.append(name)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{self._model}\t{name}\n")


@dataclass
class Account:
    """The account of one model. Tokens are of all turns."""

    names: list[str]
    """Which model the endpoint said it was."""
    counts: "Counter[str]" = field(default_factory=Counter)
    failures: "Counter[str]" = field(default_factory=Counter)
    details: "Counter[str]" = field(default_factory=Counter)
    """Their words, of the first few kinds."""
    usage: Usage = field(default_factory=Usage)
    agreement: float = 0.0
    """Sum over the answers that have one."""

    def add(self, prediction: Prediction) -> None:
        """One more answer, or failure."""
        self.counts["cases"] += 1
        self.counts["answered"] += prediction.output is not None
        self.counts["abstained"] += prediction.abstained and not prediction.withheld
        self.counts["withheld"] += prediction.withheld is not None
        self.counts.update({what: getattr(prediction, what) for what in _COUNTED})
        if prediction.failure:
            self.failures[prediction.failure.kind.value] += 1
            detail = " ".join(prediction.failure.detail.split())[:_LONGEST]
            if detail in self.details or len(self.details) < _MOST:
                self.details[detail] += 1
        if prediction.agreement is not None:
            self.counts["voted"] += 1
            self.agreement += prediction.agreement
        self.usage += prediction.usage

    def figures(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            **{what: self.counts[what] for what in ("cases", "answered", "abstained", "withheld", *_COUNTED)},
            "failed": self.failures.total(),
            "failures": dict(self.failures),
            "agreement": self._agreement(),
            **self.usage.model_dump(),
            "models": self.names,
        }

    def lines(self) -> Iterable[str]:
        """For the user: what became of the answers; and which names the model went by, if several."""
        count, usage = self.counts, self.usage
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.failures.most_common())
        parts = [f"{count['answered']} of {count['cases']} answered, {count['abstained']} abstained"]
        parts[0] += f", {count['withheld']} withheld" if count["withheld"] else ""
        parts[0] += f", {self.failures.total()} failed" + (f" ({kinds})" if kinds else "")
        parts += [told] if (told := ", ".join(f"{count[what]} {what}" for what in _TOLD if count[what])) else []
        if (agreement := self._agreement()) is not None:
            parts.append(f"agreement {agreement:.2f}")
        thinking = f", {usage.thinking_tokens:,} of them thinking" if usage.thinking_tokens else ""
        parts.append(f"tokens {usage.prompt_tokens:,} in, {usage.completion_tokens:,} out{thinking}")
        yield "; ".join(parts)
        if len(self.names) > 1:
            yield f"the endpoint said it was {', '.join(self.names)}"
        if count["cut"]:
            yield f"records longer than the model can take in, whose ends were not read: {count['cut']}"
        if self.failures:
            (often, _), *_ = self.details.most_common(1)
            if often:
                yield f"the commonest failure: {often}"
            advice = ", with a larger max_tokens for those that it cut" if self.failures["truncated"] else ""
            yield f"the same command with --retry asks the failed ones again, and them alone{advice}"

    def _agreement(self) -> float | None:
        return self.agreement / self.counts["voted"] if self.counts["voted"] else None
