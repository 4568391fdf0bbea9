"""What Jina's refusals say of the texts of a request, and what one process learns from them."""

from __future__ import annotations

import re

from embedmill.errors import InputRejected, InputTooLong, TooManyInputs

from ..packing import MAX_INPUTS, MOST_INPUTS

_AT_MOST = re.compile(r"at most ([\d,]+) (?:items|inputs|texts|documents|elements|strings)", re.IGNORECASE)
_TOO_MANY = re.compile(r"too many (?:items|inputs|texts)|batch size", re.IGNORECASE)
_TOO_LONG = re.compile(r"(?:maximum of|exceed) [\d,]+ tokens|too many tokens|maximum context length", re.IGNORECASE)
# Fewer texts than this are refused for something else, and smaller requests would not help.
_LEAST_LEARNED = 32


def input_refusal(said: str, *, status: int, code: str) -> InputRejected:
    """What a 400, a 413 or a 422 about the texts means."""
    at_most = _AT_MOST.search(said)
    if code == "INPUT_TOKEN_LIMIT_EXCEEDED" or _TOO_LONG.search(said):
        return InputTooLong(said)
    if at_most:
        return TooManyInputs(said, allowed=int(at_most[1].replace(",", "")))
    if status == 413 or _TOO_MANY.search(said):
        return TooManyInputs(said)
    return InputRejected(said)


class LearnedInputs:
    """How many texts a request may hold. max_inputs: as a rule; most_inputs: of short ones."""

    def __init__(self) -> None:
        self.max_inputs, self.most_inputs = MAX_INPUTS, MOST_INPUTS

    def refused(self, sent: int, refusal: TooManyInputs) -> None:
        """A request with so many texts was refused for their number."""
        if refusal.allowed is not None and refusal.allowed > 0:
            most = refusal.allowed
        elif sent > MAX_INPUTS:
            most = MAX_INPUTS
        else:
            most = max(_LEAST_LEARNED, sent // 2)
        if most < sent:
            self.most_inputs = min(self.most_inputs, most)
            self.max_inputs = min(self.max_inputs, most)
