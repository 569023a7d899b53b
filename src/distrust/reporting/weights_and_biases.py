"""The run for Weights & Biases, through its own library, which reads its own settings (WANDB_PROJECT, …)."""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.config import TrainConfig, key
from distrust.errors import ConfigError
from distrust.reporting.scalars import TRAINING, scalars_of
from distrust.training.events import Event, RunEnded, RunStarted

#: The identity of the run there, in the run's folder: the same command goes on with the same one.
RUN_ID = "wandb-run-id"
DEFAULT_PROJECT = "distrust"


class WandbWriter:
    """Logs to Weights & Biases.

    Steps that are made again after a crash have the numbers that they had, so what is there already stays,
    and only what is new is sent. Of what a killed session took with it, as it does offline, the next one
    sends what its checkpoint remembers: the losses of the steps.

    Args:
        config: of the run.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"--report-to wandb needs its library ({error}): pip install wandb") from None
        self._wandb = wandb
        self._config = config
        self._run: Any = None
        self._next_step = 0

    def __call__(self, event: Event) -> None:
        """Log what an event says."""
        match event:
            case RunStarted():
                self._begin(event)
            case RunEnded() if self._run is not None:
                self._run.finish(exit_code=0 if event.finished else 1)
                self._run = None
            case _ if self._run is not None:
                step, values = scalars_of(event)
                if values and step >= self._next_step:
                    self._run.log(values, step=step)

    def _begin(self, event: RunStarted) -> None:
        out = event.out
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=out.name,
            id=_run_id(out),
            resume="allow",
            dir=str(out),
            config={key(name): value for name, value in asdict(self._config).items()},
        )
        self._next_step = self._run.starting_step
        for step in range(max(1, self._next_step), event.step + 1):
            known = {f"{TRAINING}{name}": values[step - 1] for name, values in event.history.items()}
            self._run.log(known, step=step)
            self._next_step = step + 1


def _run_id(out: Path) -> str:
    file = out / RUN_ID
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        made = secrets.token_hex(8)
        with atomic_file(file, force=False) as new:
            new.write(f"{made}\n".encode())
        return made
