"""Compares the two engines: the same base, data, seed and float32, and each resumes the other's run.

    python scripts/compare_engines.py --picture docs/engines.png
    python scripts/compare_engines.py --steps 20 -- --model ./my-model --data mine.jsonl

Four runs of the same steps: with torch; with mlx; started with torch and resumed with mlx in the middle; and
the reverse. Each engine initializes the adapter from its own generator, and B starts at zero: the first
losses are those of the base model, the later ones those of two different adapters. A resumed run starts from
the other engine's exact weights and moments: there, all losses must agree.

Exit code 1 if the first losses, or any after the switch, differ by more than 1e-4. Options after ``--`` go to
every ``distrust train``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

AGREED = 1e-4
OPTIONS = ["--max-length", "64", "--batch-size", "4", "--learning-rate", "2e-3", "--threads", "1"]
COLOURS = {"torch": "#1f77b4", "mlx": "#d62728"}
OTHER = {"torch": "mlx", "mlx": "torch"}

Losses = dict[int, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", type=Path, help="draw the losses there")
    parser.add_argument("options", nargs="*", help="after --: for distrust train")
    options = parser.parse_args()
    half = options.steps // 2
    with tempfile.TemporaryDirectory(prefix="distrust-engines-") as folder:
        folder_path = Path(folder)
        arguments = [*OPTIONS, "--max-steps", str(options.steps), "--save-every", str(half), *options.options]
        alone = {engine: train(folder_path / engine, engine, arguments) for engine in OTHER}
        taken_up = {}
        for engine, other_engine in OTHER.items():
            out = folder_path / f"{engine}-then-{other_engine}"
            (out / "checkpoints").mkdir(parents=True)
            shutil.copy(
                folder_path / engine / "checkpoints" / f"checkpoint-{half}.safetensors", out / "checkpoints"
            )
            taken_up[engine] = train(out, other_engine, arguments)

    first = abs(alone["torch"][1] - alone["mlx"][1])
    print(
        f"loss of the first step: torch {alone['torch'][1]:.7f}, mlx {alone['mlx'][1]:.7f}, apart {first:.1e}"
    )
    last = options.steps
    print(f"loss of step {last}, each with its own first values: torch {alone['torch'][last]:.4f}, "
          f"mlx {alone['mlx'][last]:.4f}")  # fmt: skip
    worst = first
    for engine, losses in taken_up.items():
        distances = {step: abs(losses[step] - alone[engine][step]) for step in range(half + 1, last + 1)}
        worst = max(worst, *distances.values())
        print(
            f"{engine}, resumed with {OTHER[engine]} after step {half}, compared with {engine} alone: "
            f"apart {distances[half + 1]:.1e} in the first step, {max(distances.values()):.1e} at most"
        )
    if options.picture:
        draw(options.picture, alone, taken_up, half)
    return 0 if worst <= AGREED else 1


def train(out: Path, engine: str, options: list[str]) -> Losses:
    """Train in a process of its own; returns the loss of each step."""
    command = [sys.executable, "-m", "distrust", "train", "--engine", engine, "--out", str(out), *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{process.stderr}")
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def draw(path: Path, alone: dict[str, Losses], taken_up: dict[str, Losses], half: int) -> None:
    """The losses, and below them the distances between them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, distance_axes) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for engine, values in alone.items():
        style = {"torch": "-", "mlx": "--"}[engine]
        losses.plot([*values], [*values.values()], style, color=COLOURS[engine], label=f"{engine}, alone")
    for engine, values in taken_up.items():
        resumed_losses = {step: loss for step, loss in values.items() if step > half}
        label = f"{engine}, resumed with {OTHER[engine]}"
        colour = COLOURS[engine]
        losses.plot(
            [*resumed_losses],
            [*resumed_losses.values()],
            ".",
            markersize=7,
            color=colour,
            alpha=0.5,
            label=label,
        )
        differences = [max(abs(resumed_losses[step] - alone[engine][step]), 1e-9) for step in resumed_losses]
        distance_axes.plot(
            [*resumed_losses], differences, ".-", color=colour, label=f"{label}, beside {engine} alone"
        )
    both = [max(abs(alone["torch"][step] - alone["mlx"][step]), 1e-9) for step in alone["torch"]]
    distance_axes.plot(
        [*alone["torch"]], both, color="#777777", label="torch and mlx, each with its own first values"
    )
    losses.axvline(half + 0.5, color="#bbbbbb", linewidth=1)
    losses.set_ylabel("loss (nats a token)")
    distance_axes.set_ylabel("apart (nats)")
    distance_axes.set_yscale("log")
    distance_axes.axhline(AGREED, color="#bbbbbb", linewidth=1, linestyle=":")
    distance_axes.set_xlabel("step")
    losses.set_title("The same run with either engine, and taken up by the other in the middle")
    for axes in (losses, distance_axes):
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
