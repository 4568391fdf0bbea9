"""The command `embedmill`: finds the subcommand, and turns every error into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__
from ..errors import CorruptStore, EmbedmillError
from .options import check_environment, load_config

_COMMANDS = {
    "run": "run:run",
    "quote": "quote:quote",
    "create": "jobs:create",
    "push": "push:push",
    "search": "search:search",
    "status": "status:status",
    "verify": "verify:verify",
    "info": "info:info",
    "export": "export:export",
    "compact": "compact:compact",
    "purge": "purge:purge",
    "pause": "jobs:pause",
    "resume": "jobs:resume",
    "cancel": "jobs:cancel",
    "dead": "dead:dead",
    "batches": "batches:batches",
    "load": "load:load",
    "rehearse": "rehearse:rehearse",
    "scheduler": "services:scheduler",
    "worker": "services:worker",
    "loader": "services:loader",
}
_EPILOG = """\b
Examples:
  embedmill run corpus.jsonl --to ./wiki
  embedmill run docs/ --to ./wiki --text-field title,text
  embedmill search "how do I cancel a task" --milvus ./wiki/milvus.db
  embedmill status ./wiki
  embedmill verify ./wiki
"""


class _Commands(click.Group):
    """Subcommands are imported when they are asked for: `--help` should not wait for Milvus."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if args[0] not in _COMMANDS and not args[0].startswith("-") and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f".{module}", __package__), name)
        return command


@click.group(
    cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="embedmill")
@click.pass_context
def cli(context: click.Context) -> None:
    """Corpora to vectors: queued, embedded within your rate limits, stored in sharded Zarr, loaded into Milvus, proven."""
    if not any(argument in ("-h", "--help") for argument in sys.argv):
        check_environment(os.environ)
        settings = load_config()
        context.default_map = dict.fromkeys(_COMMANDS, settings)


def run(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process with the exit status of the design: 0, 1, 2, 3 or 4."""
    logging.basicConfig(level=logging.CRITICAL)
    sys.exit(_status(list(arguments) if arguments is not None else None))


def _status(arguments: list[str] | None) -> int:
    context: dict[str, Any] = {}
    try:
        with cli.make_context("embedmill", arguments if arguments is not None else sys.argv[1:]) as ctx:
            context = ctx.meta
            result = cli.invoke(ctx)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        _say("stopped before the end; the same command goes on")
        return EmbedmillError.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if context.get("embedmill.verbose"):
            logging.getLogger("embedmill").exception("the traceback, as -v asks for")
        return _explain(error)
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> int:
    """One line for the user, and the exit status."""
    known = _known(error)
    if known is not None:
        hint = " (embedmill verify DATASET looks through everything, and says what can be mended)"
        _say(f"{known}{hint if isinstance(known, CorruptStore) else ''}")
        return known.exit_status
    _say(f"internal error: {error!r}; this is a bug: please report it, with the output of the same command and -v")
    return EmbedmillError.exit_status


def _known(error: BaseException) -> EmbedmillError | None:
    """The error of ours in it, also inside of groups that concurrent parts raise."""
    if isinstance(error, EmbedmillError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_known, error.exceptions)), None)
    return None


def _say(text: str) -> None:
    click.echo(f"embedmill: {text}", err=True)
