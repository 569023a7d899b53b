"""What a save costs, beside safetensors with fsync: the same state, the same disk, in turn.

    python benchmarks/saving.py --mebibytes 256 --repeats 7

Prints medians with their range, and the ratio of each pair. ``saved`` is a blocking, durable save with
digests; ``returns`` is how long ``save_async`` keeps the caller.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from distrust import Checkpoint, CheckpointManager

TENSORS = 400


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peer(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def shown(name: str, seconds: list[float], ratios: list[float]) -> str:
    return (
        f"{name:24} {statistics.median(seconds) * 1000:8.1f} ms ({min(seconds) * 1000:.1f} to "
        f"{max(seconds) * 1000:.1f})   x {statistics.median(ratios):.2f} of safetensors + fsync"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the state")
    parser.add_argument("--repeats", type=int, default=7, help="counted ones, after one that is not")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: a temporary one")
    options = parser.parse_args()

    elements = options.mebibytes * 2**20 // 4 // TENSORS
    state = {f"layer.{index}": torch.randn(elements) for index in range(TENSORS)}
    times: dict[str, list[float]] = {"safetensors + fsync": [], "saved": [], "returns": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        for repeat in range(options.repeats + 1):
            measured = {"safetensors + fsync": timed(lambda: peer(state, root / "peer.safetensors"))}
            (root / "peer.safetensors").unlink()
            with CheckpointManager(root / "ours", keep_last=1) as manager:
                blocking = Checkpoint(step=2 * repeat, model=state)
                measured["saved"] = timed(lambda m=manager, c=blocking: m.save(c))  # type: ignore[misc]
                background = Checkpoint(step=2 * repeat + 1, model=state)
                measured["returns"] = timed(lambda m=manager, c=background: m.save_async(c))  # type: ignore[misc]
            if repeat:
                for name, once in measured.items():
                    times[name].append(once)
    print(f"{options.mebibytes} MiB in {TENSORS} tensors, {options.repeats} repeats, median (range)")
    for name, seconds in times.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, times["safetensors + fsync"], strict=True)]
        print(shown(name, seconds, ratios))


if __name__ == "__main__":
    main()
