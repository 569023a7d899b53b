"""The process that saves and cleans up while others read, and the board on which it reports what is durable.

It answers once, when it has saved often enough. The product is imported after the fault is planted.
"""

from __future__ import annotations

import mmap
import random
import struct
from pathlib import Path

from campaigns.child import parse_arguments

SIZES = (16, 500, 5_000, 50_000)
_BOARD_BYTES = 4096
_STEP, _VERSION, _BEST, _STOP = (8 * index for index in range(4))


class Board:
    """Numbers in a mapped file. One process writes them, each of eight bytes at once.

    Args:
        path: of the file, which is made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_BOARD_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BOARD_BYTES)

    def report(self, step: int, version: int, metric: float) -> None:
        """A checkpoint was reported durable."""
        best = self.best
        struct.pack_into("d", self._memory, _BEST, metric if best is None else min(best, metric))
        struct.pack_into("q", self._memory, _STEP, step)
        struct.pack_into("q", self._memory, _VERSION, version)  # last: it makes the others valid

    @property
    def version(self) -> int:
        """The newest durable version; 0 before the first."""
        return int(struct.unpack_from("q", self._memory, _VERSION)[0])

    @property
    def step(self) -> int:
        """Its step."""
        return int(struct.unpack_from("q", self._memory, _STEP)[0])

    @property
    def best(self) -> float | None:
        """The best metric of all durable checkpoints."""
        return float(struct.unpack_from("d", self._memory, _BEST)[0]) if self.version else None

    @property
    def stopped(self) -> bool:
        """Whether the readers are to stop."""
        return bool(self._memory[_STOP])

    def stop(self) -> None:
        """Stop the readers."""
        self._memory[_STOP] = 1


class Writer:
    """Saves at random: blocking and in the background, finals, and the newest step again.

    Args:
        directory: of the checkpoints.
    """

    def __init__(self, directory: Path, board: Board, rng: random.Random) -> None:
        from distrust import CheckpointManager
        from distrust.checkpoint import PendingSave

        self._board = board  # where it reports what is durable
        self._rng = rng  # of all choices
        self._manager = CheckpointManager(
            directory,
            keep_last=rng.choice([1, 2, 4]),
            keep_best=rng.choice([1, 2]),
            keep_every=rng.choice([None, 97]),
        )
        self._step = self._version = 0
        self._was_final = True
        self._pending: tuple[PendingSave, int, int] | None = None

    def save(self) -> None:
        """Save once, and now and then clean up."""
        from campaigns.concurrency import content

        rng = self._rng
        # A periodic checkpoint after the final one of its step would be newer, but not the one that is read.
        if self._was_final or rng.random() < 0.8:
            self._step += 1
        self._version += 1
        self._was_final = rng.random() < 0.03
        checkpoint = content.make(self._step, self._version, rng.choice(SIZES))
        if rng.random() < 0.5:
            self._manager.save(checkpoint, final=self._was_final)
            self._report(self._step, self._version)
        else:
            pending = self._manager.save_async(checkpoint, final=self._was_final)
            self._wait()
            self._pending = pending, self._step, self._version
            if rng.random() < 0.5:
                self._wait()
        if rng.random() < 0.05:
            self._manager.cleanup(keep_last=1)

    def finish(self) -> None:
        """Wait for the last save."""
        self._wait()
        self._manager.close()

    def _wait(self) -> None:
        if self._pending is not None:
            pending, step, version = self._pending
            pending.wait()
            self._pending = None
            if version > self._board.version:
                self._report(step, version)

    def _report(self, step: int, version: int) -> None:
        from campaigns.concurrency import content

        if self._pending is not None:  # this save has waited for it, so it is durable, too
            self._wait()
        self._board.report(step, version, content.metric(step))


def main() -> None:
    options = parse_arguments(directory=Path, board=Path, seed=str, saves=int, path=str)
    if options.path == "buffered":
        from distrust.checkpoint import direct_io

        direct_io.FLAG = 0
    writer = Writer(options.directory, Board(options.board), random.Random(options.seed))
    for _ in range(options.saves):
        writer.save()
    writer.finish()
    print("saved", flush=True)


if __name__ == "__main__":
    main()
