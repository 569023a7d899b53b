"""The facts and tables of a run's page: pure functions of the run's data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from distrust.checkpoint import CheckpointFile
from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.retention import Candidate, Retention, rank_by_metric
from distrust.config import TrainConfig, key
from distrust.reporting.display import TABLE_NAME_CHARACTERS, class_name, duration, number, words
from distrust.reporting.panels import classes_by_share
from distrust.reporting.run_reader import RunData
from distrust.reporting.series import stall_share, zero_unknown
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
    return (
        RunRecord(config={}, settings={}) if run.newest is None else RunRecord.from_header(run.newest.header)
    )


def last_step(run: RunData) -> int:
    """The last known step."""
    return max(
        int(run.steps.step[-1]) if len(run.steps) else 0,
        run.newest.step if run.newest is not None else 0,
    )


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
    best = best_evaluation(run)  # None without evaluations
    candidates = [
        Fact("steps", f"{last_step(run):,}", _of_max_steps(run)),
        best and Fact(f"best {_with_spaces(best[0])}", number(best[1]), f"at step {best[2]:,}"),
        _last_loss(run),
        *_checkpoints(run),
        _time(run),
        _tokens(run),
        _stall(run),
        _memory(run),
        _effective_sample(run),
    ]
    return [fact for fact in candidates if fact]


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


def _last_loss(run: RunData) -> Fact | None:
    if "loss" not in run.steps.columns:
        return None
    return Fact("training loss", number(float(run.steps.columns["loss"][-1])), "of the last step")


def _checkpoints(run: RunData) -> list[Fact]:
    newest, best = run.newest, best_checkpoint(run)
    rows = []
    if newest is not None:
        rows.append(Fact("last checkpoint", f"step {newest.step:,}", newest.kind))
    if best is not None:
        metric = _rules(run).metric
        value = f"{_with_spaces(metric)} {number(best.metrics[metric])}"
        rows.append(Fact("best checkpoint", f"step {best.step:,}", value))
    return rows


def _time(run: RunData) -> Fact | None:
    seconds = run.steps.columns.get("seconds")
    if seconds is not None:
        total, measured = float(zero_unknown(seconds).sum()), int(np.isfinite(seconds).sum())
        detail = f"{total / max(1, measured):.3g} s per step"
        if measured < len(seconds):
            detail += f"; of {measured:,} steps"  # restored lines have no times
        return Fact("time in steps", duration(total), detail)
    elapsed = _record(run).elapsed_seconds
    return None if elapsed is None else Fact("time in steps", duration(elapsed))


def _tokens(run: RunData) -> Fact | None:
    columns = run.steps.columns
    saved_count = _record(run).tokens_seen
    if "tokens" not in columns:
        return Fact("trained tokens", f"{saved_count:,}") if saved_count is not None else None
    detail = ""
    if "seconds" in columns:
        timed = np.isfinite(columns["tokens"]) & np.isfinite(columns["seconds"])
        seconds, tokens = (float(zero_unknown(columns[name][timed]).sum()) for name in ("seconds", "tokens"))
        if seconds > 0 and math.isfinite(tokens / seconds):
            detail = f"{tokens / seconds:,.0f} per second"
    return Fact("trained tokens", f"{zero_unknown(columns['tokens']).sum():,.0f}", detail)


def _stall(run: RunData) -> Fact | None:
    columns = run.steps.columns
    if "stall_seconds" not in columns or "seconds" not in columns:
        return None
    seconds = float(zero_unknown(columns["stall_seconds"]).sum())
    return Fact("checkpoint stall", f"{stall_share(run)[-1]:.2%}", duration(seconds))


def _memory(run: RunData) -> Fact | None:
    if "memory_bytes" not in run.steps.columns:
        return None
    return Fact("peak memory", f"{zero_unknown(run.steps.columns['memory_bytes']).max() / 2**30:.3g} GiB")


def _effective_sample(run: RunData) -> Fact | None:
    if run.provenance is None:
        return None
    weights = run.provenance.weights
    share = weights.effective_examples / max(1, weights.examples)
    detail = f"{share:.0%} of {weights.examples:,}"
    return Fact("effective sample size", f"{weights.effective_examples:,.0f}", detail)


def evaluations(run: RunData) -> tuple[list[str], list[Row], int]:
    """The table of evaluations: headings, rows from the newest, and the number of omitted rows.

    If there are many, it has the newest, the first and the best.
    """
    names = [name for name in EVALUATION_COLUMNS if any(name in e.metrics for e in run.evaluations)]
    best = best_evaluation(run)
    best_step = best[2] if best else None
    newest = len(run.evaluations) - ROWS  # index of the first of the newest
    chosen = [
        e for index, e in enumerate(run.evaluations) if index == 0 or index >= newest or e.step == best_step
    ]
    rows = [
        Row(f"{e.step:,}", [_cell(e.metrics, name) for name in names], e.step == best_step)
        for e in reversed(chosen)
    ]
    return [EVALUATION_COLUMNS[name] for name in names], rows, len(run.evaluations) - len(chosen)


def evaluations_by_class(run: RunData) -> tuple[list[str], list[Row]]:
    """The table of source classes: headings, and for each class its first and last evaluation."""
    rows = []
    for name in classes_by_share(run):
        losses, perplexities = (
            run.evaluations_of(f"{metric}/{name}")[1] for metric in ("eval_loss", "eval_perplexity")
        )
        cells = [
            number(float(losses[0])),
            number(float(losses[-1])),
            number(float(perplexities[-1])) if len(perplexities) else "",
            f"{losses[-1] - losses[0]:+.4g}",
        ]
        rows.append(Row(class_name(name, TABLE_NAME_CHARACTERS), cells))
    return CLASS_COLUMNS, rows


def options(run: RunData) -> list[Fact]:
    """Every option of the run, in the order of the reference; then those that this version does not know.

    The detail of an option that differs from its default is the default.
    """
    saved = _record(run).options
    defaults = {key(field.name): field.default for field in fields(TrainConfig)}
    rows = []
    for name, default in defaults.items():
        if name in saved:
            value, standard = words(saved[name]), words(default)
            rows.append(Fact(name, value, standard if value != standard else ""))
    unknown = [(name, value) for name, value in _record(run).config.items() if name not in defaults]
    return rows + [Fact(name, words(value)) for name, value in unknown]


def environment(run: RunData) -> list[Fact]:
    """The machine and the software of the newest checkpoint."""
    if run.newest is None:
        return []
    info, record = run.newest.header.run_info, _record(run)
    values: dict[str, Any] = {name: info.get(name) for name in ("host", "created") if name in info}
    values |= record.environment
    values |= {f"corpus: {name}": value for name, value in record.corpus.items()}
    values |= {f"fingerprint of the {name}": value for name, value in record.fingerprints.items()}
    return [Fact(str(name), words(value)) for name, value in values.items()]


def _cell(metrics: Mapping[str, float], name: str) -> str:
    return number(metrics[name]) if name in metrics else ""


def _with_spaces(metric: str) -> str:
    return metric.replace("_", " ")
