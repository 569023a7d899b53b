"""TensorBoard and Weights & Biases, each through its own library: every step once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrust import DistrustWarning, TrainConfig
from distrust.errors import DistrustError, MissingDependency, WriteFailed
from distrust.reporting.dashboards import FOLDER, Dispensable, TensorBoardWriter, create_observers
from distrust.training.events import RunEnded, StepEnded


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """By tag, the values by step, as TensorBoard shows them; a step that it would show twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / FOLDER), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in shown.Tags()["scalars"]:
        steps = [event.step for event in shown.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
        curves[tag] = {event.step: event.value for event in shown.Scalars(tag)}
    return curves


def test_tensorboard_shows_repeated_steps_once(run, eval_data, tmp_path):
    options = {"eval_data": str(eval_data), "eval_every": 3, "save_every": 4, "keep_best": 0}

    class Crash(Exception):
        pass

    def crash(event):
        if isinstance(event, StepEnded) and event.step == 7:
            raise Crash  # saved by the loop: so the newest checkpoint is taken away, below

    with pytest.raises(Crash):
        run(tmp_path, observers=[TensorBoardWriter(), crash], **options)
    (tmp_path / "checkpoints" / "checkpoint-7.safetensors").unlink()
    ended, events = run(tmp_path, observers=[TensorBoardWriter()], **options)
    assert [event.step for event in events if isinstance(event, StepEnded)] == [5, 6, 7, 8, 9]
    curves = scalars(tmp_path)
    assert list(curves["train/loss"]) == list(range(1, 10))
    assert list(curves["eval/loss"]) == [3, 6, 9]
    assert {
        "train/learning_rate",
        "speed/tokens_per_second",
        "memory/host_gib",
        "eval/perplexity",
    } <= curves.keys()
    alone, _ = run(tmp_path / "alone", observers=[TensorBoardWriter()], **options)
    assert alone.state_digest == ended.state_digest
    assert scalars(tmp_path / "alone")["train/loss"] == curves["train/loss"]


WANDB_RUN = """
import os, signal, sys
sys.path[:0] = {paths!r}
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust import DistrustTrainer, TrainConfig
from distrust.reporting.dashboards import create_observers
from distrust.training.events import RunEnded, StepEnded
config = TrainConfig(**TOY | {options!r}, report_to=("wandb",))
if {killed}:
    def kill(event):
        if isinstance(event, StepEnded) and event.step == {killed}:
            os.kill(os.getpid(), signal.SIGKILL)
    DistrustTrainer(config, engine=ToyEngine(), observers=[*create_observers(config), kill]).train()
def show(event):
    if isinstance(event, RunEnded):
        import wandb
        settings = wandb.run.settings
        print(settings.base_url, settings.settings_workspace, "WANDB_DISABLE_GIT" in os.environ)
DistrustTrainer(config, engine=ToyEngine(), observers=[show, *create_observers(config)]).train()
"""


def hostile_folder(folder: Path) -> tuple[Path, Path]:
    """A folder whose settings redirect wandb, and a file that exists once git has run a program of it."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9/taken\n")
    evidence = folder / "evidence"
    (folder / "file").touch()
    commit = "-c user.name=a -c user.email=a@b commit -m a"
    for command in ("init", "add file", commit, f"config core.fsmonitor 'touch {evidence};false'"):
        subprocess.run(["git", *shlex.split(command)], check=True, cwd=folder, capture_output=True)
    return folder, evidence


@pytest.mark.parametrize("content", ["../../other", "a b", "", "x" * 65, "a\nb\n", None, "link", "pipe"])
def test_an_identity_that_a_stranger_wrote_is_one_clear_line(run, tmp_path, content, monkeypatch):
    file = tmp_path / "wandb-run-id"
    if content is None:
        file.mkdir()
    elif content == "link":
        (tmp_path / "secret").write_text("abc")
        file.symlink_to(tmp_path / "secret")
    elif content == "pipe":
        os.mkfifo(file)
    else:
        file.write_text(content)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # nothing of it is called
    observers = create_observers(TrainConfig(report_to=("wandb",), out=str(tmp_path)))
    with pytest.raises(DistrustError, match=rf"^{re.escape(str(file))}: .*; re(move|place) it") as caught:
        run(tmp_path, observers=observers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_dashboard_is_not_written_through_a_link(run, tmp_path, name, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    if name == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    observers = create_observers(TrainConfig(report_to=(name,)))
    with pytest.raises(WriteFailed, match=f"run/{name}: is a link"):
        run(tmp_path / "run", observers=observers)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_wandb_gets_every_step_under_the_identity_of_the_run(data, eval_data, tmp_path):
    tests = Path(__file__).parent
    options = {"data": str(data), "eval_data": str(eval_data), "out": str(tmp_path / "run"), "eval_every": 3}
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    environment["WANDB_SAVE_CODE"] = "true"  # as an organization may have it: then wandb calls `git diff`
    folder, program = hostile_folder(tmp_path / "hostile")
    for killed in (5, 0):
        script = WANDB_RUN.format(paths=[str(tests), str(tests.parent)], options=options, killed=killed)
        completed = subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            env=environment,
            timeout=120,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert completed.returncode == (-signal.SIGKILL if killed else 0)
    server, *afterwards = completed.stdout.split()
    assert "127.0.0.1" not in server
    assert afterwards == [f"{tmp_path}/run/wandb/settings", "False"]  # the library is as it was
    assert not program.exists()
    identity = (tmp_path / "run" / "wandb-run-id").read_text().strip()
    logs = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    log = max(logs, key=lambda path: path.stat().st_mtime)
    read = f"""
import json
from wandb.proto import wandb_internal_pb2 as pb
raw, place, parts, rows = open({str(log)!r}, "rb").read(), 7, b"", []
while place < len(raw):  # blocks of 32 KiB, of pieces with a checksum, a length and a type
    left = 32768 - place % 32768
    if left < 7:
        place += left
        continue
    length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
    parts += raw[place + 7 : place + 7 + length]
    place += 7 + length
    if kind not in (1, 4):  # the first piece of a record, or one in its middle
        continue
    record, parts = pb.Record.FromString(parts), b""
    if record.WhichOneof("record_type") == "history":
        rows.append({{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                     for item in record.history.item}})
print(json.dumps(rows))
"""
    completed = subprocess.run(
        [sys.executable, "-c", read], check=True, env=environment, capture_output=True, text=True, timeout=60
    )
    rows = json.loads(completed.stdout)
    assert [row["_step"] for row in rows] == list(range(1, 10))
    assert [row["_step"] for row in rows if "eval/loss" in row] == [
        6,
        9,
    ]  # the killed one had that of 3
    assert all(row["train/loss"] > 0 for row in rows)


def test_a_failing_dashboard_is_dropped_and_the_run_continues(run, tmp_path):
    events = []

    def fails(event):
        events.append(event)
        raise RuntimeError("no connection")

    with pytest.warns(
        DistrustWarning, match="Weights & Biases failed and gets no more events: no connection"
    ):
        ended, _ = run(tmp_path, observers=[Dispensable(fails, "Weights & Biases")])
    assert isinstance(ended, RunEnded)
    assert ended.finished
    assert len(events) == 1


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_library_is_reported_at_once(monkeypatch, name, module):
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"--report-to {name} needs {module}.*: pip install .*dashb"):
        create_observers(TrainConfig(report_to=(name,)))
