"""A Trainer under DDP in two processes, forked from one that has imported what they need."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from campaigns.integrations.digest import digest
from distrust.errors import DistrustError
from distrust.integrations.random import generators
from distrust.integrations.transformers import DistrustCheckpoints
from tests.integrations.test_attach import build


class KillAt(TrainerCallback):
    """Kills one of the processes at the end of a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


class Begin(TrainerCallback):
    """Notes the step at which training began."""

    step: int | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step if self.step is None else self.step


def train(folder: str, directory: str | None, kill: list[int] | None, options: dict[str, Any]) -> Any:
    """Train; what an undisturbed run must equal, with the step at which this process began."""
    torch.set_num_threads(1)
    begin = Begin()
    callbacks = [begin, *([KillAt(*kill)] if kill else [])]
    trainer = build(Path(folder), callbacks=callbacks, ddp_backend="gloo", **options)
    if directory is not None:
        DistrustCheckpoints(directory).attach(trainer)
    result = trainer.train()
    log = [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]
    return {
        "weights": digest(trainer.model.state_dict()),
        "moments": digest(trainer.optimizer.state_dict()["state"]),
        "generators": digest(generators()),
        "log": log,
        "train_loss": result.training_loss,
        "began": begin.step,
    }


def run(folder: str, disk_bytes: int | None = None, **job: Any) -> None:
    """Write to ``ends`` how each process ended; files of the first one cannot exceed ``disk_bytes``."""
    Path(folder).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            with open(os.devnull, "w") as nowhere:  # the output of this process is read by the test
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ.update({name: str(value) for name, value in numbers.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == 0 and disk_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (disk_bytes, disk_bytes))
            code = 1
            try:
                end = train(folder, **job)
                code = 0
                dist.destroy_process_group()
            except DistrustError as error:
                end = {"error": f"{type(error).__name__}: {error}"}
            except Exception:  # another process is lost
                end = {"error": traceback.format_exc()[-2000:]}
            Path(folder, str(rank)).write_text(json.dumps(end))
            os._exit(code)
    ends = []
    for rank, pid in enumerate(pids):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file = Path(folder, str(rank))
        ends.append({"code": code, **(json.loads(file.read_text()) if file.exists() else {})})
    Path(folder, "ends").write_text(json.dumps(ends))
