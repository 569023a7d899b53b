"""The processes that make one run together, its ranks: what the loop and the engines need of them.

All ranks run the same loop on the same values, so most decisions need no communication. What may differ by
rank, such as a signal, is gathered, and every rank decides from the same list. Rank 0 leads: it alone locks
the folder of the run, writes and reports. A rank that fails ends; the others end within a second, because
each watches another, and the leader reports the error.

Values travel as arrays and JSON, never pickled: the ports are open to the network of the machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
Array = np.ndarray[Any, Any]


class Ranks(Protocol):
    """The ranks of a run, as one of them sees them. Every rank makes the same calls in the same order.

    A context manager for all of their work together. If its block ends without an error, all ranks wait for
    each other: the leader's last save is durable. With an error the other ranks end, too.
    """

    @property
    def index(self) -> int:
        """Number of this rank, from 0."""
        return 0

    @property
    def count(self) -> int:
        """Number of ranks."""
        return 1

    @property
    def local_index(self) -> int:
        """Number of this rank among those on its machine, from 0."""
        return 0

    @property
    def local_count(self) -> int:
        """Number of ranks on this machine."""
        return 1

    def describe(self, index: int) -> str:
        """A rank for messages, with its machine: "rank 3 (node-1)"."""
        return f"rank {index}"

    def gather(self, array: Array, *, patient: bool = False) -> Array:  # noqa: ARG002
        """[count, ...]: the arrays of all ranks, which have one shape and dtype.

        A rank that does not answer within ``--rank-timeout`` raises RankLost; ``patient`` waits as long as
        that rank lives, for work whose time is not known, such as loading data.
        """
        return array[None]

    def broadcast(self, array: Array) -> None:  # noqa: ARG002
        """Overwrite a contiguous array on every rank by the leader's. Always patient."""
        return

    def before_exit(self, finish: Callable[[], object]) -> None:  # noqa: ARG002
        """Call ``finish`` before this process ends because another rank is lost: a save may be under way."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class SingleProcess(Ranks):
    """The one rank of a run in one process."""


SINGLE = SingleProcess()


def leads(ranks: Ranks) -> bool:
    """Whether this rank locks, writes and reports."""
    return ranks.index == 0


def gather_json(ranks: Ranks, value: Any) -> list[Any]:
    """The values of all ranks, which may differ in size; patient."""
    if ranks.count == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = ranks.gather(np.array([len(text)]), patient=True)[:, 0]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = ranks.gather(padded, patient=True)
    return [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]


def of_leader(ranks: Ranks, make: Callable[[], T]) -> T:
    """What the leader makes, on every rank. It must be JSON; an error of the leader ends all ranks."""
    value: T = gather_json(ranks, make() if leads(ranks) else None)[0]
    return value
