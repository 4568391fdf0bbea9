"""`embedmill rehearse` as a user runs it."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

COMMAND = [sys.executable, "-m", "embedmill", "rehearse"]


class Running:
    """The command with its first lines read; `ended` holds the counters that it showed at its end."""

    def __init__(self, process):
        self._process = process
        self.said = [process.stdout.readline() for _ in range(4)]
        self.command = self.said[2]
        self.api_base = self.command.split("--api-base")[1].strip()
        self.ended = None

    def embed(self, texts):
        body = json.dumps({"model": "jina-embeddings-v3", "input": texts, "dimensions": 4}).encode()
        headers = {"Authorization": "Bearer jina_x", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api_base}/embeddings", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers)

    def stats(self):
        with urllib.request.urlopen(self.api_base.replace("/v1", "/stats"), timeout=10) as response:
            return json.load(response)


@contextmanager
def running(*options):
    command = [*COMMAND, "--port", "0", "--latency-ms", "0", "--jitter-ms", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        run = Running(process)
        try:
            yield run
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        run.ended = json.loads(output)


def test_it_says_how_to_use_it_and_shows_at_its_end_what_it_billed():
    with running() as run:
        assert "export JINA_API_KEY=rehearsal" in run.said[1]
        assert run.embed(["a", "b"])[0] == 200
    assert (run.ended["requests"], run.ended["texts_embedded"], run.ended["max_per_text"]) == (1, 2, 1)
    assert run.ended["tokens_billed"] == 6
    assert "since_reset" not in run.ended


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ([], {"rpm": 500, "tpm": 2_000_000, "concurrency": 50}),
        (["--tier", "free"], {"rpm": 100, "tpm": 100_000, "concurrency": 2}),
        (["--tier", "premium", "--rpm", "7", "--tpm", "0"], {"rpm": 7, "tpm": 0, "concurrency": 500}),
    ],
)
def test_a_tier_gives_the_limits_and_single_figures_override_it(options, limits):
    with running(*options, "--window", "bucket", "--window-s", "6", "--other-client", "0.3") as run:
        shown = run.stats()["limits"]
        tier = options[1] if "--tier" in options else "paid"
        assert f" --to ./rehearsal --model jina/jina-embeddings-v3 --tier {tier} --api-base " in run.command
    assert shown == {"window": "bucket", "window_s": 6.0, "other_client": 0.3, **limits}


def test_faults_and_headers_are_options():
    with running("--token-429", "1", "--retry-after", "2.5", "--no-limit-headers") as run:
        status, headers = run.embed(["a"])
    assert (status, headers["Retry-After"]) == (429, "2.5")
    assert run.ended["refusals"] == {"RATE_TOKEN_LIMIT_EXCEEDED": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tier", "payd"], "error: no tier 'payd'; did you mean paid?"),
        (["--host", "here"], "error: --host 'here' is not an address"),
        (["--retry-after", "soon"], "'soon' is neither a number of seconds nor 'none'"),
        (["--hang", "2"], "2.0 is not in the range"),
    ],
)
def test_what_cannot_work_is_said_and_ends_with_2(options, said):
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_one_clear_line_and_exit_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert done.stderr.count("\n") == 1
