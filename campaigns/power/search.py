"""The disks that power cuts leave of a program: built at each instant, checked once each, counted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from unittest import mock

from campaigns.campaign import Campaign, CounterExample, never, require
from campaigns.oracle import Saved
from campaigns.power.cut import FATES, PAGE_BYTES, Fate, Image, World, build
from campaigns.power.program import INNER, Began, Event, Invariants, Program, Version, describe_event
from campaigns.power.recording import Operation
from distrust import CheckpointManager
from distrust.checkpoint import direct_io, storage, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import CheckpointNotFound, DistrustError, SaveFailed

SEQUENCES_PER_CASE = 3  # each starts where a cut left the one before
#: Random fates at each instant; all combinations would mostly be the same disks.
RANDOM_FATES = 8


class UnsyncedDisk(Disk):
    """For disks that are checked and thrown away: nothing has to be durable there."""

    def sync(self, descriptor: int) -> None: ...

    def sync_directory(self, path: Path) -> None: ...


def check_disk(root: Path, invariants: Invariants, versions: dict[int, Version]) -> list[Version]:
    """Restart on a disk that a cut has left, and check it; returns the checkpoints that exist there."""
    manager = CheckpointManager(root / INNER, keep_last=2, keep_best=0, disk=UnsyncedDisk())
    existing = _existing(manager, invariants, versions)
    names = {version.name for version in existing}
    missing = sorted(invariants.required.keys() - names)
    require(not missing, f"{missing} reported durable, and gone; existing: {sorted(names)}")
    _require_latest(manager, max(existing, key=lambda version: version.saved[:2]) if existing else None)
    _require_next_save(manager, existing)
    return existing


def _existing(
    manager: CheckpointManager, invariants: Invariants, versions: dict[int, Version]
) -> list[Version]:
    existing = []
    scan = manager.scan()
    require(not scan.damaged, f"{[str(damaged.error) for damaged in scan.damaged]}")
    for file in scan.files:
        with never(DistrustError):
            loaded = manager.load(file.path)
        number, name = int(loaded.metadata["version"]), file.path.name
        require((loaded.model["w"] == number).all(), f"{name} holds another content than was saved")
        possible = invariants.possible.get(name, ())
        require(number in possible, f"{name} holds version {number}, and was not saved like that")
        existing.append(versions[number])
    return existing


def _require_latest(manager: CheckpointManager, newest: Version | None) -> None:
    try:
        latest = manager.load_latest().metadata["version"]
    except CheckpointNotFound:
        latest = None
    expected = newest.number if newest else None
    require(latest == expected, f"load_latest gave version {latest}, and the newest is {expected}")


def _require_next_save(manager: CheckpointManager, existing: list[Version]) -> None:
    """The next save works, removes temporary files, and keeps what it must keep."""
    step = max((version.saved.step for version in existing), default=0) + 1
    following = Version(0, Saved(step))
    with never(SaveFailed, "the next save failed: "), manager:
        manager.save(following.checkpoint())
        _require_latest(manager, following)
    names = {path.name for path in manager.directory.iterdir()}
    expected = {version.name for version in existing if version.saved.final} | {following.name, LOCK_NAME}
    clean = expected <= names and not any(name.endswith(".tmp") for name in names)
    require(clean, f"after the next save there are {sorted(names)}, expected {sorted(expected)}")


class Search:
    def __init__(
        self,
        campaign: Campaign,
        root: Path,
        checked: dict[bytes, list[Version]],
        disks: set[bytes],
        program: type[Program] = Program,
    ) -> None:
        self._campaign = campaign  # for its counts
        self._program = program  # what runs on a disk
        self._root = root  # the disk that the programs run on; those that cuts leave are built beside it
        self._checked = checked  # by digest of a disk and its invariants: the checkpoints on it
        self._disks = disks  # digests of the disks alone
        self._versions = {0: Version(0, Saved(0))}

    def run_case(self, rng: Random, leave_out: Callable[[Operation], bool]) -> None:
        """Run some sequences, each on a disk that a cut in the one before has left."""
        image: Image = {}
        existing: list[Version] = []
        for _ in range(SEQUENCES_PER_CASE):
            build(self._root, self._root, image)
            program = self._program(self._root, rng, max(self._versions), leave_out)
            program.run()
            self._campaign.count("sequences")
            self._campaign.count("blocks written past the page cache", program.disk.direct_writes)
            image, existing = self._cut_everywhere(program.events, image, existing, rng)

    def _cut_everywhere(
        self, events: list[Event], image: Image, existing: list[Version], rng: Random
    ) -> tuple[Image, list[Version]]:
        """Check disks after each event; returns one of them, and the checkpoints that exist there."""
        for event in events:
            if isinstance(event, Began):
                self._versions[event.version.number] = event.version
        invariants = Invariants(World(self._root, image), self._root / INNER, existing)
        chosen = rng.randrange(len(events))
        next_start: tuple[Image, list[Version]] = image, existing
        for number, event in enumerate(events):
            invariants.apply(event)
            self._campaign.count("instants of a cut")
            for names, contents in _fates(invariants.world, rng):
                disk = invariants.world.after_cut(names, contents, rng)
                description = f"{names}/{contents} after {describe_event(event)}"
                survivors = self._check_once(disk, invariants, description)
                if number == chosen:
                    next_start = disk, survivors
        self._require_true_model(invariants.world)
        return next_start

    def _require_true_model(self, world: World) -> None:
        """Without a cut, the model equals the real disk, except the lock's note and temporary files."""
        for path, content in world.after_cut("kept", "kept", Random(0)).items():
            if path.name == LOCK_NAME or path.suffix == ".tmp":  # a sync of it may have failed
                continue
            same = path.is_dir() if content is None else path.read_bytes() == content
            require(same, f"the model of {path.name} differs from the real disk")

    def _check_once(self, image: Image, invariants: Invariants, description: str) -> list[Version]:
        disk = hashlib.blake2b(digest_size=16)
        for path, content in image.items():
            disk.update(f"{path}:{None if content is None else len(content)}\n".encode())
            disk.update(content or b"")
        key = disk.copy()
        key.update(repr(sorted(invariants.required.items())).encode())
        if key.digest() in self._checked:
            return self._checked[key.digest()]
        self._disks.add(disk.digest())
        self._campaign.counts["distinct disks"] = len(self._disks)
        self._campaign.count("disks checked")
        target = self._root.with_name("after")
        build(target, self._root, image)
        try:
            self._checked[key.digest()] = check_disk(target, invariants, self._versions)
        except CounterExample as error:
            raise CounterExample(f"{error} ({description})") from None
        return self._checked[key.digest()]


def _fates(world: World, rng: Random) -> Iterator[tuple[Fate, Fate]]:
    """Pairs of fates, of the names and of the contents."""
    yield "kept", "kept"
    if world.has_pending:
        yield from (("lost", "lost"), ("lost", "kept"), ("kept", "lost"))
        for _ in range(RANDOM_FATES):
            yield rng.choice(FATES), rng.choice(FATES)


@contextlib.contextmanager
def small_blocks(*, buffered: bool) -> Iterator[None]:
    """Blocks of a page, written one after the other, so that a case is the same each time."""
    with (
        mock.patch.object(stream_writer, "BLOCK_BYTES", PAGE_BYTES),
        mock.patch.object(storage, "WRITES_IN_FLIGHT", 1),
        mock.patch.object(direct_io, "FLAG", 0 if buffered else direct_io.FLAG),
    ):
        yield


def search(
    campaign: Campaign,
    leave_out: Callable[[Operation], bool] = lambda operation: False,
    program: type[Program] = Program,
) -> None:
    checked: dict[bytes, list[Version]] = {}
    disks: set[bytes] = set()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="distrust-", dir=memory) as directory:
        for case in campaign.cases():
            buffered = case.number % 2 == 1
            campaign.count("cases, buffered" if buffered else "cases with direct I/O")
            disk_search = Search(campaign, Path(directory) / "disk", checked, disks, program)
            with small_blocks(buffered=buffered):
                disk_search.run_case(case.rng, leave_out)
