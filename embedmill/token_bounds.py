"""The most tokens that texts can count, whatever tokenizer counts them: what a spend cap is held against. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Begin and end marks, and a prompt for the task that some models put before each text.
_UNSEEN_TOKENS = 16


def most_tokens(texts: Sequence[str], *, max_input_tokens: int = 0) -> int:
    """An upper bound of what these texts count together; max_input_tokens: where each is cut, 0 for nowhere.

    A token stands for one byte of the text at least, byte by byte where the vocabulary knows no better. Tokenizers put a
    text into a normal form first, which may be longer: one character of three bytes becomes thirty-three in NFKC.
    """
    bounds = (_bytes(text) + _UNSEEN_TOKENS for text in texts)
    return sum(min(bound, max_input_tokens) for bound in bounds) if max_input_tokens else sum(bounds)


def _bytes(text: str) -> int:
    """Of the longest form that a tokenizer may count."""
    if text.isascii():
        return len(text)
    return max(len(_encoded(text)), *(len(_encoded(unicodedata.normalize(form, text))) for form in ("NFC", "NFKC")))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
