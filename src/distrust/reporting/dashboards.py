"""TensorBoard and Weights & Biases, each through its own library: no other framework is loaded for them.

Each optimizer step is logged once, also when a crash made the run repeat some of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.checkpoint.files import open_regular_file
from distrust.config import TrainConfig, key
from distrust.errors import ConfigError, DistrustError, ErrorTranslator, MissingDependency, warn
from distrust.reporting.metrics import MetricsWriter, memory_fields
from distrust.training.events import (
    CheckpointStarted,
    Evaluated,
    Event,
    Observer,
    RunEnded,
    RunStarted,
    StepEnded,
)

#: Folder of TensorBoard's event files, in the run's folder.
FOLDER = "tensorboard"
#: File with the run's identity at Weights & Biases, in the run's folder: a resumed run keeps it.
RUN_ID = "wandb-run-id"
#: What the dashboards write in the run's folder; wandb names its own folder.
WRITTEN_NAMES = (FOLDER, RUN_ID, "wandb", ".wandb")
_RUN_ID_SYNTAX = re.compile(rb"([A-Za-z0-9_-]{1,64})\n?")
DEFAULT_PROJECT = "distrust"
TRAINING = "train/"


def create_observers(config: TrainConfig) -> list[Observer]:
    """The observers that a config asks for: ``metrics.jsonl`` always, and each of ``report_to``.

    Raises:
        MissingDependency: a dashboard's library is not installed.
    """
    observers: list[Observer] = [MetricsWriter(config)]  # never dispensable
    if "tensorboard" in config.report_to:
        observers.append(Dispensable(TensorBoardWriter(), "TensorBoard"))
    if "wandb" in config.report_to:
        observers.append(Dispensable(WandbWriter(config), "Weights & Biases"))
    return observers


@contextlib.contextmanager
def default_observers(config: TrainConfig) -> Iterator[tuple[Observer, ...]]:
    """Context manager of the observers of ``distrust train``: progress on the console, and the others."""
    from distrust.reporting.console import ConsoleReporter  # rich is slow to load

    with ConsoleReporter(log_every=config.log_every) as console:
        yield (console, *create_observers(config))


class Dispensable:
    """Wraps an observer that a run can do without: when it fails, the run warns and stops calling it."""

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer: Observer | None = observer
        self._name = name

    def __call__(self, event: Event) -> None:
        """Pass the event on. Errors of this package are the user's to fix and are not swallowed."""
        if self._observer is None:
            return
        try:
            self._observer(event)
        except DistrustError:
            raise
        except Exception as error:  # any: the library is not ours
            self._observer = None
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{self._name} failed and gets no more events: {reason}")


def scalars_of(event: StepEnded | Evaluated, step_metrics: Sequence[str]) -> dict[str, float]:
    """The values of an event by ``group/name``; of a step, those of its ``step_metrics``.

    ``train/loss``, ``train/learning_rate`` and so on; ``eval/loss``, ``eval/loss/CLASS``;
    ``speed/tokens_per_second``, ``speed/stall_seconds``; ``memory/host_gib`` and so on.
    """
    if isinstance(event, Evaluated):
        return {f"eval/{name.removeprefix('eval_')}": value for name, value in event.metrics.items()}
    memory = memory_fields(event)
    return {
        **{f"{TRAINING}{name}": getattr(event, name) for name in step_metrics},
        "speed/tokens_per_second": event.tokens / event.seconds,
        "speed/stall_seconds": event.stall_seconds,
        **{f"memory/{name.removesuffix('bytes')}gib": value / 2**30 for name, value in memory.items()},
    }


class TensorBoardWriter:
    """Writes event files into the run's folder ``tensorboard``.

    A resumed run writes a session start, so TensorBoard hides the later steps of the killed session.

    Raises:
        MissingDependency: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        with _require_library("tensorboard"):
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self._event, self._session, self._writer = event_pb2.Event, event_pb2.SessionLog, EventFileWriter
        self._summary, self._value = summary_pb2.Summary, summary_pb2.Summary.Value
        self._file: Any = None

    def __call__(self, event: Event) -> None:
        """Log an event."""
        match event:
            case RunStarted():
                self._step_metrics = event.step_metrics
                self._file = self._writer(str(event.out / FOLDER))
                start = self._session(status=self._session.START)  # hides later steps
                self._add(event.step + 1 if event.step else 0, session_log=start)
            case _ if self._file is None:
                return
            case CheckpointStarted():
                self._file.flush()  # what the checkpoint covers is not logged again
            case RunEnded():
                self._file.close()
                self._file = None
            case StepEnded() | Evaluated():
                values = scalars_of(event, self._step_metrics).items()
                entries = [self._value(tag=tag, simple_value=value) for tag, value in values]
                self._add(event.step, summary=self._summary(value=entries))

    def _add(self, step: int, **content: Any) -> None:
        self._file.add_event(self._event(wall_time=time.time(), step=step, **content))


class WandbWriter:
    """Logs to Weights & Biases, whose library reads its own settings (``WANDB_PROJECT``, …).

    Repeated steps have the same numbers, so only steps that the server lacks are sent. What a killed session
    did not send, as in offline mode, the next session sends from the checkpoint's history: the step metrics.

    Raises:
        MissingDependency: the library is not installed.
    """

    def __init__(self, config: TrainConfig) -> None:
        with _require_library("wandb"):
            import wandb
        self._wandb = wandb
        self._config = config
        self._run: Any = None
        self._next_step = 0  # the first step that is sent

    def __call__(self, event: Event) -> None:
        """Log an event."""
        match event:
            case RunStarted():
                self._start(event)
            case _ if self._run is None:
                return
            case RunEnded():
                self._run.finish(exit_code=0 if event.finished else 1)  # 1 marks a stopped run
                self._run = None
            case StepEnded() | Evaluated() if event.step >= self._next_step:  # it ignores steps out of order
                self._run.log(scalars_of(event, self._step_metrics), step=event.step)

    def _start(self, event: RunStarted) -> None:
        self._step_metrics = event.step_metrics
        identity = _run_id(event.out)
        with _ignore_current_folder(self._wandb.Settings):
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
                name=event.out.name,
                id=identity,
                resume="allow",  # a resumed run continues the same curves
                dir=str(event.out),
                config={key(name): value for name, value in asdict(self._config).items()},
            )
        self._next_step = self._run.starting_step  # the first that the server lacks
        for step in range(max(1, self._next_step), event.step + 1):
            values = {f"{TRAINING}{name}": event.history[name][step - 1] for name in event.step_metrics}
            self._run.log(values, step=step)
            self._next_step = step + 1


@contextlib.contextmanager
def _ignore_current_folder(settings: Any) -> Iterator[None]:
    """Keep wandb, whose class of settings is given, away from the current folder, which may be a stranger's.

    It would take the address of the server, to which it sends the user's key, from ``wandb/settings`` there,
    and would call git, which runs programs that a repository names.
    """
    workspace, git = settings.settings_workspace, os.environ.get("WANDB_DISABLE_GIT")
    settings.settings_workspace = property(lambda _: os.devnull)  # the path of that file
    os.environ["WANDB_DISABLE_GIT"] = "true" if git is None else git  # the user may ask for it
    try:
        yield
    finally:
        settings.settings_workspace = workspace
        if git is None:
            del os.environ["WANDB_DISABLE_GIT"]


def _run_id(out: Path) -> str:
    """The run's identity; a new one if it has none."""
    file = out / RUN_ID
    try:
        with open_regular_file(file) as source:
            match = _RUN_ID_SYNTAX.fullmatch(source.read(100))  # bounded: the file may be anybody's
    except FileNotFoundError:
        identity = secrets.token_hex(8)  # random: the seeded generators stay untouched
        with atomic_file(file, force=False) as target:
            target.write(f"{identity}\n".encode())
        return identity
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    else:
        if match is not None:
            return match[1].decode()
        reason = "holds no identity of Weights & Biases"
    raise ConfigError(f"{file}: {reason}; remove it to begin a new run there")


def _require_library(name: str) -> ErrorTranslator:
    def translate(error: ImportError) -> MissingDependency:
        return MissingDependency(f"--report-to {name}", library=error.name or name, extra="dashboards")

    return ErrorTranslator((ImportError,), translate)
