"""A writer with children: killed while they live, it does not block the next writer; their end is harmless.

Forked by hand, by libraries, by a thread, in the middle of a background save, while the lock is being taken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from campaigns.campaign import Campaign, Case, require
from campaigns.child import Child, start_child
from campaigns.concurrency import model, parent
from distrust import CheckpointManager

#: A loader takes seconds to import, so it comes less often.
METHODS = (*parent.METHODS * 3, "loader")
END_SECONDS = 30.0  # for the children, after their release


class _Family:
    def __init__(self, campaign: Campaign, case: Case, folder: Path, method: str, writer: Child) -> None:
        self._campaign = campaign
        self._rng = case.rng
        self._folder = folder
        self._method = method
        self._writer = writer
        self._directory = folder / "checkpoints"
        self._durable = {0}
        self.pids: list[int] = []

    def start(self) -> None:
        while (line := self._writer.receive().split())[0] == "durable":
            self._durable.add(int(line[1]))
        self.pids = [int(pid) for pid in line[1:]]

    def kill_parent(self) -> None:
        """The writer is killed; another one takes over, and the children end while it saves."""
        if self._rng.random() < 0.5:
            self._writer.send("save")
        time.sleep(self._rng.uniform(0, 0.05))
        self._writer.kill()
        require(all(self._alive()), "a child did not outlive its parent")
        began, method = time.monotonic(), self._method
        with CheckpointManager(self._directory, keep_last=None) as manager:
            locked = model.is_locked(manager)
            require(not locked, f"the writer is dead, {sum(self._alive())} of its children live ({method})")
            elapsed = round((time.monotonic() - began) * 1e3)
            self._campaign.count_largest("orphans: slowest restart, ms", elapsed)
            model.version_of(manager.load_latest())
            pending = manager.save_async(model.make_checkpoint(5000, 5000, parent.LARGE))
            self.release()
            pending.wait()
            if self._rng.random() < 0.3:
                self._require_locked()
        self._check(manager, 5000)
        self._campaign.count(f"orphans: restarted while a child lived ({method})")

    def end_children(self, *, saving: bool) -> None:
        """The children end, perhaps in the middle of the writer's save."""
        (self._folder / parent.RELEASE).touch()
        self._writer.send("join")
        self.release()
        self._require_locked()
        if saving:
            self._writer.send("wait")
            while (line := self._writer.receive()) != "durable 2":
                self._durable.add(int(line.split()[1]))
        self._writer.finish()
        self._check(CheckpointManager(self._directory), 2 if saving else 1)
        self._campaign.count(f"orphans: outlived by the writer ({self._method})")

    def release(self) -> None:
        (self._folder / parent.RELEASE).touch()
        deadline = time.monotonic() + END_SECONDS
        while any(self._alive()):
            require(time.monotonic() < deadline, "a child does not end")
            time.sleep(0.002)

    def kill_children(self) -> None:
        """Kill those that still live: after a finding, nothing else ends them soon."""
        (self._folder / parent.RELEASE).touch()
        for pid, alive in zip(self.pids, self._alive(), strict=True):
            with contextlib.suppress(ProcessLookupError):
                if alive:
                    os.kill(pid, signal.SIGKILL)

    def _alive(self) -> list[bool]:
        return [parent.is_alive(self._folder, str(number)) for number in range(len(self.pids))]

    def _require_locked(self) -> None:
        locked = model.is_locked(CheckpointManager(self._directory))
        require(locked, f"a child's end released the lock of a living writer ({self._method})")

    def _check(self, manager: CheckpointManager, newest: int) -> None:
        steps = manager.list_checkpoints()
        lost = (self._durable - {0} | {newest}) - set(steps)
        require(not lost, f"durable and lost: {sorted(lost)}; existing: {steps}")
        require(999 not in steps, "a child wrote")
        for step in steps:
            model.version_of(manager.load(step), step=step)
        names = {path.name for path in self._directory.iterdir()}
        expected = {".lock", *(f"checkpoint-{step}.safetensors" for step in steps)}
        require(names == expected, f"left in the directory: {sorted(names ^ expected)}")


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    rng = case.rng
    method = rng.choice(METHODS)
    saving = method not in ("acquiring", "thread") and rng.random() < 0.6
    ending, uses = rng.choice(parent.ENDINGS), int(rng.random() < 0.5)
    arguments = (folder / "checkpoints", method, ending, int(saving), uses)
    with start_child(campaign, "campaigns.concurrency.parent", *arguments) as writer:
        family = _Family(campaign, case, folder, method, writer)
        try:
            family.start()
            if rng.random() < 0.6:
                family.kill_parent()
            else:
                family.end_children(saving=saving)
        finally:
            family.kill_children()
