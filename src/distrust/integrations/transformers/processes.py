"""The processes of a Trainer under DDP: the first one saves, and all resume from what it has verified.

Weights, moments and the log are the same in all; the states of generators, and the sums of losses since the
last log, are each process's own. All make the same calls. If one fails, its launcher
ends the others.
"""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainingArguments

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound, ResumeRefused
from distrust.integrations.settings import refuse_differences
from distrust.integrations.transformers.trainer_state import StepEnd, to_array
from distrust.ranks import Array, Ranks, gather_json, leads


class Processes(Ranks):
    """Those of a run, as one of them sees them; a single one if there is no launcher."""

    index = count = 0

    def __init__(self, args: TrainingArguments) -> None:
        self.index, self.count = args.process_index, args.world_size
        self._timeout = args.ddp_timeout_delta
        self._group: Any = None  # of gloo, which needs no GPU

    def gather(self, array: Array, *, patient: bool = False) -> Array:  # noqa: ARG002
        """See :class:`distrust.ranks.Ranks`; the timeout is the Trainer's."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        rows = np.empty((self.count, *array.shape), array.dtype)
        dist.all_gather([*torch.from_numpy(rows)], torch.from_numpy(array), group=self._group)
        return rows


def add_local_states(processes: Processes, checkpoint: Checkpoint, step_end: StepEnd) -> Checkpoint:
    """The checkpoint with what is each process's own at the end of its step; of a single process as it is."""
    if processes.count == 1:
        return checkpoint
    state = {
        "rng": {"now": step_end.generators, "epoch": step_end.epoch_generators},
        "collected": step_end.collected,
        "loss_sum": float(step_end.loss_sum),
    }
    text = json.dumps(state, default=lambda array: np.asarray(array).tolist())
    return replace(checkpoint, rng={**checkpoint.rng, "processes": to_array(gather_json(processes, text))})


def load_latest(processes: Processes, manager: CheckpointManager) -> Checkpoint | None:
    """The newest intact checkpoint, with the state of this process; None if there are none.

    ResumeRefused: a process does not see the file, or it was saved by another number of processes.
    """
    latest = None
    if leads(processes):
        with contextlib.suppress(CheckpointNotFound):
            latest = manager.load_latest(framework="torch")
    step = gather_json(processes, latest and latest.step)[0]
    if step is None:
        return None
    file = manager.scan().by_step().get(step)
    digests = gather_json(processes, [file and file.digest, socket.gethostname()])
    for index, (digest, host) in enumerate(digests):
        if digest != digests[0][0]:
            raise ResumeRefused(
                f"process {index} ({host}) does not see the checkpoint of step {step} in "
                f"{manager.directory}: give a directory on a disk that all processes share"
            )
    checkpoint = latest or manager.load(step, framework="torch")
    rng, metadata = checkpoint.rng, checkpoint.metadata
    states = json.loads(np.asarray(rng["processes"]).tobytes()) if "processes" in rng else [None]
    name = "the number of processes"
    refuse_differences(step, {name: len(states)}, {name: processes.count})
    if processes.count == 1:
        return checkpoint
    state = json.loads(str(states[processes.index]))
    return replace(
        checkpoint,
        rng={**rng, **state["rng"]},
        history={**checkpoint.history, "collected": state["collected"]},
        metadata={**metadata, "trainer": {**metadata["trainer"], "loss_sum": state["loss_sum"]}},
    )
