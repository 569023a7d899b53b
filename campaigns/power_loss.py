"""Power loss: on every disk that a cut may leave, nothing is lost that was reported durable.

    python -m campaigns.power_loss --seed 1 --seconds 600
    python -m campaigns.power_loss --leave-out sync         # what a fault of the protocol looks like
    python -m campaigns.power_loss --seed 1 --case 7        # one sequence once more

A case is a random sequence of what a manager is asked to do: new steps and older ones, the same step again,
finals, in the foreground and behind, clean-ups, a process that is killed between two system calls and started
again. Its system calls are recorded (``recording.py``). For every prefix of the record, disks are built that
POSIX permits after a power cut (``power_cut.py``), and on each of them:

- every file under the name of a checkpoint is whole, and one that was saved under that name;
- what was reported durable is there, in its last version or one that was being saved over it, unless the
  rules let it go; which they do is worked out here by other means than the product's;
- ``load_latest`` gives the newest of them;
- the next save works, and no temporary file is left.

The next sequence of a case begins on one of these disks. Half of the cases use direct I/O, where the file
system takes it. Blocks are a page long here, so that a small file has several.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from campaigns import campaign
from campaigns.campaign import Campaign, CounterExample
from campaigns.power_cut import FATES, PAGE_BYTES, Fate, Image, World
from campaigns.recording import Killed, Operation, RecordingDisk, Rename, Sync, SyncDirectory, Unlink
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io, storage, stream_writer
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import CheckpointNotFound, DistrustError, SaveFailed

INNER = Path("run", "checkpoints")
#: What can be left out of the protocol, to see that it is missed.
FAULTS: dict[str, Callable[[Operation], bool]] = {
    "sync": lambda done: isinstance(done, Sync),
    "sync_directory": lambda done: isinstance(done, SyncDirectory) and done.path.name == INNER.name,
    "sync_parent": lambda done: isinstance(done, SyncDirectory) and done.path.name != INNER.name,
}
SEQUENCES_A_CASE = 3
#: Of the names and of the contents, for each prefix; all of them together would be mostly the same disks.
DRAWN_FATES = 8


class Version(NamedTuple):
    """A checkpoint that was saved, or was to be.

    Attributes:
        number: what its arrays are full of.
        step: its step.
        final: whether it is a final one.
        loss: its metric; None if it has none.
    """

    number: int
    step: int
    final: bool
    loss: float | None

    @property
    def name(self) -> str:
        """Of its file."""
        return f"checkpoint-{self.step}{'-final' if self.final else ''}.safetensors"

    def checkpoint(self) -> Checkpoint:
        """To be saved: of one page and up to four."""
        items = (1 + self.number % 4) * (PAGE_BYTES // 8) - self.number % 5
        return Checkpoint(
            step=self.step,
            model={"w": np.full(items, self.number)},
            optimizer={"state": {0: {"m": np.full(self.number % 7, self.number, np.float32)}}},
            metadata={"version": self.number},
            metrics={} if self.loss is None else {"eval_loss": self.loss},
        )


class Rules(NamedTuple):
    """What is to be kept."""

    keep_last: int
    keep_best: int

    def kept(self, versions: Sequence[Version]) -> set[str]:
        """The names that may not go while all of these are there; by other means than the product's."""
        by_step: dict[int, Version] = {}
        for version in versions:
            if version.final or version.step not in by_step:
                by_step[version.step] = version
        newest = sorted(by_step)[-self.keep_last :]
        best = sorted((v.loss, v.step) for v in by_step.values() if v.loss is not None)[: self.keep_best]
        steps = {*newest, *(step for _, step in best)}
        return {v.name for v in by_step.values() if v.final or v.step in steps}


class Began(NamedTuple):
    """A save was asked for."""

    version: Version


class Reported(NamedTuple):
    """The save that was asked for last was reported durable."""


class Ruled(NamedTuple):
    """From now on these rules say what may go."""

    rules: Rules


Event = Operation | Began | Reported | Ruled


class Invariants:
    """What is promised at an instant, worked out from the events until then.

    Args:
        world: the disk, before the first event.
        directory: of the checkpoints.
        there: what stands in it, durable.

    Attributes:
        due: by name: what has to be there after a cut, or a version that was being saved over it.
        possible: by name: the numbers of the versions that may be there.
    """

    def __init__(self, world: World, directory: Path, there: Sequence[Version]) -> None:
        self.world = world
        self.due = {version.name: version for version in there}
        self.possible = {version.name: {version.number} for version in there}
        self._directory = directory
        self._visible = dict(self.due)  # as the running system sees it
        self._coming: Version | None = None
        self._rules: Rules | None = None

    def apply(self, event: Event) -> None:
        """Take an event into account.

        Raises:
            CounterExample: if it removes what no rule lets go.
        """
        match event:
            case Began(version):
                self._coming = version
                self.possible.setdefault(version.name, set()).add(version.number)
                return
            case Reported() if self._coming is not None:
                self.due[self._coming.name] = self._coming
                self.possible[self._coming.name] = {self._coming.number}
                return
            case Ruled(rules):
                self._rules = rules
                return
            case Unlink(path) if path.name in self._visible:
                self._let_go(path.name)
            case Rename(_, target) if self._coming is not None:
                self._visible[target.name] = self._coming
        self.world.apply(event)  # type: ignore[arg-type]  # the others have returned

    def _let_go(self, name: str) -> None:
        """Whether what is certain to stand after a cut, and this, allow it to go."""
        certain = [
            version
            for other, version in self._visible.items()
            if other == name or self.world.is_certain(self._directory / other)
        ]
        if self._rules is None or name in self._rules.kept(certain):
            raise CounterExample(f"{name} was removed, which {self._rules} keep: {certain} are certain")
        del self._visible[name]
        self.due.pop(name, None)


class Program:
    """A random sequence of what a manager is asked to do, on a disk that keeps a record.

    Args:
        root: what everything happens in.
        chance: what is asked for.
        number: of the last version so far.
        leave_out: operations that the record is not told of.

    Attributes:
        events: what happened.
        number: of the last version.
    """

    def __init__(
        self, root: Path, chance: Random, number: int, leave_out: Callable[[Operation], bool]
    ) -> None:
        self.events: list[Event] = []
        self.number = number
        self._directory = root / INNER
        self._chance = chance
        self._disk = RecordingDisk(lambda done: None if leave_out(done) else self.events.append(done))
        self._steps: list[int] = []
        self._manager: CheckpointManager

    def run(self) -> None:
        """Everything, from the first opening to the last save."""
        self._start()
        for _ in range(self._chance.randint(3, 7)):
            todo = [self._save, self._clean_up, self._restart, self._die]
            self._do(self._chance.choices(todo, weights=[10, 1, 1, 2])[0])
        self._manager.close()

    @property
    def direct_writes(self) -> int:
        """How many blocks went past the page cache."""
        return self._disk.direct_writes

    def _do(self, todo: Callable[[], None]) -> None:
        todo()

    def _start(self) -> None:
        self._rules = Rules(self._chance.randint(1, 3), self._chance.randint(0, 1))
        self.events.append(Ruled(self._rules))
        self._manager = CheckpointManager(self._directory, disk=self._disk, **self._rules._asdict())
        if self._chance.random() < 0.7:
            with contextlib.suppress(CheckpointNotFound):
                self._manager.load_latest()
        self._steps = self._manager.list_checkpoints()

    def _restart(self) -> None:
        self._manager.close()
        self._start()

    def _save(self) -> None:
        version = self._next_version()
        self.events.append(Began(version))
        if self._chance.random() < 0.5:
            self._manager.save(version.checkpoint(), final=version.final)
        else:
            self._manager.save_async(
                version.checkpoint(), final=version.final, overlap=self._chance.random() < 0.5
            ).wait()
        self.events.append(Reported())

    def _clean_up(self) -> None:
        strict = self._rules._replace(keep_last=1)
        self.events.append(Ruled(strict))
        self._manager.cleanup(keep_last=1)
        self.events.append(Ruled(self._rules))

    def _die(self) -> None:
        """Killed between two calls of a save or a clean-up, and started again."""
        self._disk.dies_after = self._disk.calls + self._chance.randint(0, 14)
        try:
            with contextlib.suppress(Killed):
                self._chance.choices([self._save, self._clean_up], weights=[4, 1])[0]()
                self._save()
        finally:
            self._disk.dies_after = None
            self._restart()

    def _next_version(self) -> Version:
        self.number += 1
        last = max(self._steps, default=0)
        step = self._chance.choices([last + 1, self._chance.randint(0, last), last], weights=[6, 1, 1])[0]
        self._steps.append(step)
        return Version(
            self.number,
            step,
            final=self._chance.random() < 0.15,
            loss=self._chance.choice([None, round(self._chance.random(), 3)]),
        )


class QuickDisk(Disk):
    """For disks that are looked at and thrown away: nothing has to be durable there."""

    def sync(self, descriptor: int) -> None:
        """Not here."""

    def sync_directory(self, path: Path) -> None:
        """Not here."""


def look(root: Path, promises: Invariants, versions: dict[int, Version]) -> list[Version]:
    """Start again on a disk that a cut has left; returns what stands there.

    Raises:
        CounterExample: if a promise was not kept.
    """
    manager = CheckpointManager(root / INNER, keep_last=2, keep_best=0, disk=QuickDisk())
    there = _what_stands(manager, promises, versions)
    names = {version.name for version in there}
    missing = sorted(promises.due.keys() - names)
    if missing:
        raise CounterExample(f"{missing[0]} was reported durable, and is gone; there are {sorted(names)}")
    _require_latest(manager, max(there, key=_age) if there else None)
    _require_next_save(manager, there)
    return there


def _what_stands(
    manager: CheckpointManager, promises: Invariants, versions: dict[int, Version]
) -> list[Version]:
    there = []
    found = manager.scan()
    for damaged in found.damaged:
        raise CounterExample(str(damaged.error))
    for file in found.files:
        number = _content(manager, file.path)
        if number not in promises.possible.get(file.path.name, ()):
            raise CounterExample(f"{file.path.name} holds version {number}, and was not saved like that")
        there.append(versions[number])
    return there


def _content(manager: CheckpointManager, path: Path) -> int:
    """The number of the version in a file, all of which is read."""
    try:
        loaded = manager.load(path)
    except DistrustError as error:
        raise CounterExample(str(error)) from error
    number = loaded.metadata["version"]
    if not (loaded.model["w"] == number).all():
        raise CounterExample(f"{path.name} holds another content than was saved")
    return int(number)


def _age(version: Version) -> tuple[int, bool]:
    return version.step, version.final


def _require_latest(manager: CheckpointManager, newest: Version | None) -> None:
    try:
        latest = manager.load_latest().metadata["version"]
    except CheckpointNotFound:
        latest = None
    wanted = newest.number if newest else None
    if latest != wanted:
        raise CounterExample(f"load_latest gave version {latest}, and the newest there is {wanted}")


def _require_next_save(manager: CheckpointManager, there: list[Version]) -> None:
    """It works, cleans up after the dead, and keeps what it has to keep."""
    step = max((version.step for version in there), default=0) + 1
    coming = Version(0, step, final=False, loss=None)
    try:
        with manager:
            manager.save(coming.checkpoint())
            _require_latest(manager, coming)
    except SaveFailed as error:
        raise CounterExample(f"the next save failed: {error}") from error
    names = {path.name for path in manager.directory.iterdir()}
    wanted = {version.name for version in there if version.final} | {coming.name, LOCK_NAME}
    if not wanted <= names or any(name.endswith(".tmp") for name in names):
        raise CounterExample(f"after the next save there are {sorted(names)}, and should be {sorted(wanted)}")


class Search:
    """The disks of one case: built, looked at, and counted.

    Args:
        run: of the campaign.
        root: the disk that the programs run on; those that cuts leave are built beside it.
        seen: by the digest of a disk that was built before and of what was promised of it: what stands there.
        disks: digests of the disks alone.
        program: what runs on a disk.
    """

    def __init__(
        self,
        run: Campaign,
        root: Path,
        seen: dict[bytes, list[Version]],
        disks: set[bytes],
        program: type[Program] = Program,
    ) -> None:
        self._run = run
        self._program = program
        self._root = root
        self._seen = seen
        self._disks = disks
        self._versions = {0: Version(0, 0, final=False, loss=None)}

    def case(self, chance: Random, leave_out: Callable[[Operation], bool]) -> None:
        """Some sequences, each on a disk that a cut in the one before has left."""
        image: Image = {}
        there: list[Version] = []
        for _ in range(SEQUENCES_A_CASE):
            build(self._root, self._root, image)
            program = self._program(self._root, chance, max(self._versions), leave_out)
            program.run()
            self._run.count("sequences")
            self._run.count("blocks written past the page cache", program.direct_writes)
            image, there = self._cut_everywhere(program.events, image, there, chance)

    def _cut_everywhere(
        self, events: list[Event], image: Image, there: list[Version], chance: Random
    ) -> tuple[Image, list[Version]]:
        """Look at disks after each event; returns one of them, and what stands there."""
        for event in events:
            if isinstance(event, Began):
                self._versions[event.version.number] = event.version
        promises = Invariants(World(self._root, image), self._root / INNER, there)
        stops_at = chance.randrange(len(events))
        left: tuple[Image, list[Version]] = image, there
        for number, event in enumerate(events):
            promises.apply(event)
            self._run.count("instants of a cut")
            for names, contents in _fates(promises.world, chance):
                after = promises.world.after_cut(names, contents, chance)
                stands = self._look_once(after, promises, f"{names}/{contents} after {describe_event(event)}")
                if number == stops_at:
                    left = after, stands
        self._require_true_model(promises.world)
        return left

    def _require_true_model(self, world: World) -> None:
        """Without a cut, the model has what the real disk has.

        But for the note in the lock, and temporary files, of which a sync may have failed.
        """
        for path, content in world.after_cut("kept", "kept", Random(0)).items():
            if path.name == LOCK_NAME or path.suffix == ".tmp":
                continue
            if not path.is_dir() if content is None else path.read_bytes() != content:
                raise CounterExample(f"the model of {path.name} is not what the real disk holds")

    def _look_once(self, image: Image, promises: Invariants, what: str) -> list[Version]:
        disk = hashlib.blake2b(digest_size=16)
        for path, content in image.items():
            disk.update(f"{path}:{None if content is None else len(content)}\n".encode())
            disk.update(content or b"")
        key = disk.copy()
        key.update(repr(sorted(promises.due.items())).encode())
        if key.digest() in self._seen:
            return self._seen[key.digest()]
        self._disks.add(disk.digest())
        self._run.counts["distinct disks"] = len(self._disks)
        self._run.count("disks looked at")
        target = self._root.with_name("after")
        build(target, self._root, image)
        try:
            self._seen[key.digest()] = look(target, promises, self._versions)
        except CounterExample as error:
            raise CounterExample(f"{error} ({what})") from None
        return self._seen[key.digest()]


def _fates(world: World, chance: Random) -> Iterator[tuple[Fate, Fate]]:
    yield "kept", "kept"
    if world.something_pending:
        yield from (("lost", "lost"), ("lost", "kept"), ("kept", "lost"))
        for _ in range(DRAWN_FATES):
            yield chance.choice(FATES), chance.choice(FATES)


def describe_event(event: Event) -> str:
    """An event in a few words."""
    paths = [part.name for part in event if isinstance(part, Path)]
    return " ".join([type(event).__name__, *paths])


def build(target: Path, root: Path, image: Image) -> None:
    """Make a folder that holds what ``image`` says of ``root``."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for path, content in image.items():
        place = target / path.relative_to(root)
        if content is None:
            place.mkdir()
        else:
            place.write_bytes(content)


@contextlib.contextmanager
def small_blocks(*, buffered: bool) -> Iterator[None]:
    """Blocks of a page, written one after the other, so that a case is the same each time."""
    before = stream_writer.BLOCK_BYTES, storage.WRITES_IN_FLIGHT, direct_io.FLAG
    stream_writer.BLOCK_BYTES, storage.WRITES_IN_FLIGHT = PAGE_BYTES, 1
    direct_io.FLAG = 0 if buffered else direct_io.FLAG
    try:
        yield
    finally:
        stream_writer.BLOCK_BYTES, storage.WRITES_IN_FLIGHT, direct_io.FLAG = before


def search(
    run: Campaign,
    directory: Path,
    leave_out: Callable[[Operation], bool],
    program: type[Program] = Program,
) -> None:
    """All cases of a campaign, in ``directory``."""
    seen: dict[bytes, list[Version]] = {}
    disks: set[bytes] = set()
    for case in run.cases():
        buffered = case.number % 2 == 1
        run.count("cases, buffered" if buffered else "cases with direct I/O")
        with small_blocks(buffered=buffered):
            Search(run, directory / "disk", seen, disks, program).case(case.chance, leave_out)


def memory_folder() -> str | None:
    """Where nothing is slow: no file of a campaign has to outlive it."""
    shared = Path("/dev/shm")
    return str(shared) if os.access(shared, os.W_OK) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    made = campaign.parser(__doc__)
    made.add_argument(
        "--leave-out", choices=FAULTS, help="leave a call out of the protocol: it must be missed"
    )

    def body(run: Campaign) -> None:
        options: Namespace = run.options
        leave_out = FAULTS[options.leave_out] if options.leave_out else lambda done: False
        with tempfile.TemporaryDirectory(prefix="distrust-", dir=memory_folder()) as directory:
            search(run, Path(directory), leave_out)

    return campaign.run("power_loss", made, body, cases=20, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
