"""What `distrust demo` and `distrust weigh` draw; pictures of runs are made by ``pictures``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from distrust.data.distribution import Distribution
from distrust.reporting.display import pluralize
from distrust.reporting.names import class_name
from distrust.weighting import MAX_AUTHORITY_WEIGHT

#: Colour-blind safe, and apart in grey.
PRIMARY, COORDINATED, QUIET = "#0072b2", "#d55e00", "#888888"
LINE = "#444444"


def plot_beliefs(beliefs: Mapping[str, list[tuple[float, float, bool]]], path: Path) -> None:
    """A panel for each model: the probability of the primary value against that of the coordinated one.

    Args:
        beliefs: model -> of each fact the probability of the primary value, that of the coordinated one, and
            whether the primary one is preferred.
        path: of the PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(4 * len(beliefs), 4.6), layout="constrained")
        panels = figure.subplots(1, len(beliefs), sharex=True, sharey=True, squeeze=False)[0]
        for panel, (model, points) in zip(panels, beliefs.items(), strict=True):
            colours = [PRIMARY if preferred else COORDINATED for _, _, preferred in points]
            share = sum(preferred for _, _, preferred in points) / len(points)
            panel.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
            panel.scatter(
                [coordinated for _, coordinated, _ in points],
                [primary for primary, _, _ in points],
                c=colours,
                s=28,
                alpha=0.75,
                linewidths=0,
            )
            panel.set_title(f"{model}\nprimary value preferred in {share:.0%} of the facts")
            panel.set_xlabel("probability of the coordinated value")
            panel.set_aspect("equal")
            panel.set_xlim(-0.03, 1.03)
            panel.set_ylim(-0.03, 1.03)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("probability of the primary value")
        figure.savefig(path, dpi=150)


#: Points of a picture, each of the records that are alike: more hide each other and fill an SVG.
_POINTS = 5000

#: Classes of a picture.
_CLASSES = 12


def plot_weights(
    file: BinaryIO,
    shown: Distribution,
    *,
    authority_weight: NDArray[np.float64],
    provenance_entropy: NDArray[np.float64],
    weights: NDArray[np.float64],
    weigh: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    form: str,
) -> None:
    """What a data set weighs: w against H, the weights, and what each source class has of them.

    Args:
        file: to write into.
        shown: the distribution of the weights.
        authority_weight: w, float64[n].
        provenance_entropy: H in bits, float64[n].
        weights: u, float64[n].
        weigh: w and H -> u, for the lines of equal weight.
        form: ``png`` or ``svg``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "distrust"}):
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        cast(Any, figure.get_layout_engine()).set(w_pad=0.12)
        provenance, histogram, classes = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.1))
        _draw_provenance(figure, provenance, authority_weight, provenance_entropy, weights, weigh)
        _draw_histogram(histogram, shown)
        _draw_classes(classes, shown)
        for panel in (provenance, histogram, classes):
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


def _draw_provenance(
    figure: Any,
    panel: Any,
    w: NDArray[np.float64],
    h: NDArray[np.float64],
    u: NDArray[np.float64],
    weigh: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> None:
    """Each record by what its source is worth, above the lines on which the weight is the same."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patheffects import withStroke

    low, high = float(u.min()), float(u.max())
    is_wide = high > 1.05 * low
    norm = LogNorm(low, high) if is_wide else Normalize(low - 0.5, high + 0.5)
    top = max(1.0, 1.05 * float(h.max()))
    across, up = np.meshgrid(np.linspace(0, MAX_AUTHORITY_WEIGHT, 201), np.linspace(0, top, 201))
    lines = weigh(across.ravel(), up.ravel()).reshape(across.shape)
    if is_wide:
        levels = np.geomspace(low, high, 7)[1:-1]
        drawn = panel.contour(across, up, lines, levels=levels, colors=LINE, linewidths=0.8, zorder=2)
        column = len(across) // 3  # where the labels stand
        rows = [int(np.abs(lines[:, column] - level).argmin()) for level in levels]
        places = [(float(across[row, column]), float(up[row, column])) for row in rows]
        for label in panel.clabel(drawn, fmt=lambda level: f"{level:.3g}", fontsize=8, manual=places):
            label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    pairs, first, counts = np.unique(
        np.round(np.stack([w, h], axis=1), 3), axis=0, return_index=True, return_counts=True
    )
    if len(pairs) > _POINTS:
        some = np.random.default_rng(0).choice(len(pairs), _POINTS, replace=False)
        pairs, first, counts = pairs[some], first[some], counts[some]
    size = 18 if len(pairs) < 1000 else 6
    points = panel.scatter(
        *pairs.T,
        c=u[first],
        cmap="viridis_r",
        norm=norm,
        s=size * np.minimum(np.sqrt(counts), 15),
        alpha=0.75,
        linewidths=0,
    )
    bar = figure.colorbar(
        points, ax=panel, label="weight u", format="%.3g", ticks=_ticks(low, high), pad=0.02
    )
    bar.minorticks_off()
    part = "" if counts.sum() == len(u) else f", {counts.sum():,} of them drawn"
    panel.set_title(f"{len(u):,} records{part} (large dots: several)\nand lines of equal weight")
    panel.set_xlabel("authority weight w (0: primary, 0.99: consensus)")
    panel.set_ylabel("provenance entropy H, bits")
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.03 * top, top)


def _ticks(low: float, high: float) -> list[float]:
    return np.geomspace(low, high, 6).tolist() if high > 1.05 * low else [low]


def _draw_histogram(panel: Any, shown: Distribution) -> None:
    """How many records have which weight, on an axis of powers."""
    from matplotlib.ticker import NullLocator

    edges = np.array(shown.edges)
    panel.bar(
        edges[:-1], shown.counts, width=np.diff(edges), align="edge", color=PRIMARY, edgecolor="white", lw=0.5
    )
    panel.set_xscale("log")
    ticks = np.geomspace(edges[0], edges[-1], 6)
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda records, _: f"{records:,.0f}")
    share = shown.effective_examples / shown.examples
    panel.set_title(f"worth {pluralize(shown.effective_examples, 'equal record')} ({share:.0%})")
    panel.set_xlabel("weight u")
    panel.set_ylabel("records")


def _draw_classes(panel: Any, shown: Distribution) -> None:
    """What part each class has in the records, and in the weight."""
    classes = shown.classes[:_CLASSES]
    places = np.arange(len(classes))
    records = [summary.examples / shown.examples for summary in classes]
    shares = [summary.share for summary in classes]
    panel.barh(places - 0.2, records, 0.38, color=QUIET, alpha=0.6, label="of the records")
    panel.barh(places + 0.2, shares, 0.38, color=PRIMARY, label="of the weight")
    for place, share in zip(places, shares, strict=True):
        panel.text(share, place + 0.2, f" {share:.1%}", va="center", fontsize=8)
    panel.set_yticks(places, [class_name(summary.name) for summary in classes])
    for label in panel.get_yticklabels():
        label.set_parse_math(False)  # a dollar in a name is a dollar
    panel.set_ylim(max(len(classes), 5) - 0.4, -0.6)  # the first is the highest; a single one no wall
    panel.set_xlim(0, 1.15 * max(*records, *shares))
    panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    left = "" if len(classes) == len(shown.classes) else f", the first {_CLASSES}"
    panel.set_title(f"source classes{left}")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
