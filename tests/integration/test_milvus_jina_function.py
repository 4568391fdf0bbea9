"""pymilvus' own JinaEmbeddingFunction, unchanged, pointed at the simulator: it gets what it expects."""

import asyncio
import importlib

import numpy as np
import pytest

from embedmill.rehearsal import Rehearsal, account_name, pretend_vector, serve_rehearsal

KEY = "jina_milvus"
TEXTS = ["one", "zwei Wörter", "三", ""]


@pytest.fixture
def jinaai():
    """Imported late: it takes all of transformers along."""
    return importlib.import_module("pymilvus.model.dense.jinaai")


@pytest.fixture
async def simulator(jinaai, monkeypatch, request):
    async with serve_rehearsal(Rehearsal(**getattr(request, "param", {}))) as (api_base, simulator):
        monkeypatch.setattr(jinaai, "API_URL", f"{api_base}/embeddings")
        yield simulator


@pytest.fixture
async def function(jinaai, simulator):
    """Makes one; every call of it runs in a thread, as the class blocks."""
    made = []

    def make(**options):
        made.append(jinaai.JinaEmbeddingFunction(api_key=KEY, **options))
        return made[-1]

    yield make
    for one in made:
        one._session.close()


@pytest.mark.parametrize("model", ["jina-embeddings-v3", "jina-embeddings-v2-base-en", "jina-embeddings-v5-text-nano"])
async def test_documents_and_queries_are_the_vectors_of_the_texts_in_their_order(function, simulator, model):
    of_milvus = function(model_name=model)
    for encode in (of_milvus.encode_documents, of_milvus.encode_queries, of_milvus):
        vectors = await asyncio.to_thread(encode, TEXTS)
        expected = [pretend_vector(text, model=model, dimensions=len(vectors[0])) for text in TEXTS]
        assert np.array_equal(np.float32(vectors), np.stack(expected))
    assert simulator.stats()["statuses"] == {"200": 3}
    assert set(simulator.stats()["keys"]) == {account_name(KEY)}


async def test_its_dim_is_probed_with_an_empty_text_and_asked_for_afterwards(function):
    of_milvus = function(model_name="jina-embeddings-v5-text-nano")
    assert await asyncio.to_thread(lambda: of_milvus.dim) == 768
    assert len((await asyncio.to_thread(of_milvus, ["x"]))[0]) == 768


async def test_dimensions_and_late_chunking_are_taken(function):
    vectors = await asyncio.to_thread(function(dimensions=32, late_chunking=True).encode_documents, TEXTS)
    assert [vector.shape for vector in vectors] == [(32,)] * 4


@pytest.mark.parametrize("simulator", [{"shuffle": 1.0}], indirect=True)
async def test_rows_in_another_order_are_put_right_by_index(function):
    vectors = await asyncio.to_thread(function(dimensions=8), TEXTS)
    expected = [pretend_vector(text, model="jina-embeddings-v3", dimensions=8) for text in TEXTS]
    assert np.array_equal(np.float32(vectors), np.stack(expected))


@pytest.mark.parametrize(
    ("simulator", "said"),
    [
        ({"bad_key": True}, "Invalid API key"),
        ({"tpm": 1}, r"Token rate limit exceeded: [\d,]+/1 tokens per minute"),
        ({"error_503": 1.0}, "Service temporarily unavailable"),
    ],
    indirect=["simulator"],
)
async def test_a_refusal_reaches_its_user_in_the_vendors_words(function, said):
    with pytest.raises(RuntimeError, match=said):
        await asyncio.to_thread(function(), TEXTS)


async def test_a_task_of_another_generation_is_refused(function):
    with pytest.raises(RuntimeError, match="task"):
        await asyncio.to_thread(function(task="clustering"), TEXTS)
