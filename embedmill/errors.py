"""Every error that crosses a boundary, grouped by what the handler does with it.

    EmbedmillError
    ├── ConfigurationError        one clear line, exit 2
    ├── TransientError            try again, with backoff
    │   ├── RateLimited           waits; never spends an attempt
    │   ├── Overloaded            the other side is busy or broken for now
    │   ├── BatchPending          a batch is still with the provider: look again later, nothing is wrong
    │   └── OutcomeUnknown        the request may have been executed and billed
    ├── InputRejected             this request's content is refused: bisect, then dead letter
    │   ├── InputTooLong          over the model's limit, as one text or together
    │   ├── TooManyInputs         smaller requests from now on
    │   └── RequestTooLarge       bisect too, but a single passage stops the job
    ├── EmbedderFailed            not foreseen: try again, find the passage, then dead letter
    ├── JobFatalError             stop, say why, lose nothing, exit 3
    │   ├── InvalidKey            pause the job, too, unless other workers have other keys
    │   ├── NoBalance             likewise
    │   ├── PassageTooLarge       pause the job; others go on
    │   ├── CapReached            the same, until its cap is raised
    │   └── BatchHeld             the same, until somebody has looked at the batch
    ├── StorageError              stop, say what to free or allow, go on later
    ├── CorruptStore              stop, name the object
    ├── ObjectExists              somebody else created it first: adopt it
    ├── ObjectChanged             a compare-and-swap lost: read again
    └── SnapshotOutdated          a reader's shard was replaced meanwhile: refresh, read again

Each class has a stable `code`, which is what logs, dead letters and `--json` carry.
"""

from __future__ import annotations

from typing import ClassVar


class EmbedmillError(Exception):
    """Base of all errors that this project raises on purpose. `exit_status` is what the command ends with."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 3


class ConfigurationError(EmbedmillError):
    """What the user asked for cannot be done as asked. The message says what to do instead."""

    code = "configuration"
    exit_status = 2


class TransientError(EmbedmillError):
    """Trying again later may work. `retry_after_s` is the other side's own word, when it gave one."""

    code = "transient"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(TransientError):
    """The provider refused for its rate: nothing was embedded and nothing is billed.

    `limit` names which of its limits: `requests`, `tokens`, `concurrency`, `address` or `unknown`;
    `allowed` is that limit's value where the answer told it.
    """

    code = "rate_limited"

    def __init__(
        self,
        message: str,
        *,
        limit: str = "unknown",
        allowed: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit
        self.allowed = allowed


class Overloaded(TransientError):
    """A 5xx, a refused connection: the request was not executed."""

    code = "overloaded"


class BatchPending(TransientError):
    """What was handed to a provider's batch endpoint is not done yet. `retry_after_s` says when to look again."""

    code = "batch_pending"


class OutcomeUnknown(TransientError):
    """A timeout or a connection lost after sending: it may have been executed, so its estimate is charged."""

    code = "outcome_unknown"


class InputRejected(EmbedmillError):
    """The provider refuses this request because of its content. Alone in a request, the passage becomes a dead letter."""

    code = "input_rejected"


class InputTooLong(InputRejected):
    """A text, or with late chunking all texts of a request together, has more tokens than the model takes."""

    code = "too_long"


class TooManyInputs(InputRejected):
    """The provider takes fewer texts, or fewer bytes, in one request. `allowed`: how many texts, where it says so."""

    code = "too_many_inputs"

    def __init__(self, message: str, *, allowed: int | None = None) -> None:
        super().__init__(message)
        self.allowed = allowed


class RequestTooLarge(InputRejected):
    """The key's limits never allow a request of this size. A smaller one may pass; a single passage can't be smaller."""

    code = "request_too_large"


class EmbedderFailed(EmbedmillError):
    """The embedder raised what it never should: a bug, a text that it cannot stand, or too little memory."""

    code = "embedder_failed"


class JobFatalError(EmbedmillError):
    """Nothing of this job can succeed until a person acts."""

    code = "job_fatal"


class InvalidKey(JobFatalError):
    """The API key is missing, malformed or refused."""

    code = "invalid_key"


class NoBalance(JobFatalError):
    """The account has no balance, or its plan does not allow this."""

    code = "no_balance"


class PassageTooLarge(JobFatalError):
    """The limits of the key or of the provider never allow a request for one passage of the job."""

    code = "passage_too_large"


class CapReached(JobFatalError):
    """What the job's cap of tokens leaves is less than the request may count. A smaller one may pass.

    `limit` is the cap that was reached.
    """

    code = "cap_reached"

    def __init__(self, message: str, *, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


class BatchHeld(JobFatalError):
    """Nobody can tell whether a batch was accepted, or what it is worth: sending it again might pay twice."""

    code = "batch_held"


class StorageError(EmbedmillError):
    """The dataset's storage refuses: full, read-only, not allowed. Nothing is lost; the same command goes on later."""

    code = "storage"


class CorruptStore(EmbedmillError):
    """An object of the dataset is not what its checksum or its format says. The message names it."""

    code = "corrupt_store"


class ObjectExists(EmbedmillError):
    """An exclusive creation found the object already there."""

    code = "object_exists"


class ObjectChanged(EmbedmillError):
    """A compare-and-swap found other content than expected."""

    code = "object_changed"


class SnapshotOutdated(EmbedmillError):
    """What a reader's snapshot names was replaced or taken away since. Nothing is damaged: refresh and read again."""

    code = "snapshot_outdated"
