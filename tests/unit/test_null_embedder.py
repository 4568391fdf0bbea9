from __future__ import annotations

import numpy as np
import pytest

from embedmill.errors import ConfigurationError
from worker.embedders.null import NullEmbedder, hash_vectors

TEXTS = ["", "a", "b", "A longer text, with a comma.", "北京", "a"]


def test_vectors_are_the_same_bits_on_every_machine() -> None:
    assert hash_vectors(["embedmill"], 4).tobytes().hex() == "b8449d3e4a4d1d3f79baa1be518a273f"
    assert hash_vectors(["embedmill"], 7)[0, -1].tobytes().hex() == "1c48e03e"


@pytest.mark.parametrize("dimensions", [1, 3, 4, 64, 385])
def test_vectors_have_unit_length_at_any_dimensions(dimensions: int) -> None:
    vectors = hash_vectors(TEXTS, dimensions)
    assert vectors.shape == (len(TEXTS), dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_row_depends_on_its_text_alone() -> None:
    together = hash_vectors(TEXTS, 64)
    alone = np.concatenate([hash_vectors([text], 64) for text in TEXTS])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[1], together[5])


def test_different_texts_point_in_unrelated_directions() -> None:
    vectors = hash_vectors([f"passage {number}" for number in range(500)], 384)
    cosines = vectors @ vectors.T - np.eye(500)
    assert np.abs(cosines).max() < 0.35
    assert abs(float(cosines.mean())) < 0.001


async def test_embed_bills_what_it_estimates_when_called() -> None:
    embedder = NullEmbedder(8)
    answer = await embedder.embed(TEXTS)
    np.testing.assert_array_equal(answer.vectors, hash_vectors(TEXTS, 8))
    assert answer.billed_tokens == sum(embedder.estimate_tokens(TEXTS)) == 1 + 1 + 1 + 8 + 1 + 1
    assert answer.truncated == ()


async def test_no_texts_give_no_vectors() -> None:
    answer = await NullEmbedder().embed([])
    assert answer.vectors.shape == (0, 64)
    assert answer.billed_tokens == 0


def test_dimensions_decide_the_vector_space() -> None:
    assert NullEmbedder(64).spec.model == "null/64"
    assert NullEmbedder(64).spec.fingerprint == NullEmbedder().spec.fingerprint != NullEmbedder(65).spec.fingerprint


@pytest.mark.parametrize("dimensions", [0, -1, 65_537])
def test_impossible_dimensions_are_refused(dimensions: int) -> None:
    with pytest.raises(ConfigurationError, match="null/384"):
        NullEmbedder(dimensions)
