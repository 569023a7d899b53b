"""What a page says of a run beside its pictures: pure functions of what the folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from distrust.checkpoint import CheckpointFile
from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.retention import Candidate, Retention, rank_by_metric
from distrust.config import TrainConfig, key
from distrust.reporting.names import class_name
from distrust.reporting.panels import by_share, stall_share
from distrust.reporting.run_reader import Evaluation, RunData
from distrust.reporting.style import zero_unknown
from distrust.run_record import RunRecord

#: Rows of evaluations that a page shows: a long run has thousands.
ROWS = 25
#: Letters of a class's name in a table: it has more room than a picture.
NAME_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure, as a reader meets it.

    Attributes:
        name: what it is.
        value: in words.
        more: what it is compared with, or where it was reached.
    """

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a run.

    Attributes:
        name: its key.
        value: in words.
        default: in words, where the value is another one; else None.
    """

    name: str
    value: str
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """An evaluation, or the evaluations of a source class.

    Attributes:
        name: the step, or the class.
        values: a cell for each column; empty where nothing was measured.
        best: whether it is the best one.
    """

    name: str
    values: Sequence[str]
    best: bool = False


def options_of(run: RunData) -> dict[str, Any]:
    """All options that its newest checkpoint holds, by key."""
    if run.newest is None:
        return {}
    return RunRecord.from_header(run.newest.header).options


def last_step(run: RunData) -> int:
    """The last step that is known to be made."""
    return max(
        int(run.steps.step[-1]) if len(run.steps) else 0,
        run.newest.step if run.newest is not None else 0,
    )


def _max_steps(run: RunData) -> int | None:
    """How far the run goes, if that is known: until it saves, one that was made longer has not said so."""
    last = options_of(run).get("max_steps")
    return last if isinstance(last, int) and last_step(run) <= last < MAX_STEP else None


def _of_steps(run: RunData) -> str:
    last = _max_steps(run)
    return "" if last is None else f"of {last:,}"


def state(run: RunData) -> tuple[str, str]:
    """Where a run is: a word, and a sentence."""
    step, last = last_step(run), _max_steps(run)
    of = f"step {step:,} {_of_steps(run)}".rstrip()
    newest = run.newest
    if newest is None:
        return "not saved yet", f"{of}: no checkpoint stands"
    if newest.kind == "final" and newest.step == step:
        early = last is not None and step < last
        return ("ended early" if early else "finished"), of
    return "not finished", f"{of}; the newest checkpoint is of step {newest.step:,}"


def facts(run: RunData) -> list[Fact]:
    """The figures at the top of the page; what is not known is left out."""
    columns = run.steps.columns
    best = best_evaluation(run)
    found = [
        Fact("steps", f"{last_step(run):,}", _of_steps(run)),
        best and Fact(f"best {_words(best[0])}", number(best[1]), f"at step {best[2]:,}"),
        _last_loss(run),
        *_checkpoints(run),
        _time(run),
        _tokens(run),
    ]
    if "stall_seconds" in columns and "seconds" in columns:
        waited = float(zero_unknown(columns["stall_seconds"]).sum())
        found.append(Fact("held up by checkpoints", f"{stall_share(run)[-1]:.2%}", duration(waited)))
    if "memory_bytes" in columns:
        found.append(Fact("peak memory", f"{zero_unknown(columns['memory_bytes']).max() / 2**30:.3g} GiB"))
    if run.provenance is not None:
        weights = run.provenance.weights
        share = weights.effective_examples / max(1, weights.examples)
        found.append(
            Fact(
                "effective examples",
                f"{weights.effective_examples:,.0f}",
                f"{share:.0%} of {weights.examples:,}",
            )
        )
    return [fact for fact in found if fact]


def best_evaluation(run: RunData) -> tuple[str, float, int] | None:
    """Metric, value and step of the best evaluation, by the run's own metric; None without any."""
    rules = _rules(run)
    metrics = {e.step: {**_metrics_of_step(run, e.step), **e.metrics} for e in run.evaluations}
    steps = rank_by_metric(
        [Candidate(step, final=False, metrics=found) for step, found in metrics.items()], rules
    )
    return (rules.metric, metrics[steps[0]][rules.metric], steps[0]) if steps else None


def _metrics_of_step(run: RunData, step: int) -> dict[str, float]:
    """What was logged of a step itself: it may be what the best one is told by."""
    at = int(np.searchsorted(run.steps.step, step))
    if at == len(run.steps) or run.steps.step[at] != step:
        return {}
    return {name: float(values[at]) for name, values in run.steps.columns.items()}


def best_checkpoint(run: RunData) -> CheckpointFile | None:
    """The best of the checkpoints that stand, by the run's own metric."""
    files = run.checkpoints.by_step()
    steps = rank_by_metric(
        [Candidate(step, False, file.metrics, file.measured_on) for step, file in files.items()], _rules(run)
    )
    return files[steps[0]] if steps else None


def _rules(run: RunData) -> Retention:
    options = options_of(run)
    metric, mode = options.get("metric"), options.get("metric_mode")
    return Retention(
        metric=metric if isinstance(metric, str) else "eval_loss",
        metric_mode="max" if mode == "max" else "min",
    )


def _last_loss(run: RunData) -> Fact | None:
    if "loss" not in run.steps.columns:
        return None
    return Fact("training loss", number(float(run.steps.columns["loss"][-1])), "of the last step")


def _checkpoints(run: RunData) -> list[Fact]:
    newest, best = run.newest, best_checkpoint(run)
    found = []
    if newest is not None:
        found.append(Fact("last checkpoint", f"step {newest.step:,}", newest.kind))
    if best is not None:
        metric = _rules(run).metric
        found.append(
            Fact("best checkpoint", f"step {best.step:,}", f"{_words(metric)} {number(best.metrics[metric])}")
        )
    return found


def _time(run: RunData) -> Fact | None:
    seconds = run.steps.columns.get("seconds")
    if seconds is not None:
        total, measured = float(zero_unknown(seconds).sum()), int(np.isfinite(seconds).sum())
        more = f"{total / max(1, measured):.3g} s a step"
        if measured < len(seconds):
            more += f"; of {measured:,} steps"
        return Fact("time in steps", duration(total), more)
    elapsed = None if run.newest is None else RunRecord.from_header(run.newest.header).elapsed_seconds
    return None if elapsed is None else Fact("time in steps", duration(elapsed))


def _tokens(run: RunData) -> Fact | None:
    columns = run.steps.columns
    seen = None if run.newest is None else RunRecord.from_header(run.newest.header).tokens_seen
    if "tokens" not in columns:
        return Fact("learned tokens", f"{seen:,}") if seen is not None else None
    more = ""
    if "seconds" in columns:
        both = np.isfinite(columns["tokens"]) & np.isfinite(columns["seconds"])
        seconds, tokens = (float(zero_unknown(columns[name][both]).sum()) for name in ("seconds", "tokens"))
        more = f"{tokens / seconds:,.0f} a second" if seconds > 0 and math.isfinite(tokens / seconds) else ""
    return Fact("learned tokens", f"{zero_unknown(columns['tokens']).sum():,.0f}", more)


#: The columns of a table of evaluations, as they are headed.
EVALUATED = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_weighted_loss": "weighted loss",
    "eval_weighted_perplexity": "weighted perplexity",
}


def evaluations(run: RunData) -> tuple[list[str], list[Row], int]:
    """A table of the evaluations: its columns, its rows, newest first, and how many rows are left out.

    Of many, the newest are there, the first, and the best.
    """
    names = [name for name in EVALUATED if any(name in e.metrics for e in run.evaluations)]
    best = best_evaluation(run)
    chosen: list[Evaluation] = list(run.evaluations)
    if len(chosen) > ROWS:
        chosen = [
            e
            for number, e in enumerate(run.evaluations)
            if number == 0 or number >= len(run.evaluations) - ROWS or (best and e.step == best[2])
        ]
    rows = [
        Row(f"{e.step:,}", [_cell(e.metrics, name) for name in names], bool(best and best[2] == e.step))
        for e in reversed(chosen)
    ]
    return [EVALUATED[name] for name in names], rows, len(run.evaluations) - len(chosen)


def evaluations_by_class(run: RunData) -> tuple[list[str], list[Row]]:
    """A table of the source classes: how each did at its last evaluation, and at its first."""
    metrics = ("eval_loss", "eval_perplexity")
    rows = []
    for name in by_share(run):
        _, values = run.evaluations_of(f"eval_loss/{name}")
        last = [run.evaluations_of(f"{metric}/{name}")[1] for metric in metrics]
        rows.append(
            Row(
                class_name(name, NAME_CHARACTERS),
                [
                    number(float(values[0])),
                    *(number(float(of[-1])) if len(of) else "" for of in last),
                    f"{values[-1] - values[0]:+.4g}",
                ],
            )
        )
    return ["first loss", "last loss", "last perplexity", "change"], rows


def options(run: RunData) -> list[Option]:
    """Every option of the run, in the order of the reference; then those that this program does not know."""
    there = options_of(run)
    defaults = {key(field.name): field.default for field in fields(TrainConfig)}
    rows = []
    for name, default in defaults.items():
        if name in there:
            value, usual = words(there[name]), words(default)
            rows.append(Option(name, value, usual if value != usual else None))
    saved = {} if run.newest is None else RunRecord.from_header(run.newest.header).config
    return rows + [Option(name, words(value)) for name, value in saved.items() if name not in defaults]


def environment(run: RunData) -> list[Fact]:
    """Where the newest checkpoint was made, and with what: names and values as it says them."""
    if run.newest is None:
        return []
    info, record = run.newest.header.run_info, RunRecord.from_header(run.newest.header)
    found: dict[str, Any] = {name: info.get(name) for name in ("host", "created") if name in info}
    found |= record.environment
    found |= {f"corpus: {name}": value for name, value in record.corpus.items()}
    found |= {f"fingerprint of the {name}": value for name, value in record.fingerprints.items()}
    return [Fact(str(name), words(value)) for name, value in found.items()]


def words(value: Any) -> str:
    """A value of an option."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(words, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {words(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: int | float) -> str:
    """A metric, to four digits."""
    if not isinstance(value, float):  # of a checkpoint's metrics, some count
        return f"{value:,}" if abs(value) < 10**15 else f"{str(value)[:4]}…"
    return f"{value:#.4g}".rstrip(".")


def duration(seconds: float) -> str:
    """A time, as a clock shows it; a short one in seconds."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def _cell(metrics: Mapping[str, float], name: str) -> str:
    return number(metrics[name]) if name in metrics else ""


def _words(metric: str) -> str:
    return metric.replace("_", " ")
