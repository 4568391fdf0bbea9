"""An S3 server for tests: moto on loopback, in threads of this process, which counts requests and can be made to fail.

moto looks and then writes; here writes happen one at a time, so that a conditional PUT is as atomic as S3's.
"""

from __future__ import annotations

import io
import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "texts"
Fault = Literal[
    "503", "503 afterwards", "reset", "reset afterwards", "hang", "hang afterwards", "400", "403", "409", "429"
]
_ANSWERS = {
    "503": ("503 Slow Down", "SlowDown"),
    "400": ("400 Bad Request", "AuthorizationHeaderMalformed"),
    "403": ("403 Forbidden", "AccessDenied"),
    "409": ("409 Conflict", "ConditionalRequestConflict"),
    "429": ("429 Too Many Requests", "TooManyRequests"),
}
_WRITES = {"PUT", "POST", "DELETE"}


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


class ObjectServer:
    """A server with the bucket `texts`.

    requests: how often each kind was asked, as `PUT documents`; hanging: a request hangs.
    """

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Handler)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._writing = threading.Lock()
        self._faults: list[tuple[Fault, Callable[[str, str], bool]]] = []
        self._released = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.hanging = threading.Event()
        self.ignores_conditions = False

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            # Nobody is to ask the machine's cloud for credentials.
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",
        }

    def start(self) -> None:
        import boto3

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._thread.start()
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        self.forget()

    def stop(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.log.clear()

    def fail(self, fault: Fault, *, method: str = "", path: str = "", times: int = 1) -> None:
        """Have the next requests of a method, whose path has these words, go wrong; `afterwards`: once they were obeyed."""
        self._faults += [(fault, lambda m, p: method in ("", m) and path in p)] * times

    @contextmanager
    def failing(self, fault: Fault, *, method: str = "", path: str = "") -> Iterator[None]:
        """Have every such request go wrong for now."""
        self.fail(fault, method=method, path=path, times=100_000)
        try:
            yield
        finally:
            self._faults.clear()
            self.hanging.clear()
            self._released.set()
            self._released = threading.Event()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = environ.get("QUERY_STRING", "")
        self.requests[f"{method} {_kind(path, query)}"] += 1
        self.log.append((method, f"{path}?{query}" if query else path))
        fault = self._take_fault(method, f"{path}?{query}")
        # Read here: nobody else waits for a slow sender.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        if self.ignores_conditions:
            for name in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"):
                environ.pop(name, None)
        if fault in _ANSWERS:
            return _answer(start_response, *_ANSWERS[fault])
        if fault == "hang":
            self._hang()
        if fault in ("hang", "reset"):
            return _reset(environ)
        answer = self._forward(environ, body, start_response if fault is None else _discard)
        if fault == "hang afterwards":
            self._hang()
        if fault in ("hang afterwards", "reset afterwards"):
            return _reset(environ)
        if fault == "503 afterwards":
            return _answer(start_response, *_ANSWERS["503"])
        return answer

    def _hang(self) -> None:
        self.hanging.set()
        self._released.wait(60)

    def _forward(self, environ: dict[str, Any], body: bytes, start_response: Callable[..., Any]) -> list[bytes]:
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        if environ["REQUEST_METHOD"] in _WRITES:
            with self._writing:
                return [b"".join(self._application(environ, start_response))]
        return [b"".join(self._application(environ, start_response))]

    def _take_fault(self, method: str, path: str) -> Fault | None:
        for number, (fault, matches) in enumerate(self._faults):
            if matches(method, path):
                del self._faults[number]
                return fault
        return None


def _kind(path: str, query: str) -> str:
    """`documents`, `LIST commits`: the folder of the dataset that a request is about."""
    if path.strip("/").count("/") == 0:
        prefix = parse_qs(query).get("prefix", [""])[0]
        return "LIST " + "/".join(prefix.strip("/").split("/")[1:2])
    return (path.strip("/").split("/")[2:3] or [""])[0]


def _answer(start_response: Callable[..., Any], status: str, code: str) -> list[bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _discard(_status: str, _headers: Any, _error: Any = None) -> Callable[[bytes], object]:
    return lambda _data: None


def _reset(environ: dict[str, Any]) -> list[bytes]:
    connection: socket.socket = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionError("reset, as told")
