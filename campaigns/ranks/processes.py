"""The processes of an attempt, as the campaign sees them: those that it starts, and the ranks of an agent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from campaigns.child import HANG_SECONDS, PYTHON, Child

_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the launcher sets it
    "TOKENIZERS_PARALLELISM": "false",
    # No threads of OpenBLAS and of pyarrow's allocator: a fork would lose them.
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Program(NamedTuple):
    """What to start: a module with its arguments and environment, in the network of a process or in ours."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    network: int | None = None
    fault: str | None = None  # of :mod:`campaigns.ranks.faults`
    fresh: bool = False  # whether it is a new interpreter, and not a fork


class Server:
    """Starts processes as forks of one with its imports done; a context that ends them all."""

    def __init__(self, python: Sequence[str] = PYTHON) -> None:
        self._child = Child("campaigns.ranks.server", environment=_VARIABLES, python=python)
        self._codes: dict[int, int] = {}
        self._pid = json.loads(self._child.receive(HANG_SECONDS))["ready"]

    def start(self, program: Program, *, out: Path, err: Path) -> int:
        """Start a program, which appends what it prints to two files; returns its process id."""
        self._child.send({**program._asdict(), "out": str(out), "err": str(err)})
        while True:
            answer = self._child.receive_json()
            if "started" in answer:
                pid = int(answer["started"])
                self._codes.pop(pid, None)  # of a process whose number the system uses again
                return pid
            self._codes[answer["ended"]] = answer["code"]

    def codes(self) -> Mapping[int, int]:
        """The exit codes of the processes that it started, once they have ended; negative for a signal."""
        while line := self._child.read_line(0):
            answer = json.loads(line)
            self._codes[answer["ended"]] = answer["code"]
        return self._codes

    def living(self) -> list[int]:
        """The processes that live: those that it started, and what those have started, orphans included."""
        return descendants(self._pid)

    def end_all(self) -> None:
        while living := self.living():
            for pid in living:
                send(pid, signal.SIGKILL)
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_all()
        self._child.__exit__(*exception)


class Group:
    """The processes of one attempt, which end together: agents, or ranks without an agent."""

    def __init__(self, server: Server, pids: Sequence[int], *, are_agents: bool) -> None:
        self.server = server
        self.pids = list(pids)  # the first one is, or starts, the leader
        self.are_agents = are_agents

    @property
    def pid(self) -> int:
        return self.pids[0]

    def poll(self) -> int | None:
        """0 if all have ended with that, once none is left, nor a rank of them; else another's exit code."""
        codes = self.server.codes()
        if any(pid not in codes for pid in self.pids) or self.server.living():
            return None
        return next((code for code in self.codes() if code != 0), 0)

    def send_signal(self, number: int, /) -> None:
        """Send a signal to every process; before SIGKILL, each prints the stacks of its threads."""
        if number == signal.SIGKILL:
            self.abort(self.server.living())
        for pid in self.server.living():
            send(pid, number)

    @staticmethod
    def abort(pids: Iterable[int]) -> None:
        """End processes that hang by what makes them print where they are, if they are forks."""
        for pid in pids:
            send(pid, signal.SIGCONT)
            send(pid, signal.SIGABRT)
        time.sleep(0.5)

    def ranks(self) -> list[int]:
        """The ranks that live, in the order in which they were started."""
        if self.are_agents:
            return [pid for agent in self.pids for pid in children(agent)]
        return [pid for pid in self.pids if lives(pid)]

    def codes(self) -> list[int]:
        """The exit codes of what was started, in its order."""
        codes = self.server.codes()
        return [codes[pid] for pid in self.pids]


def send(pid: int, number: int) -> None:
    """Send a signal to a process, if it exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def lives(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    return _status(pid) is not None


def children(parent: int) -> list[int]:
    """The living children of a process, in the order of their numbers."""
    return sorted(pid for pid, its_parent in _processes() if its_parent == parent)


def descendants(ancestor: int) -> list[int]:
    """The living children of a process, their children, and so on."""
    parents = dict(_processes())
    generation = {ancestor}
    result: list[int] = []
    while generation := {pid for pid, parent in parents.items() if parent in generation}:
        result += generation
    return sorted(result)


def _processes() -> Iterator[tuple[int, int]]:
    """Each living process and its parent."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (parent := _status(int(name))) is not None:
            yield int(name), parent


def _status(pid: int) -> int | None:
    """The parent of a process; None if it has ended, reaped or not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)
