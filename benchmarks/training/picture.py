"""The picture: tokens per second and peak memory of each trainer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.picture import INK, OURS, PEER, QUIET

#: What is drawn, from top to bottom; without the variant that only shows the cost of weighting.
SHOWN = ("distrust, packing", "distrust", "TRL, packing", "TRL", "transformers + peft, by length",
         "transformers + peft", "mlx-lm")  # fmt: skip


def draw(results: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], path: Path) -> None:
    """Two panels for each model: medians as bars, minimum to maximum as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(results), 2, figsize=(11, 0.6 + 2.7 * len(results)), squeeze=False, constrained_layout=True
    )
    for row, (setting, rounds) in zip(panels, results.items(), strict=True):
        names = [name for name in SHOWN if any(name in figures for figures in rounds)]
        for panel, key, title in (
            (row[0], "speed", f"{setting}: tokens a second, without padding"),
            (row[1], "peak_mib", f"{setting}: peak memory, MiB"),
        ):
            values = [[figures[name][key] for figures in rounds if name in figures] for name in names]
            medians = [statistics.median(each) for each in values]
            colors = [OURS if name.startswith("distrust") else PEER for name in names]
            spread = [
                [median - min(each) for median, each in zip(medians, values, strict=True)],
                [max(each) - median for median, each in zip(medians, values, strict=True)],
            ]
            panel.barh(names, medians, color=colors, xerr=spread, ecolor=QUIET, height=0.7)
            for position, (median, each) in enumerate(zip(medians, values, strict=True)):
                panel.text(
                    max(each) + 0.012 * max(medians), position, f"{median:,.0f}", va="center", color=INK
                )
            panel.set_title(title, loc="left", color=INK, fontsize=10)
            panel.set_xlim(0, 1.15 * max(max(each) for each in values))
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(colors=INK, labelsize=9)
    figure.savefig(path, dpi=150)
