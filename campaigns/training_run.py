"""One training run in a folder of its own: the command that trains into it, and what is done to it.

The command is ``distrust train`` itself. The same run can also be made of forks of a process that has
imported torch (``fork_server.py``), which begins within the second: the way to hundreds of kills.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from campaigns.campaign import Campaign, Case, CounterExample
from campaigns.campaign import parser as campaign_parser
from campaigns.processes import PATIENCE_SECONDS, Command, Forks, Launcher, Session
from campaigns.triggers import Trigger, strike
from distrust.checkpoint import catalog
from distrust.checkpoint.retention import Retention
from distrust.config import STEP_METRICS
from distrust.errors import DistrustError
from distrust.reporting.metrics import METRICS, STEP_FIELDS

Alone = TypeVar("Alone")

COMMAND = Command([sys.executable, "-m", "distrust"], name="the real command")
PROGRAM = "distrust.cli:main"
#: What a line of metrics.jsonl tells of the machine, or only where nothing was lost.
MACHINE = set(STEP_FIELDS) - {"step", *STEP_METRICS}
ENGINES = ("torch", "mlx")
#: A training of some seconds, which says of each step that it was made.
STEPS = 40
TRAINING = [
    "--max-steps", str(STEPS), "--keep-last", "3", "--lora-dropout", "0.1", "--lora-rank", "4",
    "--batch-size", "1", "--threads", "1", "--log-every", "1",
    "--eval-fraction", "0.004", "--eval-every", "7", "--keep-best", "0",
]  # fmt: skip
#: What it may remove.
RULES = Retention(keep_last=3)
#: How the lines begin that it prints when it begins to load, and when its loop begins.
LOADING, LOOP = "loading the model ", "training "
#: What a training imports: most of its time before the first step.
IMPORTS = [
    "distrust.cli.train",
    "distrust.engines.torch.engine",
    "distrust.reporting.console",
    "distrust.training",
    "numpy.random",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a campaign that disturbs training runs."""
    made = campaign_parser(description)
    made.add_argument("--directory", type=Path, help="where to train; default: where temporary files go")
    made.add_argument("--engine", choices=ENGINES, default="torch", help="that trains (default: torch)")
    return made


def forks() -> Forks:
    """Forks that train as the command does, with torch."""
    return Forks(PROGRAM, IMPORTS, name="a fork")


def disturb(
    campaign: Campaign,
    *,
    real_every: int,
    leave_alone: Callable[[TrainingRun], Alone],
    one_case: Callable[[Campaign, Case, TrainingRun, Alone], None],
) -> None:
    """Go through the cases of a campaign that disturbs training runs, each in a folder of its own.

    Args:
        campaign: with the options of :func:`parser`.
        real_every: of so many cases the first one is the real command; the others are forks, if torch trains.
        leave_alone: trains without a disturbance, by the real command.
        one_case: disturbs a run; given what that gave.
    """
    engine = campaign.options.engine
    training = [*TRAINING, "--engine", engine]
    place = Path(tempfile.mkdtemp(prefix=f"{campaign.name}-", dir=campaign.options.directory))
    alone = leave_alone(TrainingRun(place / "alone", training, COMMAND))
    # Only torch is known to work in a fork of a process that has imported it.
    with forks() if engine == "torch" else nullcontext(COMMAND) as forked:
        for case in campaign.cases():
            launcher = COMMAND if case.number % real_every == 0 else forked
            folder = place / f"case-{case.number}"
            one_case(campaign, case, TrainingRun(folder, training, launcher), alone)
            shutil.rmtree(folder)
    shutil.rmtree(place)  # not after a counterexample: its folder is kept


@dataclass(frozen=True)
class TrainingRun:
    """One folder, and the options that train into it.

    Attributes:
        out: the folder.
        options: of ``distrust train``.
        launcher: starts it.
        patience_seconds: if a session runs for so long, it hangs.
    """

    out: Path
    options: Sequence[str]
    launcher: Launcher = COMMAND
    patience_seconds: float = PATIENCE_SECONDS

    @property
    def checkpoints(self) -> Path:
        """The directory of its checkpoints."""
        return self.out / catalog.RUN_SUBDIRECTORY

    def with_options(self, *options: str) -> TrainingRun:
        """The same with more options."""
        return replace(self, options=[*self.options, *options])

    def start(self) -> Session:
        """Start the command: at the beginning, or where it was."""
        self.out.mkdir(parents=True, exist_ok=True)
        arguments = ["train", "--out", str(self.out), *self.options]
        return Session(
            self.launcher,
            arguments,
            folder=self.out,
            directory=self.checkpoints,
            patience_seconds=self.patience_seconds,
        )

    def disturb(self, number: int, instant: Trigger, delay: float = 0.0) -> tuple[Session, int]:
        """Start it, and send a signal; returns the session, which has ended, and its exit code."""
        session = self.start()
        strike(session, number, instant, delay)
        return session, session.wait()

    def finish(self) -> str:
        """Run the command to its end; returns the digest of the final state.

        Raises:
            CounterExample: if it fails, or leaves no final checkpoint.
        """
        session = self.start()
        code = session.wait()
        if code != 0:
            raise CounterExample(f"{self.out}: exit code {code}: {session.complaints()}")
        try:
            newest = catalog.newest(self.checkpoints)
        except DistrustError as error:
            raise CounterExample(f"{self.out}: {error}") from error
        if newest.kind != "final":
            raise CounterExample(f"{self.out}: ended without a final checkpoint")
        return newest.state_digest

    def numbers(self) -> list[dict[str, float]]:
        """What ``metrics.jsonl`` says, line by line, without what is the machine's.

        Raises:
            CounterExample: if it cannot be read.
        """
        try:
            lines = [json.loads(line) for line in (self.out / METRICS).read_bytes().splitlines(keepends=True)]
        except (OSError, ValueError) as error:
            raise CounterExample(f"{self.out / METRICS}: {error}") from error
        return [{key: value for key, value in line.items() if key not in MACHINE} for line in lines]

    def steps(self) -> list[int]:
        """The steps of its checkpoints, by their names."""
        return sorted(
            int(path.stem.split("-")[1]) for path in self.checkpoints.glob("checkpoint-*.safetensors")
        )

    def temporary(self) -> list[Path]:
        """What was not renamed yet, or never will be."""
        return list(self.checkpoints.glob(".checkpoint-*.tmp"))
