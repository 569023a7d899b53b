"""A device on the CPU that does everything late: when somebody waits for it, not when it is queued."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from distrust.checkpoint.arrays import copy_streams


class LateStream(copy_streams.CopyStream):
    """In :meth:`wait`, runs the kernels that it follows, and then its copies, if the gate is open."""

    kernels: list[Callable[[], None]]  # queued by the program, in its own stream
    executed: int  # how many of them have run
    locked: dict[int, int]  # page-locked memory: address -> bytes
    free: int  # bytes of the device
    gate: threading.Event

    @classmethod
    def restart(cls) -> None:
        """An idle device."""
        cls.kernels, cls.executed, cls.locked, cls.free = [], 0, {}, 1 << 40
        cls.gate = threading.Event()
        cls.gate.set()

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._followed = 0
        self._copies: list[tuple[list[Any], list[Any]]] = []

    def page_lock(self, address: int, nbytes: int) -> Callable[[], None]:
        locked = self.locked
        assert address not in locked
        locked[address] = nbytes
        return lambda: locked.pop(address)

    def free_bytes(self) -> int:
        return self.free

    def follow(self) -> None:
        self._followed = len(self.kernels)

    def copy(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        assert all(map(self.is_locked, targets)) or all(map(self.is_locked, sources))
        self._copies.append((list(targets), list(sources)))

    @torch.no_grad()
    def wait(self) -> None:
        self.run_kernels(self._followed)
        if self._copies:
            assert self.gate.wait(60)
        while self._copies:
            super().copy(*self._copies.pop(0))

    def gather(self, runs: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]] | None:
        copies: list[Any] = []

        @torch.no_grad()
        def copy_late() -> None:
            by_dtype = (itertools.groupby(run, key=lambda flat: flat.dtype) for run in runs)
            groups = [list(group) for run in by_dtype for _, group in run]
            for copy, group in zip(copies, groups, strict=True):
                torch.cat(group, out=copy)

        self.kernels.append(copy_late)
        gathered = super().gather(runs)
        if gathered is None:
            self.kernels.pop()
        copies += [copy for run in gathered or () for copy in run]
        for copy in copies:
            copy.zero_()
        return gathered

    @classmethod
    def run_kernels(cls, count: int) -> None:
        """Let the device run the first ``count``."""
        while cls.executed < count:
            cls.executed += 1
            cls.kernels[cls.executed - 1]()

    def is_locked(self, tensor: torch.Tensor) -> bool:
        """Whether all of it is in one piece of page-locked memory."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        locked = [*self.locked.items()]
        return begin == end or any(first <= begin and end <= first + nbytes for first, nbytes in locked)
