"""benchmarks.client, small, without the peers."""

import sys

import pytest

from benchmarks import client


@pytest.mark.slow
def test_our_clients_are_measured_against_the_canned_server_and_missing_peers_are_named(capsys):
    sizes = client.Sizes(inputs=(8,), dimensions=16, seconds=0.05, rounds=1)
    record = client.measure(sizes, python=sys.executable)
    rows = {row["who"]: row for row in record["measured"]}
    assert {"client", "face"} <= rows.keys()
    assert rows["client"]["client_is_times_it"] == 1.0
    assert rows["face"]["per_core"] > 0
    client.show(record)
    assert "PEERS/bin/pip install 'openai" in capsys.readouterr().out


def test_a_client_that_makes_something_else_of_the_answer_is_not_measured(monkeypatch):
    whole = client.Child.result

    def wrong_sums(child):
        found = whole(child)
        return (
            {**found, "sums": {size: total + 1 for size, total in found["sums"].items()}} if "sums" in found else found
        )

    monkeypatch.setattr(client.Child, "result", wrong_sums)
    with pytest.raises(client.ChildFailed, match="made of the answer what it does not say"):
        client.measure(client.Sizes(inputs=(8,), dimensions=16, seconds=0.05, rounds=1), python=sys.executable)
