"""The port of a provider's batch endpoint: jobs of many texts that are answered when it suits the provider.

One call is one request, never tried again inside. A batch that was accepted goes on whether or not anybody hears of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from embedmill.errors import OutcomeUnknown

State = Literal["pending", "processing", "completed", "failed", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """A batch as the provider shows it. total, completed, failed: lines; None, 0 and 0 where it does not say."""

    batch_id: str
    state: State
    model: str
    total: int | None
    completed: int
    failed: int
    tokens: int
    has_errors: bool
    error: str

    @property
    def is_open(self) -> bool:
        return self.state in ("pending", "processing")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """The answer to one text: a vector (dimensions,) float32, or why there is none."""

    custom_id: str
    vector: NDArray[np.float32] | None
    error: str = ""


class OutputMissing(OutcomeUnknown):
    """The provider does not have the lines of a batch, or not yet."""


class BatchEndpoint(Protocol):
    """limits: lines and bytes of one batch."""

    model: str
    key_id: str
    api_base: str
    max_lines: int
    max_bytes: int

    async def submit(self, texts: Mapping[str, str]) -> BatchStatus:
        """Hand over texts by custom_id.

        Raises OutcomeUnknown where a batch may have come of it, RequestTooLarge for too many bytes at once; after any other
        error of ours there is certainly none.
        """
        ...

    async def status(self, batch_id: str) -> BatchStatus | None:
        """None for a batch that this key does not know."""
        ...

    async def cancel(self, batch_id: str) -> BatchStatus | None:
        """Its state after that, which for one that had ended is what it was."""
        ...

    async def recent(self) -> tuple[Sequence[BatchStatus], bool]:
        """The key's latest batches, and whether the list was short enough to be all of them."""
        ...

    def output(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        """What was embedded, as it arrives. Raises OutputMissing, and TransientError where it breaks off."""
        ...

    def errors(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        """What failed. Raises like `output`."""
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class HasSecrets(Protocol):
    """A budget of several keys, which come and go. usable_secrets: those of them that are not refused."""

    @property
    def secrets(self) -> tuple[str, ...]: ...

    @property
    def usable_secrets(self) -> tuple[str, ...]: ...


@runtime_checkable
class EmbedsInBatches(Protocol):
    """An embedder whose provider has a batch endpoint, for some of its models."""

    def batch_endpoint(self, key: str = "") -> BatchEndpoint:
        """With another key than the embedder's own, where one is given.

        Raises ConfigurationError, with what works instead, where this model or task cannot be had in batches.
        """
        ...
