"""The process that saves; orders and samples are lines of JSON.

{"rules": {…}}              save by these rules from now on
{"first": 0, "count": 100}  save these steps; answered by a sample

The product is imported after the fault is planted.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from campaigns.child import parse_arguments
from campaigns.long_run import resources

#: The small state: some tensors, a few KiB.
TENSORS, VALUES = 4, 512
#: Saves from one probe of the disk to the next.
PROBE_EVERY = 5
#: Saves from one release of the directory to the next.
CLOSE_EVERY = 10


class Saver:
    """Saves into one directory, and measures the time."""

    def __init__(self, directory: Path, seed: str) -> None:
        import numpy as np

        from distrust import CheckpointManager

        self._seed = seed  # of the choice between copying and overlapping
        self._directory = directory  # of the checkpoints
        self._manager = CheckpointManager(directory)
        self._threads = resources.count_threads()
        self._weights = {f"layer{number}": np.zeros(VALUES) for number in range(TENSORS)}
        self._blocking: list[float] = []
        self._returning: list[float] = []

    def set_rules(self, rules: dict[str, Any]) -> None:
        """Save by other rules."""
        from distrust import CheckpointManager

        self._manager.close()
        self._manager = CheckpointManager(self._directory, **rules)

    def save(self, first: int, count: int) -> dict[str, Any]:
        """Save some steps; returns a sample."""
        self._blocking.clear()
        self._returning.clear()
        probes, cpu = [], 0.0
        for step in range(first, first + count):
            if step % CLOSE_EVERY == 0:
                self._manager.close()  # the next save takes the lock again
            if step % PROBE_EVERY == 0:
                probes.append(self._probe_disk())
            began = time.process_time()
            self._save_step(step)
            cpu += time.process_time() - began
        self._manager.cleanup()  # it waits for the last save
        return {
            **resources.read(self._threads)._asdict(),
            "save": statistics.median(self._blocking),
            "returns": statistics.median(self._returning),
            "disk": statistics.median(probes),
            "cpu": cpu / count,
            "steps": self._manager.list_checkpoints(),
            "files": len(list(self._directory.iterdir())),
        }

    def _probe_disk(self) -> float:
        """The seconds that the disk takes for the same calls as a save."""
        began = time.perf_counter()
        probe = self._directory.parent / "probe"
        with open(probe.with_suffix(".new"), "wb") as file:
            file.write(bytes(TENSORS * VALUES * 8))
            file.flush()
            os.fsync(file.fileno())
        os.rename(probe.with_suffix(".new"), probe)
        descriptor = os.open(self._directory.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def _save_step(self, step: int) -> None:
        from distrust import Checkpoint

        for number, array in enumerate(self._weights.values()):
            array[:] = step + number
        checkpoint = Checkpoint(step=step, model=self._weights, metrics={"eval_loss": metric(step)})
        began = time.perf_counter()
        if step % 2:
            self._manager.save(checkpoint)
            self._blocking.append(time.perf_counter() - began)
            return
        overlap = random.Random(f"{self._seed}/{step}").random() < 0.5
        pending = self._manager.save_async(checkpoint, overlap=overlap)
        self._returning.append(time.perf_counter() - began)
        pending.wait_copied()
        # No save starts while another one runs, so that each measurement is of one save.
        pending.wait()


def metric(step: int) -> float:
    """The metric of a step: good ones come at any time, and go when better ones come."""
    return random.Random(step).random()


def main() -> None:
    options = parse_arguments(directory=Path, seed=str)
    saver = Saver(options.directory, options.seed)
    for line in sys.stdin:
        order = json.loads(line)
        if "rules" in order:
            saver.set_rules(order["rules"])
        else:
            print(json.dumps(saver.save(**order)), flush=True)


if __name__ == "__main__":
    main()
