"""Processes that read while another one writes: each gets an intact checkpoint, or a clear "not found".

A step is *gone* if it does not exist any more when it is requested: then it must not be listed any more
either, and nothing that a rule retains may ever be gone. A loaded checkpoint never changes, whatever the
writer removes or replaces: some are held for a while, and checked again. This module is also the process that
reads; it answers with its counts and its finding.
"""

from __future__ import annotations

import contextlib
import json
import random
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from campaigns.campaign import Campaign, Case, fault_arguments, require
from campaigns.child import Child, parse_arguments
from campaigns.concurrency import content
from campaigns.concurrency.writer import Board
from campaigns.invariants import temporary_files
from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound

HELD = 4
#: For all saves together, on a disk that is used by others, too.
SECONDS_PER_SAVE, LEAST_SECONDS = 2.0, 60.0


class Reader:
    """Reads at random.

    Args:
        directory: of the checkpoints.
    """

    def __init__(self, directory: Path, board: Board, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._manager = CheckpointManager(directory, keep_best=1, metric=content.METRIC)
        self._board = board  # what the writer has reported
        self._rng = rng  # of all choices
        self._held: deque[tuple[int, Checkpoint]] = deque()
        self._newest = 0
        self._methods: list[Callable[[], None]] = [
            self._list,
            self._scan,
            *[self._load] * 2,
            self._load_path,
            self._validate,
            self._inspect,
            *[self._load_latest] * 2,
            self._load_best,
        ]

    def read(self) -> None:
        """Read once, by one of the methods; every exception is a finding."""
        self._rng.choice(self._methods)()

    def finish(self) -> None:
        """Check all that is held."""
        while self._held:
            self._check_held()

    def _list(self) -> None:
        step = self._board.step
        steps = self._manager.list_checkpoints()
        require(steps == sorted(set(steps)), f"a list out of order: {steps}")
        require(step == 0 or steps[-1:] >= [step], f"step {step} is durable, and the list is {steps}")
        self.counts["lists"] += 1

    def _scan(self) -> None:
        scan = self._manager.scan()
        require(not scan.damaged, f"damaged: {[file.reason for file in scan.damaged]}")
        self.counts["scans"] += 1

    def _load(self) -> None:
        if (step := self._any_step()) is None:
            return
        mmap = self._rng.random() < 0.6
        lazy = mmap and self._rng.random() < 0.5
        try:
            loaded = self._manager.load(step, mmap=mmap, verify="lazy" if lazy else "full")
        except CheckpointNotFound as error:
            self._require_unlisted(error, step)
            return
        self._check(step, loaded, check=not lazy, hold=mmap)
        self.counts["loads, " + ("lazy" if lazy else "mapped" if mmap else "plain")] += 1

    def _load_path(self) -> None:
        files = self._manager.scan().files
        if not files:
            return
        file = self._rng.choice(files)
        try:
            loaded = self._manager.load(file.path)
        except CheckpointNotFound as error:
            require("\n" not in str(error), f"more than a line: {error}")
            paths = [other.path for other in self._manager.scan().files]
            require(file.path not in paths, f"{file.path.name} is gone, and is listed: {error}")
            self.counts["gone"] += 1
            return
        self._check(file.step, loaded)
        self.counts["loads, by path"] += 1

    def _validate(self) -> None:
        if (step := self._any_step()) is None:
            return
        try:
            self._manager.validate(step)
        except CheckpointNotFound as error:
            self._require_unlisted(error, step)
        else:
            self.counts["verified"] += 1

    def _inspect(self) -> None:
        if (step := self._any_step()) is None:
            return
        try:
            file = self._manager.inspect(step)
        except CheckpointNotFound as error:
            self._require_unlisted(error, step)
            return
        require(file.step == step == file.metadata["of"][0], f"step {step} has the metadata {file.metadata}")
        require(file.metrics == {content.METRIC: content.metric(step)}, f"metrics of {step}: {file.metrics}")
        self.counts["inspected"] += 1

    def _load_latest(self) -> None:
        step, version = self._board.step, self._board.version
        mmap = self._rng.random() < 0.3
        try:
            loaded = self._manager.load_latest(mmap=mmap)
        except CheckpointNotFound as error:
            require(version == 0, f"step {step} is durable: {error}")
            return
        latest = self._check(None, loaded, hold=mmap)
        least = max(version, self._newest)
        require(latest >= least, f"the newest is version {latest}, and {least} existed before")
        self._newest = latest
        self.counts["loads of the latest"] += 1

    def _load_best(self) -> None:
        best = self._board.best
        try:
            loaded = self._manager.load_best()
        except CheckpointNotFound as error:
            require(best is None, f"{best} is the best, and durable: {error}")
            return
        self._check(None, loaded)
        metric = content.metric(loaded.step)
        require(best is None or metric <= best, f"load_best gave {metric}, and {best} is durable")
        self.counts["loads of the best"] += 1

    def _any_step(self) -> int | None:
        steps = self._manager.list_checkpoints()
        return self._rng.choice(steps) if steps else None

    def _require_unlisted(self, error: CheckpointNotFound, step: int) -> None:
        require("\n" not in str(error), f"more than a line: {error}")
        require(step not in self._manager.list_checkpoints(), f"step {step} is gone, and is listed: {error}")
        self.counts["gone"] += 1

    def _check(self, step: int | None, loaded: Checkpoint, *, check: bool = True, hold: bool = False) -> int:
        """Check what was loaded, and perhaps hold it to check it again."""
        version = content.version_of(loaded, step=step) if check else 0
        if hold:
            self._held.append((loaded.step, loaded))
            if len(self._held) > HELD:
                self._check_held()
        return version

    def _check_held(self) -> None:
        step, loaded = self._held.popleft()
        content.version_of(loaded, step=step)
        self.counts["checked again later"] += 1


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """Let some processes read what another one saves."""
    options = campaign.options
    directory, board = folder / "checkpoints", Board(folder / "board")
    seed = case.rng.random()
    buffered = case.rng.random() < 0.5 if options.path == "either" else options.path == "buffered"
    path = "buffered" if buffered else "direct"
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(
                Child("campaigns.concurrency.readers", directory, folder / "board", f"{seed}/{number}")
            )
            for number in range(options.readers)
        ]
        writer = stack.enter_context(
            Child(
                "campaigns.concurrency.writer",
                *(directory, folder / "board", seed, options.saves, path),
                *fault_arguments(options),
            )
        )
        writer.receive(max(LEAST_SECONDS, options.saves * SECONDS_PER_SAVE))
        writer.finish()
        board.stop()
        answers = [reader.receive_json() for reader in readers]
        for reader in readers:
            reader.finish()
    campaign.count(f"saves beside {options.readers} readers, {path}", options.saves)
    loads = []
    for answer in answers:
        campaign.require(answer["finding"] is None, f"beside a writer ({path}): {answer['finding']}")
        campaign.count_all({f"readers: {name}": number for name, number in answer["counts"].items()})
        loads.append(sum(number for name, number in answer["counts"].items() if name.startswith("load")))
    campaign.count("readers: loads of the one that loaded least", min(loads))
    temporary = temporary_files(directory)
    campaign.require(not temporary, f"the writer left {temporary}")


def main() -> None:
    options = parse_arguments(directory=Path, board=Path, seed=str)
    warnings.simplefilter("error")
    board = Board(options.board)
    reader = Reader(options.directory, board, random.Random(options.seed))
    finding = None
    try:
        while not board.stopped:
            reader.read()
        reader.finish()
    except Exception:
        finding = traceback.format_exc()
    print(json.dumps({"counts": reader.counts, "finding": finding}), flush=True)


if __name__ == "__main__":
    main()
