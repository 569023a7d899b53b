"""The ranks of a checkpoint that all write together, on torch.distributed; see ``shared_writer.Peers``."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distrust.checkpoint.arrays import rows_of
from distrust.engines.torch.ranks import TorchRanks
from distrust.ranks import Array, gather_json


class TorchPeers:
    """A group of gloo of its own: a save communicates beside what training does."""

    def __init__(self, ranks: TorchRanks) -> None:
        self.index, self.count, self.local_count = ranks.index, ranks.count, ranks.local_count
        self._ranks, self._group = ranks, ranks.save_group

    def tell(self, value: Any) -> list[Any]:
        """The JSON values of all ranks."""
        return gather_json(cast(Any, self), value)

    def gather(self, array: Array, *, patient: bool = False) -> Array:  # noqa: ARG002
        """See :class:`~distrust.ranks.Ranks`."""
        return self._ranks.gather(array, group=self._group)

    def exchange(
        self, sent: mmap.mmap, sent_sizes: Sequence[int], received: mmap.mmap, sizes: Sequence[int]
    ) -> None:
        """Send a part of ``sent`` to each rank, and receive one from each."""
        source, target = (torch.frombuffer(memory, dtype=torch.uint8) for memory in (sent, received))
        self._all_to_all(target[: sum(sizes)], source[: sum(sent_sizes)], sizes, sent_sizes)

    def scatter(self, array: Tensor) -> Tensor:
        """This rank's rows of the leader's array; the contents of the others' are ignored."""
        rows = [len(rows_of(rank, rows=len(array), count=self.count)) for rank in range(self.count)]
        part = torch.empty((rows[self.index], *array.shape[1:]), dtype=array.dtype)
        nothing, leads = [0] * self.count, self.index == 0
        source = array.contiguous() if leads else array[:0]
        self._all_to_all(part, source, [len(part), *nothing[1:]], rows if leads else nothing)
        return part

    def _all_to_all(
        self, target: Tensor, source: Tensor, sizes: Sequence[int], source_sizes: Sequence[int]
    ) -> None:
        with self._ranks.collective():
            dist.all_to_all_single(target, source, [*sizes], [*source_sizes], group=self._group)
