"""Which shards of a worker go through the provider's batch endpoint, and with which keys."""

from __future__ import annotations

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Submissions
from embedmill.errors import BatchHeld, ConfigurationError

from .batch_endpoint import BatchEndpoint, EmbedsInBatches, HasSecrets
from .batch_lane import BatchLane, Compared
from .batch_matching import Sightings
from .batch_pace import Pace
from .requesting import Requester


class BatchLanes:
    """The lanes of one worker's shards."""

    def __init__(self, requester: Requester, *, worker: str) -> None:
        self._requester = requester
        self._worker = worker
        self._endpoints: dict[str, BatchEndpoint] = {}
        self._compared = Compared()
        self._sightings = Sightings()
        self._pace = Pace()

    async def lane(self, dataset: Dataset, shard: int) -> BatchLane | None:
        """None for a shard of another job, unless something of it was sent before the job changed its mode.

        Raises BatchHeld where the embedder has no such endpoint.
        """

        def look() -> tuple[bool, bool]:
            job = dataset.job(dataset.admission(shard).job)
            return job is not None and job.mode == "batch", Submissions(dataset).has(shard)

        submits, has_sent = await to_thread.run_sync(look)
        if not submits and not has_sent:
            return None
        budget = self._requester.budget
        secrets, senders = (budget.secrets, budget.usable_secrets) if isinstance(budget, HasSecrets) else (("",), ("",))
        return BatchLane(
            list(map(self._endpoint, secrets)), list(map(self._endpoint, senders)), self._requester, dataset, shard,
            worker=self._worker, submits=submits,
            compared=self._compared, sightings=self._sightings, pace=self._pace,
        )  # fmt: skip

    async def aclose(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.aclose()

    def _endpoint(self, secret: str) -> BatchEndpoint:
        if secret not in self._endpoints:
            embedder = self._requester.embedder
            if not isinstance(embedder, EmbedsInBatches):
                raise BatchHeld(
                    f"{embedder.spec.model} cannot be had in batches: `embedmill run --no-batch` does without"
                )
            try:
                self._endpoints[secret] = embedder.batch_endpoint(secret)
            except ConfigurationError as error:
                raise BatchHeld(str(error)) from error
        return self._endpoints[secret]
