"""streaq (PyPI `streaq`) with jobs that do nothing: its producer and its worker, each in a process of its own.

Jobs are enqueued with its pipelined `enqueue_many`, and results are not kept (`ttl=0`) unless its defaults are asked for.
A job counts when streaq has counted it as completed, and its acknowledgement has removed it from the stream.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import anyio
from streaq import Worker

from .processes import in_batches, load_documents, options_of_child, say_ready, say_result, wait_for_go


def make_worker(options: dict[str, Any]) -> tuple[Worker[Any], Any]:
    how: dict[str, Any] = {}
    if options["serializer"] == "orjson":
        import orjson

        how = {"serializer": orjson.dumps, "deserializer": orjson.loads}
    worker: Worker[Any] = Worker(
        redis_url=options["url"], queue_name=options["queue"], concurrency=options["concurrency"],
        prefetch=options["prefetch"], handle_signals=False, **how,
    )  # fmt: skip
    keeping = {} if options["keep_results"] else {"ttl": 0, "silent": True}

    async def nothing(_documents: list[dict[str, Any]]) -> None:
        pass

    return worker, worker.task(name="nothing", **keeping)(nothing)


async def produce(options: dict[str, Any]) -> None:
    worker, job = make_worker(options)
    batches = in_batches(load_documents(options["documents"]), options["batch"])
    pipeline = options["pipeline"]
    async with worker:
        started_at = wait_for_go()
        for start in range(0, len(batches), pipeline):
            await worker.enqueue_many([job.enqueue(batch) for batch in batches[start : start + pipeline]])
    say_result({"started_at": started_at, "ended_at": time.monotonic()})


async def work(options: dict[str, Any]) -> None:
    worker, _ = make_worker(options)
    async with anyio.create_task_group() as group:
        await group.start(worker.run_async)
        say_ready()
        while worker.counters["completed"] < options["jobs"]:  # noqa: ASYNC110 - nothing of it can be awaited
            await anyio.sleep(0.002)
        while await worker.redis.xlen(worker.stream_key + worker.priorities[0]):  # noqa: ASYNC110
            await anyio.sleep(0.002)
        say_result({"ended_at": time.monotonic()})


def main() -> None:
    options = options_of_child()
    logging.getLogger("streaq").setLevel(logging.WARNING)
    role = {"produce": produce, "work": work}[options["role"]]
    anyio.run(role, options, backend_options={"use_uvloop": options["uvloop"]})


if __name__ == "__main__":
    main()
