"""The run in ``metrics.jsonl``: a line for each step and each evaluation, none twice and none missing.

That holds after a crash at any instant, because a checkpoint is never durable before the lines of its steps
are, and because a run that goes on from a checkpoint begins by mending the file: what comes after the
checkpoint's step is cut off, for those steps are made again; so is what is torn, twice, or not of this run;
and a step whose line is missing gets it back from the checkpoint's own history. The losses are the run's
numbers to the last bit; ``seconds``, ``stall_seconds`` and ``memory_bytes`` are of the machine, and a line
that was brought back has none.

What cannot be written never stops a run: it is warned of, kept, and tried again with each checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.config import STEP_METRICS, TrainConfig
from distrust.errors import ConfigError, DistrustWarning, WriteFailed
from distrust.training.events import CheckpointStarted, Evaluated, Event, RunEnded, RunStarted, StepEnded

METRICS = "metrics.jsonl"
PROVENANCE = "provenance.json"

#: What a line of a step holds.
STEP_FIELDS = ("step", *STEP_METRICS, "tokens", "seconds", "stall_seconds", "memory_bytes")


class MetricsWriter:
    """Writes a run's ``metrics.jsonl``, and when it starts its ``provenance.json``: what its examples weigh.

    Args:
        config: of the run; says how it weighs.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._started: RunStarted | None = None
        self._file: int | None = None
        self._unwritten = b""
        self._warned = False

    def __call__(self, event: Event) -> None:
        """Write what an event says."""
        match event:
            case RunStarted():
                self._close()
                self._started, self._unwritten, self._warned = event, b"", False
                self._open()
            case StepEnded():
                self._write({name: getattr(event, name) for name in STEP_FIELDS})
            case Evaluated():
                self._write({"step": event.step, **event.metrics})
            case CheckpointStarted():
                self._make_durable()
            case RunEnded():
                self._make_durable()
                self._close()

    def _open(self) -> None:
        """Mend what is there, to go on with it; where that fails, it is tried again with each checkpoint."""
        if self._started is None:
            return
        with self._tolerant():
            self._started.out.mkdir(parents=True, exist_ok=True)
            self._repair(self._started)
            with atomic_file(self._started.out / PROVENANCE, force=True) as file:
                weights = self._started.distribution.as_json()
                file.write(_json({**weights, **_weighting(self._config)}, indent=1))
            self._file = os.open(self._started.out / METRICS, os.O_WRONLY | os.O_APPEND)

    def _repair(self, started: RunStarted) -> None:
        path = started.out / METRICS
        before = path
        if started.resumed_from is not None and not path.exists():  # a branch begins with its origin's lines
            before = started.resumed_from.parent.parent / METRICS
        with atomic_file(path, force=True) as file:
            for line in repair_lines(_lines(before), step=started.step, history=started.history):
                file.write(line)

    def _write(self, values: Mapping[str, Any]) -> None:
        self._unwritten += _json(values)
        self._flush()

    def _flush(self) -> None:
        if self._file is None:
            return
        with self._tolerant():
            while self._unwritten:  # with what could not be written before
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def _make_durable(self) -> None:
        if self._file is None:
            self._open()
        self._flush()
        if self._file is not None:
            with self._tolerant():
                os.fsync(self._file)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._started = None

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A log is not worth a run: a failure is warned of, once."""
        try:
            yield
        except (OSError, WriteFailed, ConfigError) as error:
            if not self._warned and self._started is not None:
                self._warned = True
                path = self._started.out / METRICS
                what = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else error
                warnings.warn(
                    f"the log cannot be written: {what}. Training goes on, and it is tried again with each "
                    "checkpoint. Of what is missing in the end, the losses of the steps come back when the "
                    "run goes on, evaluations do not",
                    DistrustWarning,
                    stacklevel=4,
                )


def repair_lines(
    lines: Iterable[bytes], *, step: int, history: Mapping[str, Sequence[float]]
) -> Iterator[bytes]:
    """The lines of the steps up to one: each step once, each evaluation once, in order.

    Args:
        lines: of the file as a crash has left it, each with its end.
        step: of the checkpoint that the run goes on from; of step 0 nothing is kept.
        history: by name, the value of each step up to this one.
    """
    made, evaluated = 0, -1
    held: tuple[int, bytes] | None = None  # an evaluation of a step whose line is not there

    def brought_back(last: int) -> Iterator[bytes]:
        for missing in range(made + 1, last + 1):
            yield _json({"step": missing, **{name: history[name][missing - 1] for name in STEP_METRICS}})

    for raw in lines:
        line = _parse_line(raw)
        if line is None or not 0 <= line["step"] <= step or step == 0:
            continue
        at = line["step"]
        if "eval_loss" in line:
            if at == made and at > evaluated:
                evaluated = at
                yield raw
            elif at > made:
                held = at, raw
        elif at > made and all(line.get(name) == _plain(history[name][at - 1]) for name in STEP_METRICS):
            # Damage can change a number: an evaluation is believed if the lines around it agree.
            if held is not None and held[0] == at - 1:
                yield from (*brought_back(at - 1), held[1])
                made = evaluated = at - 1
            yield from brought_back(at - 1)
            made, held = at, None
            yield raw
    yield from brought_back(step)
    if held is not None and held[0] == step > made:
        yield held[1]


def _lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from file


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """A line, if it is whole and one of ours."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _weighting(config: TrainConfig) -> dict[str, Any]:
    return {
        "weighting": config.weighting,
        "alpha": config.alpha,
        "lambda": config.lambda_,
        "max_ratio": config.max_ratio,
    }


def _json(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    plain = {name: _plain(value) for name, value in values.items()}
    return json.dumps(plain, allow_nan=False, ensure_ascii=False, indent=indent).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What is no number to JSON becomes a string: nan, inf, -inf."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
