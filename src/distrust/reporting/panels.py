"""The panels of a figure. Each knows which runs have data for it, and draws all of them into given axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrust.data import NO_CLASS
from distrust.data.distribution import Distribution
from distrust.errors import ConfigError
from distrust.reporting.display import class_name, one_line
from distrust.reporting.run_reader import RunData, Values
from distrust.reporting.series import GIB, peak_memory, stall_share
from distrust.reporting.style import (
    BROWN,
    DASHED,
    QUIET,
    SERIES,
    PlottedRun,
    disable_math,
    draw_line,
    draw_raw_and_smoothed,
    scale_log,
)

#: More lines of source classes cannot be distinguished; a table has room for twice as many rows.
CLASSES = 8
_DASHED_REMARK = "dashed: weighted"

Coloured = Sequence[tuple[Distribution, Any]]
"""Distributions of weights, each with its colour."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind of panel."""

    title: str
    caption: str  # one sentence that says what it shows
    has: Callable[[RunData], bool]  # whether a run has data for it
    draw: Callable[[Any, Sequence[PlottedRun]], str]  # draws those runs; returns a remark for the title
    over_steps: bool = True  # whether the x axis is that of the steps
    minor: bool = False  # whether a page shows it small


def _draw_loss(axes: Any, runs: Sequence[PlottedRun]) -> str:
    remark = ""
    for shown in runs:
        columns = shown.run.steps.columns
        draw_raw_and_smoothed(axes, shown, columns["loss"])
        if "weighted_loss" in columns and _differ(columns["loss"], columns["weighted_loss"]):
            remark = _DASHED_REMARK
            weighted = shown.smooth_values(columns["weighted_loss"])
            draw_line(axes, shown.x, weighted, color=shown.colour, linewidth=1.2, linestyle=DASHED)
    axes.set_ylabel("nats per token")
    return remark


def _differ(values: Values, weighted: Values) -> bool:
    return not np.array_equal(values, weighted, equal_nan=True)  # without weighting they are equal


def _draw_evaluations(axes: Any, runs: Sequence[PlottedRun]) -> str:
    remarks = []
    for shown in runs:
        steps, values = shown.run.evaluations_of("eval_loss")
        marker = "o" if len(steps) <= 50 else ""
        draw_line(
            axes, shown.positions_of(steps), values, color=shown.colour, linewidth=2, marker=marker,
            markersize=3.5, label="all", zorder=3,
        )  # fmt: skip
        steps, weighted = shown.run.evaluations_of("eval_weighted_loss")
        if len(steps) and _differ(values, weighted):
            remarks = [_DASHED_REMARK]
            x = shown.positions_of(steps)
            draw_line(axes, x, weighted, color=shown.colour, linewidth=1.2, linestyle=DASHED)
    axes.set_ylabel("nats per token")
    if len(runs) == 1 and len(classes := classes_by_share(runs[0].run)) > 1:
        remarks += _draw_classes(axes, runs[0], classes)
    return ", ".join(remarks)


def classes_by_share(run: RunData) -> list[str]:
    """The source classes of the evaluations, those with the largest share of the weight first."""
    classes = run.provenance.weights.classes if run.provenance else ()
    shares = {c.name or NO_CLASS: c.share for c in classes}  # evaluations use NO_CLASS, not ""
    return sorted(run.classes_of("eval_loss"), key=lambda name: -shares.get(name, 0.0))


def _draw_classes(axes: Any, shown: PlottedRun, classes: list[str]) -> list[str]:
    colours = [colour for colour in (*SERIES, QUIET, BROWN) if colour != shown.colour]
    for name, colour in zip(classes[:CLASSES], colours, strict=False):
        steps, values = shown.run.evaluations_of(f"eval_loss/{name}")
        x = shown.positions_of(steps)
        draw_line(axes, x, values, color=colour, linewidth=1.2, label=class_name(name))
    columns = 3 if max(len(class_name(name)) for name in classes[:CLASSES]) < 16 else 2
    legend = axes.legend(  # below the axes, where it covers no line
        loc="upper center", bbox_to_anchor=(0.5, -0.21), ncols=columns, frameon=False, fontsize="small",
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    disable_math(legend.get_texts())
    return [f"{CLASSES} of {len(classes)} source classes"] if len(classes) > CLASSES else []


def _line_panel(
    title: str,
    caption: str,
    columns: Sequence[str],
    *,
    values: Callable[[PlottedRun], Values] | None = None,
    label: str = "",
    raw: bool = False,
    remark: Callable[[RunData], str] = lambda _: "",
) -> Panel:
    """A small panel of lines, from zero: of the ``values``, or of the only one of the columns that it needs.

    With ``raw``, the lines are smoothed, and the raw values are behind them.
    """
    values_of = values or (lambda shown: shown.run.steps.columns[columns[0]])

    def draw(axes: Any, runs: Sequence[PlottedRun]) -> str:
        for shown in runs:
            if raw:
                draw_raw_and_smoothed(axes, shown, values_of(shown))
            else:
                draw_line(axes, shown.x, values_of(shown), color=shown.colour, linewidth=1.7)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # headroom for flat lines
        return remark(runs[0].run) if len(runs) == 1 else ""

    return Panel(title, caption, _has(*columns), draw, minor=True)


def _speed(shown: PlottedRun) -> Values:
    columns = shown.run.steps.columns
    with np.errstate(invalid="ignore", divide="ignore"):
        # Tokens of a window by its seconds, not a mean of speeds: short steps must not count more.
        return shown.smooth_values(columns["tokens"]) / shown.smooth_values(columns["seconds"])


def _distributions(runs: Sequence[PlottedRun]) -> Coloured:
    return [(run.run.provenance.weights, run.colour) for run in runs if run.run.provenance is not None]


def _draw_run_weights(axes: Any, runs: Sequence[PlottedRun]) -> str:
    remark = draw_weights(axes, _distributions(runs), noun="example")
    axes.axvline(1, color=QUIET, linewidth=1, linestyle=":")  # weight of an average token
    axes.set_xlabel("weight of an example (mean over the tokens: 1)")
    return remark


def draw_weights(axes: Any, distributions: Coloured, *, noun: str) -> str:
    """Draw histograms of weights; returns a remark."""
    for weights, colour in distributions:
        if len(distributions) == 1:
            axes.stairs(weights.counts, weights.edges, fill=True, color=colour, alpha=0.8)
        else:
            shares = np.array(weights.counts) / max(1, sum(weights.counts)) * 100  # runs may differ in size
            axes.stairs(shares, weights.edges, color=colour, linewidth=1.7)
    scale_log(axes, [edge for weights, _ in distributions for edge in weights.edges])
    axes.set_ylabel(f"{noun}s" if len(distributions) == 1 else f"% of the {noun}s")
    if len(distributions) > 1:  # each run has its own
        return ""
    weights = distributions[0][0]
    share = weights.effective_examples / max(1, weights.examples)
    return f"effective sample size {weights.effective_examples:,.0f} ({share:.0%})"


def draw_sources(axes: Any, distributions: Coloured, *, unit: str) -> str:
    """Draw the share of each source class in the tokens (the ``unit``) and the weight; returns a remark."""
    names = list(dict.fromkeys(c.name for weights, _ in distributions for c in weights.classes))
    rows = {name: -number for number, name in enumerate(names[: 2 * CLASSES])}
    for number, (weights, colour) in enumerate(distributions):
        # Several runs share a row, each at a height of its own.
        offset = 0.0 if len(distributions) == 1 else 0.5 * (0.5 - number / (len(distributions) - 1))
        for source in weights.classes:
            if source.name in rows:
                y, share = rows[source.name] + offset, source.tokens / max(1, weights.tokens)
                axes.plot([100 * share, 100 * source.share], [y, y], color=colour, linewidth=2, alpha=0.5)
                axes.plot(100 * share, y, marker="o", markersize=5, color=QUIET, markerfacecolor="none")
                axes.plot(100 * source.share, y, marker="o", markersize=6, color=colour)
    axes.set_yticks(list(rows.values()), [class_name(name) for name in rows])
    disable_math(axes.get_yticklabels())
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlim(left=0)  # shares are compared from zero
    axes.set_xlabel(f"% of the {unit} (ring), of the weight (dot)")
    return f"{len(rows)} of {len(names)} source classes" if len(names) > len(rows) else ""


def _has(*columns: str) -> Callable[[RunData], bool]:
    def has(run: RunData) -> bool:
        values = run.steps.columns  # absent without any value
        return all(name in values and bool(np.isfinite(values[name]).any()) for name in columns)

    return has


PANELS: Mapping[str, Panel] = {
    "loss": Panel(
        "Training loss", "Cross-entropy of each step (faint) and smoothed.", _has("loss"), _draw_loss
    ),
    "eval": Panel(
        "Evaluation loss",
        "Cross-entropy on examples that are not trained on.",
        lambda run: bool(len(run.evaluations_of("eval_loss")[0])),
        _draw_evaluations,
    ),
    "sources": Panel(
        "Weight by source class",
        "A dot to the right of its ring: the weighting counts the class for more than its share of tokens.",
        lambda run: run.provenance is not None and len(run.provenance.weights.classes) > 1,
        lambda axes, runs: draw_sources(axes, _distributions(runs), unit="tokens"),
        over_steps=False,
    ),
    "weights": Panel(
        "Example weights",
        "Number of examples by weight.",
        lambda run: run.provenance is not None and bool(run.provenance.weights.counts),
        _draw_run_weights,
        over_steps=False,
    ),
    "lr": _line_panel("Learning rate", "The learning rate of each step.", ["learning_rate"]),
    "norm": _line_panel(
        "Gradient norm",
        "The norm of the gradient.",
        ["gradient_norm"],
        raw=True,
        remark=lambda _: "before clipping",
    ),
    "speed": _line_panel(
        "Speed",
        "Trained tokens per second, smoothed.",
        ["tokens", "seconds"],
        values=_speed,
        label="tokens per second",
    ),
    "stall": _line_panel(
        "Checkpoint stall",
        "Share of the time so far in which training waited for checkpoints.",
        ["stall_seconds", "seconds"],
        values=lambda shown: 100 * stall_share(shown.run),
        label="% of the time so far",
        remark=lambda run: f"{stall_share(run)[-1]:.2%} in total",
    ),
    "memory": _line_panel(
        "Memory",
        "Resident on the host after each step.",
        ["host_bytes"],
        values=lambda shown: shown.run.steps.columns["host_bytes"] / GIB,
        label="GiB",
        remark=lambda run: f"peak {peak_memory(run, 'host_bytes', 'host_peak_bytes')}",
    ),
    "device": _line_panel(
        "Device memory",
        "Reserved on the device after each step: arrays, and the caches of the allocator.",
        ["device_reserved_bytes", "device_peak_bytes"],
        values=lambda shown: shown.run.steps.columns["device_reserved_bytes"] / GIB,
        label="GiB",
        remark=lambda run: f"peak of the arrays {peak_memory(run, 'device_peak_bytes')}",
    ),
}


def require_panels(names: Sequence[str]) -> None:
    """Raise ConfigError if a name is unknown."""
    for name in names:
        if name not in PANELS:
            raise ConfigError(
                f"--panels: there is no panel {one_line(name, 60)!r}; there are {', '.join(PANELS)}"
            )
