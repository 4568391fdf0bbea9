"""What refusals say of the texts of a request, and what is learned from them."""

from __future__ import annotations

import pytest

from embedmill.commands.embedders import ModelChoice, make_embedder, open_embedder
from embedmill.errors import InputRejected, InputTooLong, TooManyInputs
from worker.embedders.jina_inputs import LearnedInputs, input_refusal


@pytest.mark.parametrize(
    ("said", "status", "allowed"),
    [
        ("Validation error: 'body -> jina-embeddings-v4' Each input list can contain at most 512 items.", 422, 512),
        ("List should have at most 1,024 items after validation, not 2,048", 422, 1024),
        ("batch size 142 > maximum allowed batch size 32", 413, None),
        ("Too many inputs in request, split into more batches.", 400, None),
        ("Payload Too Large", 413, None),
    ],
)
def test_too_many_inputs_are_told_from_bad_ones(said: str, status: int, allowed: int | None) -> None:
    error = input_refusal(said, status=status, code="")
    assert isinstance(error, TooManyInputs)
    assert error.allowed == allowed


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Input text exceeds the model's maximum of 8192 tokens. Use 'truncate: true'", ""),
        ("whatever", "INPUT_TOKEN_LIMIT_EXCEEDED"),
        ("Single text cannot exceed 8192 tokens. 9237 tokens given.", ""),
        ("maximum context length is 512 tokens", ""),
    ],
)
def test_too_long_is_told_from_other_refusals(said: str, code: str) -> None:
    assert isinstance(input_refusal(said, status=400, code=code), InputTooLong)


def test_any_other_refusal_is_about_the_content() -> None:
    assert type(input_refusal("Input cannot be processed", status=422, code="")) is InputRejected


def test_what_is_allowed_is_learned_and_never_unlearned() -> None:
    learned = LearnedInputs()
    assert (learned.max_inputs, learned.most_inputs) == (512, 2_048)
    learned.refused(2_048, TooManyInputs("", allowed=512))
    assert (learned.max_inputs, learned.most_inputs) == (512, 512)
    learned.refused(512, TooManyInputs("", allowed=100))
    learned.refused(512, TooManyInputs("", allowed=200))
    assert (learned.max_inputs, learned.most_inputs) == (100, 100)


def test_without_a_number_the_known_limit_is_tried_first_and_then_halves() -> None:
    learned = LearnedInputs()
    learned.refused(2_000, TooManyInputs(""))
    assert learned.most_inputs == 512
    learned.refused(512, TooManyInputs(""))
    assert learned.max_inputs == 256


@pytest.mark.parametrize("sent", [2, 20, 32])
def test_a_small_request_that_is_too_large_teaches_nothing_of_the_number(sent: int) -> None:
    learned = LearnedInputs()
    learned.refused(sent, TooManyInputs("Payload Too Large"))
    assert (learned.max_inputs, learned.most_inputs) == (512, 2_048)


def test_nonsense_teaches_nothing() -> None:
    learned = LearnedInputs()
    learned.refused(100, TooManyInputs("", allowed=0))
    learned.refused(100, TooManyInputs("", allowed=512))
    assert learned.max_inputs == 50


async def test_questions_to_a_late_chunking_dataset_find_its_embedder_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_API_KEY", "jina_0123456789")
    spec = make_embedder(ModelChoice("jina/jina-embeddings-v3", 16, late_chunking=True)).spec
    async with open_embedder(spec.model, dimensions=spec.dimensions, options=spec.options) as embedder:
        assert embedder.spec.fingerprint == spec.fingerprint
