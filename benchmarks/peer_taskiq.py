"""taskiq with taskiq-redis and tasks that do nothing: its producer and its worker, each in a process of its own.

`stream` is its broker with acknowledgements; a task counts once it has run and nothing is pending in its group. `list` is
its broker without them: a task counts once it has run, and is lost when its worker dies.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from redis.asyncio import Redis
from taskiq.api import run_receiver_task
from taskiq_redis import ListQueueBroker, RedisStreamBroker
from taskiq_redis.redis_broker import BaseRedisBroker

from .processes import in_batches, load_documents, options_of_child, say_ready, say_result, wait_for_go


def make_broker(options: dict[str, Any]) -> BaseRedisBroker:
    broker: BaseRedisBroker
    if options["broker"] == "list":
        broker = ListQueueBroker(options["url"], queue_name=options["queue"])
    else:
        broker = RedisStreamBroker(options["url"], queue_name=options["queue"], consumer_id="0")
    if options["serializer"] == "orjson":
        from taskiq.serializers import ORJSONSerializer

        broker.with_serializer(ORJSONSerializer())
    return broker


async def produce(options: dict[str, Any]) -> None:
    broker = make_broker(options)

    async def nothing(_documents: list[dict[str, Any]]) -> None:
        pass

    task = broker.task("nothing")(nothing)
    await broker.startup()
    batches = in_batches(load_documents(options["documents"]), options["batch"])
    at_once = options["pipeline"]
    started_at = wait_for_go()
    for start in range(0, len(batches), at_once):
        await asyncio.gather(*(task.kiq(batch) for batch in batches[start : start + at_once]))
    say_result({"started_at": started_at, "ended_at": time.monotonic()})


async def work(options: dict[str, Any]) -> None:
    broker = make_broker(options)
    ran, all_ran = 0, asyncio.Event()

    async def nothing(_documents: list[dict[str, Any]]) -> None:
        nonlocal ran
        ran += 1
        if ran == options["jobs"]:
            all_ran.set()

    broker.task("nothing")(nothing)
    await broker.startup()
    receiving = run_receiver_task(
        broker, max_async_tasks=options["concurrency"], max_prefetch=options["prefetch"], run_startup=False
    )
    receiver = asyncio.create_task(receiving)
    say_ready()
    await asyncio.wait([receiver, asyncio.create_task(all_ran.wait())], return_when=asyncio.FIRST_COMPLETED)
    if options["broker"] == "stream":
        async with Redis.from_url(options["url"]) as redis:
            while (await redis.xpending(options["queue"], "taskiq"))["pending"]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    say_result({"ended_at": time.monotonic()})


def main() -> None:
    options = options_of_child()
    role = {"produce": produce, "work": work}[options["role"]]
    if options["uvloop"]:
        import uvloop

        uvloop.run(role(options))
    else:
        asyncio.run(role(options))


if __name__ == "__main__":
    main()
