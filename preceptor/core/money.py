"""What asking costs: prices as providers state them, and sums of money."""

from datetime import date
from typing import NamedTuple

from pydantic import Field

from preceptor.core.records import Record, Usage

_MILLION = 1_000_000


class Money(NamedTuple):
    """A sum in one currency; sums in two are never added."""

    amount: float
    currency: str


class Price(Record):
    """What a model's tokens cost, per million, and when that was so."""

    currency: str = Field(pattern=r"^[A-Z]{3}$")
    """ISO 4217, such as CNY or USD."""
    input: float = Field(ge=0, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of prompt tokens that the provider had in its cache; by default as `input`."""
    output: float = Field(ge=0, allow_inf_nan=False)
    """Of all that was generated, thinking included."""
    as_of: date
    """The day on which the provider stated it."""

    def cost(self, usage: Usage) -> Money:
        """What a reply cost."""
        hits = min(usage.cached_tokens, usage.prompt_tokens)
        cached = self.input if self.cached is None else self.cached
        tokens = (usage.prompt_tokens - hits) * self.input + hits * cached + usage.completion_tokens * self.output
        return Money(tokens / _MILLION, self.currency)
