"""The HTTP side: routes, the order of checks, connection faults, and the counters that are served.

An embeddings request passes, in this order: key, balance, body, the fault that the dice give, limits. What passes is
admitted; it is billed when its work is done, whether or not the answer arrives or the client has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from embedmill.errors import ConfigurationError

from . import refusals
from .accounts import Account, Counters, Payments, account_name, as_report, merged
from .answers import answer
from .batch import BatchDesk
from .behaviour import Rehearsal
from .connections import cut, hang, reset_connection, send_lines
from .contract import CONTRACTS, EmbeddingRequest, model_card, parse_request
from .faults import BILLED_REFUSALS, Dice, refusal_of
from .refusals import Refused

_MAX_BODY_BYTES = 64 * 2**20
# Above this many numbers an answer is made in a thread, so that the others do not wait for it.
_NUMBERS_IN_THE_LOOP = 65_536
_NO_KEY = "no key"


class ProviderSimulator:
    """The endpoint's state: accounts, faults and counters. One per server, used from one event loop."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._dice = Dice(rehearsal)
        self._accounts: dict[str, Account] = {}
        self._payments = Payments()
        self._desk = BatchDesk(rehearsal, self._dice, self._bill)
        self._began = self._reset_at = time.monotonic()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_json_errors])
        add = app.router
        add.add_post("/v1/embeddings", self._embeddings)
        add.add_post("/v1/batch/embeddings", self._batch_submit)
        add.add_get("/v1/batch/{batch_id}", self._batch_status)
        add.add_delete("/v1/batch/{batch_id}", self._batch_cancel)
        add.add_get("/v1/batch/{batch_id}/output", self._batch_output)
        add.add_get("/v1/batch/{batch_id}/errors", self._batch_errors)
        add.add_get("/v1/batches", self._batches)
        add.add_get("/v1/models", self._models)
        add.add_get("/v1/models/{model_id:.+}", self._model)
        for probe in ("/health", "/live", "/ready"):
            add.add_get(probe, self._healthy)
        add.add_get("/stats", self._stats)
        add.add_post("/stats/reset", self._reset)
        return app

    def stats(self) -> dict[str, object]:
        """Counters of all keys since the start, then of each, then the same since the last reset."""
        now = time.monotonic()
        self._desk.settle(now)
        return {
            **self._reports(now, lambda account: account.lifetime, since=self._began),
            **self._payments.report(),
            "in_flight": sum(account.in_flight for account in self._accounts.values()),
            "batches": self._desk.states(),
            "limits": self._limits(),
            "since_reset": self._period(now),
        }

    def reset(self) -> dict[str, object]:
        """Begin a new period, to leave out a warm-up or the drain. Returns the counters of the one that ends."""
        now = time.monotonic()
        self._desk.settle(now)
        ended, self._reset_at = self._period(now), now
        for account in self._accounts.values():
            account.reset(now)
        return ended

    def _period(self, now: float) -> dict[str, object]:
        total = merged((account.period for account in self._accounts.values()), since=self._reset_at)
        series = [total.by_second[second] for second in range(int(now - self._reset_at) + 1)]
        report = self._reports(now, lambda account: account.period, since=self._reset_at)
        return {**report, "tokens_admitted_by_second": series}

    def _reports(self, now: float, of: Callable[[Account], Counters], *, since: float) -> dict[str, object]:
        allowed = self._rehearsal.tpm / self._rehearsal.window_s
        # A key that never got in is no quota that could have been used.
        used = sum(1 for account in self._accounts.values() if account.lifetime.requests_admitted)
        total = merged(map(of, self._accounts.values()), since=since)
        keys = {name: as_report(of(account), now=now, tokens_per_s=allowed) for name, account in self._accounts.items()}
        return {**as_report(total, now=now, tokens_per_s=allowed * used), "keys": keys}

    def _limits(self) -> dict[str, object]:
        names = ("window", "window_s", "rpm", "tpm", "concurrency", "other_client")
        return {name: getattr(self._rehearsal, name) for name in names}

    async def _stats(self, _http: web.Request) -> web.Response:
        return web.json_response(self.stats())

    async def _reset(self, _http: web.Request) -> web.Response:
        return web.json_response(self.reset())

    async def _healthy(self, _http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, _http: web.Request) -> web.Response:
        return web.json_response({"data": [model_card(name) for name in CONTRACTS]})

    async def _model(self, http: web.Request) -> web.Response:
        name = http.match_info["model_id"].removeprefix("jina-ai/")
        if name not in CONTRACTS:
            return _response(refusals.not_found("model", http.match_info["model_id"]))
        return web.json_response(model_card(name))

    def _account(self, http: web.Request) -> tuple[Account, Refused | None]:
        """The key's account, and why the key is refused, if it is. A stranger without a usable key is counted as one."""
        given = http.headers.get("Authorization", "")
        key = given.removeprefix("Bearer ").strip() if given.startswith("Bearer ") else ""
        name = account_name(key) if key else _NO_KEY
        account = self._accounts.get(name)
        if account is None:
            now = time.monotonic()
            account = Account(self._rehearsal, now=now, began=self._began, reset=self._reset_at)
            self._accounts[name] = account
        account.add("requests")
        if not key:
            return account, refusals.malformed_key() if given else refusals.missing_key()
        marker = self._rehearsal.bad_key_marker
        if self._rehearsal.bad_key or (marker and marker in key):
            return account, refusals.invalid_key()
        return account, None

    async def _embeddings(self, http: web.Request) -> web.StreamResponse:
        account, refusal = self._account(http)
        try:
            if refusal is not None:
                raise refusal
            account.check_balance()
            request = parse_request(await http.read(), self._rehearsal)
            for name in request.undeclared:
                account.count("undeclared_fields", f"{request.model}: {name}")
            fault = self._fault(account, tokens=request.total_tokens)
            account.admit(request.total_tokens, now=time.monotonic())
        except Refused as refused:
            return self._refuse(account, refused)
        try:
            return await self._execute(http, request, account, fault=fault)
        finally:
            account.leave()

    def _fault(self, account: Account, *, tokens: int = 0) -> str | None:
        """Raises Refused for a fault that answers before the work."""
        fault = self._dice.fault()
        if fault is not None:
            account.count("faults", fault)
            refused = refusal_of(fault, self._rehearsal, tokens=tokens)
            if refused is not None and fault not in BILLED_REFUSALS:
                raise refused
        return fault

    async def _execute(
        self, http: web.Request, request: EmbeddingRequest, account: Account, *, fault: str | None
    ) -> web.StreamResponse:
        if fault == "drop_before":
            return reset_connection(http, account)
        await asyncio.sleep(self._dice.latency_s(request.total_tokens))
        self._bill(account, request.texts, request.tokens)
        if fault in BILLED_REFUSALS:
            refused = refusal_of(fault, self._rehearsal, tokens=request.total_tokens)
            assert refused is not None
            return self._refuse(account, refused)
        if fault == "drop_after":
            return reset_connection(http, account)
        if fault == "hang":
            return await hang(http, account)
        body = await self._answer(request, fault)
        if fault == "truncated_body":
            return await cut(http, account, body)
        account.count("statuses", "200")
        return web.Response(body=body, content_type="application/json", headers=self._headers(account))

    async def _answer(self, request: EmbeddingRequest, fault: str | None) -> bytes:
        seed = self._dice.seed() if self._dice.chance("shuffle") else None
        bare = self._rehearsal.bare_sparse
        if len(request.texts) * max(request.dimensions, 64) <= _NUMBERS_IN_THE_LOOP:
            return answer(request, fault=fault, shuffle_seed=seed, bare_sparse=bare)
        return await asyncio.to_thread(answer, request, fault=fault, shuffle_seed=seed, bare_sparse=bare)

    def _bill(self, account: Account, texts: Sequence[str], tokens: Sequence[int]) -> None:
        account.add("tokens_billed", sum(tokens))
        account.add("texts_embedded", len(texts))
        self._payments.add(texts, tokens)

    def _refuse(self, account: Account, refused: Refused) -> web.Response:
        account.count("statuses", str(refused.status) if refused.status != 200 else refused.kind)
        account.count("refusals", refused.kind)
        headers = self._headers(account) if refused.content_type == "application/json" else {}
        if refused.status == 429 and self._rehearsal.retry_after is not None:
            headers["Retry-After"] = f"{self._rehearsal.retry_after:g}"
        return _response(refused, headers)

    def _headers(self, account: Account) -> dict[str, str]:
        limits = self._rehearsal
        if not limits.limit_headers or not (limits.rpm or limits.tpm):
            return {}
        used, headers = account.used(time.monotonic()), {}
        if limits.rpm:
            headers["X-RateLimit-Remaining-Requests"] = str(max(0, int(limits.rpm - used.requests)))
        if limits.tpm:
            headers["X-RateLimit-Remaining-Tokens"] = str(max(0, int(limits.tpm - used.tokens)))
        return headers

    async def _batch_submit(self, http: web.Request) -> web.StreamResponse:
        raw = await http.read()

        def submit(account: Account, now: float, origin: str) -> dict[str, object]:
            account.check_balance()
            batch_id = self._desk.submit(raw, account, now=now)
            return self._desk.status(batch_id, account, now=now, origin=origin)

        return await self._batch_call(http, submit, lose=self._dice.chance("batch_lost_answer"))

    async def _batch_status(self, http: web.Request) -> web.StreamResponse:
        id_ = http.match_info["batch_id"]
        return await self._batch_call(
            http, lambda account, now, origin: self._desk.status(id_, account, now=now, origin=origin)
        )

    async def _batch_cancel(self, http: web.Request) -> web.StreamResponse:
        id_ = http.match_info["batch_id"]
        return await self._batch_call(
            http, lambda account, now, origin: self._desk.cancel(id_, account, now=now, origin=origin)
        )

    async def _batches(self, http: web.Request) -> web.StreamResponse:
        def recent(account: Account, now: float, origin: str) -> list[dict[str, object]]:
            given = http.query.get("limit", "20")
            if not given.isdecimal():
                raise refusals.invalid("query -> limit", "Input should be a valid integer", "int_parsing", given)
            return self._desk.recent(account, limit=int(given), now=now, origin=origin)

        return await self._batch_call(http, recent)

    async def _batch_output(self, http: web.Request) -> web.StreamResponse:
        id_ = http.match_info["batch_id"]
        return await self._batch_call(http, lambda account, now, _origin: self._desk.output(id_, account, now=now))

    async def _batch_errors(self, http: web.Request) -> web.StreamResponse:
        id_ = http.match_info["batch_id"]
        return await self._batch_call(http, lambda account, now, _origin: self._desk.errors(id_, account, now=now))

    async def _batch_call(
        self, http: web.Request, call: Callable[[Account, float, str], object], *, lose: bool = False
    ) -> web.StreamResponse:
        """Any call about batches: no limits, but keys, refusals and lost connections as everywhere."""
        account, refusal = self._account(http)
        try:
            if refusal is not None:
                raise refusal
            fault = self._fault(account)
            if fault == "drop_before":
                return reset_connection(http, account)
            result = call(account, time.monotonic(), str(http.url.origin()))
        except Refused as refused:
            return self._refuse(account, refused)
        if lose:
            account.count("faults", "batch_lost_answer")
        if lose or fault == "drop_after":
            return reset_connection(http, account)
        account.count("statuses", "200")
        if isinstance(result, Iterator):
            return await send_lines(http, result, halved=fault == "truncated_body")
        return web.json_response(result)


@asynccontextmanager
async def serve_rehearsal(
    rehearsal: Rehearsal, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[tuple[str, ProviderSimulator]]:
    """Serve while the body runs: the API base to give to a client (port 0 takes a free one), and the simulator.

    Raises ConfigurationError when the address cannot be had.
    """
    simulator = ProviderSimulator(rehearsal)
    runner = web.AppRunner(simulator.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        shown_host = f"[{host}]" if ":" in host else host
        yield f"http://{shown_host}:{runner.addresses[0][1]}/v1", simulator
    finally:
        await runner.cleanup()


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Unknown addresses and methods, and bodies that are too large, in the shape of the API's other errors."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"detail": error.reason}, status=error.status)


def _response(refused: Refused, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=refused.body, status=refused.status, content_type=refused.content_type, headers=headers or {}
    )
