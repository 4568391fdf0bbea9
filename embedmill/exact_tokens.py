"""`--tokenizer FILE`: exact token counts from the model's own tokenizer, a Hugging Face `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigurationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHECKED_REQUESTS = 20
_MOST_ERROR = 0.1


class ExactTokens:
    """Raises ConfigurationError for a file that is no tokenizer, or when the library is not installed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokenizer = _load(path)
        self._seen = 0
        self._with_frame = self._without_frame = 0.0
        self._billed = 0

    def count(self, texts: Sequence[str]) -> list[int]:
        """(n,) tokens of each text, the special ones included, at least 1."""
        return [max(1, len(encoding.ids)) for encoding in self._tokenizer.encode_batch_fast(_sound(texts))]

    def checks_bills(self) -> bool:
        """Whether it is still to be seen that this is the tokenizer of the provider's model."""
        return self._seen < _CHECKED_REQUESTS

    def check(self, texts: Sequence[str], billed_tokens: int) -> str | None:
        """Compare with a bill; after 20 of them, what there is to warn of."""
        if not self.checks_bills():
            return None
        self._seen += 1
        self._billed += billed_tokens
        self._with_frame += sum(self.count(texts))
        encodings = self._tokenizer.encode_batch_fast(_sound(texts), add_special_tokens=False)
        self._without_frame += sum(len(encoding.ids) for encoding in encodings)
        if self.checks_bills() or not self._billed:
            return None
        # Providers differ in whether they count the special tokens.
        errors = [counted / self._billed - 1 for counted in (self._with_frame, self._without_frame)]
        error = min(errors, key=abs)
        if abs(error) <= _MOST_ERROR:
            return None
        how = f"{abs(error):.0%} {'more' if error > 0 else 'fewer'}"
        return (
            f"{self.path} counts {how} tokens than {self._seen} requests were billed: it is not the model's tokenizer; "
            "leave --tokenizer out, and counts are learned"
        )


def _load(path: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigurationError("--tokenizer needs a library: pip install 'embedmill[tokenizer]'") from None
    try:
        data = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"--tokenizer {path}: {reason}; name the model's tokenizer.json") from None
    try:
        tokenizer = Tokenizer.from_str(data)
    except Exception as error:
        raise ConfigurationError(
            f"--tokenizer {path} is no tokenizer.json of Hugging Face: {str(error)[:120]}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _sound(texts: Sequence[str]) -> list[str]:
    """Without lone surrogates, which the library refuses; the provider is sent replacement characters, too."""
    return [text.encode("utf-8", "replace").decode() for text in texts]
