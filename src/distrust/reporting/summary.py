"""The facts and tables of a run's page: pure functions of the run's data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from distrust.checkpoint import CheckpointFile
from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.retention import Candidate, Retention, rank_by_metric
from distrust.config import TrainConfig, key
from distrust.option_values import WEIGHT_OPTIONS
from distrust.reporting.display import TABLE_NAME_CHARACTERS, class_name, duration, number, words
from distrust.reporting.panels import classes_by_share
from distrust.reporting.run_reader import RunData
from distrust.reporting.series import peak_memory, stall_share, zero_unknown
from distrust.run_record import RunRecord

#: Evaluations that a page lists: a long run has thousands.
ROWS = 25
#: The columns of the table of evaluations, and their headings.
EVALUATION_COLUMNS = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_weighted_loss": "weighted loss",
    "eval_weighted_perplexity": "weighted perplexity",
}
CLASS_COLUMNS = ["first loss", "last loss", "last perplexity", "change"]


class Fact(NamedTuple):
    """A named value, as text."""

    name: str
    value: str
    detail: str = ""  # what it is compared with, or where it was reached; the default of a changed option


class Row(NamedTuple):
    """A row of a table: an evaluation, or the evaluations of a source class."""

    name: str  # the step, or the class
    values: Sequence[str]  # one cell per column; empty where nothing was measured
    best: bool = False  # whether it is the best evaluation


def _record(run: RunData) -> RunRecord:
    """What the newest checkpoint records; nothing without one."""
    return RunRecord.from_header(run.newest.header) if run.newest else RunRecord(config={}, settings={})


def last_step(run: RunData) -> int:
    """The last known step."""
    saved = run.newest.step if run.newest is not None else 0
    return max(int(run.steps.step[-1]), saved) if len(run.steps) else saved


def _max_steps(run: RunData) -> int | None:
    """The length of the run. Unknown while a run that was extended has not saved its new length."""
    steps = _record(run).options.get("max_steps")
    return steps if isinstance(steps, int) and last_step(run) <= steps < MAX_STEP else None  # untrusted


def _of_max_steps(run: RunData) -> str:
    steps = _max_steps(run)
    return "" if steps is None else f"of {steps:,}"


def state(run: RunData) -> tuple[str, str]:
    """The state of a run: a label and a sentence."""
    step, max_steps = last_step(run), _max_steps(run)
    position = f"step {step:,} {_of_max_steps(run)}".rstrip()
    newest = run.newest
    if newest is None:
        return "not saved yet", f"{position}: no checkpoint exists"
    if newest.kind == "final" and newest.step == step:
        early = max_steps is not None and step < max_steps
        return ("ended early" if early else "finished"), position
    return "not finished", f"{position}; the newest checkpoint is of step {newest.step:,}"


def facts(run: RunData) -> list[Fact]:
    """The facts at the top of the page; unknown ones are left out."""
    rows = [Fact("steps", f"{last_step(run):,}", _of_max_steps(run))]
    if best := best_evaluation(run):
        metric, value, step = best
        rows.append(Fact(f"best {metric.replace('_', ' ')}", number(value), f"at step {step:,}"))
    if "loss" in run.steps.columns:
        rows.append(Fact("training loss", number(float(run.steps.columns["loss"][-1])), "of the last step"))
    if run.newest is not None:
        rows.append(Fact("last checkpoint", f"step {run.newest.step:,}", run.newest.kind))
    if file := best_checkpoint(run):
        metric = _rules(run).metric
        detail = f"{metric.replace('_', ' ')} {number(file.metrics[metric])}"
        rows.append(Fact("best checkpoint", f"step {file.step:,}", detail))
    rows += [*_speed_facts(run), *_machine_facts(run)]
    if run.provenance is not None:
        weights = run.provenance.weights
        detail = f"{weights.effective_examples / max(1, weights.examples):.0%} of {weights.examples:,}"
        rows.append(Fact("effective sample size", f"{weights.effective_examples:,.0f}", detail))
    return rows


def _speed_facts(run: RunData) -> Iterator[Fact]:
    columns, record = run.steps.columns, _record(run)
    seconds, tokens = columns.get("seconds"), columns.get("tokens")
    if seconds is not None:
        total, measured = float(zero_unknown(seconds).sum()), int(np.isfinite(seconds).sum())
        detail = f"{total / max(1, measured):.3g} s per step"
        if measured < len(seconds):
            detail += f"; of {measured:,} steps"  # restored lines have no times
        yield Fact("time in steps", duration(total), detail)
    elif record.elapsed_seconds is not None:
        yield Fact("time in steps", duration(record.elapsed_seconds))
    if tokens is not None:
        detail = ""
        if seconds is not None:
            timed = np.isfinite(tokens) & np.isfinite(seconds)
            total, count = float(zero_unknown(seconds[timed]).sum()), float(zero_unknown(tokens[timed]).sum())
            if total > 0 and math.isfinite(count / total):
                detail = f"{count / total:,.0f} per second"
        yield Fact("trained tokens", f"{zero_unknown(tokens).sum():,.0f}", detail)
    elif record.tokens_seen is not None:
        yield Fact("trained tokens", f"{record.tokens_seen:,}")


def _machine_facts(run: RunData) -> Iterator[Fact]:
    columns = run.steps.columns
    if "stall_seconds" in columns and "seconds" in columns:
        seconds = float(zero_unknown(columns["stall_seconds"]).sum())
        yield Fact("checkpoint stall", f"{stall_share(run)[-1]:.2%}", duration(seconds))
    if "at_risk_seconds" in columns:
        most = float(zero_unknown(columns["at_risk_seconds"]).max())
        yield Fact("work that can be lost", f"at most {duration(most)}", "between two durable checkpoints")
    if "device_peak_bytes" in columns:
        reserved = peak_memory(run, "device_reserved_bytes")
        yield Fact("peak device memory", peak_memory(run, "device_peak_bytes"), f"{reserved} reserved")
    if "host_bytes" in columns:
        name = "peak host memory" if "device_peak_bytes" in columns else "peak memory"
        yield Fact(name, peak_memory(run, "host_bytes", "host_peak_bytes"))


def best_evaluation(run: RunData) -> tuple[str, float, int] | None:
    """Metric, value and step of the best evaluation by the run's own metric; None without any."""
    rules = _rules(run)  # of the run, not of this program
    # The metric may be one of the steps, such as the training loss.
    metrics = {e.step: {**_metrics_of_step(run, e.step), **e.metrics} for e in run.evaluations}
    candidates = [Candidate(step, final=False, metrics=values) for step, values in metrics.items()]
    steps = rank_by_metric(candidates, rules)
    return (rules.metric, metrics[steps[0]][rules.metric], steps[0]) if steps else None


def _metrics_of_step(run: RunData, step: int) -> dict[str, float]:
    index = int(np.searchsorted(run.steps.step, step))  # steps may be missing
    if index == len(run.steps) or run.steps.step[index] != step:
        return {}
    return {name: float(values[index]) for name, values in run.steps.columns.items()}


def best_checkpoint(run: RunData) -> CheckpointFile | None:
    """The best existing checkpoint by the run's own metric."""
    files = run.checkpoints.by_step()
    steps = rank_by_metric(
        [Candidate(step, False, file.metrics, file.measured_on) for step, file in files.items()], _rules(run)
    )
    return files[steps[0]] if steps else None


def _rules(run: RunData) -> Retention:
    options = _record(run).options
    metric, mode = options.get("metric"), options.get("metric_mode")
    return Retention(
        metric=metric if isinstance(metric, str) else "eval_loss",  # untrusted
        metric_mode="max" if mode == "max" else "min",
    )


def evaluations(run: RunData) -> tuple[list[str], list[Row], int]:
    """The table of evaluations: headings, rows from the newest, and the number of omitted rows.

    If there are many, it has the newest, the first and the best.
    """
    names = [name for name in EVALUATION_COLUMNS if any(name in e.metrics for e in run.evaluations)]
    _, _, best_step = best_evaluation(run) or (None, None, None)
    newest = len(run.evaluations) - ROWS  # index of the first of the newest
    chosen = [
        e for index, e in enumerate(run.evaluations) if index == 0 or index >= newest or e.step == best_step
    ]
    rows = [
        Row(
            f"{e.step:,}",
            [number(e.metrics[name]) if name in e.metrics else "" for name in names],
            e.step == best_step,
        )
        for e in reversed(chosen)
    ]
    return [EVALUATION_COLUMNS[name] for name in names], rows, len(run.evaluations) - len(chosen)


def evaluations_by_class(run: RunData) -> tuple[list[str], list[Row]]:
    """The table of source classes: headings, and for each class its first and last evaluation."""
    rows = []
    for name in classes_by_share(run):
        losses = run.evaluations_of(f"eval_loss/{name}")[1].tolist()
        perplexities = run.evaluations_of(f"eval_perplexity/{name}")[1].tolist()
        cells = [
            number(losses[0]),
            number(losses[-1]),
            number(perplexities[-1]) if perplexities else "",
            f"{losses[-1] - losses[0]:+.4g}",
        ]
        rows.append(Row(class_name(name, TABLE_NAME_CHARACTERS), cells))
    return CLASS_COLUMNS, rows


def options(run: RunData) -> list[Fact]:
    """The options of the run, in the order of the reference; then those that this version does not know.

    The detail of an option that differs from its default is the default.
    """
    saved = _record(run).options
    hidden = WEIGHT_OPTIONS if saved.get("weighting") == "off" else ()
    saved = {name: value for name, value in saved.items() if name not in hidden}
    defaults = {key(field.name): field.default for field in fields(TrainConfig)}
    rows = []
    for name in [name for name in defaults if name in saved]:
        value, standard = words(saved[name]), words(defaults[name])
        rows.append(Fact(name, value, standard if value != standard else ""))
    unknown = {name: value for name, value in _record(run).config.items() if name not in defaults}
    return rows + [Fact(name, words(value)) for name, value in unknown.items()]


def environment(run: RunData) -> list[Fact]:
    """The machine and the software of the newest checkpoint."""
    if run.newest is None:
        return []
    info, record = run.newest.header.run_info, _record(run)
    values: dict[str, Any] = {
        **{name: info[name] for name in ("host", "created") if name in info},
        **record.environment,
        **({"ranks": record.ranks} if record.ranks > 1 else {}),
        **{f"corpus: {name}": value for name, value in record.corpus.items()},
        **{f"fingerprint of the {name}": value for name, value in record.fingerprints.items()},
    }
    return [Fact(str(name), words(value)) for name, value in values.items()]
