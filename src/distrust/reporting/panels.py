"""What a picture of runs is made of: panels, each drawn into axes that it is given.

A panel knows for which runs it has something to show, and draws all of them, a colour a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrust.data import NO_CLASS
from distrust.errors import ConfigError
from distrust.reporting.display import pluralize
from distrust.reporting.names import class_name, one_line
from distrust.reporting.run_reader import RunData
from distrust.reporting.series import Values
from distrust.reporting.style import (
    BROWN,
    QUIET,
    SERIES,
    PlottedRun,
    as_text,
    compact,
    draw_line,
    draw_over_steps,
    draw_raw_and_smoothed,
    zero_unknown,
)

#: More lines of source classes are not told apart, nor more than twice as many rows.
CLASSES = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind of picture.

    Attributes:
        title: of the panel.
        caption: what it shows, in a sentence.
        has: whether there is something to show of a run.
        draw: draws the runs that have something, and returns what to say beside the title.
        over_steps: whether its x axis is that of the steps.
        minor: whether it is looked at after the others.
    """

    title: str
    caption: str
    has: Callable[[RunData], bool]
    draw: Callable[[Any, Sequence[PlottedRun]], str]
    over_steps: bool = True
    minor: bool = False


def _differ(one: Values | None, other: Values | None) -> bool:
    return one is not None and other is not None and not np.array_equal(one, other, equal_nan=True)


def _draw_loss(axes: Any, runs: Sequence[PlottedRun]) -> str:
    dashed = False
    for shown in runs:
        columns = shown.run.steps.columns
        draw_raw_and_smoothed(axes, shown, columns["loss"])
        if _differ(columns["loss"], columns.get("weighted_loss")):
            dashed = True
            line = shown.line(columns["weighted_loss"])
            draw_over_steps(axes, shown, line, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_ylabel("nats a token")
    return "dashed: weighted" if dashed else ""


def _draw_evaluations(axes: Any, runs: Sequence[PlottedRun]) -> str:
    remarks = []
    for shown in runs:
        steps, values = shown.run.evaluations_of("eval_loss")
        few = "o" if len(steps) <= 50 else ""
        draw_line(
            axes, shown.at(steps), values, color=shown.colour, linewidth=2, marker=few, markersize=3.5,
            label="all", zorder=3,
        )  # fmt: skip
        steps, weighted = shown.run.evaluations_of("eval_weighted_loss")
        if len(steps) and _differ(values, weighted):
            remarks = ["dashed: weighted"]
            draw_line(
                axes, shown.at(steps), weighted, color=shown.colour, linewidth=1.2, linestyle=(0, (4, 2))
            )
    axes.set_ylabel("nats a token")
    if len(runs) == 1 and len(classes := by_share(runs[0].run)) > 1:
        remarks += _draw_classes(axes, runs[0], classes)
    return ", ".join(remarks)


def by_share(run: RunData) -> list[str]:
    """The source classes that were evaluated: those that weigh most first."""
    classes = run.provenance.weights.classes if run.provenance else ()
    shares = {c.name or NO_CLASS: c.share for c in classes}  # so an evaluation calls the nameless one
    return sorted(run.classes_of("eval_loss"), key=lambda name: -shares.get(name, 0.0))


def _draw_classes(axes: Any, shown: PlottedRun, classes: list[str]) -> list[str]:
    others = [colour for colour in (*SERIES, QUIET, BROWN) if colour != shown.colour]
    for name, colour in zip(classes[:CLASSES], others, strict=False):
        steps, values = shown.run.evaluations_of(f"eval_loss/{name}")
        draw_line(axes, shown.at(steps), values, color=colour, linewidth=1.2, label=class_name(name))
    columns = 3 if max(len(class_name(name)) for name in classes[:CLASSES]) < 16 else 2
    # Below the axes, where it covers no line.
    legend = axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.21), ncols=columns, frameon=False, fontsize="small",
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    as_text(legend.get_texts())
    return [f"{CLASSES} of {len(classes)} source classes"] if len(classes) > CLASSES else []


def _draw_rate(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        draw_over_steps(axes, shown, shown.run.steps.columns["learning_rate"], linewidth=1.7)
    axes.set_ylim(bottom=0)
    return ""


def _draw_norm(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        draw_raw_and_smoothed(axes, shown, shown.run.steps.columns["gradient_norm"])
    axes.set_ylim(bottom=0)
    return "before clipping"


def _draw_speed(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        columns = shown.run.steps.columns
        with np.errstate(invalid="ignore", divide="ignore"):
            # Tokens of the window over its seconds, not a mean of speeds: short steps must not count more.
            speed = shown.line(columns["tokens"]) / shown.line(columns["seconds"])
        draw_over_steps(axes, shown, speed, linewidth=1.7)
    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    return ""


def stall_share(run: RunData) -> Values:
    """The part of the time until each step that checkpoints took, in [0, 1]: float64[n].

    Seconds that a line does not have count as none.
    """
    stall = np.cumsum(zero_unknown(run.steps.columns["stall_seconds"]))
    steps = np.cumsum(zero_unknown(run.steps.columns["seconds"]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(stall + steps > 0, stall / (stall + steps), 0.0)


def _draw_stall(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        draw_over_steps(axes, shown, 100 * stall_share(shown.run), linewidth=1.7)
    axes.set_ylabel("% of the time so far")
    axes.set_ylim(bottom=0)
    return f"{stall_share(runs[0].run)[-1]:.2%} in all" if len(runs) == 1 else ""


def _draw_memory(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        draw_over_steps(axes, shown, shown.run.steps.columns["memory_bytes"] / 2**30, linewidth=1.7)
    axes.set_ylabel("GiB")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if len(runs) > 1:
        return ""
    return f"peak {zero_unknown(runs[0].run.steps.columns['memory_bytes']).max() / 2**30:.3g} GiB"


def _draw_weights(axes: Any, runs: Sequence[PlottedRun]) -> str:
    for shown in runs:
        weights = shown.run.provenance.weights  # type: ignore[union-attr] # it has one, or is not drawn
        if len(runs) == 1:
            axes.stairs(weights.counts, weights.edges, fill=True, color=shown.colour, alpha=0.8)
        else:
            shares = np.array(weights.counts) / max(1, sum(weights.counts)) * 100
            axes.stairs(shares, weights.edges, color=shown.colour, linewidth=1.7)
    _scale_log(axes, [e for shown in runs for e in shown.run.provenance.weights.edges])  # type: ignore[union-attr]
    axes.axvline(1, color=QUIET, linewidth=1, linestyle=":")
    axes.set_xlabel("weight of an example (mean over the tokens: 1)")
    axes.set_ylabel("examples" if len(runs) == 1 else "% of the examples")
    if len(runs) > 1:
        return ""
    weights = runs[0].run.provenance.weights  # type: ignore[union-attr]
    return f"worth {weights.effective_examples:,.0f} of {pluralize(weights.examples, 'example')}"


def _scale_log(axes: Any, edges: Sequence[float]) -> None:
    """A logarithmic x axis with numbers on it that people read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    wide = max(edges) / min(edges) > 1000
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_sources(axes: Any, runs: Sequence[PlottedRun]) -> str:
    """For each class, what part of the tokens it is, and what part of the weight."""
    tables = [shown.run.provenance.weights for shown in runs]  # type: ignore[union-attr]
    names = list(dict.fromkeys(c.name for table in tables for c in table.classes))
    rows = {name: -number for number, name in enumerate(names[: 2 * CLASSES])}
    for number, (shown, table) in enumerate(zip(runs, tables, strict=True)):
        offset = 0.0 if len(runs) == 1 else 0.5 * (0.5 - number / (len(runs) - 1))
        for found in table.classes:
            if found.name in rows:
                y, part = rows[found.name] + offset, found.tokens / max(1, table.tokens)
                axes.plot([100 * part, 100 * found.share], [y, y], color=shown.colour, linewidth=2, alpha=0.5)
                axes.plot(100 * part, y, marker="o", markersize=5, color=QUIET, markerfacecolor="none")
                axes.plot(100 * found.share, y, marker="o", markersize=6, color=shown.colour)
    axes.set_yticks(list(rows.values()), [class_name(name) for name in rows])
    as_text(axes.get_yticklabels())
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the tokens (ring), of the weight (dot)")
    return f"{len(rows)} of {len(names)} source classes" if len(names) > len(rows) else ""


def _has(*columns: str) -> Callable[[RunData], bool]:
    def has(run: RunData) -> bool:
        there = run.steps.columns
        return all(name in there and bool(np.isfinite(there[name]).any()) for name in columns)

    return has


def _has_classes(run: RunData) -> bool:
    return run.provenance is not None and len(run.provenance.weights.classes) > 1


PANELS: Mapping[str, Panel] = {
    "loss": Panel(
        "Training loss", "Cross-entropy of each step (faint) and smoothed.", _has("loss"), _draw_loss
    ),
    "eval": Panel(
        "Evaluation loss",
        "Cross-entropy on the examples kept out of training.",
        lambda run: bool(len(run.evaluations_of("eval_loss")[0])),
        _draw_evaluations,
    ),
    "sources": Panel(
        "What the sources weigh",
        "Where the dot is right of the ring, the weighting lets a class count for more than its tokens.",
        _has_classes,
        _draw_sources,
        over_steps=False,
    ),
    "weights": Panel(
        "Weights of the examples",
        "How many examples have which weight.",
        lambda run: run.provenance is not None and bool(run.provenance.weights.counts),
        _draw_weights,
        over_steps=False,
    ),
    "lr": Panel(
        "Learning rate", "The learning rate of each step.", _has("learning_rate"), _draw_rate, minor=True
    ),
    "norm": Panel(
        "Gradient norm", "The norm of the gradient.", _has("gradient_norm"), _draw_norm, minor=True
    ),
    "speed": Panel(
        "Speed", "Learned tokens a second, smoothed.", _has("tokens", "seconds"), _draw_speed, minor=True
    ),
    "stall": Panel(
        "Held up by checkpoints",
        "The part of the time so far that training waited for checkpoints.",
        _has("stall_seconds", "seconds"),
        _draw_stall,
        minor=True,
    ),
    "memory": Panel("Memory", "Resident on host and device.", _has("memory_bytes"), _draw_memory, minor=True),
}


def require_known(names: Sequence[str]) -> None:
    """Check names of panels.

    Raises:
        ConfigError: for the first that is none.
    """
    for name in names:
        if name not in PANELS:
            raise ConfigError(
                f"--panels: there is no panel {one_line(name, 60)!r}; there are {', '.join(PANELS)}"
            )
