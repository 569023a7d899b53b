"""The ranks that ``mlx.launch`` starts, in the ring of TCP connections that it describes.

Not those of ``mx.distributed``: if a rank ends, its collectives may hang, or return rows that nobody sent,
and a rank that waits in one keeps its processor busy.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import time
from pathlib import Path

import numpy as np

from distrust.errors import ConfigError, RankLost, RanksDiffer
from distrust.ranks import Array, Ranks, gather_json

_RESUME = "the same command resumes the run"


def read_addresses() -> tuple[int, list[tuple[str, int]]]:
    """The number of this rank; host and port of each, none unless ``mlx.launch`` started several.

    Raises ConfigError for its other backends than the ring, and for variables that it did not set.
    """
    file, text = os.environ.get("MLX_HOSTFILE"), os.environ["MLX_RANK"]
    if file is None:
        raise ConfigError("mlx.launch: several ranks need the ring; give it --backend ring")
    try:
        texts, rank = json.loads(Path(file).read_bytes() or b"[]"), int(text)
        addresses = [(host, int(port)) for host, _, port in (each[0].rpartition(":") for each in texts)]
        if texts and rank not in range(len(texts)):
            raise ValueError(f"it has {len(texts)} ranks")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"MLX_HOSTFILE={file}, MLX_RANK={text}: not as mlx.launch sets them"
        raise ConfigError(f"{problem}: {error}") from None
    return rank, addresses if len(addresses) > 1 else []


class MlxRanks(Ranks):
    """The :class:`distrust.ranks.Ranks` of ``mlx.launch``. RankLost: the other ranks cannot be reached.

    ``addresses`` are those of all ranks. One that does not answer for ``timeout`` seconds counts as lost.
    """

    index = count = local_index = local_count = 0

    def __init__(self, index: int, addresses: list[tuple[str, int]], timeout: float) -> None:
        self.index, self.count, self._timeout = index, len(addresses), timeout
        self._hosts = [host for host, _ in addresses]
        self._previous, self._next = self._connect(addresses)
        digest = np.frombuffer(hashlib.sha256(json.dumps(addresses).encode()).digest(), np.uint8)
        if (self.gather(digest) != digest).any():
            with self._previous, self._next:
                raise RanksDiffer("the ranks have different files MLX_HOSTFILE, or others use these ports")
        self._hosts = gather_json(self, socket.gethostname())
        host = self._hosts[self.index]
        self.local_index, self.local_count = self._hosts[: self.index].count(host), self._hosts.count(host)

    def describe(self, index: int) -> str:
        """See :class:`distrust.ranks.Ranks`."""
        return f"rank {index} ({self._hosts[index]})"

    def gather(self, array: Array, *, patient: bool = False) -> Array:
        """See :class:`distrust.ranks.Ranks`. Each rank passes on to the next one what it has received."""
        rows = np.empty((self.count, *array.shape), array.dtype)
        rows[self.index] = array
        parts = rows.reshape(self.count, array.size).view(np.uint8)
        for turn in range(self.count - 1):
            mine = self.index - turn
            outgoing, incoming = parts[mine % self.count].data, parts[(mine - 1) % self.count].data
            self._exchange(outgoing, incoming, None if patient else self._timeout)
        return rows

    def broadcast(self, array: Array) -> None:
        """See :class:`distrust.ranks.Ranks`."""
        data, nothing = array.reshape(-1).view(np.uint8).data, memoryview(b"")
        if self.index > 0:
            self._exchange(nothing, data, None)
        if self.index + 1 < self.count:
            self._exchange(data, nothing, None)

    def __exit__(self, kind: object, *_: object) -> None:
        with self._previous, self._next:
            if kind is None:
                self.gather(np.zeros(1, np.uint8), patient=True)  # the leader's last save is durable

    def _exchange(self, outgoing: memoryview, incoming: memoryview, timeout: float | None) -> None:
        """Send to the next rank while receiving from the one before."""
        previous, following = self._previous, self._next
        try:
            while outgoing or incoming:
                ready = select.select([previous] * bool(incoming), [following] * bool(outgoing), [], timeout)
                if not any(ready):
                    seconds = f"--rank-timeout {self._timeout:g} seconds"
                    raise RankLost(f"a rank did not answer for {seconds}; {_RESUME}")
                if ready[1]:
                    outgoing = outgoing[following.send(outgoing) :]
                if ready[0]:
                    size = previous.recv_into(incoming)
                    if size == 0:
                        raise ConnectionError
                    incoming = incoming[size:]
        except OSError:  # the next rank sends nothing: it can be read only if it has ended
            lost = self.index + 1 if select.select([following], [], [], 0)[0] else self.index - 1
            raise RankLost(f"{self.describe(lost % self.count)} has ended; {_RESUME}") from None

    def _connect(self, addresses: list[tuple[str, int]]) -> tuple[socket.socket, socket.socket]:
        """Connections with the rank before, and with the next one."""
        address, next_address = addresses[self.index], addresses[(self.index + 1) % self.count]
        try:
            with socket.create_server(address) as listener:
                listener.settimeout(self._timeout)
                following = _reach(next_address, time.monotonic() + self._timeout)
                previous, _ = listener.accept()
        except OSError as error:
            raise RankLost(
                f"rank {self.index} cannot connect {address} and {next_address}: {error}"
            ) from None
        for each in (previous, following):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
        return previous, following


def _reach(address: tuple[str, int], end: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, max(end - time.monotonic(), 0.01))
        except ConnectionError:  # it has not started yet
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
