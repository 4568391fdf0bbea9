"""`--too-long`: what becomes of passages over the model's limit, as asked now or as the job has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..dataset.dataset import Dataset
from ..dataset.layout import DATASET_KEY, TooLong
from ..dataset.store import open_store
from ..errors import ConfigurationError
from ..models import find_model
from ..sources import Chunking
from .options import make_chunking

# Where texts are split, tokens are estimated by a rule that learns nothing: the same text is always split alike.
_SAFE_SHARE = 0.9


def settle_too_long(asked: TooLong | None, *, to: str | None, job: str, late_chunking: bool) -> TooLong:
    """What was asked, or what the job of an existing dataset has.

    Raises ConfigurationError where it is asked to cut what is chunked late. A job that an inbox began has it in its record
    that texts are cut, also where they are chunked late: that is no such wish, and they fail.
    """
    if asked == "truncate" and late_chunking:
        raise ConfigurationError(
            "--too-long truncate does not go with --late-chunking, which would lose whole passages: say split or fail"
        )
    if asked is None and to is not None and open_store(to).exists(DATASET_KEY):
        known = Dataset.open(to).job(job)
        asked = known.too_long if known is not None else None
    if late_chunking:
        return "split" if asked == "split" else "fail"
    return asked or "truncate"


def make_splitting(
    options: Mapping[str, Any], too_long: TooLong, *, model: str, late_chunking: bool
) -> Chunking | None:
    """What `--chunk` says, and with `--too-long split` the splitting of what is too long by itself."""
    chunking = make_chunking(options)
    if too_long != "split":
        return chunking
    if not model.startswith("jina/"):
        raise ConfigurationError(f"--too-long split goes by a provider's limits: with {model}, say --chunk N")
    known = find_model(model)
    limit = known.late_chunking_tokens if late_chunking else known.max_input_tokens
    most = int(_SAFE_SHARE * limit)
    return Chunking(None, most_tokens=most) if chunking is None else replace(chunking, most_tokens=most)
