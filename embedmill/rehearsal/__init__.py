"""A provider to rehearse against: Jina's API as its published description has it, with limits, faults and a bill.

Written from the contract and not from our client, so that the two check each other.

- `behaviour`: the settings; `contract`: models and rules for a body; `refusals`: every answer without vectors, verbatim
- `limits`: what "per minute" means; `accounts`: one key's limits, balance and counters; `faults`: the seeded dice
- `vectors`: pretend tokens and vectors; `answers`: the body of a 200; `batch`: the batch endpoint; `server`: HTTP
"""

from .accounts import account_name
from .behaviour import Rehearsal
from .server import ProviderSimulator, serve_rehearsal
from .vectors import pretend_tokens, pretend_vector

__all__ = [
    "ProviderSimulator",
    "Rehearsal",
    "account_name",
    "pretend_tokens",
    "pretend_vector",
    "serve_rehearsal",
]
