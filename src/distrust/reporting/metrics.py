"""Writes ``metrics.jsonl``: one line for each optimizer step and evaluation, none twice and none missing.

This holds after a crash at any moment, for two reasons. A checkpoint only becomes durable after the lines of
its steps. And a resumed run first repairs the file: it removes lines after the checkpoint's step (those steps
are repeated), torn lines, duplicates and lines of other runs; it restores missing step lines from the
checkpoint's history. Losses match the run to the last bit. Times and the fields about memory describe the
machine; restored lines lack them.

A failed write never stops a run: it warns, keeps the lines, and tries again at each checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.checkpoint.files import open_regular_file, open_to_write
from distrust.config import TrainConfig, key
from distrust.errors import ConfigError, WriteFailed, warn
from distrust.option_values import STEP_METRICS
from distrust.reporting.display import to_json
from distrust.training.events import CheckpointStarted, Evaluated, Event, RunEnded, RunStarted, StepEnded

METRICS = "metrics.jsonl"
PROVENANCE = "provenance.json"

#: No run writes longer lines, and a file without a newline must not fill the memory. Also the limit of
#: ``provenance.json``.
MAX_LINE_BYTES = 1 << 20
#: Bytes of lines that a repair skips; a crash leaves a few. A hole in a sparse file may have any size.
MAX_SKIPPED_BYTES = 1 << 28

#: The options that ``provenance.json`` holds, by field.
WEIGHTING = ("weighting", "alpha", "lambda_", "max_ratio")
MEMORY_FIELDS = (
    "host_bytes", "host_peak_bytes", "device_bytes", "device_peak_bytes", "device_reserved_bytes"
)  # fmt: skip
#: The fields of a step's line, of which those about weights and about a device may be absent.
STEP_FIELDS = ("step", *STEP_METRICS, "tokens", "seconds", "stall_seconds", "at_risk_seconds", *MEMORY_FIELDS)


class MetricsWriter:
    """Writes a run's ``metrics.jsonl``, and at its start ``provenance.json``: options and weights.

    If examples are not weighted, neither says anything about weights: there is no ``provenance.json``.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._run: RunStarted | None = None
        self._fields: list[str] = []  # of a step's line
        self._file: int | None = None
        self._unwritten = b""
        self._warned = False

    def __call__(self, event: Event) -> None:
        """Write what an event reports."""
        match event:
            case RunStarted():
                self._close()
                self._run, self._unwritten, self._warned = event, b"", False  # a run may follow another
                hidden = {*STEP_METRICS, *MEMORY_FIELDS} - {*event.step_metrics}  # those of memory are added
                self._fields = [name for name in STEP_FIELDS if name not in hidden]
                self._open()
            case StepEnded():
                values = {name: getattr(event, name) for name in self._fields}
                self._write(values | memory_fields(event))
            case Evaluated():
                self._write({"step": event.step, **event.metrics})
            case CheckpointStarted():
                self._make_durable()  # before the checkpoint is, so that it never has steps without lines
            case RunEnded():
                self._make_durable()
                self._close()

    def _open(self) -> None:
        """Repair the file and open it. If that fails, each checkpoint tries again."""
        if self._run is None:
            return
        with self._warn_on_failure():
            self._run.out.mkdir(parents=True, exist_ok=True)  # the first file of a new run
            self._repair(self._run)
            self._describe_weights(self._run)
            self._file = open_to_write(self._run.out / METRICS, os.O_WRONLY | os.O_APPEND)

    def _describe_weights(self, run: RunStarted) -> None:
        if not run.is_weighted:
            (run.out / PROVENANCE).unlink(missing_ok=True)  # of an earlier run in this folder
            return
        options = {key(name): getattr(self._config, name) for name in WEIGHTING}
        options["weighting"] = run.weighting
        with atomic_file(run.out / PROVENANCE, force=True) as file:
            file.write(_json({**run.distribution.as_json(), **options}, indent=1))

    def _repair(self, run: RunStarted) -> None:
        path = run.out / METRICS
        source = path
        if run.resumed_from is not None and not path.exists():  # a branch starts with its origin's lines
            source = run.resumed_from.parent.parent / METRICS
        with atomic_file(path, force=True) as file:
            lines = _read_lines(source)
            history = {name: run.history[name] for name in run.step_metrics}
            for line in repair_lines(lines, step=run.step, history=history, where=str(source)):
                file.write(line)

    def _write(self, values: Mapping[str, Any]) -> None:
        self._unwritten += _json(values)  # kept until a write succeeds
        self._flush()

    def _flush(self) -> None:
        if self._file is None:
            return
        with self._warn_on_failure():
            while self._unwritten:  # includes lines of earlier failed writes
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def _make_durable(self) -> None:
        if self._file is None:
            self._open()
        self._flush()
        if self._file is not None:
            with self._warn_on_failure():
                os.fsync(self._file)  # before the checkpoint is committed

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._run = None

    @contextlib.contextmanager
    def _warn_on_failure(self) -> Iterator[None]:
        """Turn a failure into one warning per run: a log is not worth stopping a run for."""
        try:
            yield
        except (OSError, WriteFailed, ConfigError) as error:
            if not self._warned and self._run is not None:
                self._warned = True
                path = self._run.out / METRICS
                reason = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else error
                warn(
                    f"the log cannot be written: {reason}. Training continues; each checkpoint tries again. "
                    "If lines are still missing at the end, resuming the run restores the losses of steps, "
                    "not evaluations"
                )


def memory_fields(event: StepEnded) -> dict[str, int]:
    """The fields about memory, in bytes; without a device that has its own, those of the host."""
    values = [event.memory.host, event.memory.host_peak]
    if (device := event.memory.device) is not None:
        values += [device.allocated, device.allocated_peak, device.reserved]
    return dict(zip(MEMORY_FIELDS, values, strict=False))


def repair_lines(
    lines: Iterable[bytes], *, step: int, history: Mapping[str, Sequence[float]], where: str = METRICS
) -> Iterator[bytes]:
    """The lines of all steps up to a checkpoint: each step once, each evaluation once, in order.

    Args:
        lines: of the file as a crash left it, with their newlines.
        step: of the checkpoint that the run resumes from; 0 keeps nothing.
        history: by logged metric, the value of each step up to this one.
        where: the file. After ``MAX_SKIPPED_BYTES`` of lines that are not this run's, a warning names it, and
            the rest is not read.
    """
    skipped = 0  # bytes
    last_step, last_evaluation = 0, -1  # an evaluation may precede step 1
    pending: tuple[int, bytes] | None = None  # an evaluation whose step line is missing so far

    def restore(until: int) -> Iterator[bytes]:
        for missing in range(last_step + 1, until + 1):
            values = {name: column[missing - 1] for name, column in history.items()}
            yield _json({"step": missing, **values})

    for raw in lines if step else ():
        skipped += len(raw)
        if skipped > MAX_SKIPPED_BYTES:
            warn(
                f"{where}: more than {MAX_SKIPPED_BYTES:,} bytes of it are not lines of this run. The rest "
                "is dropped: steps are restored from the checkpoint, evaluations are not"
            )
            break
        line = _parse_line(raw)
        if line is not None and line["step"] > step == last_step:
            break  # the rest of a log is of later steps
        if line is None or not 0 <= line["step"] <= step:
            continue  # torn, of a step that is repeated, or not ours
        number = line["step"]
        if "eval_loss" in line:
            if number == last_step and number > last_evaluation:
                last_evaluation = number
                skipped -= len(raw)
                yield raw
            elif number > last_step:
                pending = number, raw
        # A step line must match the checkpoint's history: it may be damaged or of another run.
        elif number > last_step and _matches(line, history, number):
            # Damage can change a step number: trust an evaluation only if the lines around it agree.
            if pending is not None and pending[0] == number - 1:
                yield from (*restore(number - 1), pending[1])
                last_step = last_evaluation = number - 1
            yield from restore(number - 1)
            last_step, pending = number, None  # a skipped evaluation was damaged
            skipped -= len(raw)
            yield raw
    yield from restore(step)  # steps whose lines were lost at the end
    if pending is not None and pending[0] == step > last_step:
        yield pending[1]


def _matches(line: Mapping[str, Any], history: Mapping[str, Sequence[float]], step: int) -> bool:
    return all(line.get(name) == to_json(column[step - 1]) for name, column in history.items())


def _read_lines(path: Path) -> Iterator[bytes]:
    """The lines; pieces of a longer one than any run writes, which count as torn lines."""
    with contextlib.suppress(FileNotFoundError), open_regular_file(path) as file:
        yield from iter(partial(file.readline, MAX_LINE_BYTES), b"")


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """A complete line with a step; None for any other."""
    if not raw.endswith(b"\n"):  # torn by a crash
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):  # deep nesting
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _json(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    return json.dumps(to_json(values), allow_nan=False, ensure_ascii=False, indent=indent).encode() + b"\n"
