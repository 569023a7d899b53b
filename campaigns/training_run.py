"""Training runs that campaigns disturb: the real command, forks of it, and the trainer on the toy engine."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from campaigns.campaign import Campaign, Case, never, require
from campaigns.campaign import parser as campaign_parser
from campaigns.child import HANG_SECONDS
from campaigns.oracle import Rules
from campaigns.session import Command, Forks, Launcher, Session
from campaigns.triggers import Trigger, send_at
from distrust.checkpoint import catalog
from distrust.errors import DistrustError
from distrust.option_values import STEP_METRICS
from distrust.reporting.metrics import METRICS, STEP_FIELDS

Reference = TypeVar("Reference")

COMMAND = Command([sys.executable, "-m", "distrust"], name="the real command")
PROGRAM = "distrust.cli:main"  # for the fork server
#: Fields of metrics.jsonl that depend on the machine, or on how often the run was interrupted.
MACHINE_FIELDS = set(STEP_FIELDS) - {"step", *STEP_METRICS}
#: A training of some seconds that prints a line for each step.
STEPS = 40
TRAINING = [
    "--max-steps", str(STEPS), "--keep-last", "3", "--lora-dropout", "0.1", "--lora-rank", "4",
    "--batch-size", "1", "--threads", "1", "--log-every", "1",
    "--eval-fraction", "0.004", "--eval-every", "7", "--keep-best", "0",
]  # fmt: skip
#: The same rules, for the oracle.
RULES = Rules(keep_last=3)
#: Beginnings of the lines that it prints when it loads the model, and when its loop begins.
LOADING, LOOP = "loading the model ", "training "
#: What a training imports: most of its time before the first step.
IMPORTS = [
    *("distrust.cli.train", "distrust.engines.torch.engine", "distrust.reporting.console"),
    *("distrust.trainer", "distrust.training.run", "distrust.checkpoint.arrays.of_torch"),
    *("distrust.training", "numpy.random", "peft", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
]


def parser(description: str | None) -> argparse.ArgumentParser:
    options = campaign_parser(description, writes=True)
    options.add_argument(
        "--engine", choices=("torch", "mlx"), default="torch", help="that trains (default: torch)"
    )
    return options


def forks() -> Forks:
    return Forks(PROGRAM, IMPORTS, name="a fork")


def disturb_runs(
    campaign: Campaign,
    *,
    real_every: int,
    reference: Callable[[TrainingRun], Reference],
    one_case: Callable[[Campaign, Case, TrainingRun, Reference], None],
) -> None:
    """Run the cases of a campaign that disturbs training runs, each in a folder of its own.

    One case in ``real_every`` is the real command; the others are forks, if torch trains. ``reference``
    trains without a disturbance, by the real command; ``one_case`` gets what it returned.
    """
    engine = campaign.options.engine
    training = [*TRAINING, "--engine", engine]
    directory = Path(tempfile.mkdtemp(prefix=f"{campaign.name}-", dir=campaign.options.directory))
    expected = reference(TrainingRun(directory / "reference", training, COMMAND))
    # Only torch is known to work in a fork of a process that has imported it.
    with forks() if engine == "torch" else nullcontext(COMMAND) as fork_launcher:
        for case in campaign.cases():
            launcher = COMMAND if case.number % real_every == 0 else fork_launcher
            folder = directory / f"case-{case.number}"
            one_case(campaign, case, TrainingRun(folder, training, launcher), expected)
            shutil.rmtree(folder)
    shutil.rmtree(directory)  # not after a counterexample: its folder is evidence


@dataclass(frozen=True)
class TrainingRun:
    out: Path  # the folder
    options: Sequence[str]  # of ``distrust train``
    launcher: Launcher = COMMAND  # starts the command
    hang_seconds: float = HANG_SECONDS  # a session that runs longer counts as a hang
    log_folder: Path | None = None  # for what it prints; by default ``out``

    @property
    def checkpoints(self) -> Path:
        return self.out / catalog.RUN_SUBDIRECTORY

    @property
    def arguments(self) -> list[str]:
        """Of the command line."""
        return ["train", "--out", str(self.out), *self.options]

    def with_options(self, *options: str) -> TrainingRun:
        return replace(self, options=[*self.options, *options])

    def start(self) -> Session:
        """Start the command, from the beginning or from the newest checkpoint."""
        folder = self.log_folder or self.out
        folder.mkdir(parents=True, exist_ok=True)
        paths = {"folder": folder, "directory": self.checkpoints}
        return Session(self.launcher, self.arguments, **paths, hang_seconds=self.hang_seconds)

    def disturb(self, number: int, trigger: Trigger, delay: float = 0.0) -> tuple[Session, int]:
        """Start it, send a signal, wait for its end; returns the session and the exit code."""
        session = self.start()
        send_at(session, number, trigger, delay)
        return session, session.wait()

    def finish(self) -> str:
        """Run the command to its end; returns the digest of the final state."""
        session = self.start()
        code = session.wait()
        require(code == 0, f"{self.out}: exit code {code}: {session.errors()}")
        return self.final_digest()

    def final_digest(self) -> str:
        """The state digest of the newest checkpoint, which must be a final one."""
        with never(DistrustError, f"{self.out}: "):
            newest = catalog.newest(self.checkpoints)
        require(newest.kind == "final", f"{self.out}: ended without a final checkpoint")
        return newest.state_digest

    def metrics(self) -> list[dict[str, float]]:
        with never((OSError, ValueError), f"{self.out / METRICS}: "):
            lines = [json.loads(line) for line in (self.out / METRICS).read_bytes().splitlines(keepends=True)]
        return [{key: value for key, value in line.items() if key not in MACHINE_FIELDS} for line in lines]

    def steps(self) -> list[int]:
        """The steps of its checkpoints, by their names."""
        paths = self.checkpoints.glob("checkpoint-*.safetensors")
        return sorted(int(path.stem.split("-")[1]) for path in paths)

    def temporary(self) -> list[Path]:
        return list(self.checkpoints.glob(".checkpoint-*.tmp"))


@functools.cache
def reference_digest(launcher: Launcher, options: Sequence[str]) -> str:
    """The state in which a training ends that nobody disturbs; ``options`` must be hashable."""
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        return TrainingRun(Path(folder) / "run", options, launcher).finish()


def train_toy(out: Path, data: Path, *observers: Callable[[Any], None], **options: Any) -> Any:
    """Train the toy engine, in this process; returns what ``DistrustTrainer.train`` returns."""
    from distrust import DistrustTrainer, TrainConfig
    from distrust.testing.toy_engine import ToyEngine

    config = TrainConfig(out=str(out), data=str(data), batch_size=2, warmup_steps=2, **options)
    return DistrustTrainer(config, engine=ToyEngine(), observers=list(observers)).train()
