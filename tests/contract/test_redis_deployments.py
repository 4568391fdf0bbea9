"""The queue on every kind of Redis that a platform team runs: TLS, ACL users, Sentinels with a failover, a cluster."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import anyio
import pytest

from embedmill import redis_clients
from embedmill.connection import Connection, Unreachable
from embedmill.errors import ConfigurationError, Overloaded
from embedmill.redis_address import parse_redis_url
from scheduler.queue import Queue
from tests.contract.queue_bench import NAMESPACE, PREFIX, only, task
from tests.servers import (
    Certificates,
    ClusterServers,
    Server,
    make_certificates,
    running,
    running_cluster,
    running_sentinels,
    tls_server,
)

pytestmark = pytest.mark.server
OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"


@asynccontextmanager
async def connected(url: str, *, retry_for_s: float = 15.0) -> AsyncIterator[Connection]:
    connection = Connection(url, retry_for_s=retry_for_s)
    try:
        yield connection
    finally:
        await connection.aclose()


async def live_a_life(connection: Connection, shard: int) -> None:
    """One task from its enqueuing to its announcement, with somebody who waits for either."""
    queue = Queue(connection, namespace=NAMESPACE)

    async def wait_for_news(stream: str) -> None:
        newest = await connection.command("XREVRANGE", f"{PREFIX}:{stream}", "+", "-", "COUNT", 1)
        last = str(newest[0][0]) if newest else "0"
        # A wait that is cut short with its connection returns without news.
        while await connection.wait_for_entry(f"{PREFIX}:{stream}", last, timeout_s=5) == last:
            pass

    with anyio.fail_after(15):
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_news, "wake")
            await anyio.sleep(0.05)
            assert await queue.enqueue([task(shard)]) == 1
        lease = await only(queue.lease("worker"))
        assert lease.task == task(shard)
        assert (await queue.extend([lease])).lost == set()
        assert (await queue.depth()).leased == 1
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_news, "announced")
            await anyio.sleep(0.05)
            assert await queue.finish(lease.task)
        assert await queue.finish(lease.task) is False
        assert (await queue.depth()).open == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_port(redis_server: str, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running(tls_server(tmp_path_factory.mktemp("tls"), certificates)) as server:
        yield server.port


async def test_the_queue_lives_on_a_server_that_speaks_only_tls(tls_port: int, certificates: Certificates) -> None:
    async with connected(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificates.authority}") as connection:
        assert (await connection.check())["redis_version"].startswith("7.")
        await live_a_life(connection, 1)


async def test_a_server_that_wants_a_certificate_gets_ours_and_says_so_without_one(
    redis_server: str, certificates: Certificates, tmp_path: Path
) -> None:
    with running(tls_server(tmp_path, certificates, clients_too=True)) as server:
        url = f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={certificates.authority}"
        ours = f"&ssl_certfile={certificates.certificate}&ssl_keyfile={certificates.key}"
        async with connected(url + ours) as connection:
            await connection.check()
            await live_a_life(connection, 1)
        async with connected(url) as connection:
            with pytest.raises(ConfigurationError, match="ssl_certfile=FILE&ssl_keyfile=FILE") as refused:
                await connection.check()
            assert not isinstance(refused.value, Unreachable)
        # Where the hang-up overtakes the reason, which a busy machine makes likely, it is asked for by reading alone.
        assert await redis_clients.wants_certificate(parse_redis_url(url))


async def test_a_server_that_wants_none_is_not_said_to_want_a_certificate(tls_port: int) -> None:
    assert not await redis_clients.wants_certificate(parse_redis_url(f"rediss://127.0.0.1:{tls_port}"))


async def test_an_untrusted_certificate_and_a_wrong_name_say_which_parameter_helps(
    tls_port: int, certificates: Certificates, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "certificates", "elsewhere.example")
    with running(tls_server(tmp_path / "elsewhere", other)) as elsewhere:
        cases = {
            f"rediss://127.0.0.1:{tls_port}": r"not trusted \(.*\); name its authority with \?ssl_ca_certs=FILE",
            f"rediss://127.0.0.1:{tls_port}?ssl_ca_certs={other.authority}": "not trusted",
            f"rediss://127.0.0.1:{elsewhere.port}?ssl_ca_certs={other.authority}": "ssl_check_hostname=false",
            f"rediss://localhost:{elsewhere.port}?ssl_ca_certs={other.authority}": "ssl_check_hostname=false",
        }
        for url, message in cases.items():
            async with connected(url) as connection:
                with pytest.raises(ConfigurationError, match=message) as refused:
                    await connection.check()
                assert not isinstance(refused.value, Unreachable)
    for switched_off in ("ssl_cert_reqs=none", f"ssl_check_hostname=false&ssl_ca_certs={certificates.authority}"):
        async with connected(f"rediss://127.0.0.1:{tls_port}?{switched_off}") as connection:
            await connection.check()


async def test_tls_and_plain_are_not_confused(tls_port: int, tmp_path: Path) -> None:
    with running(Server(tmp_path)) as plain:
        async with connected(f"rediss://127.0.0.1:{plain.port}") as connection:
            with pytest.raises(Unreachable, match="if it does not speak TLS, write redis instead of rediss"):
                await connection.check()
    async with connected(f"redis://127.0.0.1:{tls_port}") as connection:
        with pytest.raises(Unreachable, match="if it speaks TLS, write rediss"):
            await connection.check()


def documented_rule(user: str) -> list[str]:
    """The rule of `docs/operations.md`, as the words of ACL SETUSER, for the namespace of these tests."""
    found = re.search(rf"^ACL SETUSER {user} (.*)$", OPERATIONS.read_text(), re.MULTILINE)
    assert found is not None
    return [user, *found[1].replace("NAMESPACE", NAMESPACE).replace("PASSWORD", "p@ss/w#rd?%").split()]


@pytest.fixture(params=["valkey", "redis"])
def empty_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if request.param == "valkey":
        server = Server(tmp_path)
    else:
        server = Server(tmp_path, binary=request.getfixturevalue("redis_server"))
    with running(server) as started:
        yield started


async def test_the_documented_user_of_a_worker_may_do_all_of_its_work(empty_server: Server) -> None:
    empty_server.do("ACL", "SETUSER", *documented_rule("embedmill-worker"))
    url = f"redis://embedmill-worker:p%40ss%2Fw%23rd%3F%25@127.0.0.1:{empty_server.port}"
    async with connected(url) as connection:
        assert (await connection.check())["maxmemory_policy"] == "noeviction"
        await live_a_life(connection, 1)
        await connection.command("EXISTS", f"{PREFIX}:rl:x:state")
        with pytest.raises(ConfigurationError, match="ACL rule"):
            await connection.command("GET", "somebody-elses")
        with pytest.raises(ConfigurationError, match="ACL rule"):
            await connection.command("FLUSHALL")


async def test_the_documented_user_of_a_producer_may_push_and_read_receipts_and_nothing_else(
    empty_server: Server,
) -> None:
    empty_server.do("ACL", "SETUSER", *documented_rule("embedmill-producer"))
    url = f"redis://embedmill-producer:p%40ss%2Fw%23rd%3F%25@127.0.0.1:{empty_server.port}"
    async with connected(url) as connection:
        await connection.check()
        pushed = ["wiki", 100, 10**6, "k", 10, "v", "1", "documents", "{}"]
        assert (await connection.script("embedmill/push", [PREFIX], pushed))[0] == 1
        empty_server.do("XADD", f"{PREFIX}:receipts:me", "*", "receipt", "{}")
        assert await connection.wait_for_entry(f"{PREFIX}:receipts:me", "0", timeout_s=2) != "0"
        with pytest.raises(ConfigurationError, match="ACL rule"):
            await connection.script("scheduler/lease", [PREFIX], ["me", 1000, 1, "", 1000])


async def test_without_leave_to_ask_for_info_the_check_warns_and_goes_on(
    empty_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    empty_server.do("ACL", "SETUSER", "worker", "on", ">secret", "~{embedmill:2:*", "+@all", "-@dangerous")
    async with connected(f"redis://worker:secret@127.0.0.1:{empty_server.port}") as connection:
        assert "maxmemory_policy" not in await connection.check()
        await live_a_life(connection, 1)
    assert "may not ask" in caplog.text
    assert "secret" not in caplog.text


async def test_a_wrong_password_is_said_at_once_and_never_shown(empty_server: Server) -> None:
    empty_server.do("CONFIG", "SET", "requirepass", "right")
    with anyio.fail_after(5):
        for login in (":secret@", "nobody:secret@", ""):
            async with connected(f"redis://{login}127.0.0.1:{empty_server.port}") as connection:
                with pytest.raises(ConfigurationError, match="refuses the login") as refused:
                    await connection.check()
                assert not isinstance(refused.value, Unreachable)
                assert "secret" not in str(refused.value)
                with pytest.raises(ConfigurationError, match="refuses"):
                    await connection.command("PING", "x")


@pytest.mark.parametrize("binary", ["valkey", "redis"])
async def test_the_queue_goes_on_at_the_new_master_after_a_failover(
    binary: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue("redis_server") if binary == "redis" else None
    with running_sentinels(tmp_path, binary=path) as service:
        async with connected(service.url, retry_for_s=20) as connection:
            await connection.check()
            await live_a_life(connection, 1)
            queue = Queue(connection, namespace=NAMESPACE)
            await queue.enqueue([task(2)])
            lease = await only(queue.lease("worker"))
            service.wait_until_replicated()
            waiting = asyncio.create_task(connection.wait_for_entry(f"{PREFIX}:announced", "$", timeout_s=5))
            await asyncio.sleep(0.05)
            service.servers[0].kill()
            assert (await queue.extend([lease])).lost == set()
            assert await queue.finish(lease.task)
            await waiting
            assert service.master() is service.servers[1]
            await live_a_life(connection, 3)


async def test_a_master_that_became_a_replica_is_left(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as service:
        async with connected(service.url, retry_for_s=20) as connection:
            await live_a_life(connection, 1)
            service.fail_over()
            await live_a_life(connection, 2)


async def test_sentinels_that_do_not_know_the_service_name_those_they_know(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as service:
        async with connected(service.url.replace("embedmill-test", "orders")) as connection:
            with pytest.raises(ConfigurationError, match="know no 'orders', but embedmill-test") as refused:
                await connection.check()
            assert not isinstance(refused.value, Unreachable)
        async with connected(f"redis://127.0.0.1:{service.sentinels[0].port}") as connection:
            with pytest.raises(ConfigurationError, match=r"is a Sentinel: write redis\+sentinel://"):
                await connection.check()
        service.sentinels[0].kill()
        async with connected(service.url) as connection:
            with pytest.raises(Unreachable):
                await connection.check()


@pytest.fixture(scope="module", params=["valkey", "redis"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterServers]:
    binary = request.getfixturevalue("redis_server") if request.param == "redis" else None
    with running_cluster(tmp_path_factory.mktemp("cluster"), binary=binary) as servers:
        yield servers


async def test_the_queue_lives_in_a_cluster_also_when_its_scripts_are_forgotten(cluster: ClusterServers) -> None:
    async with connected(cluster.url) as connection:
        assert (await connection.check())["maxmemory_policy"] == "noeviction"
        await live_a_life(connection, 1)
        for node in cluster.nodes:
            node.do("SCRIPT", "FLUSH")
        await live_a_life(connection, 2)
        assert await connection.command("XLEN", f"{PREFIX}:announced") == 2
        await connection.command("FLUSHALL")
        assert await connection.command("EXISTS", f"{PREFIX}:announced") == 0


async def test_one_node_of_a_cluster_is_no_server_and_a_server_no_cluster(
    cluster: ClusterServers, tmp_path: Path
) -> None:
    async with connected(cluster.url.replace("redis+cluster", "redis").partition(",")[0]) as connection:
        with pytest.raises(ConfigurationError, match=r"is a cluster: write redis\+cluster://"):
            await connection.check()
    with running(Server(tmp_path)) as server:
        async with connected(f"redis+cluster://127.0.0.1:{server.port}") as connection:
            with pytest.raises(ConfigurationError, match="is no cluster: write redis://"):
                await connection.check()


async def test_a_slot_that_moves_key_by_key_is_waited_for_and_followed(cluster: ClusterServers) -> None:
    async with connected(cluster.url) as connection:
        await connection.command("FLUSHALL")
        queue = Queue(connection, namespace=NAMESPACE)
        await queue.enqueue([task(shard) for shard in range(20)])
        slot = int(cluster.nodes[0].do("CLUSTER", "KEYSLOT", PREFIX))
        source = cluster.node_of(PREFIX)
        target = next(node for node in cluster.nodes if node is not source)
        names = {node.port: node.do("CLUSTER", "MYID") for node in (source, target)}
        target.do("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target.port])
        keys = source.do("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        for key in keys[: len(keys) // 2]:
            source.do("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        leasing = asyncio.create_task(queue.lease("worker", count=100))
        await asyncio.sleep(0.3)
        assert not leasing.done(), "a script ran on half of the queue"
        for key in keys[len(keys) // 2 :]:
            source.do("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        for node in (target, source):
            node.do("CLUSTER", "SETSLOT", slot, "NODE", names[target.port])
        with anyio.fail_after(10):
            assert len(await leasing) == 20
        assert cluster.node_of(PREFIX) is target


async def test_a_node_that_dies_and_comes_back_empty_is_survived(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        async with connected(cluster.url, retry_for_s=20) as connection:
            await live_a_life(connection, 1)
            node = cluster.node_of(PREFIX)
            node.kill()
            call = asyncio.create_task(Queue(connection, namespace=NAMESPACE).depth())
            await asyncio.sleep(0.5)
            node.start()
            with anyio.fail_after(15):
                assert (await call).open == 0
            await live_a_life(connection, 2)


@dataclass
class LossyProxy:
    """Between us and a server: what is asked is executed, and some of the answers never come back."""

    target: int
    loss: float
    random: Random = field(default_factory=lambda: Random(5))
    lost: int = 0
    serving: set[asyncio.Task[None] | None] = field(default_factory=set)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await server.wait_closed()
            # Its clients are closed, so that each ends by itself.
            await asyncio.wait_for(asyncio.gather(*filter(None, self.serving)), 10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.add(asyncio.current_task())
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)

        async def upwards() -> None:
            while data := await reader.read(65536):
                up_writer.write(data)
                await up_writer.drain()
            up_writer.close()

        asking = asyncio.create_task(upwards())
        with suppress(OSError):
            while data := await up_reader.read(65536):
                if self.random.random() < self.loss:
                    self.lost += 1
                    break
                writer.write(data)
                await writer.drain()
        for end in (writer, up_writer):
            end.close()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_enqueuing_through_a_network_that_loses_three_replies_of_ten_leaves_no_duplicate(tmp_path: Path) -> None:
    with running(Server(tmp_path)) as server:
        proxy = LossyProxy(server.port, 0.3)
        async with proxy.listening() as port, connected(f"redis://127.0.0.1:{port}") as connection:
            queue = Queue(connection, namespace=NAMESPACE)
            for shard in range(200):
                await queue.enqueue([task(shard)])
        assert proxy.lost > 40
        async with connected(server.url) as connection:
            queue = Queue(connection, namespace=NAMESPACE)
            assert (await queue.depth()).open == 200
            leases = await queue.lease("worker", count=500)
            assert sorted(lease.task.shard for lease in leases) == list(range(200))
            assert int(await connection.command("XLEN", f"{PREFIX}:wake")) <= 200


async def test_whoever_must_end_soon_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with connected(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", retry_for_s=60) as connection:
        call = asyncio.create_task(Queue(connection).depth())
        await asyncio.sleep(0.1)
        connection.give_up_after(0.3)
        with anyio.fail_after(2):
            with pytest.raises(Overloaded, match="did not answer in the time that was left"):
                await call
            with pytest.raises(Overloaded):
                await Queue(connection).depth()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("fields", "product"),
    [("redis_version:6.2.14", "Redis 6.2.14"), ("redis_version:7.2.4\r\nvalkey_version:7.1.9", "Valkey 7.1.9")],
)
async def test_a_server_that_is_too_old_is_refused_in_one_line(fields: str, product: str) -> None:
    body = f"# Server\r\n{fields}\r\nredis_mode:standalone\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.strip().upper() in (b"SETINFO",):
                writer.write(b"+OK\r\n")
            if line.strip().upper() == b"INFO":
                writer.write(b"$%d\r\n%b\r\n" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with connected(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}") as connection:
        with pytest.raises(ConfigurationError, match=f"is {product}, which is too old: Redis 7.0 or Valkey 7.2"):
            await connection.check()
    server.close()
    await server.wait_closed()
