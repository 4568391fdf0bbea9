"""`--tokenizer`: exact counts, and what is wrong with a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from embedmill.errors import ConfigurationError
from embedmill.exact_tokens import ExactTokens


def write_tokenizer(folder: Path, *, framed: bool = True) -> str:
    """A tokenizer.json: a token a word, and two around each text when `framed`."""
    tokenizer = Tokenizer(WordLevel({"[U]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[U]"))
    tokenizer.pre_tokenizer = Whitespace()
    if framed:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    # What a published file may say of training is of no concern here.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_counts_are_exact_whatever_the_file_says_of_cutting_and_padding(tmp_path: Path) -> None:
    exact = ExactTokens(write_tokenizer(tmp_path))
    assert exact.count(["one", "one two three four five", "", "lone \ud800 surrogate"]) == [3, 7, 2, 5]
    bare = ExactTokens(write_tokenizer(tmp_path, framed=False))
    assert bare.count(["", "a b"]) == [1, 2]


def test_a_tokenizer_that_agrees_with_the_bills_warns_of_nothing(tmp_path: Path) -> None:
    exact = ExactTokens(write_tokenizer(tmp_path))
    # Some providers count the two tokens around each text, some do not.
    for per_text in (2, 0):
        exact = ExactTokens(exact.path)
        assert [exact.check(["a b c", "d"], 4 + 2 * per_text) for _ in range(30)] == [None] * 30
        assert not exact.checks_bills()


def test_a_tokenizer_of_another_model_is_found_out_once_after_twenty_bills(tmp_path: Path) -> None:
    exact = ExactTokens(write_tokenizer(tmp_path))
    warnings = [exact.check(["a b c d e f g h"], 20) for _ in range(60)]
    assert [number for number, warning in enumerate(warnings, start=1) if warning] == [20]
    assert "50% fewer tokens" in str(warnings[19])
    assert "tokenizer.json" in str(warnings[19])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"id": 1}\n{"id": 2}\n', None])
def test_what_is_no_tokenizer_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"--tokenizer .*t\.json") as caught:
        ExactTokens(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="directory"):
        ExactTokens(str(tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"embedmill\[tokenizer\]"):
        ExactTokens(str(tmp_path / "tokenizer.json"))
