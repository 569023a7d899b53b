"""The run on the console: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from signal import Signals
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distrust.reporting.display import pluralize, printable
from distrust.training.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    MemoryReset,
    Preparing,
    RunEnded,
    RunStarted,
    StepEnded,
)

#: Source classes of an evaluation that a line names.
CLASSES_SHOWN = 8
#: Weight of the newest step in the moving average of the speed.
SMOOTHING = 0.1


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: the default would end the program with the run unsaved."""
        raise


class ConsoleReporter:
    """Shows a run; use it as a context, so that the terminal is left as it was.

    Args:
        log_every: steps between lines, where the output is no terminal.
        stream: where to write.
    """

    def __init__(self, *, log_every: int, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._console = _Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
        self._live = self._console.is_terminal
        self._log_every = log_every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # else the warnings would leave the file they go to
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, facts="", visible=False)
        self._max_steps = 0
        self._last_saved: int | None = None
        self._seconds_per_token: float | None = None
        self._facts = ""
        self._began = time.perf_counter()

    def __enter__(self) -> ConsoleReporter:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:  # else it would end the lines with an empty one
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Preparing():
                self._preparing(event)
            case RunStarted():
                self._started(event)
            case StepEnded():
                self._stepped(event)
            case Evaluated():
                self._evaluated(event)
            case CheckpointSaved():
                self._last_saved = event.step
                self._draw()
                if not self._live:
                    stall = event.stall_seconds * 1000
                    self._say(f"step {event.step}: saved {_shown(event.path)} (stall {stall:.0f} ms)")
            case MemoryReset():
                self._say(
                    f"step {event.step}: memory reset, {event.before_bytes / 2**30:.2f} to "
                    f"{event.after_bytes / 2**30:.2f} GiB in {event.seconds:.1f} s"
                )
            case RunEnded():
                self._ended(event)

    def _preparing(self, event: Preparing) -> None:
        if self._live:
            self._bar.update(
                self._task,
                description=escape(printable(event.task)),
                total=event.total or None,
                completed=event.completed,
                visible=True,
            )
        elif event.completed == 0 and event.total == 0:
            self._say(event.task)

    def _started(self, event: RunStarted) -> None:
        low, high = event.weight_range
        self._say(
            f"{pluralize(event.examples, 'example')}, {pluralize(event.tokens, 'trained token')}, "
            f"{event.epoch_steps:.1f} steps per epoch"
            + (
                f"; {pluralize(event.truncated, 'example')} truncated, "
                f"{pluralize(event.tokens_cut, 'token')} dropped"
                if event.truncated
                else ""
            )
        )
        self._say(
            f"weights {low:.3g} to {high:.3g}: effective sample size {event.effective_examples:,.0f} "
            f"({event.effective_examples / event.examples:.0%})"
        )
        by = f"{event.engine} on {event.device}" if event.device else event.engine
        self._say(
            f"training {event.trained:,} of {event.parameters:,} parameters with {by}, into {event.out}"
        )
        if event.max_steps < 2 * event.warmup_steps:
            self._say(
                f"warm-up: {min(event.max_steps, event.warmup_steps)} of {event.max_steps} steps, so the "
                "model learns little; use fewer --warmup-steps, a smaller --batch-size or more --epochs"
            )
        if event.resumed_from is not None:
            self._say(f"Resuming from step {event.step} ({_shown(event.resumed_from)})")
        self._max_steps = event.max_steps
        self._last_saved = event.step or None
        self._bar.reset(
            self._task, description="training", total=event.max_steps, completed=event.step, visible=True
        )

    def _stepped(self, event: StepEnded) -> None:
        pace = event.seconds / event.tokens
        before = self._seconds_per_token
        self._seconds_per_token = pace if before is None else before + SMOOTHING * (pace - before)
        self._facts = f"loss {event.loss:.4f}  {1 / self._seconds_per_token:,.0f} tok/s"
        if self._live:
            self._bar.update(self._task, completed=event.step)
            self._draw()
        elif event.step % self._log_every == 0 or event.step in (1, self._max_steps):
            left = (self._max_steps - event.step) * event.tokens * self._seconds_per_token
            self._say(
                f"step {event.step}/{self._max_steps}: loss {event.loss:.4f}, weighted "
                f"{event.weighted_loss:.4f}, distrust {event.distrust:.2f}, lr {event.learning_rate:.3g}, "
                f"norm {event.gradient_norm:.3g}, {1 / self._seconds_per_token:,.0f} tok/s, "
                f"{_duration(left)} left, {self._saved()}"
            )

    def _evaluated(self, event: Evaluated) -> None:
        metrics = event.metrics
        line = f"step {event.step}: eval loss {event.loss:.4f}, perplexity {metrics['eval_perplexity']:.4g}"
        if metrics["eval_weighted_loss"] != event.loss:
            line += (
                f"; weighted {metrics['eval_weighted_loss']:.4f}, {metrics['eval_weighted_perplexity']:.4g}"
            )
        self._say(line)
        of_classes = [
            f"{name.removeprefix('eval_loss/')} {loss:.4f}"
            for name, loss in metrics.items()
            if name.startswith("eval_loss/")
        ]
        if of_classes:
            more = f", {len(of_classes) - CLASSES_SHOWN} more" if len(of_classes) > CLASSES_SHOWN else ""
            self._say(f"  {', '.join(of_classes[:CLASSES_SHOWN])}{more}")

    def _draw(self) -> None:
        self._bar.update(self._task, facts=f"{self._facts}  {self._saved()}")

    def _saved(self) -> str:
        return "nothing saved yet" if self._last_saved is None else f"saved {self._last_saved}"

    def _ended(self, event: RunEnded) -> None:
        self._bar.update(self._task, visible=False)
        if event.already_finished:
            early = " early" if event.reason == "early_stopping" else ""
            self._say(f"Nothing to do: the run finished{early} at step {event.step}")
        elif not event.finished:
            saved = "nothing to save yet" if event.path is None else f"step {event.step} is saved"
            by = "" if event.signal is None else f" by {Signals(event.signal).name}"
            self._say(f"Stopped{by}: {saved}. Run the same command to resume")
        else:
            took = time.perf_counter() - self._began
            end = (
                f"early at step {event.step} (no improvement)"
                if event.reason == "early_stopping"
                else f"step {event.step}"
            )
            self._say(
                f"Finished {end} in {_duration(took)}; checkpoint stall "
                f"{event.stall_seconds * 1000:.0f} ms ({event.stall_seconds / took:.2%})"
            )
        if event.path is not None:
            self._say(f"checkpoint {_shown(event.path)}")
            self._say(f"state digest {event.state_digest}")

    def _say(self, line: str) -> None:
        self._console.print(printable(line), markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _shown(path: Path) -> str:
    """A path below the working directory as a user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
