"""What `run` and `push` find out before they admit a corpus: whether the provider answers as it should, and whether the disk
has room."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import anyio
import click
import numpy as np

from scheduler.budget import RequestBudget
from scheduler.caps import Cap
from worker.attempts import Attempt, RetryPolicy, embed_batch
from worker.gate import inspect

from ..dataset.dataset import Dataset
from ..dataset.index import DatasetIndex
from ..dataset.local_store import LocalStore
from ..embedder import Embedder, Embedding
from ..errors import BatchPending, EmbedmillError, JobFatalError, OutcomeUnknown, StorageError
from ..sources import Chunking, FieldRules, Source, open_source
from ..sources.opening import PYDOC
from ..survey import Survey, survey
from .progress import size_words

PROBE = "embedmill"
_POLICY = RetryPolicy(base_s=0.3, cap_s=2.0)
# Refusals for rate are no failures, and an open breaker lets nothing through: either may last.
_SAID_AFTER_S, _LONGEST_S = 5.0, 30.0
_SAMPLE = 512
# A passage of a dozen bytes has a vector of some thousands.
_MOST_GROWTH = 1000
_TIGHT = 0.9
# The first documents may be small ones; what is refused must be sure.
_MOST_DOUBT = 0.5


async def probe_provider(embedder: Embedder, budget: RequestBudget, *, cap: Cap) -> int:
    """One small request, so that a bad key, an empty account, a wrong address or wrong dimensions are found before anything
    is admitted; the tokens that it was billed.

    Nothing is asked while open batches hold what is left of the cap: the provider took these. Waiting for long is said,
    and ends without an answer. Raises JobFatalError for answers that cannot be
    used, and what any request raises.
    """
    answer: Embedding | None = None
    trouble: EmbedmillError | None = None
    attempts: list[Attempt] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_say_that_it_waits, budget, attempts)
        with anyio.move_on_after(_LONGEST_S) as waiting:
            try:
                answer = await embed_batch(
                    embedder, [PROBE], budget=budget, role="query", cap=cap, on_event=attempts.append, policy=_POLICY
                )
            except EmbedmillError as error:
                trouble = error
        group.cancel_scope.cancel()
    if waiting.cancelled_caught:
        _say(f"no answer to a first request in {_LONGEST_S:.0f} s, going on all the same ({_cause(budget, attempts)})")
    if isinstance(trouble, OutcomeUnknown):
        raise JobFatalError(
            f"the provider was asked for one vector first, in vain: {trouble}; nothing was admitted"
        ) from trouble
    if trouble is not None and not isinstance(trouble, BatchPending):
        raise trouble
    if answer is None:
        return 0
    report = inspect(answer.vectors, [PROBE], dimensions=embedder.spec.dimensions)
    if not report.passed:
        cause = report.whole or next(iter(report.bad.values()))
        raise JobFatalError(f"the provider was asked for one vector first, in vain: {cause}; nothing was admitted")
    return answer.billed_tokens


async def _say_that_it_waits(budget: RequestBudget, attempts: Sequence[Attempt]) -> None:
    await anyio.sleep(_SAID_AFTER_S)
    _say(f"waiting for the provider to answer a first request ({_cause(budget, attempts)})")


def _cause(budget: RequestBudget, attempts: Sequence[Attempt]) -> str:
    """Why there is no answer, as far as anybody knows."""
    ended = [attempt.outcome for attempt in attempts if attempt.outcome != "cancelled"]
    return budget.trouble or (f"{len(ended)} sent, the last one: {ended[-1]}" if ended else "it was not sent, or hangs")


def _say(text: str) -> None:
    click.echo(f"embedmill: {text}", err=True)


def check_disk(
    dataset: Dataset,
    arguments: Sequence[str],
    *,
    rules: FieldRules,
    chunking: Chunking | None,
    index: DatasetIndex,
    limit: int | None,
    milvus_here: bool = False,
) -> str:
    """A warning, or nothing: whether the disk of a dataset has room for what the local files among `arguments` will make.

    The first documents are read, and the files' sizes say how many there are. milvus_here: Milvus Lite is on the same disk.
    Raises StorageError when the dataset alone cannot fit. Blocking.
    """
    if not isinstance(dataset.store, LocalStore):
        return ""
    free = shutil.disk_usage(dataset.store.root).free
    sources = _sized(arguments, rules=rules, chunking=chunking)
    if sum(source.total_bytes() or 0 for source in sources) * _MOST_GROWTH < free:
        return ""
    found = survey(sources, count_tokens=_one_each, max_input_tokens=0, index=index, sample=_SAMPLE * len(sources))
    least, likely = _needed(dataset, found, limit=limit, milvus_here=milvus_here)
    place = f"{dataset.url} needs about {size_words(likely)} and its disk has {size_words(free)} free"
    if least > free:
        raise StorageError(f"{place}: nothing was admitted; make room, or take a first bite with --limit")
    return f"{place}: it may become full" if likely > free * _TIGHT else ""


def _sized(arguments: Sequence[str], *, rules: FieldRules, chunking: Chunking | None) -> list[Source]:
    """Sources of their own, since reading them changes what they say at the end."""
    files = [one for one in arguments if one not in ("-", PYDOC) and "://" not in one]
    sources = [open_source(one, rules=rules, chunking=chunking) for one in files]
    return [source for source in sources if source.total_bytes()]


def _needed(dataset: Dataset, found: Survey, *, limit: int | None, milvus_here: bool) -> tuple[float, float]:
    """Bytes at least, and bytes that are likely."""
    info = dataset.info
    vector_bytes = np.dtype(info.dtype).itemsize * info.dimensions
    total = found.total
    share = min(1.0, limit / total.documents) if limit is not None and total.documents else 1.0
    new = max(0.0, total.passages - total.unchanged) * share
    owed = sum(dataset.admission(shard).rows for shard in dataset.owed())
    needed = new * (vector_bytes + found.document_bytes) + owed * vector_bytes
    beside = (new + owed) * (4 * info.dimensions + found.document_bytes) if milvus_here else 0.0
    return needed * (1 - min(found.spread, _MOST_DOUBT)), needed + beside


def _one_each(texts: Sequence[str]) -> list[float]:
    """It is passages that take space, and how evenly they lie in the files that makes the estimate sure."""
    return [1.0] * len(texts)
