"""A program that saves: the walk that ``killed_saves`` kills, again and again.

The state is a random walk whose steps depend on the state before alone; how a step is saved depends on the
seed and the step. A killed walk resumes from its newest checkpoint, and must end in the undisturbed state.
For each durable checkpoint it prints its step, kind, number and metric, by one system call.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from campaigns.faults import plant
from campaigns.oracle import Rules
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io, stream_writer
from distrust.errors import CheckpointNotFound

Method = Literal["save", "save_async", "overlap", "final", "again", "reopen", "cleanup"]
Array = np.ndarray[Any, Any]
METRIC = "height"  # that retention ranks by


@dataclass(frozen=True, kw_only=True)
class Plan:
    directory: str  # of its checkpoints
    seed: int  # of the walk, and of the methods by which it is saved
    steps: int  # its length
    sizes: tuple[int, ...]  # items of each array
    block_bytes: int  # the size of a write
    direct: bool  # whether direct I/O is tried
    keep_last: int  # of the rules
    keep_every: int | None  # of the rules
    first_save: int = 0  # the number of the first save; higher at each start
    fault: str | None = None  # a fault that is put into the product; see ``faults.py``

    @property
    def rules(self) -> Rules:
        """Its clean-ups may remove what these do not retain."""
        return Rules(self.keep_last, 1, self.keep_every, METRIC)

    def argument(self) -> str:
        return json.dumps(asdict(self))

    def method(self, step: int) -> Method:
        return random.Random(f"{self.seed}/{step}").choice(get_args(Method))


class Report(NamedTuple):
    """A line of a walk: a checkpoint is durable."""

    step: int  # of the checkpoint
    final: bool  # whether it is a final one
    number: int  # among all saves of this walk
    height: float  # its metric

    @classmethod
    def parse(cls, line: str) -> Report:
        step, kind, number, height = line.split()
        return cls(int(step), kind == "final", int(number), float(height))

    def write(self) -> None:
        """Print it by one system call: a kill never leaves half a line."""
        kind = "final" if self.final else "periodic"
        os.write(1, f"{self.step} {kind} {self.number} {self.height!r}\n".encode())


class Walk:
    def __init__(self, plan: Plan) -> None:
        self.step = 0
        self._rng = np.random.default_rng(plan.seed)
        self._positions: list[Array] = [np.zeros(size) for size in plan.sizes]
        self._moments: list[Array] = [np.zeros(size, np.float32) for size in plan.sizes]
        self._heights: list[float] = []

    @property
    def height(self) -> float:
        return self._heights[-1]

    def advance(self) -> None:
        """Make a step, in place: a checkpoint that shared the arrays would change."""
        self.step += 1
        for position, moment in zip(self._positions, self._moments, strict=True):
            move = self._rng.normal(size=position.size)
            moment[:] = 0.9 * moment + move
            position += move * np.tanh(moment)
        self._heights.append(float(sum(position.sum() for position in self._positions)))

    def checkpoint(self, number: int) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            model={"positions": self._positions},
            optimizer={"moments": self._moments},
            rng=dict(self._rng.bit_generator.state),
            history={"heights": np.array(self._heights)},
            metrics={METRIC: self.height},
            run={"number": number},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        arrays = [*checkpoint.model["positions"], *checkpoint.optimizer["moments"]]
        for array, saved in zip([*self._positions, *self._moments], arrays, strict=True):
            array[:] = saved
        self._rng.bit_generator.state = checkpoint.rng
        self._heights = checkpoint.history["heights"].tolist()


class Saver:
    """Saves a walk by every method, and reports what is durable."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._manager = self._open()
        self._number = plan.first_save

    def restore(self, walk: Walk) -> None:
        """Load the newest checkpoint; for some steps, save it again over the file that it came from."""
        try:
            walk.restore(self._manager.load_latest())
        except CheckpointNotFound:
            return
        if self._plan.method(-walk.step) == "again":
            self._save(walk)

    def save(self, walk: Walk, method: Method) -> None:
        """Save by one of the methods; the walk may change when this returns."""
        match method:
            case "save":
                self._save(walk)
            case "save_async" | "overlap":
                self._save_async(walk, overlap=method == "overlap")
            case "final":
                self._save(walk, final=True)
            case "again":
                self._save_async(walk, overlap=False)
                self._save(walk)
            case "reopen":
                self._manager.close()
                self._manager = self._open()
                self._save(walk)
            case "cleanup":
                self._save_async(walk, overlap=False)
                self._manager.cleanup()

    def finish(self, walk: Walk) -> None:
        self._save(walk, final=True)
        self._manager.close()

    def _open(self) -> CheckpointManager:
        return CheckpointManager(self._plan.directory, **self._plan.rules._asdict())

    def _save(self, walk: Walk, *, final: bool = False) -> None:
        report = self._report(walk, final=final)
        self._manager.save(walk.checkpoint(report.number), final=final)
        report.write()

    def _save_async(self, walk: Walk, *, overlap: bool) -> None:
        report = self._report(walk, final=False)
        pending = self._manager.save_async(walk.checkpoint(report.number), overlap=overlap)
        # Called on the save's own thread, whatever the loop does meanwhile.
        pending.add_done_callback(lambda: None if pending.has_unreported_error else report.write())
        pending.wait_copied()

    def _report(self, walk: Walk, *, final: bool) -> Report:
        self._number += 1
        return Report(walk.step, final, self._number, walk.height)


def main(arguments: Sequence[str]) -> int:
    plan = Plan(**json.loads(arguments[0]))
    if not plan.direct:
        direct_io.FLAG = 0
    stream_writer.BLOCK_BYTES = plan.block_bytes
    plant(plan.fault)
    walk, saver = Walk(plan), Saver(plan)
    saver.restore(walk)
    while walk.step < plan.steps:
        walk.advance()
        if walk.step < plan.steps:
            saver.save(walk, plan.method(walk.step))
    saver.finish(walk)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
