"""Who answers: one small interface for an API, a server that we start, and weights in this process."""

from typing import Protocol

from preceptor.core.errors import UserError, WorkError
from preceptor.core.money import Money
from preceptor.core.records import Failure, FailureKind, Reply, Request, Usage


class ProviderError(Exception):
    """One send brought no usable reply. The runner decides whether another is made."""

    def __init__(
        self,
        kind: FailureKind,
        detail: str,
        *,
        retryable: bool,
        retry_after: float | None = None,
        sent: bool = True,
        answered: bool = False,
        ends: UserError | WorkError | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.retryable = retryable
        self.retry_after = retry_after
        """Seconds that the server asks all senders to wait: a sign to slow down, not an attempt spent."""
        self.sent = sent
        """False when the request certainly never reached the server."""
        self.answered = answered
        """True when the server said no: it generated nothing, and nothing is owed."""
        self.ends = ends
        """What ends the whole run, since every other request would fail the same way."""
        self.usage = Usage()
        """The tokens that it took all the same."""

    def __str__(self) -> str:
        return self.detail

    def failure(self) -> Failure:
        """The record of it."""
        return Failure(kind=self.kind, detail=self.detail)


class Completer(Protocol):
    """Answers requests, many at once. What costs nothing and has no limits of its own leaves the rest as it is."""

    name: str
    """The endpoint's declared name, part of the ledger's key: stable where ports and addresses change."""
    model: str
    """The model's name; for weights on this disk, their digest."""
    zone: tuple[str, str] | None = None
    """What the user attests of who may see the text, and the host; None where it never leaves this process."""
    rpm: float | None = None
    """Most requests a minute."""
    tpm: float | None = None
    """Most tokens a minute."""
    resume_at: float = 0.0
    """No send before this time by `time.monotonic`: the server has announced it."""

    async def complete(self, request: Request) -> Reply:
        """Send once. Raises ProviderError for this request, UserError or WorkError for all of them."""

    async def close(self) -> None:
        """Let connections and threads go."""

    def gone(self) -> WorkError | None:
        """Why nobody will ever answer again; None where somebody may."""
        return None

    def most(self, request: Request) -> Money | None:
        """The most that a send can cost; None where no price is known."""
        return None

    def cost(self, usage: Usage) -> Money | None:
        """What a reply cost that took these tokens; None where that is not known."""
        return None
