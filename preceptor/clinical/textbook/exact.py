"""The answerer that knows the textbook: the limit for every student, and what the textbook teacher says."""

from functools import cache

import numpy as np

from preceptor.clinical.textbook.book import Textbook, load
from preceptor.clinical.textbook.posterior import Posterior, World
from preceptor.clinical.textbook.reader import Reader, Reading
from preceptor.core.records import Diagnosis, Evidence, Language

SUPPORTS = float(np.log(1.5))
"""A finding speaks for a disease when it is at least half as likely again with it as overall."""
REASONS = 4
"""Most reasons that an answer gives."""
_RISKS = ("low", "medium", "high", "high", "critical", "critical")
"""By severity, one more with a red flag."""
_FEW, _MANY = 5, 12
"""Details of a simple record, and of one that isn't complex."""


class Exact:
    """Reads records with full knowledge of the world that wrote them."""

    def __init__(self, book: Textbook) -> None:
        self.book = book
        self.world = World(book)
        self.reader = Reader(book)

    def posterior(self, text: str) -> Posterior:
        """Probabilities of the diseases given what `text` says."""
        return self.world.posterior(self.reader.read(text))

    def answer(self, text: str, language: Language, temperature: float = 0.0, seed: int | None = None) -> Diagnosis:
        """An answer to the record, in its language; no disease where the record does not say enough.

        At temperature 0 it is the best answer. Above, diseases are drawn from the posterior raised to the power
        1 / temperature, the same for the same seed; abstention is a decision and not drawn.
        """
        reading = self.reader.read(text)
        posterior = self.world.posterior(reading)
        diseases = self.world.exact(posterior)
        if diseases and temperature > 0:
            power = (np.log(np.maximum(posterior.probabilities, 1e-300)) / temperature).astype(float)
            weights = np.exp(power - power.max())
            drawn = np.random.default_rng(seed).choice(len(weights), p=weights / weights.sum())
            diseases = tuple(sorted(posterior.hypotheses[drawn], key=lambda d: -posterior.marginals[d]))
        evidence = self.evidence(text, reading, diseases, language, REASONS)
        return Diagnosis(
            diseases=tuple(self.book.diseases[d].name(language) for d in diseases),
            reason=tuple(e.text for e in evidence),
            evidence=evidence,
        )

    def thinking(self, text: str, language: Language) -> str:
        """What the record says, a line each in its order: `+` and `-` before a finding by name, `?` before a blur."""
        reading = self.reader.read(text)
        sex = {"male": ("Man", "男"), "female": ("Woman", "女"), None: ("", "")}[reading.sex][language == "zh"]
        age = "" if reading.age is None else f"{reading.age}岁" if language == "zh" else str(reading.age)
        lines = [("，" if language == "zh" else ", ").join(part for part in (sex, age) if part)]
        for mention in reading.mentions:
            if mention.form == "blurred":
                lines.append("?" + text[mention.start : mention.end])
            else:
                sign = "-" if mention.form == "negated" else "+"
                lines.append(sign + self.book.findings[mention.subject].words(language).name)
        return "\n".join(line for line in lines if line)

    def metadata(self, text: str) -> dict[str, str | int]:
        """What kind of case the record is: by its likeliest disease, red flags, number of details and lay words."""
        reading = self.reader.read(text)
        first = self.book.diseases[next(iter(self.world.posterior(reading).marginals))]
        forms = [mention.form for mention in reading.mentions]
        flagged = any(m.subject in first.red_flags for m in reading.mentions if m.form in ("clear", "lay"))
        risk = min(first.severity + flagged, len(_RISKS)) if forms else 1
        lay = forms.count("lay") / max(1, len(forms))
        return {
            "risk_level": _RISKS[risk - 1],
            "specialty": first.specialty if forms else "general",
            "complexity": 1 + (len(forms) > _FEW) + (len(forms) > _MANY),
            "lang_style": "colloquial" if lay > 1 / 2 else "standard" if lay else "professional",
        }

    def evidence(
        self,
        text: str,
        reading: Reading,
        diseases: tuple[str, ...],
        language: Language,
        limit: int | None = None,
    ) -> tuple[Evidence, ...]:
        """The `limit` mentions that speak most strongly for one of the diseases, in the order of the text."""
        found: dict[str, tuple[float, Evidence]] = {}
        for mention in reading.mentions:
            if mention.form not in ("clear", "lay") or mention.subject in found:
                continue
            strength, disease = max(
                ((float(self.world.support(d)[self.world.index[mention.subject]]), d) for d in diseases),
                default=(-np.inf, ""),
            )
            if strength >= SUPPORTS:
                found[mention.subject] = (
                    strength,
                    Evidence(
                        text=text[mention.start : mention.end],
                        start=mention.start,
                        end=mention.end,
                        finding=mention.subject,
                        disease=self.book.diseases[disease].name(language),
                    ),
                )
        strongest = sorted(found.values(), key=lambda item: -item[0])[:limit]
        return tuple(sorted((evidence for _, evidence in strongest), key=lambda e: e.start))


@cache
def exact() -> Exact:
    """The exact answerer of the textbook that comes with the package."""
    return Exact(load())
