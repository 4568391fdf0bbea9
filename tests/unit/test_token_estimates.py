"""Token counts learned from bills, against pretend tokenizers whose counts are known."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest

from embedmill.dataset.local_store import LocalStore
from embedmill.errors import CorruptStore
from embedmill.token_estimates import TokenEstimator, features, read_estimates, write_estimates

ENGLISH = [text[start : start + 800] for text in topics.topics.values() for start in range(0, len(text), 800)]
SCRIPTS = {
    "CYRILLIC SMALL LETTER": (0x430, 0x44F, 0.45),
    "ARABIC LETTER": (0x627, 0x63A, 0.4),
    "DEVANAGARI LETTER": (0x905, 0x939, 0.9),
    "THAI CHARACTER": (0xE01, 0xE2E, 0.5),
    "HIRAGANA LETTER": (0x3041, 0x3093, 0.7),
    "HANGUL SYLLABLE": (0xAC00, 0xD7A3, 0.8),
    "CJK UNIFIED": (0x4E00, 0x9FA5, 0.65),
}
_PIECE = re.compile(r"[A-Za-z]{1,5}|\d|[^\w\s]")


def count(text: str) -> float:
    """A pretend tokenizer: pieces of up to five Latin letters, single digits and signs, shares of one for the others."""
    tokens = 2.0 + len(_PIECE.findall(text))
    for first, last, share in SCRIPTS.values():
        tokens += share * sum(first <= ord(one) <= last for one in text)
    return tokens


def bill(texts: list[str]) -> int:
    return round(sum(map(count, texts)))


def foreign(chance: random.Random) -> str:
    first, last, _ = chance.choice(list(SCRIPTS.values()))
    words = ["".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 9))) for _ in range(60)]
    return " ".join(words)


def test_the_ranges_of_the_pretend_tokenizer_are_what_they_say() -> None:
    for name, (first, last, _) in SCRIPTS.items():
        assert all(unicodedata.name(chr(point)).startswith(name) for point in (first, last)), name


def test_features_count_characters_words_and_texts() -> None:
    found = features(["", "ab Cd-e 12", "да нет", "漢字かな 한국"])
    assert found[:, 0].tolist() == [1, 1, 1, 1]
    assert found.sum(axis=1).tolist() == [1, 1 + 10 + 3, 1 + 6 + 2, 1 + 7 + 1]
    assert found[1, 1:8].tolist() == [3, 0, 4, 1, 2, 2, 1]
    assert found[2, :3].tolist() == [1, 0, 2]


def test_features_of_texts_do_not_depend_on_their_neighbours() -> None:
    texts = ["end", "begin", "", "", "1x", "é", "\ud800", "x" * 1000]
    together = features(texts)
    assert np.array_equal(together, np.concatenate([features([text]) for text in texts]))
    assert features([]).shape == (0, together.shape[1])


def test_mixed_languages_are_within_ten_percent_after_twenty_requests() -> None:
    chance = random.Random(7)
    estimator, errors = TokenEstimator(), []
    for _ in range(80):
        texts = [foreign(chance) if chance.random() < 0.5 else chance.choice(ENGLISH) for _ in range(16)]
        errors.append(float(estimator.estimate(texts).sum()) / bill(texts) - 1)
        estimator.learn(texts, bill(texts))
    assert np.mean(np.abs(errors[20:])) < 0.1
    assert abs(np.mean(errors[20:])) < 0.02
    assert estimator.error < 0.1
    assert estimator.bills == 80


def test_a_language_that_comes_late_is_learned_and_the_first_one_is_kept() -> None:
    chance = random.Random(3)
    estimator = TokenEstimator()
    for _ in range(60):
        texts = chance.sample(ENGLISH, 8)
        estimator.learn(texts, bill(texts))
    before = float(estimator.estimate(ENGLISH[:50]).sum())
    for _ in range(60):
        texts = [foreign(chance) for _ in range(8)]
        estimator.learn(texts, bill(texts))
    texts = [foreign(chance) for _ in range(50)]
    assert float(estimator.estimate(texts).sum()) == pytest.approx(bill(texts), rel=0.05)
    assert float(estimator.estimate(ENGLISH[:50]).sum()) == pytest.approx(before, rel=0.1)


def test_before_any_bill_nothing_is_estimated_far_too_low() -> None:
    chance = random.Random(5)
    estimator = TokenEstimator()
    for texts in (ENGLISH[:40], [foreign(chance) for _ in range(40)]):
        assert float(estimator.estimate(texts).sum()) > 0.9 * bill(texts)


def test_a_bill_of_nothing_teaches_nothing_and_no_weight_is_ever_negative() -> None:
    estimator = TokenEstimator()
    before = estimator.weights.copy()
    estimator.learn(["text"], 0)
    estimator.learn([], 10)
    assert np.array_equal(before, estimator.weights)
    for billed in (1, 10**9, 1, 1, 10**9):
        estimator.learn(["a b c 1 2 3", "漢"], billed)
    assert np.isfinite(estimator.weights).all()
    assert estimator.weights.min() > 0


def test_what_was_learned_is_kept_beside_the_dataset_and_the_better_knowledge_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_estimates(store) is None
    one, two = TokenEstimator(), TokenEstimator()
    for _ in range(3):
        one.learn(ENGLISH[:9], bill(ENGLISH[:9]))
    two.learn(ENGLISH[:9], 1)
    write_estimates(store, one)
    write_estimates(store, two)
    found = read_estimates(store)
    assert found is not None
    assert (found.bills, found.error) == (3, one.error)
    assert np.array_equal(found.weights, one.weights)
    for estimator in (one, found):
        estimator.learn(ENGLISH[9:20], bill(ENGLISH[9:20]))
    assert np.array_equal(found.weights, one.weights)


@pytest.mark.parametrize(
    "damage", [{"weights": [1.0]}, {"weights": "many"}, {"covariance": None}, {"error": "nan"}, {"version": None}]
)
def test_what_cannot_be_read_is_refused_and_replaced(tmp_path: Path, damage: dict[str, object]) -> None:
    state = TokenEstimator().as_dict() | damage
    if damage == {"version": None}:
        assert TokenEstimator.from_dict(state).bills == 0
        del state["version"]
    with pytest.raises(CorruptStore, match="token counts"):
        TokenEstimator.from_dict(state)
    (tmp_path / "tokens.json").write_text("{")
    learned = TokenEstimator()
    learned.learn(ENGLISH[:3], 100)
    write_estimates(LocalStore(tmp_path), learned)
    assert read_estimates(LocalStore(tmp_path)).bills == 1  # type: ignore[union-attr]
