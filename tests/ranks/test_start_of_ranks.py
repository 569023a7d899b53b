"""What the start of a run says about its ranks, and the threads that each of them gets."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import pytest
import torch

from distrust import DistrustWarning
from distrust.engines.torch import runtime
from distrust.reporting.console import ConsoleReporter
from distrust.run_record import RunRecord
from distrust.training.events import RunStarted


@pytest.fixture
def four_threads(monkeypatch):
    previous = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(previous)


@pytest.mark.usefixtures("four_threads")
def test_ranks_share_the_threads_of_their_machine(monkeypatch):
    assert [runtime.share_of_threads(count) for count in (1, 2, 3, 9)] == [4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # torchrun sets it, too
    assert runtime.share_of_threads(2) == 4


def test_too_many_recorded_threads_are_reported(monkeypatch, recwarn):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for threads, count in ((8, 1), (99, 1), (4, 2), (1, 9)):
        runtime.warn_of_threads(threads, count)
    assert not recwarn.list
    with pytest.warns(DistrustWarning, match=r"4 ranks share 8 cores, with 3 threads each.*--threads 2 is"):
        runtime.warn_of_threads(3, 4)


def test_the_console_says_where_the_ranks_are(run, tmp_path):
    _, events = run(tmp_path, max_steps=1)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    texts = []
    for ranks in ((), ("node-1", "node-1", "node-2", "node-2")):
        stream = io.StringIO()
        ConsoleReporter(log_every=1, stream=stream)(replace(started, ranks=ranks))
        texts.append(stream.getvalue())
    assert texts[1].replace("4 ranks on 2 machines\n", "") == texts[0] != texts[1]


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_records_ranks_if_there_are_several(ranks):
    sections = RunRecord(config={}, settings={}, ranks=ranks).sections()
    assert sections["run"].get("ranks") == (4 if ranks == 4 else None)
    assert RunRecord._from_sections(**sections).ranks == ranks
    sections["run"]["ranks"] = "many"  # a hostile file
    assert RunRecord._from_sections(**sections).ranks == 1
