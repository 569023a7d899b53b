"""Shows a run on the console: a progress bar on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from signal import Signals
from typing import TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distrust.activity import in_notebook
from distrust.errors import printable
from distrust.reporting.display import clock, duration, pluralize
from distrust.reporting.notebook import CellOutput
from distrust.training.events import (
    CheckpointMirrored,
    CheckpointSaved,
    Evaluated,
    Event,
    MemoryReset,
    Preparing,
    RunEnded,
    RunStarted,
    StepEnded,
)

#: Source classes of an evaluation that are listed by name.
CLASSES_SHOWN = 8
#: Weight of the newest step in the moving average of the speed.
SMOOTHING = 0.1


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Re-raise: the default would exit the process before the run is saved."""
        raise


class ConsoleReporter:
    """Shows the events of a run. Use it as a context manager, so that the terminal is restored.

    Args:
        log_every: steps between lines, where the output is not a terminal.
        stream: where to write; default: standard output, or one output of a notebook, for every step.
    """

    def __init__(self, *, log_every: int, stream: TextIO | None = None) -> None:
        force_terminal = None
        if stream is None and in_notebook():
            stream, log_every = cast(TextIO, CellOutput()), 1
            force_terminal = False  # a kernel's environment asks for colour
        stream = stream or sys.stdout  # resolved now: tests replace it
        self._console = _Console(
            file=stream,
            highlight=False,
            soft_wrap=True,
            emoji=False,
            force_terminal=force_terminal,
            force_jupyter=False,
        )
        self._live = self._console.is_terminal  # a bar that moves; else lines
        self._log_every = log_every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,  # the bar disappears at the end
            redirect_stderr=sys.stderr.isatty(),  # else warnings would leave the file they are redirected to
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, facts="", visible=False)
        self._max_steps = 0
        self._is_weighted = self._is_by_provenance = True
        self._last_saved: int | None = None  # step of the newest durable checkpoint
        self._seconds_per_token: float | None = None
        self._facts = ""  # loss and speed, for the bar
        self._began = time.perf_counter()

    def __enter__(self) -> ConsoleReporter:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:  # else it would print an empty line at the end
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Preparing():
                self._show_preparing(event)
            case RunStarted():
                self._show_start(event)
            case StepEnded():
                self._show_step(event)
            case Evaluated():
                self._show_evaluation(event)
            case CheckpointSaved():
                self._last_saved = event.step
                self._update_bar()
                if not self._live:
                    stall, at_risk = duration(event.stall_seconds), duration(event.at_risk_seconds)
                    text = f"stall {stall}; at most {at_risk} of work can be lost"
                    self._print(f"step {event.step}: saved {_relative(event.path)} ({text})")
            case CheckpointMirrored():
                if not self._live:
                    self._print(f"step {event.step}: in {event.url} ({event.behind_seconds:.1f} s later)")
            case MemoryReset():
                levels = _change(event.before.host, event.after.host)
                if event.before.device and event.after.device:
                    reserved = event.before.device.reserved, event.after.device.reserved
                    levels += f" on the host, {_change(*reserved)} on the device,"
                self._print(f"step {event.step}: memory reset, {levels} in {event.seconds:.1f} s")
            case RunEnded():
                self._show_end(event)

    def _show_preparing(self, event: Preparing) -> None:
        if self._live:
            self._bar.update(
                self._task,
                description=escape(printable(event.task)),  # names may hold rich's markup
                total=event.total or None,  # None: the bar pulses
                completed=event.completed,
                visible=True,
            )
        elif event.completed == 0 and event.total == 0:  # a line per task, not per part of it
            self._print(event.task)

    def _show_start(self, event: RunStarted) -> None:
        counts, facts = event.counts, ""
        if event.sequences > event.examples:
            facts += f"; {event.sequences:,} sequences: the chat template rewrites earlier turns"
        if counts.truncated:
            cut = pluralize(counts.tokens_cut, "token")
            facts += f"; {pluralize(counts.truncated, 'example')} truncated, {cut} dropped"
        if counts.dropped:
            facts += f"; {pluralize(counts.dropped, 'record')} left out, too long for --max-length"
        if counts.weightless:
            facts += f"; {pluralize(counts.weightless, 'record')} left out, of weight 0"
        self._is_weighted, self._is_by_provenance = event.is_weighted, event.weighting != "off"
        self._print(f"model {event.model}, data {', '.join(event.data)}")
        self._print(
            f"{pluralize(event.examples, 'example')}, {pluralize(event.tokens, 'trained token')}, "
            f"{event.epoch_steps:.1f} steps per epoch{facts}"
        )
        if event.is_weighted:
            low, *_, high = event.distribution.quantiles["weight"]
            effective = event.distribution.effective_examples
            self._print(
                f"weights {low:.3g} to {high:.3g}: effective sample size {effective:,.0f} "
                f"({effective / event.examples:.0%})"
            )
        engine = f"{event.engine} on {event.device}" if event.device else event.engine
        self._print(
            f"training {event.trained:,} of {event.parameters:,} parameters with {engine}, into {event.out}"
        )
        if event.ranks:
            machines = pluralize(len(set(event.ranks)), "machine")
            self._print(f"{pluralize(len(event.ranks), 'rank')} on {machines}")
        for note in event.notes:
            self._print(note)
        if event.max_steps < 2 * event.warmup_steps:  # the learning rate hardly reaches its peak
            self._print(
                f"warm-up: {min(event.max_steps, event.warmup_steps)} of {event.max_steps} steps, so the "
                "model learns little; use fewer --warmup-steps, a smaller --batch-size or more --epochs"
            )
        if event.resumed_from is not None:
            self._print(f"Resuming from step {event.step} ({_relative(event.resumed_from)})")
        self._max_steps = event.max_steps
        self._last_saved = event.step or None  # a resumed run starts at a checkpoint
        self._bar.reset(
            self._task, description="training", total=event.max_steps, completed=event.step, visible=True
        )

    def _show_step(self, event: StepEnded) -> None:
        pace, average = event.seconds / event.tokens, self._seconds_per_token
        self._seconds_per_token = pace if average is None else average + SMOOTHING * (pace - average)
        speed = f"{1 / self._seconds_per_token:,.0f} tok/s"
        self._facts = f"loss {event.loss:.4f}  {speed}"
        if self._live:
            self._bar.update(self._task, completed=event.step)
            self._update_bar()
        elif event.step % self._log_every == 0 or event.step in (1, self._max_steps):
            remaining = (self._max_steps - event.step) * event.tokens * self._seconds_per_token
            weighted = f", weighted {event.weighted_loss:.4f}" if self._is_weighted else ""
            distrust = f", distrust {event.distrust:.2f}" if self._is_by_provenance else ""
            self._print(
                f"step {event.step}/{self._max_steps}: loss {event.loss:.4f}"
                f"{weighted}{distrust}, lr {event.learning_rate:.3g}, "
                f"norm {event.gradient_norm:.3g}, {speed}, {clock(remaining)} left, "
                f"{self._describe_saved()}"
            )

    def _show_evaluation(self, event: Evaluated) -> None:
        metrics = event.metrics
        line = f"step {event.step}: eval loss {event.loss:.4f}, perplexity {metrics['eval_perplexity']:.4g}"
        weighted = metrics.get("eval_weighted_loss", event.loss)
        if weighted != event.loss:  # equal where no weighting applies
            line += f"; weighted {weighted:.4f}, {metrics['eval_weighted_perplexity']:.4g}"
        self._print(line)
        prefix = "eval_loss/"
        classes = [f"{k.removeprefix(prefix)} {v:.4f}" for k, v in metrics.items() if k.startswith(prefix)]
        if classes:  # few source classes are named
            hidden = [f"{len(classes) - CLASSES_SHOWN} more"] if len(classes) > CLASSES_SHOWN else []
            self._print(f"  {', '.join(classes[:CLASSES_SHOWN] + hidden)}")

    def _show_end(self, event: RunEnded) -> None:
        self._bar.update(self._task, visible=False)  # the last lines replace it
        early = event.reason == "early_stopping"
        if event.already_finished:
            self._print(f"Nothing to do: the run finished{' early' if early else ''} at step {event.step}")
        elif not event.finished:
            durable = "nothing to save yet" if event.path is None else f"step {event.step} is saved"
            by_signal = "" if event.signal is None else f" by {Signals(event.signal).name}"
            by_signal = f" by a preemption notice ({event.notice})" if event.notice else by_signal
            again = "Train with the same config" if in_notebook() else "Run the same command"
            self._print(f"Stopped{by_signal}: {durable}. {again} to resume")
        else:
            seconds = time.perf_counter() - self._began
            end = f"early at step {event.step} (no improvement)" if early else f"step {event.step}"
            self._print(
                f"Finished {end} in {clock(seconds)}; checkpoint stall "
                f"{event.stall_seconds * 1000:.0f} ms ({event.stall_seconds / seconds:.2%})"
            )
        if event.path is not None:
            self._print(f"checkpoint {_relative(event.path)}")
            self._print(f"state digest {event.state_digest}")

    def _update_bar(self) -> None:
        self._bar.update(self._task, facts=f"{self._facts}  {self._describe_saved()}")

    def _describe_saved(self) -> str:
        return "nothing saved yet" if self._last_saved is None else f"saved {self._last_saved}"

    def _print(self, line: str) -> None:
        self._console.print(printable(line), markup=False)  # names may hold markup


def _change(before: int, after: int) -> str:
    return f"{before / 2**30:.2f} to {after / 2**30:.2f} GiB"


def _relative(path: Path) -> str:
    """A path below the working directory as a user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
