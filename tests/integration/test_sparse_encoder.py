"""`elser-v2` from Python: the faces against the simulator and its faults, rows in Milvus, and commands that refuse it."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

import embedmill
from embedmill.errors import InvalidKey, OutcomeUnknown
from embedmill.rehearsal import Rehearsal, account_name, pretend_tokens, serve_rehearsal
from embedmill.rehearsal.vectors import pretend_sparse
from embedmill.sparse import SPARSE_DIMENSIONS, token_index

pytestmark = pytest.mark.usefixtures("quick_encoder")

KEY = "jina_sparse"
TEXTS = ["Fish sing in the mine", "the mine is deep", "?!", "nobody mines fish"]


@asynccontextmanager
async def rehearsed(options=None, **behaviour):
    async with (
        serve_rehearsal(Rehearsal(**behaviour)) as (api_base, simulator),
        embedmill.AsyncJinaEmbedding("jina/elser-v2", api_key=KEY, api_base=api_base, **(options or {})) as jina,
    ):
        yield jina, simulator


def expected(text):
    return {token_index(word): float(np.float32(score)) for word, score in pretend_sparse(text).items()}


@pytest.mark.parametrize(
    "behaviour", [{}, {"bare_sparse": True}, {"shuffle": 1.0}], ids=["indexed", "bare", "shuffled"]
)
async def test_documents_and_queries_are_the_weights_of_their_words_in_either_shape(behaviour):
    async with rehearsed(undeclared_fields="refused", **behaviour) as (jina, simulator):
        for encode in (jina.encode_documents, jina.encode_queries, jina):
            rows = await encode(TEXTS)
            assert list(rows) == [expected(text) for text in TEXTS]
        assert jina.dim == rows.shape[1] == SPARSE_DIMENSIONS
        assert jina.billed_tokens == 3 * sum(map(pretend_tokens, TEXTS)) == simulator.stats()["tokens_billed"]
        assert len(await jina.encode_documents([])) == 0
    assert simulator.stats()["statuses"] == {"200": 3}
    assert simulator.stats().get("undeclared_fields", {}) == {}


async def test_any_number_of_texts_comes_back_in_their_order():
    texts = [f"text {n} of {n % 7}" for n in range(1500)]
    async with rehearsed() as (jina, simulator):
        rows = await jina.encode_documents(texts)
    assert list(rows) == [expected(text) for text in texts]
    assert simulator.stats()["requests"] == 3


async def test_a_server_that_takes_fewer_inputs_is_learned_and_the_parts_are_joined():
    texts = [f"text {n}" for n in range(300)]
    async with rehearsed(max_inputs=64) as (jina, _):
        assert list(await jina.encode_documents(texts)) == [expected(text) for text in texts]


SPOILED = {
    "missing_row": "3 sparse vectors for 4 texts",
    "extra_row": "5 sparse vectors for 4 texts",
    "nan_row": "not what Jina's API promises",
    "zero_row": "has words, and no token",
    "same_vectors": "different texts got the same weights",
    "truncated_body": "did not answer after the request was sent",
    "html_200": "what is not JSON",
    "error_200": "promises",
}


@pytest.mark.parametrize(
    ("fault", "bare", "said"),
    [(fault, bare, said) for fault, said in SPOILED.items() for bare in (False, True)]
    + [("duplicate_index", False, "second or impossible `index`")],
)
async def test_answers_that_cannot_be_used_are_asked_for_again_and_never_returned(fault, bare, said):
    async with rehearsed(bare_sparse=bare, **{fault: 1.0}) as (jina, simulator):
        with pytest.raises(OutcomeUnknown, match=said):
            await jina.encode_documents(TEXTS)
        assert jina.billed_tokens == 0
    assert simulator.stats()["requests"] == 3


async def test_what_passes_after_retries_is_whole():
    chances = dict.fromkeys(("nan_row", "missing_row", "truncated_body", "error_503", "drop_after"), 0.05)
    texts = [f"text {n} " * 100 for n in range(400)]
    async with rehearsed(seed=3, **chances) as (jina, simulator):
        assert list(await jina.encode_documents(texts)) == [expected(text) for text in texts]
    assert simulator.stats()["faults"]


async def test_a_tier_paces_on_the_budget_of_the_key_and_refusals_for_rate_are_waited_out():
    async with rehearsed({"tier": "premium"}, concurrency_429=0.5, retry_after=0, seed=1) as (jina, simulator):
        texts = ["word " * 400 + str(n) for n in range(200)]
        assert len(await jina.encode_documents(texts)) == 200
    assert simulator.stats()["faults"]["concurrency_429"] >= 1
    assert set(simulator.stats()["keys"]) == {account_name(KEY)}


async def test_a_key_that_is_refused_says_so_at_once():
    async with rehearsed(bad_key=True) as (jina, simulator):
        with pytest.raises(InvalidKey):
            await jina.encode_documents(["a"])
    assert simulator.stats()["requests"] == 1


async def test_milvus_stores_the_rows_and_finds_by_them(tmp_path):
    pymilvus = pytest.importorskip("pymilvus")

    def work(api_base):
        with embedmill.JinaEmbedding("elser-v2", api_key=KEY, api_base=api_base) as jina:
            documents = jina.encode_documents([text for text in TEXTS if text != "?!"])
            question = jina.encode_queries(["fish that sing"])
        client = pymilvus.MilvusClient(str(tmp_path / "sparse.db"))
        try:
            schema = client.create_schema()
            schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
            schema.add_field("sparse", pymilvus.DataType.SPARSE_FLOAT_VECTOR)
            index = client.prepare_index_params()
            index.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
            client.create_collection("texts", schema=schema, index_params=index)
            client.insert("texts", [{"id": n, "sparse": row} for n, row in enumerate(documents)])
            client.insert("texts", [{"id": 9, "sparse": {SPARSE_DIMENSIONS - 1: 1.0}}])
            return documents, question, client.search("texts", data=question, anns_field="sparse", limit=4)[0]
        finally:
            client.close()

    async with serve_rehearsal(Rehearsal()) as (api_base, _):
        documents, question, hits = await asyncio.to_thread(work, api_base)
    scores = np.array([sum(row.get(index, 0) * weight for index, weight in question[0].items()) for row in documents])
    assert [hit["id"] for hit in hits] == [n for n in np.argsort(-scores) if scores[n] > 0]
    assert [hit["distance"] for hit in hits] == pytest.approx(sorted(scores[scores > 0], reverse=True), rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "corpus.jsonl", "--to", "dataset"),
        ("push", "corpus.jsonl", "--to", "dataset", "--redis", "redis://127.0.0.1:1/0"),
        ("create", "dataset"),
        ("worker", "--redis", "redis://127.0.0.1:1/0"),
        ("quote", "corpus.jsonl"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_refuse_it_in_one_sentence_that_names_what_works(embedmill, arguments):
    (embedmill.folder / "corpus.jsonl").write_text('{"id": "a", "text": "fish"}\n')
    ended = embedmill(*arguments, "--model", "jina/elser-v2", environment={"JINA_API_KEY": KEY})
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert "sparse vectors" in ended.stderr
    assert "jina/jina-embeddings-v3" in ended.stderr
    assert "embedmill.JinaEmbedding" in ended.stderr
    assert not (embedmill.folder / "dataset").exists()
