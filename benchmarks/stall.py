"""What saving costs a training run: the same run with and without saves, in turn, each in a fresh process.

    python -m benchmarks.stall
    python -m benchmarks.stall --pairs 9 --steps 200 --batch-size 16
    python -m benchmarks.stall --lora-rank 16 --save-every 5 --json stall.json

Trains the bundled model on the bundled corpus through the public trainer. The clock runs from the end of step
`save-every` to the end of the last step: this includes all background saves, and neither loading nor the
final, blocking save. Processor time of background writes counts, because the steps lose it. Stall is (with -
without) / without within each pair. On a shared machine, the same ratio of median intervals (`save-every`
steps with one save each) is the steadier figure, but it ignores what happens to a few saves only; the stall
that the trainer reports is shown as well. A rank of 120 gives a checkpoint of about 20 MiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.driver import ROOT

Figures = dict[str, float]

WANTED_PERCENT = 1.0
ENOUGH_PAIRS = 3
#: If pairs differ by more, the machine was busy with something else.
NOISE_PERCENT = 10.0


class Clock:
    """Observes a run: when its steps ended, and how long its saves stalled it.

    Attributes:
        ends: step -> when it ended.
        waited: seconds of stall of each save.
    """

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self.waited: dict[int, float] = {}

    def __call__(self, event: Any) -> None:
        """Handle an event of the trainer."""
        from distrust.training.events import CheckpointSaved, StepEnded

        if isinstance(event, StepEnded):
            self.ends[event.step] = time.perf_counter()
        elif isinstance(event, CheckpointSaved):
            self.waited[event.step] = event.stall_seconds


def train(options: argparse.Namespace, save_every: int, out: Path) -> Figures:
    """One run in this process."""
    from distrust import DistrustTrainer, TrainConfig

    clock = Clock()
    config = TrainConfig(
        out=str(out),
        save_every=save_every,
        keep_last=3,
        max_steps=options.steps,
        lora_rank=options.lora_rank,
        batch_size=options.batch_size,
        max_length=options.max_length,
        gradient_accumulation=options.gradient_accumulation,
    )
    DistrustTrainer(config, observers=[clock]).train()
    first, last = options.save_every, options.steps
    marks = [clock.ends[step] for step in range(first, last + 1, first)]
    (final,) = (out / "checkpoints").glob("*-final.safetensors")
    return {
        "seconds": clock.ends[last] - clock.ends[first],
        "stretch_seconds": statistics.median(later - earlier for earlier, later in pairwise(marks)),
        "steps": last - first,
        "saves": sum(step < last for step in clock.waited),
        "waited_seconds": sum(seconds for step, seconds in clock.waited.items() if step < last),
        "checkpoint_bytes": final.stat().st_size,
    }


def main() -> None:
    """Run the pairs, and report the cost of saving."""
    options = _options()
    if options.child is not None:
        print()
        print(json.dumps(train(options, int(options.child), options.directory / "run")))
        return
    console = Console(stderr=True)
    pairs: list[dict[str, Figures]] = []
    for index in range(options.pairs):
        # Alternate the order: the second run of a pair may get a warmer machine.
        order = [("with", options.save_every), ("without", 0)]
        pair = {}
        for name, save_every in order if index % 2 == 0 else reversed(order):
            console.print(f"pair {index + 1} of {options.pairs}: {name} saves", highlight=False)
            pair[name] = _child(options, save_every)
        pairs.append(pair)
        console.print(
            f"  stall {_stall(pair):+.2%}, by median stretches {_stall(pair, 'stretch_seconds'):+.2%}",
            highlight=False,
        )
    _show(options, pairs)
    if options.json:
        options.json.write_text(json.dumps(pairs, indent=1) + "\n", "utf-8")


def _child(options: argparse.Namespace, save_every: int) -> Figures:
    with tempfile.TemporaryDirectory(dir=options.directory, prefix=".bench-") as folder:
        arguments = {
            "directory": folder,
            "child": save_every,
            **{name: getattr(options, name) for name in _SHARED},
        }
        flags = [text for name, value in arguments.items() for text in (_flag(name), str(value))]
        command = [sys.executable, "-m", "benchmarks.stall", *flags]
        process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(process.stdout.splitlines()[-1])
    return figures


def _show(options: argparse.Namespace, pairs: list[dict[str, Figures]]) -> None:
    saving, plain = [pair["with"] for pair in pairs], [pair["without"] for pair in pairs]
    step = statistics.median(run["seconds"] / run["steps"] for run in plain)
    each = statistics.median(run["waited_seconds"] / run["saves"] for run in saving)
    print(
        f"bundled model, LoRA rank {options.lora_rank}, batch of {options.batch_size}, a checkpoint of "
        f"{saving[0]['checkpoint_bytes'] / 2**20:.1f} MiB every {options.save_every} steps, "
        f"{saving[0]['saves']:.0f} saves; median of {len(pairs)} pairs of runs, minimum to maximum"
    )
    print(f"{'step without saves':30}{step * 1000:8.1f} ms")
    _print_percent("stall", [_stall(pair) for pair in pairs], wanted=True)
    # The median interval between two saves excludes what else happened on the machine.
    _print_percent("stall, by median stretches", [_stall(pair, "stretch_seconds") for pair in pairs])
    _print_percent("the trainer waited", [run["waited_seconds"] / run["seconds"] for run in saving])
    print(f"{'  each save':30}{each * 1000:8.1f} ms")


def _print_percent(name: str, shares: list[float], *, wanted: bool = False) -> None:
    median, least, most = (100 * value for value in (statistics.median(shares), min(shares), max(shares)))
    verdict = f"   wanted < {WANTED_PERCENT:g}: {_verdict(shares)}" if wanted else ""
    print(f"{name:30}{median:8.2f} %    {least:.2f} to {most:.2f}{verdict}")


def _verdict(shares: list[float]) -> str:
    if len(shares) < ENOUGH_PAIRS:
        return "too few pairs to tell"
    if 100 * (max(shares) - min(shares)) > NOISE_PERCENT:
        return "too noisy to tell; see what the trainer waited"
    return "yes" if 100 * statistics.median(shares) < WANTED_PERCENT else "NO"


def _stall(pair: dict[str, Figures], figure: str = "seconds") -> float:
    return pair["with"][figure] / pair["without"][figure] - 1


_SHARED = ("steps", "save_every", "lora_rank", "batch_size", "max_length", "gradient_accumulation")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7, help="runs with and without saves; default: 7")
    parser.add_argument("--steps", type=int, default=110, help="of a run; default: 110")
    parser.add_argument("--save-every", type=int, default=10, help="steps; default: 10")
    parser.add_argument("--lora-rank", type=int, default=120, help="default: 120, about 20 MiB")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a micro-batch; default: 16")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example; default: 256")
    parser.add_argument(
        "--gradient-accumulation", type=int, default=1, help="micro-batches of a step; default: 1"
    )
    parser.add_argument("--directory", type=Path, default=Path(), help="default: the current folder")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.directory = options.directory.resolve()
    if options.pairs < 1:
        parser.error("--pairs: give 1 or more")
    if not options.directory.is_dir():
        parser.error(f"--directory: there is no folder {options.directory}")
    if not 0 < 2 * options.save_every < options.steps:
        parser.error("--save-every: give 1 or more, and less than half of --steps")
    return options


if __name__ == "__main__":
    main()
