"""Several ranks, on machines of their own, write each checkpoint together; one of them may be killed.

Between two words that all ranks tell, nothing orders the calls of one against those of another: they are
recorded in a random order. A sync makes durable what its own rank has written, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from campaigns.power.program import Began, Program, Reported, Version
from campaigns.power.recording import Killed, Operation, RecordingDisk
from campaigns.power.thread_ranks import ThreadPeers, ThreadWorld
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import storage
from distrust.checkpoint.arrays import Shard, rows_of
from distrust.errors import SaveFailed

RANKS = 3


class SharedProgram(Program):
    """A :class:`Program` whose saves are those of several ranks."""

    def __init__(self, root: Path, rng: Random, number: int, leave_out: Callable[[Operation], bool]) -> None:
        super().__init__(root, rng, number, leave_out)
        self._concurrent: list[list[Operation]] = [[] for _ in range(RANKS)]  # calls since the last word
        self._leave_out = leave_out
        self._is_sharing = False
        recorders: list[Callable[[Operation], None]] = [self._recorder(rank) for rank in range(RANKS)]
        self._disks = [RecordingDisk(record, writer=rank) for rank, record in enumerate(recorders)]
        for disk in self._disks:
            disk.numbers = self._disks[0].numbers  # of the files that the leader creates
        self.disk = self._disks[0]

    def run(self) -> None:
        # Each write is complete when it returns, so that a case is the same each time.
        with mock.patch.object(storage, "WRITES_IN_FLIGHT", 0):
            super().run()

    def _recorder(self, rank: int) -> Callable[[Operation], None]:
        def record(operation: Operation) -> None:
            if self._leave_out(operation):
                return
            if self._is_sharing:
                self._concurrent[rank].append(operation)
            else:
                self.events.append(operation)

        return record

    def _interleave(self) -> None:
        """Record the calls since the last word: those of a rank in their order, the ranks in any."""
        ranks = [rank for rank, calls in enumerate(self._concurrent) for _ in calls]
        self._rng.shuffle(ranks)
        self.events += [self._concurrent[rank].pop(0) for rank in ranks]

    def _save(self) -> None:
        version = self._next_version()
        self.events.append(Began(version))
        final, overlap = version.saved.final, self._rng.random() < 0.5

        def save(peers: ThreadPeers) -> None:
            manager = self._manager  # of the leader, which has the lock
            if peers.index:
                manager = CheckpointManager(self._directory, disk=self._disks[peers.index])
            manager.share(peers)
            checkpoint = _share_of(version, peers)
            manager.save_async(checkpoint, final=final, overlap=overlap).wait()

        self._is_sharing = True
        try:
            results = ThreadWorld(RANKS, self._interleave).run(save)
        finally:
            self._interleave()
            self._is_sharing = False
        for result in results:  # first the one that was killed: the others have only lost it
            if isinstance(result, Killed):
                raise result
        for result in results:
            if isinstance(result, SaveFailed) and any(disk.dies_after is not None for disk in self._disks):
                raise Killed
            if isinstance(result, BaseException):
                raise result
        self.events.append(Reported())

    def _die(self) -> None:
        """One rank is killed between two of its calls, and all begin again."""
        self.disk = self._rng.choice(self._disks)
        super()._die()

    def _start(self) -> None:
        self.disk = self._disks[0]  # the leader's
        super()._start()


def _share_of(version: Version, peers: ThreadPeers) -> Checkpoint:
    """What a rank has of the checkpoint of a version."""
    checkpoint = version.checkpoint()
    weights: Any = checkpoint.model["w"]
    rows = rows_of(peers.index, rows=len(weights), count=peers.count)
    model = {"w": Shard(weights[rows.start : rows.stop], weights.shape)}
    return Checkpoint(
        step=checkpoint.step,
        model=model,
        optimizer=checkpoint.optimizer,
        metadata=checkpoint.metadata,
        metrics=checkpoint.metrics,
    )
