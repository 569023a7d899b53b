"""Runs the demo with several seeds: the figures of docs/world.md, with their spread.

    python scripts/demo_seeds.py --seeds 1 2 3

Each seed is a ``distrust demo`` in its own folder; finished trainings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("preferred", "primary", "coordinated")


def run(out: Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "distrust", "demo", "--json", "--out", str(out), "--seed", str(seed)]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    options = parser.parse_args()

    demos = [run(options.out / str(seed), seed) for seed in options.seeds]
    print(f"seeds {options.seeds}, {demos[0]['facts']} facts; mean (least to most)")
    print("| | primary value preferred | p(primary value) | p(coordinated value) |")
    print("|---|---|---|---|")
    for model in demos[0]["models"]:
        cells = []
        for column in COLUMNS:
            values = [demo["models"][model][column] for demo in demos]
            form = "{:.0%}" if column == "preferred" else "{:.4f}" if model == "before" else "{:.2f}"
            mean, low, high = (form.format(f(values)) for f in (statistics.mean, min, max))
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        print(f"| {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
