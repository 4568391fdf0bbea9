"""`embedmill rehearse`: a provider on this machine that limits, fails and counts, to rehearse a run without paying."""

from __future__ import annotations

import ipaddress
import json
import signal
from collections.abc import Callable

import anyio
import click

from embedmill.errors import ConfigurationError
from embedmill.models import TIERS, find_tier
from embedmill.rehearsal import Rehearsal, serve_rehearsal
from embedmill.rehearsal.behaviour import CHANCES

_COUNT = click.IntRange(min=0)
_TIME = click.FloatRange(min=0)
_SHARE = click.FloatRange(0, 1)


def _seconds_or_none(_context: click.Context, _parameter: click.Parameter, value: str) -> float | None:
    if value == "none":
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise click.BadParameter(f"{value!r} is neither a number of seconds nor 'none'")
    return seconds


def _chances(command: Callable[..., None]) -> Callable[..., None]:
    for name, what in reversed(CHANCES.items()):
        option = click.option(f"--{name.replace('_', '-')}", default=0.0, type=_SHARE, help=f"Chance of {what}.")
        command = option(command)
    return command


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--tier", default="paid", show_default=True, metavar="|".join(TIERS), help="Limits of a key, as that plan has them."
)
@click.option("--rpm", type=_COUNT, help="Requests per minute instead, 0 for no limit.")
@click.option("--tpm", type=_COUNT, help="Tokens per minute instead, 0 for no limit.")
@click.option("--concurrency", type=_COUNT, help="Requests at a time instead, 0 for no limit.")
@click.option(
    "--window",
    default="sliding",
    show_default=True,
    type=click.Choice(["sliding", "fixed", "bucket"]),
    help='What "per minute" means: the last minute, one minute after the other, or a bucket that is refilled.',
)
@click.option(
    "--window-s", default=60.0, show_default=True, type=click.FloatRange(min=0.1), help='Seconds in a "minute".'
)
@click.option(
    "--other-client", default=0.0, type=_SHARE, metavar="SHARE", help="A stranger asks for this share of each key."
)
@click.option("--count-refused", is_flag=True, help="Refused requests use up the limit of requests, too.")
@click.option(
    "--retry-after",
    default="none",
    show_default=True,
    metavar="SECONDS|none",
    callback=_seconds_or_none,
    help="Header of every 429; the API has none.",
)
@click.option("--no-limit-headers", is_flag=True, help="Leave X-RateLimit-Remaining-* out.")
@click.option("--latency-ms", default=200.0, show_default=True, type=_TIME, help="Mean time of an answer.")
@click.option("--jitter-ms", default=50.0, show_default=True, type=_TIME, help="Its standard deviation.")
@click.option("--ms-per-1k-tokens", default=0.0, show_default=True, type=_TIME, help="Time on top for 1,000 tokens.")
@click.option("--seed", default=0, show_default=True, help="Makes the faults repeatable.")
@click.option(
    "--max-inputs", default=512, show_default=True, type=click.IntRange(min=1), help="Inputs of one request at most."
)
@click.option(
    "--undeclared-fields",
    default="ignored",
    show_default=True,
    type=click.Choice(["ignored", "refused"]),
    help="Fields that the model's schema lacks.",
)
@click.option("--bare-sparse", is_flag=True, help="Sparse rows without index, the other shape that is allowed.")
@click.option("--bad-key", is_flag=True, help="Refuse every key.")
@click.option("--bad-key-marker", default="", metavar="WORD", help="Refuse keys that hold it.")
@click.option("--no-balance-after", default=0, type=_COUNT, metavar="TOKENS", help="Then the account is empty.")
@click.option("--reject-marker", default="", metavar="WORD", help="Refuse texts that hold it (422).")
@click.option("--batch-s", default=2.0, show_default=True, type=_TIME, help="Time that a batch job takes.")
@click.option(
    "--batch-keep-s", default=86_400.0, show_default=True, type=_TIME, help="Time that its output can be fetched."
)
@_chances
def rehearse(
    host: str,
    port: int,
    tier: str,
    rpm: int | None,
    tpm: int | None,
    concurrency: int | None,
    no_limit_headers: bool,
    **behaviour: object,
) -> None:
    """Serve a stand-in for Jina's embeddings API until Ctrl-C, then show what it counted.

    Vectors are deterministic and mean nothing. Every key has limits, a balance and counters of its own. GET /stats shows
    the counters at any time; POST /stats/reset begins a new period in `since_reset`.
    """
    try:
        _check_host(host)
        plan = find_tier(tier)
        rehearsal = Rehearsal(
            rpm=plan.requests if rpm is None else rpm,
            tpm=plan.tokens if tpm is None else tpm,
            concurrency=plan.concurrency if concurrency is None else concurrency,
            limit_headers=not no_limit_headers,
            **behaviour,  # type: ignore[arg-type]
        )
        stats = anyio.run(_serve, rehearsal, host, port, plan.name)
    except ConfigurationError as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(error.exit_status) from error
    # A line for every second is for programs.
    stats.pop("since_reset")
    click.echo(json.dumps(stats, indent=2))


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ConfigurationError(f"--host {host!r} is not an address; 127.0.0.1 is the usual one") from error


async def _serve(rehearsal: Rehearsal, host: str, port: int, tier: str) -> dict[str, object]:
    async with serve_rehearsal(rehearsal, host=host, port=port) as (api_base, simulator):
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            click.echo("Rehearsing. In another terminal:")
            click.echo("  export JINA_API_KEY=rehearsal")
            command = "embedmill run SOURCE --to ./rehearsal --model jina/jina-embeddings-v3"
            click.echo(f"  {command} --tier {tier} --api-base {api_base}")
            click.echo("Ctrl-C ends it and shows the counters.")
            await anext(signals)
    return simulator.stats()
