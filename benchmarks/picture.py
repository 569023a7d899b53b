"""The picture: the time of each library, compared with the hardware, and how it scales."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.operations import (
    BLAKE3,
    COLD_READ,
    HOT_COPY,
    LOAD_COLD,
    LOAD_WARM,
    MAPPED_COLD,
    MAPPED_WARM,
    RAW_WRITE,
    RETURN,
    RETURNS,
    SAFETENSORS_COLD,
    SAFETENSORS_WARM,
    SAVE,
)
from benchmarks.results import Figure, Figures, Results
from benchmarks.states import Spec

OURS, OURS_TOO, PEER, LIMIT, INK, QUIET = "#0072b2", "#7db8da", "#b9bec4", "#d55e00", "#222222", "#70757a"
#: Background of a text, so that a line below it does not disturb.
OVER_LINES = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
#: A bar longer than so many times the median is cut and marked, so that the others stay comparable.
CUT = 3.5
#: Height of the labels at the ends of lines, as a fraction of the panel.
LABEL_HEIGHT = 0.075


@dataclass(frozen=True, slots=True)
class Bars:
    """A panel of bars.

    Attributes:
        title: of the operation.
        note: a remark in small type.
        bars: label -> figure; of several, the fastest.
        ours: our labels; the first is the plain method, the others are drawn lighter.
        limits: label -> figure, drawn as a line.
    """

    title: str
    note: str
    bars: Mapping[str, Figures]
    ours: tuple[str, ...]
    limits: Mapping[str, Figures]


PANELS = (
    Bars(
        "Saving, until durable",
        "ours digests every tensor; the Trainer syncs nothing",
        {
            "distrust, with digests": SAVE,
            "safetensors + fsync": Figure("safetensors save"),
            "torch.save + fsync": Figure("torch save"),
            "DCP save": Figure("dcp save"),
            "orbax": Figure("orbax save"),
            "Trainer, no fsync": Figure("trainer save"),
        },
        ("distrust, with digests",),
        {"raw write": RAW_WRITE},
    ),
    Bars(
        "Saving in the background: stall",
        "until the state may change again",
        {
            "distrust, 1st save": RETURN,
            "distrust, overlap": Figure("distrust overlap", RETURNS),
            "DCP, cached, 2nd save": Figure("dcp background cached", RETURNS),
            "DCP": Figure("dcp background", RETURNS),
            "orbax, immutable arrays": Figure("orbax background", RETURNS),
        },
        ("distrust, 1st save", "distrust, overlap"),
        {"hot copy": HOT_COPY},
    ),
    Bars(
        "Loading, from the page cache",
        "ours verifies every byte; safetensors and torch none",
        {
            "distrust, verified": LOAD_WARM,
            "distrust mmap, verified": MAPPED_WARM,
            "safetensors": SAFETENSORS_WARM,
            "torch.load": Figure("torch load warm"),
            "DCP, in place": Figure("dcp load warm"),
            "orbax": Figure("orbax load warm"),
        },
        ("distrust, verified", "distrust mmap, verified"),
        {"BLAKE3": BLAKE3},
    ),
    Bars(
        "Loading, from the disk",
        "ours verifies every byte; safetensors and torch none",
        {
            "distrust, verified": LOAD_COLD,
            "distrust mmap, verified": MAPPED_COLD,
            "safetensors": SAFETENSORS_COLD,
            "torch.load": Figure("torch load cold"),
            "DCP, in place": Figure("dcp load cold"),
            "orbax": Figure("orbax load cold"),
        },
        ("distrust, verified", "distrust mmap, verified"),
        {"raw read": COLD_READ},
    ),
)

#: How cost scales: label -> figure, colour, line style.
GROWTH: Mapping[str, tuple[Figure, str, str]] = {
    "distrust, durable": (SAVE, OURS, "-"),
    "distrust, returns": (RETURN, OURS_TOO, "-"),
    "safetensors + fsync": (Figure("safetensors save"), QUIET, "-"),
    "DCP save": (Figure("dcp save"), PEER, "-"),
    "raw write": (RAW_WRITE, LIMIT, "--"),
}


def draw(results: Results, specs: Sequence[Spec], path: Path, *, about: str) -> None:
    """Draw the picture.

    Args:
        results: of a run.
        specs: its states; the bars show the one nearest to 1 GiB, which must exist.
        path: of the PNG.
        about: where it was measured, in a line.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {
        "font.size": 10,
        "axes.edgecolor": QUIET,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "xtick.color": QUIET,
        "ytick.color": INK,
        "text.color": INK,
    }
    main = _main(specs)
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(14.5, 7.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        grid = canvas.subplots(2, 3, width_ratios=[1, 1, 0.8])
        canvas.suptitle(
            f"Checkpoints of {main.title}: median of {_repeats(results)} fresh processes, less is better",
            x=0.01, ha="left", fontsize=14, fontweight="bold",
        )  # fmt: skip
        for axes, panel in zip(grid[:, :2].flat, PANELS, strict=True):
            _bars(axes, results, main, panel)
        _growth(
            grid[0, 2], results, _by_bytes(specs), _size,
            title="Growth with bytes", note="400 tensors; both scales logarithmic", logarithmic=True,
        )  # fmt: skip
        _growth(
            grid[1, 2], results, _by_tensors(specs), lambda spec: f"{spec.tensors:,}",
            title="Growth with tensors", note="as many bytes", logarithmic=False,
        )  # fmt: skip
        canvas.text(
            0.99, -0.005, "lines on the bars: minimum to maximum  ·  orange: the hardware limit\n" + about,
            ha="right", va="top", fontsize=7.5, color=QUIET, linespacing=1.5, wrap=True,
        )  # fmt: skip
        canvas.savefig(path, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15, facecolor="white")


def _bars(axes: Any, results: Results, spec: Spec, panel: Bars) -> None:
    rows = list(_measurements(results, spec, panel))
    _bare(axes, panel.title, panel.note)
    if not rows:
        _nothing(axes)
        return
    medians = [statistics.median(values) for _, values in rows]
    limits = {
        label: seconds
        for label, figures in panel.limits.items()
        if (least := results.least(spec, figures)) and (seconds := results.median(spec, least))
    }
    right = min(max(medians), CUT * statistics.median(medians))
    right = max(right, *limits.values()) if limits else right
    for position, ((label, values), median) in enumerate(zip(rows, medians, strict=True)):
        colour = OURS if label == panel.ours[0] else OURS_TOO if label in panel.ours else PEER
        _bar(axes, position, values, median, right, colour)
    for label, seconds in limits.items():
        axes.axvline(seconds, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.4, zorder=3)
        axes.text(
            seconds, -0.62, f" {label} {_time(seconds)}", color=LIMIT, ha="left", va="bottom", fontsize=9
        )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    for tick, (label, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if label in panel.ours else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.95)
    axes.set_xlim(0, right * 1.24)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _bar(axes: Any, position: int, values: Sequence[float], median: float, right: float, colour: str) -> None:
    shown = min(median, right)
    axes.barh(position, shown, height=0.66, color=colour, zorder=2)
    if median > right * 1.001:  # cut: two white strokes through the bar, as on a broken axis
        for offset in (0.90, 0.915):
            axes.plot(
                [offset * right, (offset + 0.012) * right], [position + 0.4, position - 0.4],
                color="white", linewidth=2, zorder=4,
            )  # fmt: skip
        end = shown
    else:
        end = min(max(values), right * 1.04)
        axes.plot([min(values), end], [position, position], color=INK, alpha=0.45, linewidth=1, zorder=4)
    axes.text(
        max(end, shown) + right * 0.015,
        position,
        _time(median),
        va="center",
        fontsize=10,
        zorder=5,
        bbox=OVER_LINES,
    )


def _growth(
    axes: Any, results: Results, specs: Sequence[Spec], tick: Any, *, title: str, note: str, logarithmic: bool
) -> None:
    _bare(axes, title, note)
    lines = {
        label: [results.median(spec, figure) for spec in specs] for label, (figure, _, _) in GROWTH.items()
    }
    lines = {label: line for label, line in lines.items() if any(value is not None for value in line)}
    if len(specs) < 2 or not lines:
        _nothing(axes)
        return
    xs = [spec.nbytes if logarithmic else float(position) for position, spec in enumerate(specs)]
    for label, line in lines.items():
        _, colour, style = GROWTH[label]
        ys = [float("nan") if value is None else value for value in line]
        axes.plot(xs, ys, color=colour, linestyle=style, linewidth=2, marker="o", markersize=4)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, axes.get_ylim()[1])
        axes.set_xlim(-0.15, len(xs) - 0.85)
    axes.set_xticks(xs, [tick(spec) for spec in specs])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: _time(value) if value else "0")
    axes.grid(axis="y", color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    ends = {label: line[-1] for label, line in lines.items() if line[-1] is not None}
    for label, (height, value) in _spread_labels(axes, ends).items():
        axes.annotate(
            f"{label}  {_time(value)}", (1.02, height), xycoords="axes fraction", va="center", fontsize=8.5,
            color=INK if GROWTH[label][1] in (PEER, QUIET) else GROWTH[label][1], annotation_clip=False,
        )  # fmt: skip


def _spread_labels(axes: Any, ends: Mapping[str, float | None]) -> dict[str, tuple[float, float]]:
    """The height of each line's label, as a fraction of the panel: no two overlap."""
    heights = {}
    to_fraction = axes.transData + axes.transAxes.inverted()
    for label, value in ends.items():
        if value is not None:
            heights[label] = (float(to_fraction.transform((1.0, value))[1]), value)
    placed: dict[str, tuple[float, float]] = {}
    below = -1.0
    for label, (height, value) in sorted(heights.items(), key=lambda item: item[1]):
        below = max(height, below + LABEL_HEIGHT)
        placed[label] = (below, value)
    above = 1.0 + LABEL_HEIGHT
    for label, (height, value) in reversed(placed.items()):
        above = min(height, above - LABEL_HEIGHT)
        placed[label] = (above, value)
    return placed


def _measurements(results: Results, spec: Spec, panel: Bars) -> Iterator[tuple[str, list[float]]]:
    for label, figures in panel.bars.items():
        least = results.least(spec, figures)
        if least is not None:
            yield label, results.values(spec, least)


def _main(specs: Sequence[Spec]) -> Spec:
    return min(specs, key=lambda spec: (spec.tensors != 400, abs(spec.nbytes - 2**30)))


def _by_bytes(specs: Sequence[Spec]) -> list[Spec]:
    return sorted((spec for spec in specs if spec.tensors == 400), key=lambda spec: spec.nbytes)


def _by_tensors(specs: Sequence[Spec]) -> list[Spec]:
    many = [spec for spec in specs if spec.tensors > 400]
    same = [spec for spec in specs if many and spec.nbytes == many[0].nbytes]
    return sorted(same, key=lambda spec: spec.tensors)


def _repeats(results: Results) -> int:
    return max(
        len(values)
        for cases in results.samples.values()
        for figures in cases.values()
        for values in figures.values()
    )


def _bare(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, pad=22)
    axes.annotate(
        note, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=QUIET
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def _nothing(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", color=QUIET)


def _size(spec: Spec) -> str:
    return f"{spec.text[:-3]} {spec.text[-3:]}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s" if 1 <= seconds < 10 else f"{seconds:.0f} s" if seconds >= 10 else _milli(seconds)
    )


def _milli(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"
