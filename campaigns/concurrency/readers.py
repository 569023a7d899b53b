"""Processes that read while another one writes: each gets an intact checkpoint, or a clear "not found".

A step that is *gone* when it is requested must no longer be listed, and nothing that a rule retains may be
gone. A loaded checkpoint never changes, so some are held and checked again. This module is also the process
that reads, or that writes and reports on a board what is durable.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import random
import struct
import sys
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign, Case, require
from campaigns.child import Child, parse_arguments, start_child
from campaigns.concurrency import model
from campaigns.invariants import temporary_files
from campaigns.oracle import Rules
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import PendingSave, direct_io
from distrust.errors import CheckpointNotFound

SIZES = (16, 500, 5_000, 50_000)  # items; from one block to many
_BOARD_BYTES = 4096  # a page
_STEP, _VERSION, _BEST, _STOP = (8 * index for index in range(4))


class Board:
    """Numbers in a mapped file. One process writes them, each of eight bytes at once."""

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
        return int(struct.unpack_from("q", self._memory, _STEP)[0])

    @property
    def best(self) -> float | None:
        return float(struct.unpack_from("d", self._memory, _BEST)[0]) if self.version else None

    @property
    def is_stopped(self) -> bool:
        return bool(self._memory[_STOP])

    def stop(self) -> None:
        self._memory[_STOP] = 1


class Writer:
    """Saves at random: blocking and in the background, finals, and the newest step again."""

    def __init__(self, directory: Path, board: Board, rng: random.Random) -> None:
        self._board = board  # where it reports what is durable
        self._rng = rng  # of all choices
        rules = Rules(rng.choice([1, 2, 4]), rng.choice([1, 2]), rng.choice([None, 97]))
        self._manager = CheckpointManager(directory, **rules._asdict())
        self._step = self._version = 0
        self._was_final = True
        self._pending: tuple[PendingSave, int, int] | None = None

    def save(self) -> None:
        rng = self._rng
        # A periodic checkpoint after the final one of its step would be newer, but not the one that is read.
        if self._was_final or rng.random() < 0.8:
            self._step += 1
        self._version += 1
        self._was_final = rng.random() < 0.03
        checkpoint = model.make_checkpoint(self._step, self._version, rng.choice(SIZES))
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
        if self._pending is not None:  # this save has waited for it, so it is durable, too
            self._wait()
        self._board.report(step, version, model.metric_of(step))


HELD = 4  # loaded checkpoints at once
#: For all saves together, on a disk that is used by others, too.
SECONDS_PER_SAVE, LEAST_SECONDS = 2.0, 60.0


class Reader:
    def __init__(self, directory: Path, board: Board, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._manager = CheckpointManager(directory, keep_best=1, metric=model.METRIC)
        self._board = board  # what the writer has reported
        self._rng = rng  # of all choices
        self._held: deque[tuple[int, Checkpoint]] = deque()
        self._newest = 0
        self._methods = [self._list, self._scan, self._load, self._load, self._load_path, self._validate]
        self._methods += [self._inspect, self._load_latest, self._load_latest, self._load_best]

    def read(self) -> None:
        """Read once, by one of the methods; every exception is a finding."""
        self._rng.choice(self._methods)()

    def finish(self) -> None:
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
        mmap = self._rng.random() < 0.6
        lazy = mmap and self._rng.random() < 0.5
        verify: Any = "lazy" if lazy else "full"
        step, loaded = self._read_step(lambda step: self._manager.load(step, mmap=mmap, verify=verify))
        if loaded is not None:
            self._check(step, loaded, check=not lazy, hold=mmap)
            self.counts["loads, " + ("lazy" if lazy else "mapped" if mmap else "plain")] += 1

    def _load_path(self) -> None:
        if not (files := self._manager.scan().files):
            return
        file = self._rng.choice(files)
        try:
            loaded = self._manager.load(file.path)
        except CheckpointNotFound as error:
            paths = [listed.path for listed in self._manager.scan().files]
            require(file.path not in paths, f"{file.path.name} is gone, and is listed: {error}")
            self._count_gone(error)
            return
        self._check(file.step, loaded)
        self.counts["loads, by path"] += 1

    def _validate(self) -> None:
        misses = self.counts["gone"]
        step, _ = self._read_step(self._manager.validate)
        self.counts["verified"] += step > 0 and self.counts["gone"] == misses

    def _inspect(self) -> None:
        step, file = self._read_step(self._manager.inspect)
        if file is None:
            return
        require(file.step == step == file.metadata["of"][0], f"step {step} has the metadata {file.metadata}")
        require(file.metrics == {model.METRIC: model.metric_of(step)}, f"metrics of {step}: {file.metrics}")
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
        metric = model.metric_of(loaded.step)
        require(best is None or metric <= best, f"load_best gave {metric}, and {best} is durable")
        self.counts["loads of the best"] += 1

    def _read_step(self, read: Callable[[int], Any]) -> tuple[int, Any]:
        """Read a random step; the result is None if it is gone, or there is none."""
        steps = self._manager.list_checkpoints()
        if not steps:
            return 0, None
        step = self._rng.choice(steps)
        try:
            return step, read(step)
        except CheckpointNotFound as error:
            listed = self._manager.list_checkpoints()
            require(step not in listed, f"step {step} is gone, and is listed: {error}")
            self._count_gone(error)
            return step, None

    def _count_gone(self, error: CheckpointNotFound) -> None:
        require("\n" not in str(error), f"more than a line: {error}")
        self.counts["gone"] += 1

    def _check(self, step: int | None, loaded: Checkpoint, *, check: bool = True, hold: bool = False) -> int:
        """Check what was loaded, and perhaps hold it to check it again."""
        version = model.version_of(loaded, step=step) if check else 0
        if hold:
            self._held.append((loaded.step, loaded))
            if len(self._held) > HELD:
                self._check_held()
        return version

    def _check_held(self) -> None:
        step, loaded = self._held.popleft()
        model.version_of(loaded, step=step)
        self.counts["checked again later"] += 1


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    options = campaign.options
    directory, board = folder / "checkpoints", Board(folder / "board")
    seed, module = case.rng.random(), "campaigns.concurrency.readers"
    buffered = case.rng.random() < 0.5 if options.path == "either" else options.path == "buffered"
    path = "buffered" if buffered else "direct"
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(Child(module, "read", directory, folder / "board", f"{seed}/{number}"))
            for number in range(options.readers)
        ]
        arguments = ("write", directory, folder / "board", seed, options.saves, path)
        writer = stack.enter_context(start_child(campaign, module, *arguments))
        writer.receive(max(LEAST_SECONDS, options.saves * SECONDS_PER_SAVE))
        writer.finish()
        board.stop()
        answers = [reader.receive_json() for reader in readers]
        for reader in readers:
            reader.finish()
    campaign.count(f"saves beside {options.readers} readers, {path}", options.saves)
    loads = []
    for answer in answers:
        require(answer["finding"] is None, f"beside a writer ({path}): {answer['finding']}")
        campaign.count_all({f"readers: {name}": number for name, number in answer["counts"].items()})
        loads.append(sum(number for name, number in answer["counts"].items() if name.startswith("load")))
    campaign.count("readers: loads of the one that loaded least", min(loads))
    temporary = temporary_files(directory)
    require(not temporary, f"the writer left {temporary}")


def _write() -> None:
    options = parse_arguments(role=str, directory=Path, board=Path, seed=str, saves=int, path=str)
    if options.path == "buffered":
        direct_io.FLAG = 0
    writer = Writer(options.directory, Board(options.board), random.Random(options.seed))
    for _ in range(options.saves):
        writer.save()
    writer.finish()
    print("saved", flush=True)


def _read() -> None:
    options = parse_arguments(role=str, directory=Path, board=Path, seed=str)
    warnings.simplefilter("error")
    board = Board(options.board)
    reader = Reader(options.directory, board, random.Random(options.seed))
    finding = None
    try:
        while not board.is_stopped:
            reader.read()
        reader.finish()
    except Exception:
        finding = traceback.format_exc()
    print(json.dumps({"counts": reader.counts, "finding": finding}), flush=True)


if __name__ == "__main__":
    _write() if sys.argv[1] == "write" else _read()
