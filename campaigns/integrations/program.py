"""The program that is disturbed, for the fork server: ``CASE KEEPER FOLDER [KILL]``.

It trains a case from the newest checkpoint in a folder, or from the beginning, and prints where it begins and
every step. At the end, the digests of everything that has to equal an undisturbed run are in ``end.json``.
``example KEEPER FOLDER SCRIPT`` runs a script that works in a folder.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from campaigns.integrations.cases import BY_NAME, Case, Kill
from campaigns.integrations.digest import digest
from campaigns.integrations.protocol import CHECKPOINTS, END, EXAMPLE, Keeper

#: Ends of the names of logged timings.
TIMINGS = ("_runtime", "_per_second")


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Prints the steps, and kills the process where it is told to."""

    def __init__(self, kill: Kill | None) -> None:
        self._kill = kill
        self._grace_seconds = 0.0
        self._saved_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"begins at {state.global_step}", flush=True)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reach("micro-batch", state.global_step)
        if self._kill in (Kill("stop", state.global_step), Kill("grace", state.global_step)):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)  # the Trainer's timer marks the request in a thread
            self._kill = Kill("step", state.global_step + 1) if self._kill.moment == "grace" else None
            self._grace_seconds = 0.3  # for the save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"step {state.global_step}", flush=True)
        self._reach("step", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._saved_step:  # the first event at which an attached save has begun
            self._reach("save", state.global_step)

    on_train_end = on_step_begin  # the last save

    def _reach(self, moment: str, step: int) -> None:
        if self._kill == (moment, step):
            time.sleep(self._grace_seconds)
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    name, keeper, folder, *kill = arguments
    torch.set_num_threads(1)
    if keeper == "broken":
        torch.set_rng_state = lambda new_state: None
    if name == EXAMPLE:
        sys.argv = [kill[0], folder]
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # it would compile for half a minute
        runpy.run_path(kill[0], run_name="__main__")
        _leave()
    trained = train(BY_NAME[name], keeper, Path(folder), Kill.parse(kill[0]) if kill else None)  # type: ignore[arg-type]
    temporary = Path(folder, f"{END}.tmp")
    temporary.write_text(json.dumps(trained))
    temporary.replace(Path(folder, END))
    _leave()


def _leave() -> NoReturn:
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end takes seconds after a fork


def train(case: Case, keeper: Keeper, folder: Path, kill: Kill | None) -> dict[str, Any]:
    """Train to the end; returns the state there."""
    set_seed(3)  # of the program, before anything draws from the generators
    trainer = case.trainer(folder)
    trainer.add_callback(Reporter(kill))
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "jit_manager", None) is not None:
            callback.jit_manager.kill_wait = 0  # seconds between SIGTERM and its answer
    options = {}
    if keeper in ("distrust", "broken"):
        from distrust.integrations.transformers import DistrustCheckpoints

        DistrustCheckpoints(folder / CHECKPOINTS, pure_data=case.pure_data).attach(trainer)
    elif keeper == "trainer" and any(folder.glob("checkpoint-*")):
        options["resume_from_checkpoint"] = True
    output = trainer.train(**options)
    return end_of(trainer, output.training_loss)


def end_of(trainer: Any, train_loss: float) -> dict[str, Any]:
    """What an undisturbed run ends with: digests of tensors and generators, and all logs but timings."""
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(TIMINGS)}
        for entry in trainer.state.log_history
    ]
    return {
        "step": trainer.state.global_step,
        "best": [trainer.state.best_global_step, trainer.state.best_metric],
        "weights": digest(trainer.model.state_dict()),
        "moments": digest(trainer.optimizer.state_dict()),
        "schedule": digest(trainer.lr_scheduler.state_dict()),
        "generators": digest([random.getstate(), np.random.get_state(), torch.get_rng_state()]),
        "log_history": logs,
        "train_loss": train_loss,
    }
