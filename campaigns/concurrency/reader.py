"""A process that reads, in every way there is, what another one is writing; it answers with what it counted.

A step is *gone* if it is not there any more when it is asked for: then it may not be listed any more either,
and nothing that a rule keeps may ever be gone. What was loaded stays what it was, whatever the writer removes
or replaces: some of it is held for a while, and looked at again.
"""

from __future__ import annotations

import argparse
import json
import random
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from campaigns.concurrency import content
from campaigns.concurrency.board import Board
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound

HELD = 4


class Reader:
    """Reads by chance.

    Args:
        directory: of the checkpoints.
        board: what the writer has promised.
        chance: all choices come from it.
    """

    def __init__(self, directory: Path, board: Board, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._manager = CheckpointManager(directory, keep_best=1, metric=content.METRIC)
        self._board = board
        self._chance = chance
        self._held: deque[tuple[int, Checkpoint]] = deque()
        self._newest = 0
        self._ways: list[Callable[[], None]] = [
            self._list,
            self._scan,
            self._load,
            self._load,
            self._load_path,
            self._validate,
            self._inspect,
            self._latest,
            self._latest,
            self._best,
        ]

    def read(self) -> None:
        """Read once, in one of the ways.

        Raises:
            ValueError: for what may not be. So is every other error.
        """
        self._chance.choice(self._ways)()

    def end(self) -> None:
        """Look at all that is held."""
        while self._held:
            self._let_go()

    def _list(self) -> None:
        step = self._board.step
        steps = self._manager.list_checkpoints()
        require(steps == sorted(set(steps)), f"a list out of order: {steps}")
        require(step == 0 or steps[-1:] >= [step], f"step {step} is durable, and the list is {steps}")
        self.counts["lists"] += 1

    def _scan(self) -> None:
        found = self._manager.scan()
        require(not found.damaged, f"damaged: {[file.reason for file in found.damaged]}")
        self.counts["scans"] += 1

    def _load(self) -> None:
        if (step := self._some_step()) is None:
            return
        mmap = self._chance.random() < 0.6
        lazy = mmap and self._chance.random() < 0.5
        try:
            loaded = self._manager.load(step, mmap=mmap, verify="lazy" if lazy else "full")
        except CheckpointNotFound as error:
            self._gone(error, step)
            return
        self._keep(step, loaded, look=not lazy, hold=mmap)
        self.counts["loads, " + ("lazy" if lazy else "mapped" if mmap else "plain")] += 1

    def _load_path(self) -> None:
        files = self._manager.scan().files
        if not files:
            return
        file = self._chance.choice(files)
        try:
            loaded = self._manager.load(file.path)
        except CheckpointNotFound as error:
            require("\n" not in str(error), f"more than a line: {error}")
            there = [other.path for other in self._manager.scan().files]
            require(file.path not in there, f"{file.path.name} is gone, and is listed: {error}")
            self.counts["gone"] += 1
            return
        self._keep(file.step, loaded, look=True, hold=False)
        self.counts["loads, by path"] += 1

    def _validate(self) -> None:
        if (step := self._some_step()) is None:
            return
        try:
            self._manager.validate(step)
        except CheckpointNotFound as error:
            self._gone(error, step)
        else:
            self.counts["verified"] += 1

    def _inspect(self) -> None:
        if (step := self._some_step()) is None:
            return
        try:
            file = self._manager.inspect(step)
        except CheckpointNotFound as error:
            self._gone(error, step)
            return
        require(file.step == step == file.metadata["of"][0], f"step {step} is said to be {file.metadata}")
        require(file.metrics == {content.METRIC: content.metric(step)}, f"metrics of {step}: {file.metrics}")
        self.counts["inspected"] += 1

    def _latest(self) -> None:
        step, version = self._board.step, self._board.version
        mmap = self._chance.random() < 0.3
        try:
            loaded = self._manager.load_latest(mmap=mmap)
        except CheckpointNotFound as error:
            require(version == 0, f"step {step} is durable: {error}")
            return
        found = self._keep(None, loaded, look=True, hold=mmap)
        least = max(version, self._newest)
        require(found >= least, f"the newest is version {found}, and {least} was there before")
        self._newest = found
        self.counts["loads of the latest"] += 1

    def _best(self) -> None:
        best = self._board.best
        try:
            loaded = self._manager.load_best()
        except CheckpointNotFound as error:
            require(best is None, f"{best} is the best, and durable: {error}")
            return
        self._keep(None, loaded, look=True, hold=False)
        found = content.metric(loaded.step)
        require(best is None or found <= best, f"the best is said to be {found}, and {best} is durable")
        self.counts["loads of the best"] += 1

    def _some_step(self) -> int | None:
        steps = self._manager.list_checkpoints()
        return self._chance.choice(steps) if steps else None

    def _gone(self, error: CheckpointNotFound, step: int) -> None:
        require("\n" not in str(error), f"more than a line: {error}")
        require(step not in self._manager.list_checkpoints(), f"step {step} is gone, and is listed: {error}")
        self.counts["gone"] += 1

    def _keep(self, step: int | None, loaded: Checkpoint, *, look: bool, hold: bool) -> int:
        """Look at what was loaded, and perhaps hold it to look at it again."""
        version = content.version_of(loaded, step=step) if look else 0
        if hold:
            self._held.append((loaded.step, loaded))
            if len(self._held) > HELD:
                self._let_go()
        return version

    def _let_go(self) -> None:
        step, loaded = self._held.popleft()
        content.version_of(loaded, step=step)
        self.counts["looked at again later"] += 1


def require(kept: bool, promise: str) -> None:
    """Raise ValueError for a promise that was not kept."""
    if not kept:
        raise ValueError(promise)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("board", type=Path)
    options.add_argument("seed")
    given = options.parse_args()
    warnings.simplefilter("error")
    board = Board(given.board)
    reader = Reader(given.directory, board, random.Random(given.seed))
    finding = None
    try:
        while not board.over:
            reader.read()
        reader.end()
    except Exception:
        finding = traceback.format_exc()
    print(json.dumps({"counts": reader.counts, "finding": finding}), flush=True)


if __name__ == "__main__":
    main()
