"""The options that commands share, each defined once: as a flag, as `EMBEDMILL_…`, and as a key of `embedmill.toml`."""

from __future__ import annotations

import difflib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import failpoints
from ..errors import ConfigurationError
from ..sources import Chunking

DEFAULT_MODEL = "local/minilm"
CONFIG_NAME = "embedmill.toml"
_PREFIX = "EMBEDMILL_"
_OTHER_VARIABLES = {"EMBEDMILL_CACHE", "EMBEDMILL_CONFIG", "EMBEDMILL_MINILM_PATH", failpoints.VARIABLE}
# What Kubernetes sets in every pod for a Service named embedmill-something.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP).*)?$")
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

_SHARED: dict[str, dict[str, Any]] = {
    "to": {"metavar": "DATASET", "help": "The dataset: a folder or s3://BUCKET/NAME, made when it is not there."},
    "model": {"metavar": "PROVIDER/NAME", "default": DEFAULT_MODEL, "show_default": True, "help": "What embeds."},
    "dimensions": {"type": click.IntRange(min=1), "help": "Matryoshka size, where the model has one."},
    "task": {"help": "The provider's task for documents, e.g. retrieval.passage."},
    "late_chunking": {
        "is_flag": True,
        "help": "Passages of one document know of each other, where the model has that.",
    },
    "too_long": {
        "type": click.Choice(["truncate", "split", "fail"]),
        "help": "What becomes of passages over the model's limit; kept with the job.  [default: as the job has it,"
        " else truncate, or fail with --late-chunking]",
    },
    "tokenizer": {"metavar": "FILE", "help": "The model's tokenizer.json, for exact counts of tokens."},
    "api_base": {"metavar": "URL", "help": "The provider's address up to the version, e.g. https://api.jina.ai/v1."},
    "tier": {"help": "Preset of the key's limits: free, paid or premium."},
    "rpm": {"type": click.IntRange(min=1), "help": "Requests per minute that the key allows."},
    "tpm": {"type": click.IntRange(min=1), "help": "Tokens per minute that the key allows."},
    "concurrency": {"type": click.IntRange(min=1), "help": "Requests in flight."},
    "text_field": {
        "metavar": "NAMES",
        "default": "text",
        "show_default": True,
        "help": "Fields that make the text, with commas between.",
    },
    "id_field": {
        "metavar": "NAME",
        "help": "Field of the id; else `id`, else `_id`, else FILE:LINE, which changes when lines are inserted above.",
    },
    "chunk": {
        "type": click.IntRange(min=1),
        "metavar": "N",
        "help": "Split texts into passages of at most N characters, with the ids ID#0, ID#1, ...",
    },
    "chunk_overlap": {
        "type": click.IntRange(min=0),
        "metavar": "M",
        "default": 0,
        "show_default": True,
        "help": "Characters that a passage may repeat of the one before.",
    },
    "strict": {"is_flag": True, "help": "End at the first record that cannot be a document, instead of listing it."},
    "redis": {"metavar": "URL", "help": "A Redis or Valkey server, 7.0 or newer; `run` brings its own."},
    "namespace": {"default": "default", "show_default": True, "help": "Prefix that separates queues on one server."},
    "milvus": {"metavar": "URI", "help": "A path for Milvus Lite, or http(s)://HOST:PORT; token in MILVUS_TOKEN."},
    "collection": {"metavar": "NAME", "help": "Collection in Milvus; else the dataset's name."},
    "batch": {
        "flags": "--batch/--no-batch",
        "default": None,
        "help": "Through the provider's batch endpoint, for a job that can wait for hours; kept with the job.",
    },
    "max_tokens": {
        "type": click.IntRange(min=0),
        "metavar": "N",
        "help": "The most that the job may be billed in all, whoever works for it; kept with the job, 0 lifts it.",
    },
    "job": {"default": "main", "show_default": True, "help": "Name of the job in the dataset."},
}


def shared(*names: str) -> Callable[[_Decorated], _Decorated]:
    """A decorator that adds shared options by name, e.g. `shared("to", "model")`."""

    def decorate(function: _Decorated) -> _Decorated:
        for name in reversed(names):
            settings = {"envvar": _variable(name), "show_envvar": True, **_SHARED[name]}
            flags = settings.pop("flags", f"--{name.replace('_', '-')}")
            function = click.option(flags, name, **settings)(function)
        return function

    return decorate


def output_options(function: _Decorated) -> _Decorated:
    """`--json` and `-v`."""
    function = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_be_verbose, help="Say more."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout.")(function)


def load_config() -> dict[str, Any]:
    """What `embedmill.toml` (here, or where EMBEDMILL_CONFIG says) sets. Raises ConfigurationError for what it may not."""
    named = os.environ.get("EMBEDMILL_CONFIG")
    path = Path(named or CONFIG_NAME)
    if not path.exists():
        if named:
            raise ConfigurationError(f"EMBEDMILL_CONFIG names {named}, which does not exist")
        return {}
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    renamed = {key.replace("-", "_"): value for key, value in settings.items()}
    for key, value in renamed.items():
        if key not in _SHARED:
            raise ConfigurationError(f"{path} sets {key!r}, which is no setting{_near(key, _SHARED)}")
        if not isinstance(value, (str, int, float, bool)):
            raise ConfigurationError(f"{path}: {key} takes one value, not {type(value).__name__}")
    return renamed


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises ConfigurationError for an `EMBEDMILL_…` variable that means nothing: it was meant to mean something."""
    known = {_variable(name) for name in _SHARED} | _OTHER_VARIABLES
    for variable in environment:
        if variable.startswith(_PREFIX) and variable not in known:
            raise ConfigurationError(f"the environment sets {variable}, which is no setting{_near(variable, known)}")
    failpoints.parse_plan(environment.get(failpoints.VARIABLE, ""))


def check_job_name(job: str) -> None:
    """Raises ConfigurationError for a name that cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", job):
        raise ConfigurationError(f"--job {job!r}: use letters, digits, dots, dashes and underscores")


def make_chunking(options: Mapping[str, Any]) -> Chunking | None:
    """What `--chunk` and `--chunk-overlap` say. Raises ConfigurationError."""
    if options["chunk"] is None:
        if options["chunk_overlap"]:
            raise ConfigurationError("--chunk-overlap needs --chunk N")
        return None
    return Chunking(options["chunk"], options["chunk_overlap"])


def split_names(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _variable(name: str) -> str:
    return f"{_PREFIX}{name.upper()}"


def _near(name: str, known: Any) -> str:
    # Without the prefix that all variables share, which would make any two of them alike.
    bare = {option.removeprefix(_PREFIX): option for option in known}
    close = difflib.get_close_matches(name.removeprefix(_PREFIX), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[close[0]]}?" if close else f"; there are: {', '.join(sorted(known))}"


def _be_verbose(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().meta["embedmill.verbose"] = True
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("embedmill").setLevel(logging.DEBUG)
