"""Pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: Colour-blind safe, and apart in grey.
PRIMARY, COORDINATED, QUIET = "#0072b2", "#d55e00", "#888888"


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
