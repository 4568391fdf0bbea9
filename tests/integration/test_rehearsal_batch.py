"""The simulator's batch endpoint over HTTP: a job's life, its losses and what it costs."""

import json
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import jsonschema
import pytest

from embedmill.rehearsal import Rehearsal, pretend_tokens, pretend_vector, serve_rehearsal

VENDOR = json.loads((Path(__file__).parent.parent / "data" / "jina_openapi_excerpt.json").read_text())
STATUS_SCHEMA = {"$ref": "#/components/schemas/BatchStatus", "components": VENDOR["components"]}
MODEL = "jina-embeddings-v5-text-nano"
TEXTS = [f"text number {number}" for number in range(40)]
TOKENS = sum(map(pretend_tokens, TEXTS))


def job(texts=TEXTS, **more):
    lines = [{"custom_id": f"line-{number}", "body": {"input": text}} for number, text in enumerate(texts)]
    return {"model": MODEL, "input": lines, "dimensions": 8, "task": "retrieval", **more}


class Client:
    def __init__(self, base, session):
        self._base, self._session = base, session

    async def send(self, method, path, *, key="jina_a", **options):
        headers = {"Authorization": f"Bearer {key}"}
        url = path if path.startswith("http") else f"{self._base}{path}"
        async with self._session.request(method, url, headers=headers, **options) as response:
            return response.status, await response.text()

    async def status(self, method, path, **options):
        code, text = await self.send(method, path, **options)
        assert code == 200, text
        status = json.loads(text)
        jsonschema.validate(status, STATUS_SCHEMA)
        return status

    async def submit(self, body=None, **options):
        return await self.status("POST", "/batch/embeddings", json=body or job(), **options)

    async def ended(self, batch_id):
        with anyio.fail_after(10):
            while True:
                status = await self.status("GET", f"/batch/{batch_id}")
                if status["status"] not in ("pending", "processing"):
                    return status
                await anyio.sleep(0.01)

    async def lines(self, url):
        code, text = await self.send("GET", url)
        assert code == 200, text
        return [json.loads(line) for line in text.splitlines()]

    async def stats(self):
        return json.loads((await self.send("GET", self._base.replace("/v1", "/stats")))[1])


@asynccontextmanager
async def rehearsed(**behaviour):
    async with serve_rehearsal(Rehearsal(**behaviour)) as (api_base, _), aiohttp.ClientSession() as session:
        yield Client(api_base, session)


async def test_a_job_is_pending_then_processing_then_completed_and_its_output_is_there():
    async with rehearsed(batch_s=0.4) as client:
        first = await client.submit()
        assert (first["status"], first["output_url"]) == ("pending", None)
        assert (await client.send("GET", f"/batch/{first['batch_id']}/output"))[0] == 404
        seen = set()
        while (status := await client.status("GET", f"/batch/{first['batch_id']}"))["status"] != "completed":
            seen.add(status["status"])
            await anyio.sleep(0.01)
        lines = await client.lines(status["output_url"])
        stats = await client.stats()
    assert seen == {"pending", "processing"}
    assert status["stats"] == {"total": 40, "completed": 40, "failed": 0, "total_tokens": TOKENS}
    assert [line["custom_id"] for line in lines] == [f"line-{number}" for number in range(40)]
    vector = lines[7]["response"]["body"]["data"][0]["embedding"]
    assert vector == pytest.approx(pretend_vector(TEXTS[7], model=MODEL, dimensions=8).tolist())
    assert (stats["tokens_billed"], stats["max_per_text"], stats["batches"]) == (TOKENS, 1, {"completed": 1})


async def test_bad_lines_end_in_the_error_file_and_the_others_in_the_output():
    lines = job(["good", "word " * 9_000, "bad marker"])["input"]
    lines += [{"custom_id": "no-body"}, {"body": {"input": "no id"}}]
    async with rehearsed(batch_s=0, reject_marker="marker") as client:
        batch = await client.ended((await client.submit(job(input=lines)))["batch_id"])
        errors = await client.lines(batch["error_file_url"])
        output = await client.lines(batch["output_url"])
    assert [line["custom_id"] for line in output] == ["line-0"]
    assert [line["custom_id"] for line in errors] == ["line-1", "line-2", "no-body", "None"]
    assert errors[0]["error"]["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    assert (batch["stats"]["completed"], batch["stats"]["failed"]) == (1, 4)


async def test_a_share_of_lines_fails_as_the_seed_decides():
    async with rehearsed(batch_s=0, batch_line_error=0.3, seed=4) as client:
        batch = await client.ended((await client.submit())["batch_id"])
    assert batch["stats"]["failed"] == pytest.approx(12, abs=8)
    assert batch["stats"]["completed"] + batch["stats"]["failed"] == 40


@pytest.mark.parametrize("fate", ["failed", "expired"])
async def test_a_job_that_ends_badly_has_no_output_and_has_cost_half(fate):
    async with rehearsed(batch_s=0, **{f"batch_{fate}": 1.0}) as client:
        batch = await client.ended((await client.submit())["batch_id"])
        assert (await client.send("GET", f"/batch/{batch['batch_id']}/output"))[0] == 404
        stats = await client.stats()
    assert (batch["status"], batch["output_url"]) == (fate, None)
    assert bool(batch["error"]) == (fate == "failed")
    assert stats["tokens_billed"] == sum(map(pretend_tokens, TEXTS[:20]))


async def test_a_lost_answer_leaves_a_job_that_the_list_shows():
    async with rehearsed(batch_s=0, batch_lost_answer=1.0) as client:
        with pytest.raises(aiohttp.ClientOSError):
            await client.submit()
        code, text = await client.send("GET", "/batches")
        stats = await client.stats()
    assert (code, len(json.loads(text))) == (200, 1)
    assert stats["tokens_billed"] == TOKENS


async def test_the_list_has_the_newest_first_and_only_the_keys_own():
    async with rehearsed() as client:
        made = [(await client.submit(job(["x"])))["batch_id"] for _ in range(4)]
        await client.submit(key="jina_b")
        listed = json.loads((await client.send("GET", "/batches", params={"limit": "3"}))[1])
        assert (await client.send("GET", f"/batch/{made[0]}", key="jina_b"))[0] == 404
        assert (await client.send("GET", "/batches", params={"limit": "many"}))[0] == 422
    assert [each["batch_id"] for each in listed] == made[:0:-1]


async def test_a_cancelled_job_ends_and_a_completed_one_stays_completed():
    async with rehearsed(batch_s=60) as client:
        batch_id = (await client.submit())["batch_id"]
        assert (await client.status("DELETE", f"/batch/{batch_id}"))["status"] == "cancelled"
        assert (await client.ended(batch_id))["status"] == "cancelled"
        assert (await client.stats())["tokens_billed"] == 0
    async with rehearsed(batch_s=0) as client:
        batch_id = (await client.submit())["batch_id"]
        assert (await client.status("DELETE", f"/batch/{batch_id}"))["status"] == "completed"


async def test_an_output_that_was_not_fetched_in_time_is_gone():
    async with rehearsed(batch_s=0, batch_keep_s=0) as client:
        batch = await client.submit()
        assert (await client.ended(batch["batch_id"]))["status"] == "expired"
        assert (await client.send("GET", f"/batch/{batch['batch_id']}/output"))[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        job(model="jina-embeddings-v3"),
        job(task="retrieval.passage"),
        job(dimensions=1025),
        job(input=None),
        job(input=None, input_url="gs://bucket/lines.jsonl"),
        job(["x"] * 10_001),
        job([]),
    ],
)
async def test_what_the_contract_does_not_allow_is_refused(body):
    async with rehearsed() as client:
        assert (await client.send("POST", "/batch/embeddings", json=body))[0] == 422


async def test_ten_thousand_lines_are_taken():
    async with rehearsed(batch_s=0) as client:
        assert (await client.submit(job(["x"] * 10_000)))["stats"]["total"] == 10_000


async def test_refusals_and_lost_connections_befall_batch_calls_too():
    async with rehearsed(error_503=1.0) as client:
        assert (await client.send("POST", "/batch/embeddings", json=job()))[0] == 503
        assert (await client.send("GET", "/batches"))[0] == 503
    async with rehearsed(truncated_body=1.0, batch_s=0) as client:
        batch = await client.submit()
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.send("GET", f"/batch/{batch['batch_id']}/output")
