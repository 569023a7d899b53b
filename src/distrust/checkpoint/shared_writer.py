"""One checkpoint file that the ranks of a run write together, each a part of it.

Each rank has a :class:`Shard` of the divided arrays; rank 0, which leads, has every other array. The data is
cut between tensors into one run for each rank. Every rank takes the same steps:

1. The leader creates the hidden file, reserves its space, and tells its token; the others open it.
2. In rounds, each rank gets a block of its run from the ranks that have its bytes, digests and writes it.
3. Each rank syncs what it wrote, and tells its digests.
4. The leader writes the header, commits the file as any other, and tells that it has.

A rank that fails tells it at the next step, and takes part in the rounds until then. If one fails, is lost or
silent, nothing is committed, and the save has failed on every rank: the checkpoints before stand.
The page in which a run ends is its rank's to write, with the first bytes of the next run. The file has the
bytes of one writer's.
"""

from __future__ import annotations

import bisect
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, Protocol

from distrust.checkpoint import arrays, serialization, stream_writer
from distrust.checkpoint.arrays import rows_of
from distrust.checkpoint.background import PendingSave
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.file_writer import FileWriter, WriteContent, save_errors
from distrust.checkpoint.format import Kind, canonical_json
from distrust.checkpoint.memory import PAGE_BYTES, allocate, round_up
from distrust.checkpoint.serialization import PreparedCheckpoint
from distrust.checkpoint.snapshot import BUDGET, PendingCopy
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.checkpoint.stream_writer import TensorDigests, tensors_in_range, write_header
from distrust.errors import ErrorTranslator, RankLost, SaveFailed, UnsupportedState

#: The blocks that all ranks get in one round: one rank may have to send them all. It needs twice the memory.
ROUND_BYTES = 24 << 20
#: Bytes of the data, and who has them: number of the rank, index of the tensor, begin and end.
_Segment = tuple[int, int, int, int]


class Peers(Protocol):
    """The ranks of a run as a save sees them. If one is lost, or silent too long, methods raise RankLost."""

    index: int  # of this rank, from 0
    count: int  # of the ranks
    local_count: int  # of those on this machine

    def tell(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""

    def exchange(
        self, sent: mmap.mmap, sent_sizes: Sequence[int], received: mmap.mmap, sizes: Sequence[int]
    ) -> None:
        """Send one part of ``sent`` to each rank, and receive one from each; sizes in bytes."""


class _Ended(SaveFailed):
    """Every rank knows that the save has failed, or cannot be told any more."""


class SharedFileWriter(FileWriter):
    """The part of one rank in writing checkpoints. ``files`` commits what the leader writes."""

    def __init__(self, files: FileWriter, peers: Peers) -> None:
        super().__init__(files._state, record_host=files._record_host)
        self._files, self._peers = files, peers
        self._state.snapshot.budget = BUDGET / peers.local_count
        self._state.snapshot.stream = self._stream

    def prepare(self, checkpoint: Checkpoint, kind: Kind) -> PreparedCheckpoint:
        """Lay out a checkpoint of which this rank writes its rows; the leader, all that every rank has."""
        prepared = serialization.flatten(checkpoint, kind, record_host=self._record_host).lay_out()
        named = zip(prepared.layout.names, prepared.flat_arrays, strict=True)
        leads = self._peers.index == 0
        flats = [flat if leads or name in prepared.rows else flat[:0] for name, flat in named]
        return replace(prepared, flat_arrays=flats, zero_copy=set())

    def _copy(self, path: Path, pending_copy: PendingCopy) -> None:
        with self._telling_failure(path):
            super()._copy(path, pending_copy)

    def _give_up(self, path: Path, error: SaveFailed) -> PendingSave:
        failed = {"failed": str(error)}
        return self._state.background.run(path, lambda: _tell(self._peers, path, failed))

    def _stream(self, prepared: PreparedCheckpoint) -> WriteContent:
        return lambda file: _Part(file, prepared, self._peers).write()

    def _write(self, path: Path, size: int, step: int, write_content: WriteContent) -> None:
        with self._telling_failure(path):
            if self._peers.index:
                with (
                    save_errors(path),
                    AtomicCheckpointFile(path, size, self._state.disk, is_part=True) as file,
                ):
                    write_content(file)
            else:
                self._files._write(path, size, step, write_content)
        # Who is lost from here on makes no difference to the leader: the checkpoint is durable.
        with nullcontext() if self._peers.index else suppress(_Ended):
            _tell(self._peers, path, {})

    @contextmanager
    def _telling_failure(self, path: Path) -> Iterator[None]:
        try:
            yield
        except _Ended:
            raise
        except Exception as error:  # the others wait for the next word of this rank
            _tell(self._peers, path, {"failed": str(error)})


class _Part:
    """One rank's part of one file."""

    def __init__(self, file: AtomicCheckpointFile, prepared: PreparedCheckpoint, peers: Peers) -> None:
        self._file, self._peers, self._layout = file, peers, prepared.layout
        self._flats, self._edges, names = prepared.flat_arrays, self._layout.edges, self._layout.names
        rows = [prepared.rows.get(name, 0) for name in names]
        #: For each tensor: where the bytes of each rank begin in the data, and where the last one's end.
        self._bounds = [
            _bounds(*edges, rows=count, ranks=peers.count)
            for edges, count in zip(pairwise(self._edges), rows, strict=True)
        ]
        for name, flat, bounds in zip(names, self._flats, self._bounds, strict=True):
            if flat.nbytes != bounds[peers.index + 1] - bounds[peers.index]:
                raise UnsupportedState(f"{name}: is not the shard of rank {peers.index}", label=name)
        self._identity = canonical_json([self._layout.step, names, self._edges, rows])  # equal on all ranks
        # The index of the first tensor of each rank's run, by the middle of a tensor; and their number.
        middles = [begin + end for begin, end in pairwise(self._edges)]
        goals = (2 * self._edges[-1] * rank // peers.count for rank in range(peers.count))
        self._cuts = [*(bisect.bisect_left(middles, goal) for goal in goals), len(names)]
        block_bytes = min(stream_writer.BLOCK_BYTES, ROUND_BYTES // peers.count)
        self._block_bytes = round_up(block_bytes, PAGE_BYTES)
        self._failure: Exception | None = None  # of the rounds

    def write(self) -> str:
        """Take steps 1 to 3, and write the header on the leader; returns its digest, elsewhere nothing."""
        file, path, sizes = self._file, self._file.path, [self._block_bytes] * 3
        memory = [allocate(size) for size in (self._peers.count * self._block_bytes, *sizes)]
        word: dict[str, Any] = {"identity": self._identity}
        if not file.is_part:
            word |= {"token": file.token, "data_offset": self._layout.data_offset}
        words = _tell(self._peers, path, word)
        if different := [rank for rank, each in enumerate(words) if each["identity"] != words[0]["identity"]]:
            reason = f"rank {different[0]} has other arrays, or is at another step"
            raise _Ended(f"{path}: not saved: {reason}", path=path)
        if file.is_part:
            self._attempt(file.join, words[0]["token"])
        words = _tell(self._peers, path, {"digests": self._write_run(words[0]["data_offset"], memory)})
        if file.is_part:
            return ""
        # THE LEADER GOES ON ONLY FROM HERE: all parts are durable.
        return write_header(file, self._layout, [*chain(*(each["digests"] for each in words))])

    def _write_run(self, data_offset: int, memory: Sequence[mmap.mmap]) -> list[str]:
        """Exchange blocks in rounds, digest and write this rank's run; returns the digests of its tensors."""
        index, (sent, received, *slots) = self._peers.index, memory  # it is written from two, by turns
        first_tensor, last_tensor = self._cuts[index : index + 2]
        # The page in which the run begins is another rank's, and so is what follows its end in its last page.
        run_begin, run_end = round_up(self._edges[first_tensor], PAGE_BYTES), self._edges[last_tensor]
        digests, writes = TensorDigests(self._layout.edges), deque[threading.Event]()

        def write(begin: int, end: int, segments: list[_Segment], slot: mmap.mmap) -> None:
            block, start, position = memoryview(slot), begin - begin % PAGE_BYTES, 0
            for _, _, first, last in sorted(segments):  # the order in which they are received: by rank
                size = last - first
                block[first - start : last - start] = memoryview(received)[position : position + size]
                position += size
            digests.update(block[begin - start :], begin, min(end, run_end))
            first, last = max(begin, run_begin), round_up(end, PAGE_BYTES)
            if first < last:
                writes.append(self._file.write(block[first - start : last - start], data_offset + first))
            while len(writes) > 1:
                writes.popleft().wait()  # the next block but one has the same memory

        runs = [self._pieces(rank) for rank in range(self._peers.count)]
        for number, pieces in enumerate(zip_longest(*runs, fillvalue=(0, 0))):
            segments = [[*self._segments(*piece)] for piece in pieces]  # by each rank
            parts = [[self._take(*each[1:]) for each in row if each[0] == index] for row in segments]
            self._attempt(arrays.fill, sent, 0, [*chain(*parts)])
            sent_sizes, sizes = [sum(flat.nbytes for flat in row) for row in parts], [0] * len(parts)
            for rank, _, first, last in segments[index]:
                sizes[rank] += last - first
            with _lost_errors(self._file.path):
                self._peers.exchange(sent, sent_sizes, received, sizes)
            if segments[index]:
                self._attempt(write, *pieces[index], segments[index], slots[number % 2])
        if self._file.is_part:
            self._attempt(self._file.commit)  # durable, before anyone is told
        if self._failure:
            raise self._failure
        return digests.hex[first_tensor:last_tensor]

    def _attempt(self, work: Callable[..., object], *arguments: Any) -> None:
        """Do a part of the work, unless one has failed: the others need this rank's bytes in any case."""
        if self._failure is None:
            try:
                work(*arguments)
            except Exception as error:
                self._failure = error

    def _pieces(self, rank: int) -> list[tuple[int, int]]:
        """What a rank needs of the data: its run, to the end of the run's last page, in blocks."""
        begin, run_end = (self._edges[cut] for cut in self._cuts[rank : rank + 2])
        if begin == run_end:
            return []
        end, size = min(round_up(run_end, PAGE_BYTES), self._edges[-1]), self._block_bytes
        return [*pairwise([begin, *range((begin // size + 1) * size, end, size), end])]

    def _segments(self, begin: int, end: int) -> Iterator[_Segment]:
        """Which rank has these bytes of the data."""
        for tensor in tensors_in_range(self._edges, begin, end):
            for rank, (first, last) in enumerate(pairwise(self._bounds[tensor])):
                if max(begin, first) < min(end, last):
                    yield rank, tensor, max(begin, first), min(end, last)

    def _take(self, tensor: int, first: int, last: int) -> Any:
        """This rank's array of these bytes of the data."""
        start = self._bounds[tensor][self._peers.index]
        return arrays.byte_range(self._flats[tensor], first - start, last - start)


def _bounds(begin: int, end: int, *, rows: int, ranks: int) -> list[int]:
    """Where each rank's bytes of a tensor begin; without ``rows`` it is not divided, and rank 0 has it."""
    if not rows:
        return [begin, *[end] * ranks]
    starts = (rows_of(rank, rows=rows, count=ranks).start for rank in range(ranks))
    return [*(begin + (end - begin) // rows * start for start in starts), end]


def _tell(peers: Peers, path: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Tell a value, and return those of all ranks; raises _Ended if one has failed."""
    with _lost_errors(path):
        words = peers.tell(value)
    for rank, each in enumerate(words):
        if "failed" in each:
            raise _Ended(f"rank {rank}: {each['failed']}", path=path)
    return words


def _lost_errors(path: Path) -> ErrorTranslator:
    return ErrorTranslator((RankLost,), lambda error: _Ended(f"{path}: not saved: {error}", path=path))
