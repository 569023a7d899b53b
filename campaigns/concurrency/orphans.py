"""A writer with children: when it is killed while they live, nobody is refused; and their end harms nothing.

Forked by hand, by libraries, by a thread, in the middle of a background save, while the lock is being taken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from campaigns.campaign import Campaign, Case
from campaigns.child_lines import Actor
from campaigns.concurrency import child, content, parent
from distrust import CheckpointManager
from distrust.errors import CheckpointDirectoryLocked

#: A loader takes seconds to import.
HOWS = (*[how for how in parent.HOWS if how != "loader"] * 3, "loader")
END_SECONDS = 30.0


class _Family:
    """A writer, its children, and their directory."""

    def __init__(self, campaign: Campaign, case: Case, folder: Path, how: str, writer: Actor) -> None:
        self._campaign = campaign
        self._chance = case.chance
        self._folder = folder
        self._how = how
        self._writer = writer
        self._directory = folder / "checkpoints"
        self._durable = {0}
        self.pids: list[int] = []

    def begin(self) -> None:
        """Until the children live."""
        while (line := self._writer.answer().split())[0] == "durable":
            self._durable.add(int(line[1]))
        self.pids = [int(pid) for pid in line[1:]]

    def parent_first(self) -> None:
        """The writer is killed; another one takes over, and the children end while it saves."""
        if self._chance.random() < 0.5:
            self._writer.tell("save")
        time.sleep(self._chance.uniform(0, 0.05))
        self._writer.kill()
        self._campaign.require(all(self._lives()), "a child did not outlive its parent")
        began = time.monotonic()
        with CheckpointManager(self._directory, keep_last=None) as manager:
            self._take_over(manager)
            taken = round((time.monotonic() - began) * 1e3)
            slowest = max(self._campaign.counts["orphans: slowest restart, ms"], taken)
            self._campaign.counts["orphans: slowest restart, ms"] = slowest
            content.version_of(manager.load_latest())
            pending = manager.save_async(content.make(5000, 5000, parent.LARGE))
            self.let_go()
            pending.wait()
            if self._chance.random() < 0.3:
                self._require_refused()
        self._check(manager, 5000)
        self._campaign.count(f"orphans: restarted while a child lived ({self._how})")

    def children_first(self, *, saving: bool) -> None:
        """The children end, perhaps in the middle of the writer's save."""
        (self._folder / child.LET_GO).touch()
        self._writer.tell("join")
        self.let_go()
        self._require_refused()
        if saving:
            self._writer.tell("wait")
            while (line := self._writer.answer()) != "durable 2":
                self._durable.add(int(line.split()[1]))
        self._writer.end()
        self._check(CheckpointManager(self._directory), 2 if saving else 1)
        self._campaign.count(f"orphans: outlived by the writer ({self._how})")

    def let_go(self) -> None:
        """Have the children end, and wait for it."""
        (self._folder / child.LET_GO).touch()
        deadline = time.monotonic() + END_SECONDS
        while any(self._lives()):
            self._campaign.require(time.monotonic() < deadline, "a child does not end")
            time.sleep(0.002)

    def _lives(self) -> list[bool]:
        return [child.lives(self._folder, str(number)) for number in range(len(self.pids))]

    def _take_over(self, manager: CheckpointManager) -> None:
        try:
            manager.acquire()
        except CheckpointDirectoryLocked as error:
            alive = sum(self._lives())
            self._campaign.require(
                False, f"the writer is dead, {alive} of its children live ({self._how}): {error}"
            )

    def _require_refused(self) -> None:
        try:
            CheckpointManager(self._directory).acquire()
        except CheckpointDirectoryLocked:
            return
        self._campaign.require(False, f"a child's end let go of the lock of a living writer ({self._how})")

    def _check(self, manager: CheckpointManager, newest: int) -> None:
        there = manager.list_checkpoints()
        lost = (self._durable - {0} | {newest}) - set(there)
        self._campaign.require(not lost, f"durable and lost: {sorted(lost)}; there are {there}")
        self._campaign.require(999 not in there, "a child wrote")
        for step in there:
            content.version_of(manager.load(step), step=step)
        names = {path.name for path in self._directory.iterdir()}
        expected = {".lock", *(f"checkpoint-{step}.safetensors" for step in there)}
        self._campaign.require(names == expected, f"left in the directory: {sorted(names ^ expected)}")


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """One writer and its children."""
    chance = case.chance
    how = chance.choice(HOWS)
    saving = how not in ("acquiring", "thread") and chance.random() < 0.6
    arguments = [
        *(folder / "checkpoints", how, chance.choice(child.ENDINGS)),
        *(["--saving"] if saving else []),
        *(["--uses"] if chance.random() < 0.5 else []),
        *(["--fault", campaign.options.fault] if campaign.options.fault else []),
    ]
    with Actor("campaigns.concurrency.parent", *arguments) as writer:
        family = _Family(campaign, case, folder, how, writer)
        try:
            family.begin()
            if chance.random() < 0.6:
                family.parent_first()
            else:
                family.children_first(saving=saving)
        finally:
            (folder / child.LET_GO).touch()
            for pid in family.pids:
                with contextlib.suppress(ProcessLookupError, IndexError):
                    if child.lives(folder, str(family.pids.index(pid))):
                        os.kill(pid, signal.SIGKILL)
