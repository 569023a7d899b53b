"""A run folder -> what it says, as one typed value. Reads only, and needs no lock: a run may be training.

Three things make a run: its checkpoints, ``metrics.jsonl`` and ``provenance.json``. Each may be missing: for
want of ``metrics.jsonl``, what is known of the steps is the history in the newest whole checkpoint. It is all
text that anybody may have written: what no run writes is an error that names file and line, or the field.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distrust.checkpoint import CheckpointFile, CheckpointManager, Scan, catalog
from distrust.data.distribution import ClassSummary, Distribution, Extreme, Quartiles
from distrust.errors import (
    NOT_FOUND_ERRORS,
    CheckpointNotFound,
    CorruptCheckpoint,
    DataError,
    DistrustWarning,
    RunNotFound,
)
from distrust.reporting import json_fields
from distrust.reporting.metrics import METRICS, PROVENANCE, STEP_FIELDS

#: What a line of a step may hold beside its number, all float64 here.
COLUMNS = STEP_FIELDS[1:]
_OF_A_STEP = {"step", *COLUMNS}
#: What a metric of an evaluation begins with. Behind a slash may stand the source class that it is of.
EVALUATED = "eval_"
#: Nobody writes longer ones, and a file without a newline must not fill the memory.
_MAX_BYTES = 1 << 24

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Steps:
    """The optimizer steps of a run, by rising number.

    Attributes:
        step: their numbers, int64[n].
        columns: by name (``COLUMNS``), float64[n]: NaN where a step has no such value. A column that no step
            has a value for is not there.
    """

    step: NDArray[np.int64]
    columns: Mapping[str, Values]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation.

    Attributes:
        step: optimizer steps made by then.
        metrics: by name, such as ``eval_loss`` or ``eval_loss/patent``.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the examples of a run weigh.

    Attributes:
        options: of the weighting: ``weighting``, ``alpha``, ``lambda``, ``max_ratio``.
        weights: their distribution.
    """

    options: Mapping[str, Any]
    weights: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run folder says.

    Attributes:
        path: of the folder, as it was given.
        steps: what is known of its steps.
        evaluations: by rising step.
        provenance: what its examples weigh; None for runs that did not write it.
        checkpoints: those that are there, and those that are damaged.
        from_history: whether the steps come from a checkpoint, for want of a ``metrics.jsonl``.
    """

    path: Path
    steps: Steps
    evaluations: Sequence[Evaluation] = ()
    provenance: Provenance | None = None
    checkpoints: Scan = field(default_factory=lambda: Scan((), ()))
    from_history: bool = False

    @property
    def newest(self) -> CheckpointFile | None:
        """The newest checkpoint whose header is whole."""
        return self.checkpoints.files[-1] if self.checkpoints.files else None

    def evaluations_of(self, metric: str) -> tuple[NDArray[np.int64], Values]:
        """The steps at which a metric was measured, int64[n], and its values, float64[n]."""
        found = [(e.step, e.metrics[metric]) for e in self.evaluations if metric in e.metrics]
        return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found])

    def classes_of(self, metric: str) -> list[str]:
        """The source classes that a metric was measured of, as they first came."""
        prefix = f"{metric}/"
        names = {name: None for e in self.evaluations for name in e.metrics if name.startswith(prefix)}
        return [name.removeprefix(prefix) for name in names]


def read_run(folder: Path) -> RunData:
    """What a run folder says.

    Warns of a checkpoint whose history was to be read and is damaged.

    Raises:
        RunNotFound: if there is no run.
        DataError: naming the file and the line or field that no run writes.
        CheckpointError: if checkpoints are there that cannot be read at all.
    """
    if not folder.is_dir():
        what = "is a file; give the folder of the run" if folder.exists() else NOT_FOUND_ERRORS
        raise RunNotFound(f"{folder}: {what}", path=folder)
    if folder.name == catalog.RUN_SUBDIRECTORY and (folder.parent / METRICS).is_file():
        raise RunNotFound(f"{folder}: holds the checkpoints of a run; give {folder.parent}", path=folder)
    checkpoints = catalog.scan(catalog.checkpoint_directory(folder))
    lines = _read_metrics(folder / METRICS)
    provenance = _read_provenance(folder / PROVENANCE)
    if lines is None and provenance is None and not (checkpoints.files or checkpoints.damaged):
        begun = (folder / catalog.RUN_SUBDIRECTORY).is_dir()
        what = (
            "the run has made no step and saved nothing yet; try again when it has"
            if begun
            else f"no run here: neither checkpoints nor {METRICS}; give the --out of a training"
        )
        raise RunNotFound(f"{folder}: {what}", path=folder)
    steps, evaluations = lines or (_history(checkpoints), _evaluations_of(checkpoints))
    return RunData(
        path=folder,
        steps=steps,
        evaluations=evaluations,
        provenance=provenance,
        checkpoints=checkpoints,
        from_history=lines is None,
    )


def _read_metrics(path: Path) -> tuple[Steps, list[Evaluation]] | None:
    try:
        with _open(path) as file:
            return _parsed(path, iter(partial(file.readline, _MAX_BYTES), b""))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A file to read; nobody may ever write to a pipe that stands in its place."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"{path}: is no file; move it away")
        yield file


def _parsed(path: Path, lines: Iterator[bytes]) -> tuple[Steps, list[Evaluation]]:
    numbers: array[int] = array("q")
    values: array[float] = array("d")  # row by row; there may be millions
    evaluations: list[Evaluation] = []
    count = 0
    try:
        for count, line in enumerate(lines, 1):  # noqa: B007 - for the message
            if not line.endswith(b"\n"):
                if len(line) == _MAX_BYTES:
                    raise ValueError(f"more than {_MAX_BYTES:,} bytes")
                break  # torn: its writer is in the middle of it, or was killed there
            if line.isspace():
                continue  # of an editor
            record = json_fields.parse_object(line)
            step = json_fields.integer(record, "step")
            if not record.keys() <= _OF_A_STEP and (evaluated := _evaluation_metrics(record)):
                _require_order(step, evaluations[-1].step if evaluations else -1)
                evaluations.append(Evaluation(step, evaluated))
            else:
                _require_order(step, numbers[-1] if numbers else -1)
                numbers.append(step)
                values.extend(_row(record))
    except json_fields.WRONG as error:
        raise json_fields.field_error(f"{path}:{count}", error) from None
    rows = np.array(values).reshape(-1, len(COLUMNS))
    return _steps(np.array(numbers, np.int64), rows.T), evaluations


def _row(record: Mapping[str, Any]) -> array[float]:
    """The columns of a line of a step: what it must do a million times, it does at once."""
    found = [record.get(name, math.nan) for name in COLUMNS]
    if set(map(type, found)) <= {float, int}:
        with contextlib.suppress(OverflowError):  # told below, with its name
            return array("d", found)
    return array("d", [json_fields.number(record, name) if name in record else math.nan for name in COLUMNS])


def _evaluation_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: json_fields.number(record, name) for name in record if name.startswith(EVALUATED)}


def _require_order(step: int, before: int) -> None:
    if step <= before:
        json_fields.refuse("step", f"{step} comes after {before}")


def _steps(numbers: NDArray[np.int64], columns: NDArray[np.float64]) -> Steps:
    there = zip(COLUMNS, columns, strict=True)
    return Steps(numbers, {name: values for name, values in there if not np.isnan(values).all()})


def _history(checkpoints: Scan) -> Steps:
    """What the newest checkpoint that is whole remembers of each step."""
    for file in reversed(checkpoints.files):
        try:
            # Views, each verified when it is taken out: of a large checkpoint only the history is read.
            manager = CheckpointManager(file.path.parent)
            history = manager.load(file.path, mmap=True, verify="lazy").history
            columns = {name: np.array(history[name], np.float64) for name in COLUMNS if name in history}
        except (CorruptCheckpoint, CheckpointNotFound) as error:
            warnings.warn(f"its history is not shown: {error}", DistrustWarning, stacklevel=2)
            continue
        except (TypeError, ValueError):
            columns = {}  # another program's checkpoint
        lengths = {values.shape for values in columns.values()}
        if lengths == {(file.step,)}:
            return Steps(np.arange(1, file.step + 1), columns)
        break
    return Steps(np.empty(0, np.int64), {})


def _evaluations_of(checkpoints: Scan) -> list[Evaluation]:
    """The evaluations whose checkpoints are still there."""
    metrics = {
        step: {name: _real(value) for name, value in file.metrics.items() if name.startswith(EVALUATED)}
        for step, file in checkpoints.by_step().items()
    }
    return [Evaluation(step, found) for step, found in metrics.items() if found]


def _real(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer without bounds
        return math.inf


def _read_provenance(path: Path) -> Provenance | None:
    try:
        with _open(path) as file:
            text = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        found = json_fields.parse_object(text)
        options = ("weighting", "alpha", "lambda", "max_ratio")
        return Provenance({name: json_fields.scalar(found, name) for name in options}, _distribution(found))
    except json_fields.WRONG as error:
        raise json_fields.field_error(str(path), error) from None


def _distribution(found: Mapping[str, Any]) -> Distribution:
    counts = tuple(
        json_fields.integer({"counts": count}, "counts") for count in json_fields.items(found, "counts")
    )
    edges = tuple(json_fields.finite(edge, "edges") for edge in json_fields.items(found, "edges"))
    if len(edges) != len(counts) + 1 or any(low >= high for low, high in pairwise((0.0, *edges))):
        json_fields.refuse("edges", "not one more than counts, above 0 and rising")
    quantiles = json_fields.mapping(found.get("quantiles"), "quantiles")
    effective = json_fields.finite(found.get("effective_examples"), "effective_examples")
    if not 0 <= effective <= json_fields.integer(found, "examples") + 1:
        json_fields.refuse("effective_examples", "more than there are examples, or less than 0")
    return Distribution(
        examples=json_fields.integer(found, "examples"),
        tokens=json_fields.integer(found, "tokens"),
        effective_examples=effective,
        quantiles={name: _quartiles(value, f"quantiles.{name}") for name, value in quantiles.items()},
        edges=edges,
        counts=counts,
        classes=tuple(_class(item) for item in json_fields.items(found, "classes")),
        heaviest=tuple(_extreme(item, "heaviest") for item in json_fields.items(found, "heaviest")),
        lightest=tuple(_extreme(item, "lightest") for item in json_fields.items(found, "lightest")),
    )


def _class(value: Any) -> ClassSummary:
    item = json_fields.mapping(value, "classes")
    numbers = ("authority_weight", "provenance_entropy", "weight", "share")
    return ClassSummary(
        name=json_fields.text(item, "name"),
        examples=json_fields.integer(item, "examples"),
        tokens=json_fields.integer(item, "tokens"),
        **{name: json_fields.finite(item.get(name), f"classes.{name}") for name in numbers},
    )


def _extreme(value: Any, where: str) -> Extreme:
    item = json_fields.mapping(value, where)
    numbers = ("authority_weight", "provenance_entropy", "weight")
    return Extreme(
        where=json_fields.text(item, "where"),
        **{name: json_fields.finite(item.get(name), f"{where}.{name}") for name in numbers},
    )


def _quartiles(value: Any, where: str) -> Quartiles:
    low, lower, median, upper, high = (
        json_fields.finite(item, where)
        for item in (value if isinstance(value, list) and len(value) == 5 else [None] * 5)
    )
    return low, lower, median, upper, high
