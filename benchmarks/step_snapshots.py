"""What keeping each step in shared memory costs: steps with and without a snapshot, in turn, in one process.

    python -m benchmarks.step_snapshots
    python -m benchmarks.step_snapshots --mib 20 --step-ms 150 --pairs 40

A step multiplies matrices for a fixed number of times, then waits for the copy, then changes the state in
place: once with all cores busy, once with one core idle. A pair is a step after a snapshot and one without,
in alternating order; its cost is the ratio of their times. The last line of each is what the budget of 1%
makes of it: how many of the steps are kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY_STEP = 1e9  # percent of the time


class Steps:
    """Steps of about the same time that change a state of torch's tensors."""

    def __init__(self, mib: int, seconds: float, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        count = 300  # tensors: weights and two moments
        self.state = [torch.randn(mib * 2**18 // count) for _ in range(count)]
        self._factors = torch.randn(384, 384), torch.randn(384, 384)
        self._repeats = 1
        while (took := self._multiply()) < seconds / 4:
            self._repeats *= 2
        self._repeats = max(
            1, round(self._repeats * seconds / min(took, *(self._multiply() for _ in range(5))))
        )

    def checkpoint(self, step: int) -> Any:
        from distrust import Checkpoint

        return Checkpoint(step=step, model={str(index): tensor for index, tensor in enumerate(self.state)})

    def run(self, wait_copied: Callable[[], object]) -> None:
        self._multiply()
        wait_copied()
        for tensor in self.state:
            tensor.add_(1e-6)

    def _multiply(self) -> float:
        begin = time.perf_counter()
        left, right = self._factors
        for _ in range(self._repeats):
            left @ right
        return time.perf_counter() - begin


def measure(options: argparse.Namespace, threads: int, folder: Path) -> None:
    """Print the cost of each step's snapshot, and what the default budget keeps."""
    from distrust import CheckpointManager
    from distrust.checkpoint.step_snapshots import folder_of, remove_snapshots

    steps = Steps(options.mib, options.step_ms / 1000, threads)
    with CheckpointManager(folder / f"threads-{threads}") as manager:
        number, costs, plain, stalls = 0, [], [], []

        def run(*, keep: bool) -> float:
            nonlocal number
            number += 1
            begin = time.perf_counter()
            wait: Callable[[], object] = tuple  # nothing to wait for
            if keep:
                snapshots = manager.snapshot(steps.checkpoint(number), budget=EVERY_STEP, overlap=True)
                wait = snapshots.wait_copied
                stalls.append(time.perf_counter() - begin)
            steps.run(wait)
            return time.perf_counter() - begin

        for _ in range(3):
            run(keep=True)  # allocates
        stalls.clear()
        for pair in range(options.pairs):
            order = (True, False) if pair % 2 else (False, True)
            seconds = {keep: run(keep=keep) for keep in order}
            costs.append(seconds[True] / seconds[False] - 1)
            plain.append(seconds[False])
        memory = folder_of(manager.directory)
        slots = sum(path.stat().st_size for path in memory.iterdir()) if memory else 0
        cost, step, stall = (statistics.median(values) for values in (costs, plain, stalls))
        print(
            f"{threads} threads of {os.cpu_count()} cores, step {step * 1000:.0f} ms: a snapshot of "
            f"{options.mib} MiB a step costs {cost:+.2%} (quartiles "
            f"{', '.join(f'{value:+.2%}' for value in statistics.quantiles(costs)[::2])}), "
            f"{stall * 1000:.2f} ms before the call returns; {slots / 2**20:.0f} MiB of shared memory"
        )
        snapshot_count = 0

        def make() -> Any:
            nonlocal snapshot_count
            snapshot_count += 1
            return steps.checkpoint(number)

        for _ in range(options.pairs):
            number += 1
            snapshots = manager.snapshot(make, budget=1.0, overlap=True)
            steps.run(snapshots.wait_copied)
        print(f"  with a budget of 1%: {snapshot_count} of {options.pairs} steps are kept")
    if memory is not None:
        remove_snapshots(memory)  # nobody is to resume from them


def main() -> None:
    """Measure with all cores busy, and with one idle."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=20, help="size of the state; default: 20")
    parser.add_argument("--step-ms", type=int, default=150, help="of a step without a snapshot; default: 150")
    parser.add_argument("--pairs", type=int, default=40, help="default: 40")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for threads in sorted({cores, max(1, cores - 1)}, reverse=True):
            measure(options, threads, Path(folder))


if __name__ == "__main__":
    main()
