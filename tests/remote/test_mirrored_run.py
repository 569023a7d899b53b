"""A run of the trainer with a mirror: it survives the loss of its folder, and ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("obstore", reason="needs the extra [remote]")

from distrust import CheckpointManager, RemoteError, TakenOver, TrainConfig
from distrust.checkpoint import catalog
from distrust.checkpoint.remote import client
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.mirror import Mirror
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.reporting.metrics import METRICS, MetricsWriter
from distrust.training.events import CheckpointMirrored, Preparing, RunStarted, StepEnded


def steps_made(events):
    return [event.step for event in events if isinstance(event, StepEnded)]


def copies(url):
    return [file.step for file in RemoteRun(parse(url, "--mirror")).files()]


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(stops=st.lists(st.integers(1, 9), max_size=3).map(sorted), data_of=st.data())
def test_a_run_that_loses_its_disk_ends_like_an_undisturbed_one(run, stops, data_of):
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = run(Path(folder, "plain"), max_steps=10)
        mirror, reached = Path(folder, "mirror"), 0
        for number, stop in enumerate([*stops, None]):
            out = Path(folder, f"machine-{number}")
            log = MetricsWriter(TrainConfig(out=str(out)))
            options = {"mirror": str(mirror), "max_steps": 10, "save_every": 2, "stop_after": stop}
            ended, events = run(out, observers=[log], **options)
            assert steps_made(events) == list(range(reached + 1, ended.step + 1))  # the stop saved its step
            reached = ended.step
            news = CheckpointMirrored(ended.step, str(mirror / "checkpoints"), pytest.approx(30, abs=30))
            assert news in events or ended.already_finished  # what is there already is no news
            lines = [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()]
            assert lines == list(range(1, ended.step + 1))
            if data_of.draw(st.booleans(), "the disk is lost"):
                shutil.rmtree(out)
        assert ended.state_digest == plain.state_digest
        assert copies(mirror)[-1] == 10
        again, events = run(Path(folder, "another"), mirror=str(mirror), max_steps=10)
        assert again.already_finished
        assert not steps_made(events)


def test_a_url_as_out_is_the_mirror_of_a_folder_in_the_cache(run, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTRUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    plain, _ = run(tmp_path / "plain", max_steps=9)
    run(s3.url, max_steps=9, save_every=2, stop_after=5)
    assert TrainConfig(out=s3.url).run_directory.is_relative_to(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    ended, events = run(s3.url, max_steps=9, save_every=2)
    assert ended.state_digest == plain.state_digest
    assert steps_made(events) == [6, 7, 8, 9]
    started = next(event for event in events if isinstance(event, RunStarted))
    assert f"each checkpoint is copied to {s3.url}" in started.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "plain"]  # no folder "s3:"
    start = copies(s3.url)[-2]  # a slow store need not have every step: newer ones make older ones needless
    branch, events = run(s3.url, max_steps=9, from_step=start, branch=f"{s3.url}-branch", keep_last=9)
    assert branch.state_digest == plain.state_digest
    assert steps_made(events) == list(range(start + 1, 10))
    assert copies(f"{s3.url}-branch")


def test_a_run_that_was_taken_over_stops_and_names_what_it_saved(run, tmp_path):
    mirror, takeovers = tmp_path / "mirror", []

    def take_over(event):
        if isinstance(event, StepEnded) and event.step == 8:
            while not copies(mirror):  # of step 4
                time.sleep(0.01)
            options = Mirror(mirror / "checkpoints", take_over=True)
            with CheckpointManager(tmp_path / "elsewhere", mirror=options) as manager:
                manager.begin()
            takeovers.append(event.step)

    with pytest.raises(TakenOver, match="another process has taken over this run"):
        run(tmp_path / "out", mirror=str(mirror), max_steps=200, save_every=4, observers=[take_over])
    assert takeovers == [8]
    assert max(copies(mirror)) <= 8  # what came later does not count
    assert CheckpointManager(tmp_path / "out" / "checkpoints").list_checkpoints()


def test_a_final_checkpoint_that_was_not_copied_is_copied_by_the_same_command(run, tmp_path, monkeypatch):
    run(tmp_path / "out", max_steps=5)

    def read_slowly(path, read=catalog.read_header):
        time.sleep(0.2)  # the upload of the final one ends before the older one is looked at
        return read(path)

    monkeypatch.setattr(catalog, "read_header", read_slowly)
    again, events = run(tmp_path / "out", max_steps=5, mirror=str(tmp_path / "mirror"))
    assert again.already_finished
    assert not steps_made(events)
    assert copies(tmp_path / "mirror") == [5]


def test_a_store_that_cannot_be_reached_stops_a_run_before_it_begins(run, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteError, match="no credentials"):
        run(tmp_path / "out", mirror="s3://bucket/run")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(client.connect, "__kwdefaults__", {"give_up_after": 0.0, "request_seconds": 1.0})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(RemoteError, match=r"does not answer.*later, or leave out --mirror to go on"):
        run(tmp_path / "out", mirror="s3://bucket/run")
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_a_run_that_watches_another_writer(run, tmp_path):
    def send(event):
        if isinstance(event, Preparing) and event.task.startswith("making sure that no other process"):
            os.kill(os.getpid(), signal.SIGTERM)

    mirror = tmp_path / "mirror"
    with CheckpointManager(tmp_path / "elsewhere", mirror=mirror / "checkpoints") as manager:
        manager.begin()
        began = time.monotonic()
        ended, _ = run(tmp_path / "out", mirror=str(mirror), observers=[send])
    assert (ended.signal, ended.step) == (signal.SIGTERM, 0)
    assert time.monotonic() - began < 30, "the patience is 60 s"
