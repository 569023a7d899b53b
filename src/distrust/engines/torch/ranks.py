"""The :class:`~distrust.ranks.Ranks` of torch.distributed.

The default process group is for gradients and weights: NCCL if each rank of a machine has its own GPU, else
gloo. Groups of gloo are for the rest: one with a time limit, one for work of unknown time, one for the watch.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.distributed

from distrust.config import TrainConfig
from distrust.engines.torch import runtime
from distrust.engines.torch.watch import Watch
from distrust.errors import ConfigError, DistrustError, ErrorTranslator, RankLost
from distrust.ranks import Array

_PATIENCE = timedelta(days=1)
_PART_BYTES = 1 << 26  # of a broadcast: there may be no room for a second copy of an array
_joined: Counter[str] = Counter()  # by port: the store may have the keys of earlier runs of this process
dist: Any = torch.distributed  # which exports few of its names


@dataclass
class TorchRanks:
    """Ranks that meet in a store of torch.distributed when the block begins.

    If the program has initialized the default process group, it is used, and stays.
    """

    store: Any  #: of this run alone
    index: int
    count: int
    local_index: int
    local_count: int
    timeout: float  #: seconds
    backend: str = "gloo"  #: of the default process group
    is_launched: bool = False  #: as a program of its own: a follower with an error ends its process

    @classmethod
    def from_environment(cls, config: TrainConfig) -> TorchRanks:
        """The ranks that torchrun, or a program that uses torch.distributed, has started.

        Raises:
            ConfigError: if a variable of torchrun is missing or wrong, or if there are too few GPUs.
            RankLost: if the other ranks cannot be reached.
        """
        index, count, local_index, local_count = _read_variables()
        device = runtime.choose_device(config.device, local_index=local_index, local_count=local_count)
        is_launched, backend = not dist.is_initialized(), "gloo"
        if device.type == "cuda" and config.device in ("auto", "cuda"):  # NCCL refuses to share a GPU
            torch.cuda.set_device(device)
            backend = "nccl"
        limit = min(config.rank_timeout, _PATIENCE.total_seconds() * 365)  # torch counts in nanoseconds
        store = _meet(limit) if is_launched else dist.distributed_c10d._get_default_store()
        _joined[port := os.environ["MASTER_PORT"]] += 1
        store = dist.PrefixStore(f"distrust/{_joined[port]}", store)
        return cls(store, index, count, local_index, local_count, limit, backend, is_launched)

    def __post_init__(self) -> None:
        self._hosts = ["?"] * self.count
        self._watch: Any = None  # until the block begins

    def __enter__(self) -> Self:
        self.store = dist.PrefixStore("again", self.store)  # without the keys of an earlier block
        self._has_made_group = not dist.is_initialized()
        limit = timedelta(seconds=self.timeout)
        with self.collective():
            self.store.set(f"host/{self.index}", socket.gethostname())
            hosts = self.store.multi_get([f"host/{index}" for index in range(self.count)])  # waits for them
            self._hosts = [host.decode(errors="replace") for host in hosts]
            if self._has_made_group:
                world = {"store": self.store, "rank": self.index, "world_size": self.count}
                dist.init_process_group(self.backend, timeout=limit, **world)
            limits = (limit, _PATIENCE, limit)
            *self._groups, watched = (dist.new_group(backend="gloo", timeout=each) for each in limits)
        # A connection of its own: that of the main thread may be waiting.
        self._watch = Watch(self, self.store.clone(), watched, self.timeout)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.gather(np.zeros(1, np.uint8), patient=True)  # the leader's last save is durable
        except BaseException as lost:
            self._leave(lost)
            raise
        if error is None:
            self._watch.end()
        else:
            self._leave(error)
            if self.is_launched:
                return  # the end of the process disconnects; NCCL would wait for ranks that are lost
        for group in (*self._groups, self._watch.group, *([None] if self._has_made_group else [])):
            dist.destroy_process_group(group)

    def _leave(self, error: BaseException) -> None:
        failure = self._watch.leave(error)
        if self.is_launched and self.index > 0:
            if not isinstance(error, (DistrustError, OSError, KeyboardInterrupt, SystemExit)):
                traceback.print_exception(error)  # a bug
            self._watch.announce(failure)
            sys.stdout.flush()
            os._exit(failure.code)

    def before_exit(self, finish: Callable[[], object]) -> None:
        """See :class:`~distrust.ranks.Ranks`."""
        self._watch.finish = finish

    def describe(self, index: int) -> str:
        """See :class:`~distrust.ranks.Ranks`."""
        return f"rank {index} ({self._hosts[index]})"

    @cached_property
    def save_group(self) -> Any:
        """A group of gloo for saves, which communicate beside training. All ranks make it at once."""
        with self.collective():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        self._groups.append(group)
        return group

    def gather(self, array: Array, *, patient: bool = False, group: Any = None) -> Array:
        """See :class:`~distrust.ranks.Ranks`."""
        row = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        rows = torch.empty((self.count, row.size), dtype=torch.uint8)
        if row.size:
            mine = torch.from_numpy(row.copy())  # the array may be read-only
            with self.collective():
                dist.all_gather(list(rows.unbind()), mine, group=group or self._groups[patient])
        return rows.numpy().view(array.dtype).reshape(self.count, *array.shape)

    def broadcast(self, array: Array) -> None:
        """See :class:`~distrust.ranks.Ranks`."""
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, _PART_BYTES):
            part = flat[begin : begin + _PART_BYTES]
            buffer = torch.from_numpy(part.copy())
            with self.collective():
                dist.broadcast(buffer, 0, group=self._groups[True])
            if self.index > 0:
                part[:] = buffer.numpy()

    def collective(self) -> ErrorTranslator:
        """Context manager for calls of torch.distributed: a RankLost replaces an error of theirs."""
        return ErrorTranslator((RuntimeError,), self._explain)

    def _explain(self, error: RuntimeError) -> DistrustError:
        if self._watch is not None:
            return RankLost(self._watch.explain(error))
        return RankLost(f"rank {self.index} cannot connect to the other ranks: {_first_line(error)}")


def _read_variables() -> list[int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"
    texts = {name: os.environ.get(name, "") for name in names}
    numbers = [int(text) if text.isdecimal() else -1 for text in texts.values()]
    index, count, local_index, local_count, port, _ = numbers
    if not (0 <= index < count and 0 <= local_index < local_count and port >= 0 and texts["MASTER_ADDR"]):
        values = " ".join(f"{name}={text}" for name, text in texts.items())
        raise ConfigError(
            f"these variables do not say which of several ranks this process is: {values}; "
            "distrust train --nproc N, or torchrun, starts ranks and sets them"
        )
    return numbers[:4]


def _meet(seconds: float) -> Any:
    """The store that torchrun's agent or rank 0 has opened at MASTER_ADDR:MASTER_PORT."""
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
    except (RuntimeError, ValueError) as error:
        rank, host, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        raise RankLost(
            f"rank {rank} does not meet the others at {host}:{port} (MASTER_ADDR, MASTER_PORT): "
            f"{_first_line(error)}; check that all ranks are started and reach this address"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300].rstrip(".")
