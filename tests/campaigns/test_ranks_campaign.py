"""The campaign of ranks in short form, and that it can find something."""

from __future__ import annotations

import json
import socket

import pytest

from campaigns import child
from campaigns.ranks import __main__ as command
from campaigns.ranks import attempts, cases, machines


@pytest.fixture
def campaign(forked_python, tmp_path, monkeypatch):
    """Runs the campaign on short runs of one or two ranks; returns the exit code and the counts."""
    monkeypatch.setattr(attempts, "STEPS", 5)

    def run(*arguments, attempts, counts=(1, 2)):
        monkeypatch.setattr(cases, "ATTEMPTS", attempts)
        monkeypatch.setattr(cases, "REPLICATED", cases.REPLICATED._replace(counts=counts))
        figures = tmp_path / "figures.json"
        options = ["--directory", str(tmp_path), "--json", str(figures), "--slack", "20", *arguments]
        code = command.main(options, python=(str(forked_python),))
        return code, json.loads(figures.read_text())["counts"]

    return run


def test_a_rank_is_killed(campaign, tmp_path, capsys):
    code, counts = campaign("--case", "1", "--only", "SIGKILL of a rank", "--shard", "none", attempts=1)
    assert code == 0, capsys.readouterr().out
    assert counts["accidents"] == 1
    assert counts["runs that ended in the undisturbed state"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_sum_in_another_order_is_found(campaign, capsys, monkeypatch):
    monkeypatch.setattr(cases, "_random_count", lambda *_, **__: 2)
    code, _ = campaign(
        "--case", "2", "--fault", "reversed-sum", "--only", "SIGKILL", "--shard", "none", attempts=0
    )
    assert code == 1
    assert "ended in another state than the undisturbed process" in capsys.readouterr().out


def test_a_cut_cable_is_silent_until_it_is_mended():
    if (reason := machines.obstacle()) is not None:
        pytest.skip(reason)

    def talk():
        with machines.Machines() as two:
            first, second = two.both
            machines.join_network(second.network)
            with socket.create_server((second.address, 5000)) as listener:
                machines.join_network(first.network)
                with socket.create_connection((second.address, 5000)) as near, listener.accept()[0] as far:
                    near.sendall(b"1")
                    assert far.recv(9) == b"1"
                    two.cut()
                    far.settimeout(0.2)
                    near.sendall(b"2")
                    with pytest.raises(TimeoutError):
                        far.recv(9)
                    two.mend()
                    far.settimeout(20)
                    return far.recv(9)

    assert child.call(talk) == b"2"
