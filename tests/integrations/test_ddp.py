"""A Trainer under DDP: the first process saves, all resume, and the run ends as an undisturbed one."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments

from distrust import Checkpoint, CheckpointManager, ConfigError, ResumeRefused
from distrust.integrations.transformers import DistrustCheckpoints
from distrust.integrations.transformers.processes import Processes, load_latest
from tests.integrations.test_attach import build
from tests.trainer_warnings import pytestmark  # noqa: F401

#: Rows of several lengths: the generators of the processes draw different numbers for dropout.
ROWS = [[(7 * row + 3 * place) % 32 for place in range(4 + row % 5)] for row in range(12)]
OPTIONS: dict[str, Any] = {
    "data": [{"input_ids": row, "labels": row} for row in ROWS],
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,  # six batches an epoch: three steps
    "save_steps": 2,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}


def test_a_killed_run_ends_as_an_undisturbed_one(start_runs, tmp_path):
    run = start_runs("tests.integrations.ddp_run")

    def ends(name: str, directory: str | None, **job: Any) -> list[Any]:
        folder = tmp_path / name
        job = {"kill": None, "options": OPTIONS, "directory": directory and str(tmp_path / directory), **job}
        assert run(folder=str(folder), **job) == 0
        return json.loads((folder / "ends").read_text())

    undisturbed = ends("undisturbed", None)
    assert [end["code"] for end in undisturbed] == [0, 0], undisturbed
    assert undisturbed[0]["generators"] != undisturbed[1]["generators"]  # else it would show nothing
    assert undisturbed[0]["train_loss"] != undisturbed[1]["train_loss"]
    killed = ends("killed", "saved", kill=[0, 5])
    assert [end["code"] for end in killed] == [-9, 1]
    alone = build(tmp_path, **OPTIONS)
    with pytest.raises(ResumeRefused, match="the number of processes was 2 and is now 1"):
        DistrustCheckpoints(tmp_path / "saved").attach(alone).train()
    last = ends("last", "saved")
    assert {end.pop("began") for end in last} <= {2, 4}
    assert [end.pop("began") for end in undisturbed] == [0, 0]
    assert last == undisturbed
    full = ends("full", "full", disk_bytes=4096)
    assert full[0]["error"].startswith("SaveFailed: ")
    assert [end["code"] for end in full] == [1, 1], "no process waits for one that has failed"


def test_a_process_that_does_not_see_the_checkpoint_is_named(tmp_path):
    for name in ("first", "copy"):
        manager = CheckpointManager(tmp_path / name)
        manager.save(Checkpoint(step=2, model={"weight": np.ones(1)}, config={"name": name}))
        manager.close()
    rows: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=10)

    class Thread(Processes):
        def __init__(self, index: int) -> None:
            self.index, self.count = index, 2

        def gather(self, array, *, patient=False):
            rows[self.index] = array
            barrier.wait()
            result = np.stack(rows)
            barrier.wait()
            return result

    for second in ("empty", "copy"):
        managers = [CheckpointManager(tmp_path / name) for name in ("first", second)]
        with ThreadPoolExecutor() as threads:
            loads = [threads.submit(load_latest, Thread(index), managers[index]) for index in range(2)]
        for load in loads:
            with pytest.raises(
                ResumeRefused, match=r"process 1 \(.*a disk that all processes share"
            ) as error:
                load.result()
            assert "\n" not in str(error.value)


def test_only_the_first_process_writes_a_folder(tmp_path, monkeypatch):
    checkpoints = DistrustCheckpoints(tmp_path / "saved")
    checkpoints.attach(build(tmp_path))  # there is no checkpoint that it could find
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert checkpoints.to_folder(tmp_path / "folder") == tmp_path / "folder"
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda trainer: setattr(trainer.args, "enable_jit_checkpoint", True), "let processes differ"),
        (lambda trainer: setattr(trainer.args, "ddp_broadcast_buffers", False), "let processes differ"),
        (lambda trainer: setattr(trainer.accelerator.state, "distributed_type", "NO"), "under DDP alone"),
    ],
)
def test_what_several_processes_may_not_have(tmp_path, monkeypatch, change, problem):
    trainer = build(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", "MULTI_CPU")
    change(trainer)
    with pytest.raises(ConfigError, match=problem) as error:
        DistrustCheckpoints(tmp_path / "saved").attach(trainer)
    assert "\n" not in str(error.value)
