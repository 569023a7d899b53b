"""The process that saves, for as long as it is told: orders and samples are lines of JSON.

{"rules": {…}}             save by these rules from now on
{"first": 0, "count": 100}  save these steps; answered by a sample
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from campaigns.faults import plant
from campaigns.long_run import gauges

#: The small state: some tensors, a few KiB.
TENSORS, VALUES = 4, 512
#: Saves from one probe of the disk to the next.
PROBE_EVERY = 5
#: Saves from one time that the directory is let go of to the next.
CLOSE_EVERY = 10


class Saver:
    """Saves into one directory, and keeps the time.

    Args:
        directory: of the checkpoints.
        seed: of what is saved how.
    """

    def __init__(self, directory: Path, seed: str) -> None:
        import numpy as np

        from distrust import CheckpointManager

        self._seed = seed
        self._directory = directory
        self._manager = CheckpointManager(directory)
        self._usual_threads = gauges.threads()
        self._weights = {f"layer{number}": np.zeros(VALUES) for number in range(TENSORS)}
        self._blocking: list[float] = []
        self._returning: list[float] = []

    def obey(self, rules: dict[str, Any]) -> None:
        """Save by other rules."""
        from distrust import CheckpointManager

        self._manager.close()
        self._manager = CheckpointManager(self._directory, **rules)

    def save(self, first: int, count: int) -> dict[str, Any]:
        """Save some steps, and take a sample."""
        self._blocking.clear()
        self._returning.clear()
        probes, cpu = [], 0.0
        for step in range(first, first + count):
            if step % CLOSE_EVERY == 0:
                self._manager.close()  # the next save takes the lock again
            if step % PROBE_EVERY == 0:
                probes.append(self._probe())
            began = time.process_time()
            self._one(step)
            cpu += time.process_time() - began
        self._manager.cleanup()  # it waits for the save under way
        found = gauges.read(self._usual_threads)
        return {
            **found._asdict(),
            "save": statistics.median(self._blocking),
            "returns": statistics.median(self._returning),
            "disk": statistics.median(probes),
            "cpu": cpu / count,
            "steps": self._manager.list_checkpoints(),
            "files": len(list(self._directory.iterdir())),
        }

    def _probe(self) -> float:
        """What the disk takes at the moment for what a save asks of it, without the save."""
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

    def _one(self, step: int) -> None:
        from distrust import Checkpoint

        for number, array in enumerate(self._weights.values()):
            array[:] = step + number
        checkpoint = Checkpoint(step=step, model=self._weights, metrics={"eval_loss": metric(step)})
        began = time.perf_counter()
        if step % 2:
            self._manager.save(checkpoint)
            self._blocking.append(time.perf_counter() - began)
            return
        pending = self._manager.save_async(
            checkpoint, overlap=random.Random(f"{self._seed}/{step}").random() < 0.5
        )
        self._returning.append(time.perf_counter() - began)
        pending.wait_copied()
        # Each save begins with none under way: what is timed is this save, and not the one before.
        pending.wait()


def metric(step: int) -> float:
    """The metric of a step: the best ones come at any time, and go when better ones come."""
    return random.Random(step).random()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("seed")
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)
    saver = Saver(given.directory, given.seed)
    for line in sys.stdin:
        order = json.loads(line)
        if "rules" in order:
            saver.obey(order["rules"])
        else:
            print(json.dumps(saver.save(**order)), flush=True)


if __name__ == "__main__":
    main()
