"""``metrics.jsonl``: each step and evaluation once, whatever was killed, torn or lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import DistrustWarning, TrainConfig
from distrust.checkpoint import snapshot
from distrust.contract import DeviceMemory
from distrust.option_values import STEP_METRICS
from distrust.reporting import metrics
from distrust.reporting.dashboards import scalars_of
from distrust.reporting.metrics import METRICS, PROVENANCE, MetricsWriter, repair_lines
from distrust.reporting.run_reader import read_run
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointStarted, Evaluated, StepEnded

EVALUATED = {"eval_every": 2, "eval_at_start": True}


@pytest.fixture
def train_logged(run, eval_data):
    """Runs the toy with its log: the end, the events, and the lines."""

    def train_logged(out: Path, *, before=(), after=(), **options):
        options = {"eval_data": str(eval_data), **EVALUATED, **options}
        config = TrainConfig(weighting=options.get("weighting", "monotone"))
        ended, events = run(out, observers=[*before, MetricsWriter(config), *after], **options)
        return ended, events, lines(Path(options.get("branch", out)))

    return train_logged


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def numbers(out: Path) -> list[dict]:
    """The lines without what is the machine's."""
    names = {"step", *STEP_METRICS}
    return [
        {name: value for name, value in line.items() if name in names or name.startswith("eval_")}
        for line in lines(out)
    ]


def test_a_line_for_each_step_and_each_evaluation(train_logged, tmp_path):
    _, events, repaired = train_logged(tmp_path)
    reported = [event for event in events if isinstance(event, (StepEnded, Evaluated))]
    assert [line["step"] for line in repaired] == [event.step for event in reported]
    for line, event in zip(repaired, reported, strict=True):
        if isinstance(event, Evaluated):
            assert line == {"step": event.step, **event.metrics}
        else:
            names = ("step", *STEP_METRICS, "tokens", "seconds", "stall_seconds", "at_risk_seconds")
            memory = {"host_bytes": event.memory.host, "host_peak_bytes": event.memory.host_peak}
            assert line == {name: getattr(event, name) for name in names} | memory  # none of a device
            assert 0 < line["host_bytes"] <= line["host_peak_bytes"]


def test_memory_of_a_device_is_logged_apart(train_logged, tmp_path):
    class OnDevice(ToyEngine):
        def device_memory(self):
            return DeviceMemory(*(gib << 30 for gib in (1, 2, 3, 4)))

    _, events, _ = train_logged(tmp_path, engine=OnDevice())
    columns = read_run(tmp_path).steps.columns
    for name, gib in {"device_bytes": 1, "device_peak_bytes": 2, "device_reserved_bytes": 3}.items():
        assert set(columns[name] / 2**30) == {gib}
    assert set(columns["host_bytes"]) == {e.memory.host for e in events if isinstance(e, StepEnded)}
    scalars = scalars_of(next(e for e in events if isinstance(e, StepEnded)), ("loss",))
    assert {name: value for name, value in scalars.items() if name.startswith("memory/device")} == {
        "memory/device_gib": 1,
        "memory/device_peak_gib": 2,
        "memory/device_reserved_gib": 3,
    }


def test_stalls_are_logged_with_the_step_that_waited(train_logged, tmp_path):
    ended, _, repaired = train_logged(tmp_path, save_every=2)
    reported = sum(line.get("stall_seconds", 0) for line in repaired)
    assert 0 < reported < ended.stall_seconds  # the last save is after the last step


@pytest.mark.parametrize("stops", [(3,), (5, 7), (1, 2, 8)])
def test_an_interrupted_run_has_the_log_of_an_uninterrupted_one(train_logged, tmp_path, stops):
    train_logged(tmp_path / "one")
    for step in stops:
        train_logged(tmp_path / "pieces", stop_after=step)
    train_logged(tmp_path / "pieces")
    assert numbers(tmp_path / "pieces") == numbers(tmp_path / "one")
    train_logged(tmp_path / "pieces")  # it has nothing left to do, and nothing to add
    assert numbers(tmp_path / "pieces") == numbers(tmp_path / "one")


@pytest.mark.parametrize("filler", [b"", b'{"step": 1, "of": "another run"}\n' * 99], ids=["hole", "another"])
def test_a_log_that_holds_more_than_a_run_is_repaired_without_reading_it_all(
    train_logged, tmp_path, monkeypatch, filler
):
    """A hole in a sparse file may be of any size."""
    train_logged(tmp_path / "one")
    train_logged(tmp_path / "longer", stop_after=5)
    log = tmp_path / "longer" / METRICS
    log.write_bytes(log.read_bytes() + filler)
    if filler:
        monkeypatch.setattr(metrics, "MAX_SKIPPED_BYTES", len(filler) // 2)
    else:
        os.truncate(log, 1 << 42)
    with pytest.warns(DistrustWarning, match=f"{METRICS}: more than .* are not lines of this run") as caught:
        train_logged(tmp_path / "longer")
    assert len(caught) == 1
    assert numbers(tmp_path / "longer") == numbers(tmp_path / "one")


def test_a_long_log_of_the_run_itself_is_kept(train_logged, tmp_path, monkeypatch):
    train_logged(tmp_path / "one")
    train_logged(tmp_path / "two", stop_after=5)
    size = (tmp_path / "two" / METRICS).stat().st_size
    monkeypatch.setattr(metrics, "MAX_SKIPPED_BYTES", size // 2)
    train_logged(tmp_path / "two")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")


def test_a_branch_from_an_early_step_of_a_long_log_does_not_warn(train_logged, tmp_path, monkeypatch):
    train_logged(tmp_path / "one", keep_last=9)
    monkeypatch.setattr(metrics, "MAX_SKIPPED_BYTES", (tmp_path / "one" / METRICS).stat().st_size // 4)
    train_logged(tmp_path / "one", from_step=2, branch=str(tmp_path / "branch"))  # warnings are errors
    assert numbers(tmp_path / "branch") == numbers(tmp_path / "one")


def test_a_deleted_log_is_restored_from_the_checkpoint(train_logged, tmp_path):
    train_logged(tmp_path / "one")
    train_logged(tmp_path / "lost", stop_after=5)
    (tmp_path / "lost" / METRICS).unlink()
    train_logged(tmp_path / "lost")
    expected = [line for line in numbers(tmp_path / "one") if "loss" in line or line["step"] > 5]
    assert numbers(tmp_path / "lost") == expected


def test_a_branch_starts_with_the_lines_of_its_origin(train_logged, tmp_path):
    train_logged(tmp_path / "one", keep_last=9)
    train_logged(tmp_path / "one", from_step=4, branch=str(tmp_path / "branch"))
    assert numbers(tmp_path / "branch") == numbers(tmp_path / "one")


def test_a_checkpoint_is_never_durable_before_its_lines(run, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "BUDGET", 0.0)  # no race: a save has ended when it returns
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    durable_first: dict[int, bool] = {}

    def watch(event):
        if isinstance(event, CheckpointStarted):
            path = tmp_path / METRICS
            last = json.loads(path.read_bytes().splitlines()[-1])
            durable_first[event.step] = last["step"] == event.step and not event.path.exists()
            assert path.stat().st_size == synced[-1]

    with pytest.warns(DistrustWarning, match="saved synchronously"):
        run(tmp_path, observers=[MetricsWriter(TrainConfig()), watch])
    assert durable_first == {2: True, 4: True, 6: True, 8: True, 9: True}


def test_a_full_disk_does_not_stop_the_run_and_the_lines_come_later(train_logged, tmp_path, monkeypatch):
    write, calls = os.write, []

    def full_for_a_while(file, data):
        calls.append(file)
        if 3 <= len(calls) < 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:50])  # and never all at once

    monkeypatch.setattr(metrics.os, "write", full_for_a_while)
    with pytest.warns(DistrustWarning, match=r"cannot be written: .*metrics\.jsonl: No space") as reported:
        ended, _, _ = train_logged(tmp_path / "full", save_every=0)
    monkeypatch.undo()
    assert len(reported) == 1
    alone, _, _ = train_logged(tmp_path / "alone", save_every=0)
    assert ended.state_digest == alone.state_digest
    assert numbers(tmp_path / "full") == numbers(tmp_path / "alone")


@pytest.mark.parametrize("name", [METRICS, PROVENANCE])
def test_a_log_that_cannot_be_created_is_retried_at_each_checkpoint(train_logged, tmp_path, name):
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)

    def room(event):
        if isinstance(event, StepEnded) and event.step == 5:
            (out / name).rmdir()

    with pytest.warns(DistrustWarning, match=f"log cannot be written: .*{name}: ") as reported:
        train_logged(out, after=[room])
    assert len(reported) == 1
    train_logged(tmp_path / "alone")
    assert numbers(out) == numbers(tmp_path / "alone")
    assert (out / PROVENANCE).read_text() == (tmp_path / "alone" / PROVENANCE).read_text()


def test_the_last_checkpoint_still_writes_the_missing_lines(train_logged, tmp_path, monkeypatch):
    write, full = os.write, []

    def watch(event):
        full[:] = [True] if isinstance(event, StepEnded) and event.step >= 8 else []

    def on_a_full_disk(file, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(metrics.os, "write", on_a_full_disk)
    with pytest.warns(DistrustWarning, match="log cannot be written"):
        train_logged(tmp_path / "full", before=[watch])
    monkeypatch.undo()
    train_logged(tmp_path / "alone")
    assert numbers(tmp_path / "full") == numbers(tmp_path / "alone")


@pytest.mark.parametrize("name", [METRICS, PROVENANCE])
def test_a_folder_at_the_path_of_the_log_does_not_stop_the_run(run, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.warns(DistrustWarning, match=f"{name}: exists already, and is not a file"):
        ended, _ = run(tmp_path / "run", observers=[MetricsWriter(TrainConfig())])
    assert ended.finished


def test_a_damaged_step_number_removes_no_other_line():
    """Of an evaluation: believed, it would have all steps until then made anew."""
    history = {name: [float(step) for step in range(1, 31)] for name in STEP_METRICS}
    complete = []
    for step in range(1, 31):
        complete.append(line_of({"step": step, **dict.fromkeys(STEP_METRICS, float(step)), "seconds": 1.0}))
        if step % 5 == 0:
            complete.append(line_of({"step": step, "eval_loss": 1.5}))
    at = complete.index(line_of({"step": 10, "eval_loss": 1.5}))
    damaged = [*complete[:at], line_of({"step": 25, "eval_loss": 1.5}), *complete[at + 1 :]]
    assert list(repair_lines(damaged, step=30, history=history)) == [*complete[:at], *complete[at + 1 :]]
    # A line of a step that is lost takes no evaluation with it: the lines around it agree.
    for lost in ([at - 1], [at - 1, at - 2], [len(complete) - 2]):
        damaged = [line for number, line in enumerate(complete) if number not in lost]
        repaired = [json.loads(line) for line in repair_lines(damaged, step=30, history=history)]
        assert [line["step"] for line in repaired] == [json.loads(line)["step"] for line in complete]
        assert sum("eval_loss" in line for line in repaired) == 6


def test_the_weights_are_written_to_provenance_json(train_logged, tmp_path):
    train_logged(tmp_path, weighting="published")
    remaining = json.loads((tmp_path / PROVENANCE).read_text())
    assert (remaining["examples"], remaining["weighting"], remaining["alpha"]) == (11, "published", 2.7)
    assert sum(remaining["counts"]) == 11


def line_of(values: dict) -> bytes:
    """As it is written: what is no number to JSON is a string."""
    plain = {name: str(value) if abs(value) == float("inf") else value for name, value in values.items()}
    return json.dumps(plain).encode() + b"\n"


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
runs = st.lists(st.tuples(*[finite | st.just(float("inf"))] * len(STEP_METRICS)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(runs, st.data())
def test_any_damage_is_mended(rows, draw):
    """Lines cut off, torn, lost, twice, in another order or of another run: nothing else is ever kept."""
    history = {name: [row[column] for row in rows] for column, name in enumerate(STEP_METRICS)}
    complete = []
    for number in range(1, len(rows) + 1):
        step = {"step": number, **{name: history[name][number - 1] for name in STEP_METRICS}}
        complete.append(line_of({**step, "seconds": 1.0}))
        if number % 3 == 0:
            complete.append(line_of({"step": number, "eval_loss": 1.5}))
    last_step = draw.draw(st.integers(1, len(rows)))
    remaining = draw.draw(st.lists(st.sampled_from(complete), max_size=2 * len(complete)))
    junk = st.sampled_from(
        [b"\n", b"{\n", b"[1]\n", b'{"step": "1"}\n', b'{"step": 1, "loss": 0}\n', b"\xff\n"]
    )
    damaged = [
        line
        for pair in zip(
            remaining,
            draw.draw(st.lists(junk, min_size=len(remaining), max_size=len(remaining))),
            strict=True,
        )
        for line in pair
    ]
    damaged.append(complete[-1][:-1])  # torn

    repaired = [json.loads(line) for line in repair_lines(damaged, step=last_step, history=history)]
    steps = [line for line in repaired if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, last_step + 1))
    for line in steps:
        assert [float(line[name]) for name in STEP_METRICS] == list(rows[line["step"] - 1])
    evaluations = [line["step"] for line in repaired if "eval_loss" in line]
    assert evaluations == sorted(set(evaluations))
    assert [line["step"] for line in repaired] == sorted(line["step"] for line in repaired)
    # Whole, it stays as it is, byte for byte.
    upto = [line for line in complete if json.loads(line)["step"] <= last_step]
    assert list(repair_lines(complete, step=last_step, history=history)) == upto
