"""The figure of ``distrust weigh``: provenance, weights and source classes of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distrust.data.distribution import Distribution
from distrust.reporting.figures import render
from distrust.reporting.panels import draw_sources, draw_weights
from distrust.reporting.style import INK, PRIMARY, set_titles, style_context
from distrust.weighting import MAX_AUTHORITY_WEIGHT

#: Points of the figure: more hide each other and bloat an SVG.
_POINTS = 5000

Array = NDArray[np.float64]


def plot_weights(
    file: BinaryIO,
    distribution: Distribution,
    *,
    authority_weight: Array,
    provenance_entropy: Array,
    weights: Array,
    weigh: Callable[[Array, Array], Array],
    form: str,
) -> None:
    """Draw a dataset: w against H, the histogram of the weights, and the share of each source class.

    Args:
        file: to write into.
        distribution: of the weights.
        authority_weight: w, float64[n].
        provenance_entropy: H in bits, float64[n].
        weights: u, float64[n].
        weigh: (w, H) -> u, for the lines of equal weight.
        form: ``png`` or ``svg``.
    """
    coloured = [(distribution, PRIMARY)]
    with style_context():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 4.8), layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.1))
        remarks = (
            _draw_provenance(figure, panels[0], authority_weight, provenance_entropy, weights, weigh),
            draw_weights(panels[1], coloured, noun="record"),
            draw_sources(panels[2], coloured, unit="records"),
        )
        panels[1].set_xlabel("weight u")
        titles = ("Records by provenance", "Weights", "Source classes")
        for panel, title, remark in zip(panels, titles, remarks, strict=True):
            set_titles(panel, title, remark)
    file.write(render(figure, f".{form}"))


def _draw_provenance(
    figure: Any, panel: Any, w: Array, h: Array, u: Array, weigh: Callable[[Array, Array], Array]
) -> str:
    """Draw each record at its w and H, over lines of equal weight."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(u.min()), float(u.max())
    varies = high > 1.05 * low  # else there is no scale
    top = max(1.0, 1.05 * float(h.max()))  # data may have no entropy at all
    if varies:
        _draw_contours(panel, weigh, np.geomspace(low, high, 7)[1:-1], top)  # below the points
    pairs, first, counts = np.unique(
        np.round(np.stack([w, h], axis=1), 3), axis=0, return_index=True, return_counts=True
    )
    if len(pairs) > _POINTS:
        sample = np.random.default_rng(0).choice(len(pairs), _POINTS, replace=False)
        pairs, first, counts = pairs[sample], first[sample], counts[sample]
    points = panel.scatter(
        *pairs.T,
        c=u[first],
        cmap="viridis_r",
        norm=LogNorm(low, high) if varies else Normalize(low - 0.5, high + 0.5),
        s=(18 if len(pairs) < 1000 else 6) * np.minimum(np.sqrt(counts), 15),  # area by number of records
        alpha=0.75,
        linewidths=0,
    )
    ticks = np.geomspace(low, high, 6).tolist() if varies else [low]
    bar = figure.colorbar(points, ax=panel, label="weight u", format="%.3g", ticks=ticks, pad=0.02)
    bar.minorticks_off()
    panel.set_xlabel("authority weight w (0: primary, 0.99: consensus)")
    panel.set_ylabel("provenance entropy H, bits")
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.03 * top, top)
    shown = "" if counts.sum() == len(u) else f", {counts.sum():,} shown"
    return f"{len(u):,} records{shown}; lines: equal weight"


def _draw_contours(panel: Any, weigh: Callable[[Array, Array], Array], levels: Array, top: float) -> None:
    """Draw lines of equal weight, each labelled in one column of the figure."""
    from matplotlib.patheffects import withStroke

    w, h = np.meshgrid(np.linspace(0, MAX_AUTHORITY_WEIGHT, 201), np.linspace(0, top, 201))
    weights = weigh(w.ravel(), h.ravel()).reshape(w.shape)
    lines = panel.contour(w, h, weights, levels=levels, colors=INK, linewidths=0.8, zorder=2)
    column = len(w) // 3  # where the lines are apart
    rows = [int(np.abs(weights[:, column] - level).argmin()) for level in levels]
    anchors = [(float(w[row, column]), float(h[row, column])) for row in rows]
    for label in panel.clabel(lines, fmt=lambda level: f"{level:.3g}", fontsize=8, manual=anchors):
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])
