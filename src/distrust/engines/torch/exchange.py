"""Sums the gradients of a step whose micro-batches several ranks compute, on torch.distributed.

Exact: no collective adds. Each rank receives its slice of all gradients, adds them in the order of the
micro-batches, and sends the sum to all. So the bits are those of one process, whatever the algorithm, the
network and the number of ranks. Gradients travel while the next micro-batch is computed.

Fast: each rank adds its own, and one all-reduce adds those, in the order of the library.

gloo exchanges through the memory of the host, also the gradients of a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distrust.engines.micro_batches import owner
from distrust.engines.torch.ranks import TorchRanks
from distrust.errors import ConfigError
from distrust.option_values import Reduction
from distrust.ranks import Ranks

#: Of a bucket, whose numbers travel in one call: large enough for the network, small for its buffers.
BUCKET_BYTES = 64 * 2**20
#: Rounds of micro-batches, one a rank, that travel at a time. Each takes twice the memory of the gradients.
MOST_UNDER_WAY = 2
#: By its name from torch 2.13 on, which warns of the other.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Round(NamedTuple):
    """A micro-batch of each rank, whose gradients are under way."""

    owners: list[int]  # the rank of each micro-batch, in their order
    sent: Tensor  # its memory stays until it has arrived
    received: Sequence[Tensor]  # for each bucket the slices from all ranks
    works: list[Any]


class Exchange:
    """The gradients of all ranks.

    Args:
        parameters: trained, on one device, and the same on all ranks.
        ranks: those of torch's default process group.
        reduction: of the run's config.
        clear: clears the gradients of this rank.
    """

    def __init__(
        self, parameters: Sequence[Tensor], ranks: Ranks, reduction: Reduction, *, clear: Callable[[], None]
    ) -> None:
        if not isinstance(ranks, TorchRanks):
            raise ConfigError("--engine torch: start its ranks with distrust train --nproc or torchrun")
        self._parameters, self._clear, self._collective = parameters, clear, ranks.collective
        self._index, self._count = ranks.index, ranks.count
        self._sum = self._sum_exact if reduction == "exact" else self._sum_fast
        self._device = parameters[0].device
        self._exchange_device = torch.device("cpu") if dist.get_backend() == "gloo" else self._device
        # Each gradient, whether it is there, and so many numbers that all ranks have equal slices.
        sizes = [parameter.numel() for parameter in parameters]
        self._sizes = [*sizes, len(sizes), -(sum(sizes) + len(sizes)) % ranks.count]

    def accumulate(self, compute: Callable[[int], object], micro_batches: int) -> None:
        """Set the gradients to those of all micro-batches; ``compute`` adds that of one, on its owner."""
        owners = [owner(number, count=micro_batches, ranks=self._count) for number in range(micro_batches)]
        *parts, flags, _ = torch.split(self._sum(compute, owners).to(self._device), self._sizes)
        for parameter, part, flag in zip(self._parameters, parts, flags.tolist(), strict=True):
            # In memory of its own and in the parameter's layout: the last bits of a norm depend on both.
            empty = torch.empty_like(parameter)
            parameter.grad = empty.copy_(part.view_as(parameter)) if flag > 0 else None  # no rank had one

    def _sum_exact(self, compute: Callable[[int], object], owners: list[int]) -> Tensor:
        under_way: deque[_Round] = deque()
        sums: list[Tensor] = []  # this rank's slice of each bucket
        for begin in range(0, len(owners), self._count):
            of_round = owners[begin : begin + self._count]
            self._clear()
            if self._index in of_round:
                compute(begin + of_round.index(self._index))
            if len(under_way) == MOST_UNDER_WAY:
                self._add(under_way.popleft(), sums)
            sent = self._flatten()
            received = self._buckets(torch.empty_like(sent))
            works = self._start(dist.all_to_all_single, received, self._buckets(sent))
            under_way.append(_Round(of_round, sent, received, works))
        for each in under_way:
            self._add(each, sums)
        # The sums take the place of what was sent last, which has arrived.
        self._finish(self._start(_all_gather, self._buckets(sent), sums))
        return sent

    def _add(self, arriving: _Round, sums: list[Tensor]) -> None:
        for number, (bucket, work) in enumerate(zip(arriving.received, arriving.works, strict=True)):
            self._finish([work])
            slices = bucket.view(self._count, -1)
            for rank in arriving.owners:
                if number == len(sums):  # the first of the step
                    sums.append(slices[rank].clone())
                else:
                    sums[number] += slices[rank]

    def _sum_fast(self, compute: Callable[[int], object], owners: list[int]) -> Tensor:
        self._clear()
        for number, rank in enumerate(owners):
            if rank == self._index:
                compute(number)
        flat = self._flatten()
        self._finish(self._start(dist.all_reduce, self._buckets(flat)))
        return flat

    def _flatten(self) -> Tensor:
        """A copy of this rank's gradients, and what follows them, where it travels: float32[n]."""
        one = torch.ones(1, device=self._device)
        missing = torch.full((1,), -0.0, device=self._device)  # -0.0 + x is x, bit for bit; 0.0 + -0.0 is not
        gradients, (*sizes, _, padding) = [parameter.grad for parameter in self._parameters], self._sizes
        flags = [missing if gradient is None else one for gradient in gradients]
        parts = [
            missing.expand(size) if gradient is None else gradient.reshape(-1)
            for gradient, size in zip(gradients, sizes, strict=True)
        ]
        return torch.cat([*parts, *flags, missing.expand(padding)]).to(self._exchange_device)

    def _buckets(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views; each has equal slices for the ranks."""
        return torch.split(flat, BUCKET_BYTES // flat.element_size() // self._count * self._count)

    def _start(self, collective: Callable[..., Any], *tensors: Sequence[Tensor]) -> list[Any]:
        """Begin a collective on each bucket."""
        with self._collective():
            return [collective(*of_bucket, async_op=True) for of_bucket in zip(*tensors, strict=True)]

    def _finish(self, works: Sequence[Any]) -> None:
        with self._collective():
            for work in works:
                work.wait()
