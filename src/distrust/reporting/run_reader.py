"""Reads a run folder into one typed value. It only reads and takes no lock: the run may be training.

A run consists of its checkpoints, ``metrics.jsonl`` and ``provenance.json``. Each may be missing: without
``metrics.jsonl``, the steps come from the history in the newest intact checkpoint. Anybody may have written
these files: content that no run writes raises an error that names the file and the line or field.
"""

from __future__ import annotations

import contextlib
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distrust.checkpoint import CheckpointFile, CheckpointManager, Scan, catalog
from distrust.checkpoint.catalog import read_header
from distrust.checkpoint.files import open_regular_file
from distrust.checkpoint.remote.location import Location, Target
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.config import key
from distrust.data.distribution import ClassSummary, Distribution, Extreme, Quartiles
from distrust.errors import (
    NO_SUCH_FILE,
    CheckpointNotFound,
    CorruptCheckpoint,
    DataError,
    ErrorTranslator,
    RunNotFound,
    warn,
)
from distrust.remote_copies import fetch_checkpoint, fetch_files
from distrust.reporting import json_fields
from distrust.reporting.metrics import MAX_LINE_BYTES, METRICS, PROVENANCE, STEP_FIELDS, WEIGHTING

#: The columns of the steps, all float64 here.
COLUMNS = STEP_FIELDS[1:]
#: Earlier versions logged one sum of the host's and the device's memory; it becomes the host's.
_MEMORY_SUM = "memory_bytes"
_LOGGED = (*COLUMNS, _MEMORY_SUM)
_STEP_KEYS = {"step", *_LOGGED}
#: Prefix of an evaluation's metrics. A slash and a source class may follow the metric.
EVALUATION = "eval_"
#: The largest log that is read: of 25 million steps.
MAX_LOG_BYTES = 1 << 33
#: The most steps, and values of evaluations, that are read: they take more space in memory than in a file.
MAX_STEPS, MAX_EVALUATED = 1 << 25, 1 << 24

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Steps:
    """The optimizer steps of a run, in ascending order."""

    step: NDArray[np.int64]  # [n]
    columns: Mapping[str, Values]  # of COLUMNS, those with any value: float64[n], NaN where a step has none

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation."""

    step: int
    metrics: Mapping[str, float]  # by name, such as eval_loss or eval_loss/patent


@dataclass(frozen=True, slots=True)
class Provenance:
    """The weights of a run's examples."""

    options: Mapping[str, Any]  # of the weighting: WEIGHTING
    weights: Distribution


@dataclass(frozen=True, slots=True)
class RunData:
    """The content of a run folder."""

    path: Path  # as the caller gave it
    steps: Steps
    evaluations: Sequence[Evaluation] = ()  # in ascending order of steps
    provenance: Provenance | None = None  # None for runs that are not weighted, or did not write it
    checkpoints: Scan = field(default_factory=lambda: Scan((), ()))  # intact and damaged ones
    from_history: bool = False  # whether the steps come from a checkpoint, without metrics.jsonl

    @property
    def newest(self) -> CheckpointFile | None:
        """The newest checkpoint with an intact header."""
        return self.checkpoints.files[-1] if self.checkpoints.files else None

    def evaluations_of(self, metric: str) -> tuple[NDArray[np.int64], Values]:
        """The steps at which a metric was measured, int64[n], and its values, float64[n]."""
        measured = [e for e in self.evaluations if metric in e.metrics]
        values = np.array([e.metrics[metric] for e in measured], np.float64)
        return np.array([e.step for e in measured], np.int64), values

    def classes_of(self, metric: str) -> list[str]:
        """The source classes for which a metric was measured, in order of first appearance."""
        prefix = f"{metric}/"
        names = {name: None for e in self.evaluations for name in e.metrics if name.startswith(prefix)}
        return [name.removeprefix(prefix) for name in names]


def read_run(folder: Target) -> RunData:
    """Read a run folder, here or in a store. Warns of each damaged checkpoint whose history it tried to read.

    Raises:
        RunNotFound: there is no run.
        DataError: a file has content that no run writes; names the file and the line or field.
        CheckpointError: the checkpoints cannot be read at all.
        RemoteError: a store fails.
    """
    if isinstance(folder, Location):
        run = RemoteRun(folder)
        if run.is_one:
            raise RunNotFound(f"{folder}: is a file; give the URL of the run", path=folder.path)
        with fetch_files(folder, METRICS, PROVENANCE) as files:
            return _read(folder.path, files, run.scan(), lambda: [read_header(fetch_checkpoint(folder)[0])])
    if not folder.is_dir():
        problem = "is a file; give the folder of the run" if folder.exists() else NO_SUCH_FILE
        raise RunNotFound(f"{folder}: {problem}", path=folder)
    if folder.name == catalog.RUN_SUBDIRECTORY and (folder.parent / METRICS).is_file():  # an easy mistake
        raise RunNotFound(f"{folder}: holds the checkpoints of a run; give {folder.parent}", path=folder)
    checkpoints = catalog.scan(catalog.checkpoint_directory(folder))
    return _read(folder, folder, checkpoints, lambda: checkpoints.files)


def _read(
    folder: Path, files: Path, checkpoints: Scan, with_history: Callable[[], Sequence[CheckpointFile]]
) -> RunData:
    """The content of a run; of what is in ``files``, messages name what is in ``folder``."""
    lines = _read_metrics(files / METRICS)  # None: no file
    provenance = _read_provenance(files / PROVENANCE)
    if lines is None and provenance is None and not (checkpoints.files or checkpoints.damaged):
        problem = f"no run here: neither checkpoints nor {METRICS}; give the --out of a run"
        if (files / catalog.RUN_SUBDIRECTORY).is_dir():
            problem = "the run has made no step and saved nothing yet; try again later"
        raise RunNotFound(f"{folder}: {problem}", path=folder)
    steps, evaluations = lines or (_history(with_history()), _saved_evaluations(checkpoints))
    return RunData(folder, steps, evaluations, provenance, checkpoints, from_history=lines is None)


def _read_metrics(path: Path) -> tuple[Steps, list[Evaluation]] | None:
    with _open(path) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        if size > MAX_LOG_BYTES:  # perhaps a hole in a sparse file
            error = ValueError(f"{size:,} bytes, more than {MAX_LOG_BYTES:,}")
            raise json_fields.field_error(str(path), error)
        return _parse_metrics(path, iter(partial(file.readline, MAX_LINE_BYTES), b""))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO | None]:
    """Open a regular file; None if it is missing."""
    with ErrorTranslator((OSError,), lambda error: DataError(f"{path}: cannot be read: {error.strerror}")):
        try:
            file = open_regular_file(path)
        except FileNotFoundError:
            yield None
            return
        with file:
            yield file


def _parse_metrics(path: Path, lines: Iterator[bytes]) -> tuple[Steps, list[Evaluation]]:
    numbers: array[int] = array("q")  # compact
    values: array[float] = array("d")  # row by row: there may be millions
    evaluations: list[Evaluation] = []
    count = evaluated = 0
    try:
        for count, line in enumerate(lines, 1):  # noqa: B007 - for the message
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
                break  # torn: the run is writing it, or was killed while it did
            if line.isspace():
                continue  # an editor may add empty lines
            record = json_fields.parse_object(line)
            step = json_fields.integer(record, "step")
            # Only lines with another key: a million step lines have none.
            names = [] if record.keys() <= _STEP_KEYS else [n for n in record if n.startswith(EVALUATION)]
            if names:
                metrics = {name: json_fields.number(record, name) for name in names}
                evaluated += len(metrics)
                _require_order(step, evaluations[-1].step if evaluations else -1)
                evaluations.append(Evaluation(step, metrics))
            else:
                _require_order(step, numbers[-1] if numbers else -1)
                numbers.append(step)
                values.extend(_row(record))
            if len(numbers) > MAX_STEPS or evaluated > MAX_EVALUATED:
                raise ValueError(f"more than {MAX_STEPS:,} steps, or {MAX_EVALUATED:,} values of evaluations")
    except json_fields.FIELD_ERRORS as error:
        raise json_fields.field_error(f"{path}:{count}", error) from None
    rows = np.array(values).reshape(-1, len(_LOGGED))  # one copy
    columns = zip(_LOGGED, rows.T, strict=True)
    with_values = {name: column for name, column in columns if not np.isnan(column).all()}
    if (sums := with_values.pop(_MEMORY_SUM, None)) is not None:
        host = with_values.get("host_bytes", sums)
        with_values["host_bytes"] = np.where(np.isnan(host), sums, host)
    return Steps(np.array(numbers, np.int64), with_values), evaluations


def _row(record: Mapping[str, Any]) -> array[float]:
    """The columns of a step's line. Called a million times, so it first converts all of them at once."""
    row = [record.get(name, math.nan) for name in _LOGGED]
    if set(map(type, row)) <= {float, int}:
        with contextlib.suppress(OverflowError):  # the slow path reports it with its name
            return array("d", row)
    return array("d", [json_fields.number(record, name) if name in record else math.nan for name in _LOGGED])


def _require_order(step: int, previous: int) -> None:
    if step <= previous:
        json_fields.reject("step", f"{step} comes after {previous}")


def _history(files: Sequence[CheckpointFile]) -> Steps:
    """The steps in the history of the newest intact checkpoint."""
    for file in reversed(files):
        try:
            # Lazy verification: of a large checkpoint only the history is read, and that is verified.
            manager = CheckpointManager(file.path.parent)
            history = manager.load(file.path, mmap=True, verify="lazy").history
            columns = {name: np.array(history[name], np.float64) for name in COLUMNS if name in history}
        except (CorruptCheckpoint, CheckpointNotFound) as error:
            warn(f"its history is not shown: {error}")
            continue
        except (TypeError, ValueError):
            columns = {}  # a checkpoint of another program
        shapes = {values.shape for values in columns.values()}
        if shapes == {(file.step,)}:  # one value for each step
            return Steps(np.arange(1, file.step + 1), columns)
        break
    return Steps(np.empty(0, np.int64), {})


def _saved_evaluations(checkpoints: Scan) -> list[Evaluation]:
    """The evaluations that the remaining checkpoints record."""
    metrics = {
        step: {name: _float(value) for name, value in file.metrics.items() if name.startswith(EVALUATION)}
        for step, file in checkpoints.by_step().items()
    }
    return [Evaluation(step, values) for step, values in metrics.items() if values]


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON does not bound integers
        return math.inf


def _read_provenance(path: Path) -> Provenance | None:
    with _open(path) as file:
        if file is None:
            return None
        text = file.read(MAX_LINE_BYTES + 1)
    try:
        if len(text) > MAX_LINE_BYTES:
            raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
        record = json_fields.parse_object(text)
        options = {name: json_fields.scalar(record, name) for name in map(key, WEIGHTING)}
        weights = _distribution(record)
        # Earlier versions described equal weights, too.
        unweighted = options["weighting"] == "off" and len(weights.counts) == 1
        return None if unweighted else Provenance(options, weights)
    except json_fields.FIELD_ERRORS as error:
        raise json_fields.field_error(str(path), error) from None


def _distribution(record: Mapping[str, Any]) -> Distribution:
    counts = [
        json_fields.integer({"counts": n}, "counts")
        for n in json_fields.field_of_type(record, "counts", list)
    ]
    edges = [json_fields.finite(edge, "edges") for edge in json_fields.field_of_type(record, "edges", list)]
    if len(edges) != len(counts) + 1 or any(low >= high for low, high in pairwise((0.0, *edges))):
        json_fields.reject("edges", "not one more than counts, above 0 and rising")
    quantiles = json_fields.field_of_type(record, "quantiles", dict)
    effective = json_fields.finite(record.get("effective_examples"), "effective_examples")
    if not 0 <= effective <= json_fields.integer(record, "examples") + 1:  # + 1: it was rounded
        json_fields.reject("effective_examples", "more than there are examples, or less than 0")
    return Distribution(
        examples=json_fields.integer(record, "examples"),
        tokens=json_fields.integer(record, "tokens"),
        effective_examples=effective,
        quantiles={name: _quartiles(value, f"quantiles.{name}") for name, value in quantiles.items()},
        edges=tuple(edges),
        counts=tuple(counts),
        classes=json_fields.build(ClassSummary, record, "classes"),
        heaviest=json_fields.build(Extreme, record, "heaviest"),
        lightest=json_fields.build(Extreme, record, "lightest"),
    )


def _quartiles(value: Any, where: str) -> Quartiles:
    items = value if isinstance(value, list) and len(value) == 5 else [None] * 5
    low, lower, median, upper, high = (json_fields.finite(item, where) for item in items)
    return low, lower, median, upper, high
