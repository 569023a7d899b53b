"""The plots: what each method prefers and keeps; and the weight over w."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distrust.weighting import MAX_AUTHORITY_WEIGHT, Weighting, example_weights
from experiments.weighting import figures
from experiments.weighting.design import WORLDS, WRONG
from experiments.weighting.figures import Measure
from experiments.weighting.results import Result

#: Colours of Okabe and Ito, distinguishable for the colour-blind; markers distinguish them in grey.
LOOKS = {
    "off": ("#777777", "o", "off: all records alike"),
    "published": ("#d55e00", "s", "published: weight by r²"),
    "monotone": ("#0072b2", "D", "monotone: weight by max(r, 0)²"),
    "filter": ("#e69f00", "^", "filter: drop what has r ≤ 0"),
    "upsample": ("#009e73", "v", "upsample: repeat by the weight"),
}
ENTROPIES = (("#0072b2", "-", 4), ("#009e73", "--", 2), ("#e69f00", "-.", 1), ("#d55e00", ":", 0))
ROWS: tuple[tuple[str, Measure], ...] = (
    ("Disputed facts\nwhose primary value is preferred", figures.primary_share),
    ("Facts that only coordinated\nsources tell, and that are kept", figures.sole_kept),
)


def draw_results(results: Sequence[Result], path: Path) -> None:
    """Two rows, a column for each world, to ``path`` with .png and .svg; means with 95% intervals."""
    worlds = [world for world in WORLDS if any(result["world"] == world for result in results)]
    figure = _figure(width=2 + 2.9 * len(worlds), height=7)
    panels = figure.subplots(2, len(worlds), sharey=True, squeeze=False)
    for column, world in enumerate(worlds):
        for row, (title, measure) in enumerate(ROWS):
            panel = panels[row][column]
            if WORLDS[world] is None and row:
                panel.axis("off")
                continue
            _panel(panel, results, world, measure)
            if WORLDS[world] is None or (column == 0 and row) or (row and WORLDS[worlds[column - 1]] is None):
                panel.set_ylabel(title)
                panel.tick_params(labelleft=True)
            if row == 0:
                ratio = "Bundled world, 1:5" if WORLDS[world] is None else f"Harder world, {world}"
                panel.set_title(ratio)
                if column == 0:
                    panel.set_ylabel(title)
    handles = [
        figure.axes[0].errorbar([], [], yerr=[], color=color, marker=marker, linestyle="-", label=words)
        for color, marker, words in LOOKS.values()
    ]
    if WORLDS[worlds[0]] is None:
        panels[1][0].legend(handles=handles, loc="center", frameon=False, fontsize=9)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def draw_curve(path: Path) -> None:
    """The weight of an example over w for several H: where r² rises again, and `monotone` does not."""
    figure = _figure(width=9.5, height=4.3)
    panels = figure.subplots(1, 2, sharey=True)
    w = np.linspace(0, MAX_AUTHORITY_WEIGHT, 500)
    names: tuple[Weighting, ...] = ("published", "monotone")
    for panel, weighting in zip(panels, names, strict=True):
        for color, style, entropy in ENTROPIES:
            u = example_weights(w, np.full_like(w, entropy), weighting=weighting)
            panel.plot(
                w, u, style, color=color, linewidth=2, label=f"H = {entropy} bit{'s' if entropy != 1 else ''}"
            )
        panel.set_yscale("log")
        panel.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        panel.minorticks_off()
        panel.set_xlabel("authority weight w  (0: primary record, 0.99: coordinated)")
        panel.grid(axis="y", color="#dddddd", linewidth=0.7)
    panels[0].set_title("published: 1 + λ·α·r²")
    panels[1].set_title("monotone: 1 + λ·α·max(r, 0)²")
    panels[0].set_ylabel("weight u of an example")
    panels[1].legend(frameon=False, loc="upper right")
    panels[0].annotate(
        "turns round: the least\ntrustworthy gain again", xy=(0.975, 12), xytext=(0.42, 7.2), fontsize=9,
        arrowprops={"arrowstyle": "->", "color": "#444444"}, color="#444444",
    )  # fmt: skip
    _save(figure, path)


def _panel(panel: Any, results: Sequence[Result], world: str, measure: Measure) -> None:
    bundled = WORLDS[world] is None
    for position, (method, (color, marker, _)) in enumerate(LOOKS.items()):
        shares = (0.0,) if bundled else WRONG
        values = [
            figures.estimate(figures.of_cell(results, world, wrong, method), measure) for wrong in shares
        ]
        dodge = 0.09 * (position - (len(LOOKS) - 1) / 2)
        points = [
            (position if bundled else number + dodge, one.mean, one.half)
            for number, one in enumerate(values)
            if one is not None
        ]
        if not points:
            continue
        x, mean, half = (np.array(values) for values in zip(*points, strict=True))
        # a share ends at 0 and 1, whatever the interval of a normal distribution says
        spread = [np.minimum(half, mean), np.minimum(half, 1 - mean)]
        panel.errorbar(
            x, mean, yerr=np.nan_to_num(spread), color=color, marker=marker, markersize=6, capsize=3,
            linewidth=1.5, clip_on=False, zorder=3,
        )  # fmt: skip
    if bundled:
        panel.set_xticks(range(len(LOOKS)), list(LOOKS), rotation=30, ha="right")
    else:
        panel.set_xticks(range(len(WRONG)), [f"{wrong:.0%}" for wrong in WRONG])
        panel.set_xlabel("records with wrong w and H")
    panel.set_ylim(-0.03, 1.03)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    panel.axhline(0.5, color="#bbbbbb", linewidth=1, linestyle=":")
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def _figure(*, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "weighting"}):  # equal figures give equal files
        figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
