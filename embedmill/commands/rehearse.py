"""`embedmill rehearse`: a provider on this machine that limits, fails and counts, to rehearse a run without paying."""

from __future__ import annotations

import ipaddress
import json
import signal

import anyio
import click

from embedmill.errors import ConfigurationError
from embedmill.rehearsal import Rehearsal, serve_rehearsal

_CHANCE = click.FloatRange(0, 1)
_COUNT = click.IntRange(min=0)
_TIME = click.FloatRange(min=0)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--rpm", default=500, show_default=True, type=_COUNT, help="Requests per minute, 0 for no limit.")
@click.option("--tpm", default=1_000_000, show_default=True, type=_COUNT, help="Tokens per minute, 0 for no limit.")
@click.option("--concurrency", default=50, show_default=True, type=_COUNT, help="Requests at a time, 0 for no limit.")
@click.option(
    "--window-s", default=60.0, show_default=True, type=click.FloatRange(min=0.1), help='Seconds in a "minute".'
)
@click.option("--latency-ms", default=200.0, show_default=True, type=_TIME, help="Mean time of an answer.")
@click.option("--jitter-ms", default=50.0, show_default=True, type=_TIME, help="Its standard deviation.")
@click.option("--seed", default=0, show_default=True, help="Makes the faults repeatable.")
@click.option("--bad-key", is_flag=True, help="Refuse every key.")
@click.option("--no-balance-after", default=0, type=_COUNT, metavar="TOKENS", help="Then the account is empty.")
@click.option("--reject-marker", default="", metavar="WORD", help="Refuse texts that hold it (422).")
@click.option("--error-500", default=0.0, type=_CHANCE, help="Chance of an internal error.")
@click.option("--error-503", default=0.0, type=_CHANCE, help="Chance of an overload.")
@click.option("--burst-429", default=0.0, type=_CHANCE, help="Chance that five refusals for rate begin.")
@click.option("--drop-before", default=0.0, type=_CHANCE, help="Chance of a connection lost before the work.")
@click.option(
    "--drop-after", default=0.0, type=_CHANCE, help="Chance of a connection lost after it: paid for, no answer."
)
@click.option("--truncated-body", default=0.0, type=_CHANCE, help="Chance of half an answer.")
@click.option("--missing-row", default=0.0, type=_CHANCE, help="Chance of a vector too few.")
@click.option("--nan-row", default=0.0, type=_CHANCE, help="Chance of a vector that is not numbers.")
@click.option("--duplicate-index", default=0.0, type=_CHANCE, help="Chance of an index given twice.")
@click.option("--shuffle", default=0.0, type=_CHANCE, help="Chance of rows in another order.")
def rehearse(host: str, port: int, **behaviour: float | int | bool | str) -> None:
    """Serve a stand-in for Jina's embeddings API until Ctrl-C, then show what it counted.

    Vectors are deterministic and mean nothing. GET /stats shows the counters at any time.
    """
    rehearsal = Rehearsal(**behaviour)  # type: ignore[arg-type]
    try:
        _check_host(host)
        stats = anyio.run(_serve, rehearsal, host, port)
    except ConfigurationError as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(error.exit_status) from error
    click.echo(json.dumps(stats, indent=2))


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ConfigurationError(f"--host {host!r} is not an address; 127.0.0.1 is the usual one") from error


async def _serve(rehearsal: Rehearsal, host: str, port: int) -> dict[str, object]:
    async with serve_rehearsal(rehearsal, host=host, port=port) as (api_base, simulator):
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            click.echo("Rehearsing. In another terminal:")
            click.echo("  export JINA_API_KEY=rehearsal")
            click.echo(f"  embedmill run SOURCE --model jina/jina-embeddings-v3 --api-base {api_base}")
            click.echo("Ctrl-C ends it and shows the counters.")
            await anext(signals)
    return simulator.stats()
