"""The picture: memory and latency over the saves of each run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from campaigns.long_run.growth import Samples

MEMORY, BLOCKING, RETURNING, WORK, QUIET = "#0072b2", "#0072b2", "#d55e00", "#009e73", "#70757a"
#: The label and the colour of each duration in a sample.
TIMES = {
    "save": ("save, until durable", BLOCKING),
    "returns": ("save_async, until it returns", RETURNING),
    "step": ("a training step", BLOCKING),
    "cpu": ("processor time of a save, on all cores", WORK),
    "disk": ("a bare write, sync and rename", QUIET),
}
TITLES = {
    "saves": "Saves of a small state, in one process",
    "many": "With more and more checkpoints, then as many",
    "training": "The trainer, saving every second step",
}


def draw(runs: Mapping[str, Samples], path: Path) -> None:
    """Draw a row for each run into a PNG: resident memory on the left, durations on the right."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 2.7 * len(runs)), layout="constrained")
        rows = figure.subplots(len(runs), 2, squeeze=False)
        for (name, samples), (memory, latency) in zip(runs.items(), rows, strict=True):
            _draw_memory(memory, samples)
            _draw_latency(latency, samples)
            memory.set_title(TITLES[name], loc="left")
        figure.savefig(path, dpi=150)


def _draw_memory(axes: Any, samples: Samples) -> None:
    axes.plot(_saves(samples), [sample["resident"] / 2**20 for sample in samples], color=MEMORY)
    first, last = samples[0], samples[-1]
    text = f"open files: {first['descriptors']} to {last['descriptors']}, "
    text += f"threads: {first['threads']} to {last['threads']}"
    axes.text(0.98, 0.06, text, transform=axes.transAxes, ha="right", color=QUIET)
    axes.set_ylabel("resident memory, MiB")
    _finish(axes)


def _draw_latency(axes: Any, samples: Samples) -> None:
    for key, (label, colour) in TIMES.items():
        if key in samples[0]:
            axes.plot(_saves(samples), [sample[key] * 1e3 for sample in samples], color=colour, label=label)
    axes.set_ylabel("ms, median of a window")
    axes.legend(frameon=False)
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.set_xlabel("saves")
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)


def _saves(samples: Samples) -> list[int]:
    return [sample["saves"] for sample in samples]
