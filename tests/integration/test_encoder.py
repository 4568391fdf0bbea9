"""The Python face of the client: any number of texts, blocking and not, against the simulator."""

import base64
import gc
import json
import subprocess
import sys
import threading
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest
from aiohttp import web
from anyio import to_thread

import embedmill
from embedmill.errors import ConfigurationError, InputRejected, InvalidKey, OutcomeUnknown
from embedmill.models import find_model
from embedmill.rehearsal import Rehearsal, serve_rehearsal

pytestmark = pytest.mark.usefixtures("quick_encoder")

KEY = "jina_rehearsal"


class Stand:
    """A provider that answers what `vector` makes of each text, and notes what it was asked."""

    def __init__(self, vector=None):
        self.bodies = []
        self.refusals = []
        self.vector = vector or (lambda text, size: np.full(size, len(text) + 1, np.float32))
        self.in_flight = self.most_in_flight = 0

    async def answer(self, request):
        body = json.loads(await request.read())
        self.bodies.append(body)
        if self.refusals:
            status, content, headers = self.refusals.pop(0)
            return web.json_response(content, status=status, headers=headers)
        size = body.get("dimensions", 768)
        encode = {
            "base64": lambda vector: base64.b64encode(vector.tobytes()).decode(),
            "float": lambda vector: vector.tolist(),
            "binary": lambda vector: np.packbits(vector > 0).view(np.int8).tolist(),
            "ubinary": lambda vector: np.packbits(vector > 0).tolist(),
        }[body["embedding_type"]]
        data = [{"index": i, "embedding": encode(self.vector(t, size))} for i, t in enumerate(body["input"])]
        return web.json_response({"data": data[::-1], "usage": {"total_tokens": len(data)}})


@asynccontextmanager
async def serve(stand):
    application = web.Application(client_max_size=2**26)
    application.router.add_post("/v1/embeddings", stand.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def test_any_number_of_texts_comes_back_in_their_order_in_requests_within_the_limits():
    texts = ["x" * (n % 37) for n in range(1500)]
    stand = Stand()
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, dimensions=16) as jina:
        vectors = await jina.encode_documents(texts)
        assert jina.dim == 16
        assert jina.billed_tokens == 1500
    assert (vectors.shape, vectors.dtype) == ((1500, 16), np.float32)
    assert vectors[:, 0].tolist() == [len(text) + 1 for text in texts]
    assert sorted(len(body["input"]) for body in stand.bodies) == [476, 512, 512]
    vectors[0] = 0


async def test_the_two_roles_and_the_call_send_the_tasks_of_the_model():
    stand = Stand()
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api) as jina:
        await jina.encode_documents(["a"])
        await jina.encode_queries(["a"])
        await jina(["a"])
    assert [body["task"] for body in stand.bodies] == ["retrieval.passage", "retrieval.query", "retrieval.passage"]


async def test_no_texts_are_no_request():
    async with embedmill.AsyncJinaEmbedding(api_key=KEY, api_base="http://127.0.0.1:9/v1", dimensions=8) as jina:
        assert (await jina.encode_documents([])).shape == (0, 8)


@pytest.mark.parametrize(
    ("embedding_type", "dtype", "columns"),
    [("base64", np.float32, 16), ("float", np.float32, 16), ("binary", np.int8, 2), ("ubinary", np.uint8, 2)],
)
async def test_every_embedding_type_has_its_array(embedding_type, dtype, columns):
    stand = Stand(lambda text, size: np.where(np.arange(size) % 3 == 0, 1, -1).astype(np.float32) + len(text) / 8)
    async with (
        serve(stand) as api,
        embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, dimensions=16, embedding_type=embedding_type) as jina,
    ):
        vectors = await jina.encode_documents(["", "a"])
        assert (await jina.encode_documents([])).dtype == dtype
    assert (vectors.shape, vectors.dtype) == ((2, columns), dtype)
    if columns == 2:
        bits = np.unpackbits(vectors.view(np.uint8), axis=1)
        assert bits[0].tolist() == [int(n % 3 == 0) for n in range(16)]


async def test_refusals_for_rate_are_waited_out_and_a_tier_paces():
    busy = (429, {"detail": "Concurrency limit exceeded: 2/2 concurrent requests."}, {"Retry-After": "0"})
    stand = Stand()
    stand.refusals = [busy, busy]
    async with (
        serve(stand) as api,
        embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, tier="premium") as jina,
    ):
        assert len(await jina.encode_documents(["a", "bb"])) == 2
    assert len(stand.bodies) == 3


async def test_what_is_refused_says_which_texts_and_nothing_comes_back():
    stand = Stand()
    stand.refusals = [(422, {"detail": "too long"}, {})]
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api) as jina:
        with pytest.raises(InputRejected, match="one of the texts 0 to 1: Jina answered 422: too long"):
            await jina.encode_documents(["a", "b"])
        stand.refusals = [(401, {"detail": "Invalid API key."}, {})]
        with pytest.raises(InvalidKey, match="Invalid API key"):
            await jina.encode_documents(["a", "b"])


@pytest.mark.parametrize("tier", [None, "premium"])
@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (lambda _, size: np.zeros(size, np.float32), "the vector is zero"),
        (lambda _, size: np.full(size, np.nan, np.float32), "not finite"),
        (lambda _, size: np.ones(size, np.float32), "3 different texts got one vector"),
    ],
)
async def test_vectors_that_mean_nothing_are_asked_for_again_and_never_returned(vector, said, tier):
    stand = Stand(vector)
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, tier=tier) as jina:
        with pytest.raises(OutcomeUnknown, match=said):
            await jina.encode_documents(["a", "b", "c"])
    assert len(stand.bodies) == 3


@pytest.mark.parametrize(
    ("texts", "options", "taken"),
    [
        (["a", "b"], {}, False),
        (["A text", "a  text"], {}, True),
        (["x" * 9000 + "a", "x" * 9000 + "b"], {}, True),
        (["x" * 9000 + "a", "x" * 9000 + "b"], {"truncate": False}, False),
    ],
    ids=["told apart", "one text to a tokenizer", "cut", "not cut"],
)
async def test_texts_share_a_vector_where_a_worker_would_believe_it(texts, options, taken):
    stand = Stand(lambda _, size: np.ones(size, np.float32))
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, **options) as jina:
        jina._embedder.estimate_tokens = lambda texts: [1] * len(texts)  # Long texts go alone otherwise.
        if taken:
            assert len(await jina.encode_documents(texts)) == 2
        else:
            with pytest.raises(OutcomeUnknown, match="2 different texts got one vector"):
                await jina.encode_documents(texts)


async def test_queries_are_cut_also_where_documents_are_late_chunked():
    stand = Stand(lambda _, size: np.ones(size, np.float32))
    texts = ["x" * 9000 + "a", "x" * 9000 + "b"]
    async with (
        serve(stand) as api,
        embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, late_chunking=True) as jina,
    ):
        jina._embedder.estimate_tokens = lambda texts: [1] * len(texts)
        assert len(await jina.encode_queries(texts)) == 2
        assert stand.bodies[0]["truncate"]
        with pytest.raises(OutcomeUnknown, match="2 different texts got one vector"):
            await jina.encode_documents(texts)


async def test_late_chunking_keeps_the_passages_of_a_document_together():
    stand = Stand()
    async with (
        serve(stand) as api,
        embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, late_chunking=True) as jina,
    ):
        await jina.encode_documents([f"passage {n}" for n in range(40)])
        await jina.encode_queries(["question"])
    assert [(len(body["input"]), body["late_chunking"]) for body in stand.bodies] == [(40, True), (1, False)]


async def test_a_late_chunking_request_that_the_provider_finds_too_long_is_halved_between_passages():
    async with (
        serve_rehearsal(Rehearsal(latency_ms=0, jitter_ms=0)) as (api, simulator),
        embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api, late_chunking=True, dimensions=8) as jina,
    ):
        # Long words: the first estimate is too low.
        vectors = await jina.encode_documents(["aerodynamic boundary layer " * 400] * 6)
    assert vectors.shape == (6, 8)
    statuses = simulator.stats()["statuses"]
    assert isinstance(statuses, dict)
    assert statuses.keys() - {"200"}, "nothing was refused, so nothing was halved"


async def test_the_blocking_face_gives_the_same_also_where_a_loop_runs_and_from_several_threads():
    stand = Stand()
    async with serve(stand) as api:

        def work():
            with embedmill.JinaEmbedding("jina-embeddings-v3", api_key=KEY, api_base=api, dimensions=8) as jina:
                assert jina.dim == 8
                found = [jina.encode_documents(["a", "bb"]), jina.encode_queries(["a", "bb"]), jina(["a", "bb"])]
                assert jina.billed_tokens == 6
            with pytest.raises(ConfigurationError, match="closed"):
                jina.encode_queries(["a"])
            return found

        for vectors in await to_thread.run_sync(work):
            assert vectors[:, 0].tolist() == [2, 3]
    assert len(stand.bodies) == 3


async def test_closing_ends_what_another_thread_waits_for():
    asked, over = anyio.Event(), anyio.Event()

    class Silent(Stand):
        async def answer(self, request):
            asked.set()
            await over.wait()
            return await super().answer(request)

    async with serve(Silent()) as api:
        jina = embedmill.JinaEmbedding(api_key=KEY, api_base=api)
        failures = []

        def wait():
            try:
                jina.encode_documents(["a"])
            except ConfigurationError as error:
                failures.append(str(error))

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        with anyio.fail_after(10):
            await asked.wait()
        await to_thread.run_sync(jina.close)
        await to_thread.run_sync(waiting.join, 10)
        over.set()
    assert failures == ["this JinaEmbedding is closed: make a new one"]


async def test_the_thread_of_the_blocking_face_ends_with_it():
    def threads():
        return [one for one in threading.enumerate() if one.name == "embedmill-jina"]

    before = len(threads())
    jina = embedmill.JinaEmbedding(api_key=KEY)
    assert len(threads()) == before + 1
    del jina
    gc.collect()
    assert len(threads()) == before


def test_a_program_that_never_closes_it_ends_without_a_word():
    program = "import embedmill; jina = embedmill.JinaEmbedding(api_key='k'); print(jina.dim)"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1024\n", "")


async def test_five_megabytes_of_text_and_a_lone_surrogate_are_sent_without_a_warning():
    stand = Stand()
    async with serve(stand) as api, embedmill.AsyncJinaEmbedding(api_key=KEY, api_base=api) as jina:
        vectors = await jina.encode_documents(["a" * 5_000_000, "\ud800"])
    assert vectors.shape == (2, find_model("jina/jina-embeddings-v3").native_dimensions)
    assert sorted(text for body in stand.bodies for text in body["input"])[0] == "?"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_name": "jina-colbert-v2"}, "a vector per token.*take jina/jina-embeddings-v3"),
        ({"model_name": "elser-v2", "dimensions": 256}, "no size to choose"),
        ({"dimension": 3}, "no option dimension"),
        ({"redis": "redis://127.0.0.1:1/0"}, "say tier="),
        ({"tier": "gold"}, "free, paid, premium"),
        ({"api_key": "jina_ü"}, "JINA_API_KEY"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(options, said):
    with pytest.raises(ConfigurationError, match=said):
        embedmill.AsyncJinaEmbedding(**{"api_key": KEY, **options})


@pytest.mark.parametrize(("texts", "said"), [("a text", "brackets"), (["a", None], "text 1 is of type NoneType")])
async def test_what_is_no_list_of_texts_is_refused(texts, said):
    async with embedmill.AsyncJinaEmbedding(api_key=KEY) as jina:
        with pytest.raises(ConfigurationError, match=said):
            await jina.encode_documents(texts)
