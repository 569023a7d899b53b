"""Training compared with other trainers: tokens per second without padding, and peak memory.

    python -m benchmarks.training                      # both models in float32: an hour
    python -m benchmarks.training --sizes 15M --rounds 3
    python -m benchmarks.training --sizes 135M --dtype bfloat16 --trainers "distrust, packing" "TRL, packing"

Every trainer has the same model (a Llama with random weights), the same texts, LoRA of rank 16 on all
linear layers, the same dtype, threads, and about as many tokens per step: packed rows of --row tokens, or as
many texts as fill them on average. Each runs in a fresh process, all of them in turn, round by round; the
clock starts after the first steps. Ratios are within one round, then the median of the rounds. Memory is the
peak of the process, with Python and every library in it. mlx, which is slow on a CPU, is measured with two
steps, and in the first round only, unless nothing else is measured:

    python -m benchmarks.training --sizes 15M --tokens 512 --threads 1 --trainers "distrust, mlx" "mlx-lm"
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.training.picture import draw
from benchmarks.training.process import measure
from benchmarks.training.trainers import TRAINERS, missing_libraries
from benchmarks.training.work import SIZES, Work, make

OURS, OFF = "distrust, packing", "distrust, packing, weighting off"
#: What the other trainers are compared with.
FASTER, SMALLER, WEIGHTING_PERCENT = 1.3, 0.8, 1.0
#: The MLX engine is compared with mlx-lm's own trainer.
OURS_MLX, MLX_LM = "distrust, mlx", "mlx-lm"
MLX_FASTER, MLX_SMALLER = 1.1, 0.9
#: Measured by ``python -m benchmarks.gpu``; here only if they are named.
ON_REQUEST = (
    "distrust, packing, not deterministic", "distrust, packing, 4 bit", "distrust, all weights, saves",
    "transformers + peft, flattened", "transformers + peft, liger",
)  # fmt: skip
#: Takes minutes per step on CPUs: it is made for Apple's GPUs.
SLOW = (OURS_MLX, MLX_LM)

Round = dict[str, dict[str, float]]


def main() -> int:
    """Measure, and print results as they come."""
    options = _options()
    console = Console(highlight=False)
    for name in list(options.trainers):
        if missing := missing_libraries(name):
            console.print(f"{name}: left out, because {', '.join(missing)} is not installed")
            options.trainers.remove(name)
    results: dict[str, list[Round]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="distrust-training-", dir=options.directory) as folder:
            work = make(
                Path(folder),
                size=size,
                dtype=options.dtype,
                tokens=options.tokens,
                row=options.row,
                threads=options.threads,
                device=options.device,
            )
            if options.steps:
                work = replace(work, size=replace(work.size, steps=options.steps))
            label = f"{size}, {options.dtype}"
            console.print(
                f"{label}: a step has {work.rows} rows of {work.row} tokens, or {work.texts} texts of "
                f"{work.mean_length:.0f} on average; {work.size.steps} steps are measured"
            )
            results[label] = _rounds(work, options, console)
            _show(label, results[label], console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        draw(results, options.picture)
    return 0


def _rounds(work: Work, options: argparse.Namespace, console: Console) -> list[Round]:
    rounds: list[Round] = []
    failed: set[str] = set()
    for number in range(options.rounds):
        order = [
            name
            for name in options.trainers
            if name not in failed and (name not in SLOW or number == 0 or set(options.trainers) <= {*SLOW})
        ]
        random.Random(number).shuffle(order)  # no trainer always follows the same one
        rounds.append({})
        for name in order:
            try:
                figures = rounds[-1][name] = measure(name, _steps_of(name, work))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed.add(name)
                console.print(f"  {name}: {str(error).strip().splitlines()[-1][:200]}")
                continue
            console.print(
                f"  round {number + 1}, {name}: {figures['speed']:,.0f} tokens/s, "
                f"{figures['peak_mib']:,.0f} MiB"
            )
    return rounds


def _steps_of(name: str, work: Work) -> Work:
    return replace(work, size=replace(work.size, warmup_steps=1, steps=2)) if name in SLOW else work


def _show(what: str, rounds: Sequence[Round], console: Console) -> None:
    table = Table(title=what, title_justify="left")
    for heading in ("trainer", "tokens/s", "least to most", "ours is faster", "peak MiB", "ours of it"):
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    for name in TRAINERS:
        figures = [figures_of_round[name] for figures_of_round in rounds if name in figures_of_round]
        if not figures:
            continue
        speeds = [figure["speed"] for figure in figures]
        table.add_row(
            name,
            f"{statistics.median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            _times(_ratios(rounds, OURS, name, "speed")),
            f"{statistics.median(figure['peak_mib'] for figure in figures):,.0f}",
            _times(_ratios(rounds, OURS, name, "peak_mib")),
        )
    console.print(table)
    for line in _verdicts(rounds):
        console.print(line)


def _verdicts(rounds: Sequence[Round]) -> list[str]:
    peers = [name for name in TRAINERS if not name.startswith("distrust") and any(name in r for r in rounds)]
    lines = _verdicts_of_mlx(rounds)
    if not any(OURS in figures for figures in rounds):
        return lines
    for key, target, words in (
        ("speed", FASTER, "times as fast as the fastest peer"),
        ("peak_mib", SMALLER, "of the memory of the leanest peer"),
    ):
        medians = {name: _median(_ratios(rounds, OURS, name, key)) for name in peers}
        ratios = {name: ratio for name, ratio in medians.items() if ratio is not None}
        if not ratios:
            continue
        hardest = (min if key == "speed" else max)(ratios, key=ratios.__getitem__)
        reached = ratios[hardest] >= target if key == "speed" else ratios[hardest] <= target
        lines.append(f"{ratios[hardest]:.2f} {words}, {hardest} (aim {target}: {_verdict(reached)})")
    weighing = _median(_ratios(rounds, OFF, OURS, "speed"))
    if weighing is not None:
        lines.append(f"weighting costs {100 * (weighing - 1):.1f} % (aim: under {WEIGHTING_PERCENT:g} %)")
    return lines


def _verdicts_of_mlx(rounds: Sequence[Round]) -> list[str]:
    speed = _median(_ratios(rounds, OURS_MLX, MLX_LM, "speed"))
    memory = _median(_ratios(rounds, OURS_MLX, MLX_LM, "peak_mib"))
    if speed is None or memory is None:
        return []
    return [
        f"on mlx: {speed:.2f} times as fast as mlx-lm (aim {MLX_FASTER}: {_verdict(speed >= MLX_FASTER)})",
        f"on mlx: {memory:.2f} of mlx-lm's memory (aim {MLX_SMALLER}: {_verdict(memory <= MLX_SMALLER)})",
    ]


def _verdict(good: bool) -> str:
    return "reached" if good else "NOT reached"


def _ratios(rounds: Sequence[Round], above: str, below: str, key: str) -> list[float]:
    return [
        figures[above][key] / figures[below][key] for figures in rounds if {above, below} <= figures.keys()
    ]


def _median(ratios: Sequence[float]) -> float | None:
    return statistics.median(ratios) if ratios else None


def _times(ratios: Sequence[float]) -> str:
    median = _median(ratios)
    return "" if median is None else f"{median:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name in TRAINERS if name not in ON_REQUEST]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["15M", "135M"])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=usual, metavar="NAME",
                        help=f"default: all of {', '.join(repr(name) for name in usual)}")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of torch: cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument(
        "--row", type=int, default=512, help="tokens of a packed row, and of the longest text"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="to measure; default: by the size of the model")
    parser.add_argument("--directory", type=Path, help="for model, data and caches; removed afterwards")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--picture", type=Path, help="draw them there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
