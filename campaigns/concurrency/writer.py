"""The process that saves and cleans up while others read; it answers once, when it has saved often enough."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from campaigns.concurrency.board import Board
from campaigns.faults import plant

SIZES = (16, 500, 5_000, 50_000)


class Writer:
    """Saves by chance: blocking and in the background, finals, and the newest step again.

    Args:
        directory: of the checkpoints.
        board: where it says what is durable.
        chance: all choices come from it.
    """

    def __init__(self, directory: Path, board: Board, chance: random.Random) -> None:
        from distrust import CheckpointManager
        from distrust.checkpoint import PendingSave

        self._board = board
        self._chance = chance
        self._manager = CheckpointManager(
            directory,
            keep_last=chance.choice([1, 2, 4]),
            keep_best=chance.choice([1, 2]),
            keep_every=chance.choice([None, 97]),
        )
        self._step = self._version = 0
        self._was_final = True
        self._pending: tuple[PendingSave, int, int] | None = None

    def save(self) -> None:
        """One save, and now and then a clean-up of its own."""
        from campaigns.concurrency import content

        chance = self._chance
        # A periodic checkpoint after the final one of its step would be the newer one, and not be read.
        if self._was_final or chance.random() < 0.8:
            self._step += 1
        self._version += 1
        self._was_final = chance.random() < 0.03
        checkpoint = content.make(self._step, self._version, chance.choice(SIZES))
        if chance.random() < 0.5:
            self._manager.save(checkpoint, final=self._was_final)
            self._promise(self._step, self._version)
        else:
            pending = self._manager.save_async(checkpoint, final=self._was_final)
            self._settled()
            self._pending = pending, self._step, self._version
            if chance.random() < 0.5:
                self._settled()
        if chance.random() < 0.05:
            self._manager.cleanup(keep_last=1)

    def end(self) -> None:
        """Wait for the last save."""
        self._settled()
        self._manager.close()

    def _settled(self) -> None:
        if self._pending is not None:
            pending, step, version = self._pending
            pending.wait()
            self._pending = None
            if version > self._board.version:
                self._promise(step, version)

    def _promise(self, step: int, version: int) -> None:
        from campaigns.concurrency import content

        if self._pending is not None:  # this save has waited for it: its metric counts, too
            self._settled()
        self._board.promise(step, version, content.metric(step))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("board", type=Path)
    options.add_argument("seed")
    options.add_argument("saves", type=int)
    options.add_argument("--buffered", action="store_true")
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)
    if given.buffered:
        from distrust.checkpoint import direct_io

        direct_io.FLAG = 0
    writer = Writer(given.directory, Board(given.board), random.Random(given.seed))
    for _ in range(given.saves):
        writer.save()
    writer.end()
    print("saved", flush=True)


if __name__ == "__main__":
    main()
