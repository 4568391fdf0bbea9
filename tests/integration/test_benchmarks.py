"""The benchmarks run, small: the real command in a process of its own, its cost, and what judged makes of its dataset."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import judged, pipeline, queue, results
from benchmarks.command import run_embedmill
from embedmill.errors import EmbedmillError
from scheduler.embedded import embedded_server


def test_the_whole_pipe_is_measured_beside_its_floors_and_by_stage(tmp_path: Path) -> None:
    record = pipeline.measure(tmp_path, documents=300, seed=1, profile=True)
    pipe, profile = record["pipe"], record["profile"]
    assert pipe["wall_s"] > record["floor_by_hand"]["wall_s"] > 0
    assert pipe["cpu_s"] > 0.1
    assert any(name.startswith("start-up") for name in profile["stages"])
    told_s = sum(spent["cpu_s"] for spent in profile["stages"].values())
    assert told_s + profile["other_threads_s"] + profile["sampler_cpu_s"] == pytest.approx(profile["cpu_s"], rel=0.02)
    if sys.platform == "linux":
        assert 50 < pipe["peak_mb"] < 600
        assert 1 < pipe["children_peak_mb"] < 100


def test_a_command_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(EmbedmillError, match=r"`embedmill run` ended with 2: .*nowhere"):
        run_embedmill(["run", str(tmp_path / "nowhere"), "--to", str(tmp_path / "dataset"), "--no-milvus"])


def test_queries_that_are_the_documents_themselves_find_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    corpus, queries, qrels = (tmp_path / name for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"))
    records = [{"id": f"d{n}", "title": f"title {n}", "text": f"text number {n}"} for n in range(120)]
    corpus.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"id": "empty", "title": "", "text": " "}]))
    queries.write_text(
        "".join(json.dumps({"id": f"q{n}", "text": f"title {n}\n\ntext number {n}"}) + "\n" for n in range(20))
    )
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(20)))
    arguments = ["--corpus", str(corpus), "--queries", str(queries), "--qrels", str(qrels), "--model", "null/64"]
    arguments += ["--to", str(tmp_path / "dataset")]

    assert judged.main([*arguments, "--expect-ndcg", "1", "--expect-recall", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"]["rejected"] == 1
    assert found["exact"] == {"queries": 20, "ndcg_at_10": 1.0, "recall_at_100": 1.0, "mrr_at_10": 1.0}
    assert judged.main([*arguments, "--expect-ndcg", "0.5"]) == 1
    assert "nDCG@10 is 1.0000, expected 0.5" in capsys.readouterr().err
    assert len(list((tmp_path / "results").iterdir())) == 2


@pytest.mark.server
@pytest.mark.slow
def test_the_queue_is_measured_on_a_server_and_says_how_to_get_the_peers_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = queue.Sizes(
        documents=600, job_documents=600, tasks=40, wake_samples=10, memory_shards=(245,), processes=2, rounds=1
    )
    with embedded_server() as url:
        record = queue.measure(tmp_path, url=url, sizes=sizes, seed=1, python=str(tmp_path / "no-python"))
    queue.show(record)
    shown = capsys.readouterr().out

    assert all(found["median"] > 10 for found in record["cycles"].values())
    assert 0.05 < record["memory"][0]["mib_per_million"] <= 1.0
    assert 0 < record["wake"]["p50_ms"] <= record["wake"]["p99_ms"]
    assert record["share"]["calls"]["finish"]["calls"] == 1
    assert 0 < record["share"]["cpu_share"] < 0.2
    assert record["push"]["documents_per_s"]["median"] > 0
    assert all(found["median"] > 0 for found in record["moved"]["ours"].values())
    assert record["moved"]["inbox"]["redis_peak_mib"] > 0
    assert record["moved"]["theirs"] == {}
    assert record["moved"]["ratios"] == {"references": None, "log": None, "inbox": None}
    assert "not all peers are installed" in shown
    assert "streaq" in shown
