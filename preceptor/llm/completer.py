"""Who answers: one small interface for an API, a server that we start, and weights in this process."""

from typing import Protocol

from preceptor.core.records import Failure, FailureKind, Reply, Request


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
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.retryable = retryable
        self.retry_after = retry_after
        """Seconds that the server asks all senders to wait: a sign to slow down, not an attempt spent."""
        self.sent = sent
        """False when the request certainly never reached the server."""

    def failure(self) -> Failure:
        """The record of it."""
        return Failure(kind=self.kind, detail=self.detail)


class Completer(Protocol):
    """Answers requests, many at once."""

    @property
    def name(self) -> str:
        """The endpoint's declared name, part of the ledger's key: stable where ports and addresses change."""

    @property
    def model(self) -> str:
        """The model's name; for weights on this disk, their digest."""

    async def complete(self, request: Request) -> Reply:
        """Send once. Raises ProviderError for this request, UserError or WorkError for all of them."""

    async def close(self) -> None:
        """Let connections and threads go."""
