"""The processes of a case: started, killed at an exact stage of a request, stopped, woken, waited for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from campaigns import training_run
from campaigns.campaign import require
from campaigns.child import ChildFailed
from campaigns.remote.program import FAILED, FINISHED, REFUSED, REPLACED, Plan
from campaigns.remote.proxy import Kind, Proxy, Request, Stage
from campaigns.session import Forks, Session

#: No process of a case runs this long, unless it hangs.
HANG_SECONDS = 60.0
POLL_SECONDS = 0.003
#: What a process imports before its first step.
IMPORTS = [
    *("numpy.random", "obstore.store", "distrust.checkpoint.arrays.of_numpy"),
    *("distrust.checkpoint.remote.mirror", "distrust.checkpoint.remote.remote_run"),
]


class Event(NamedTuple):
    """A line that a process printed."""

    name: str
    at: float  # by the clock of the machine
    values: dict[str, Any]


class Writer:
    """A process that trains, saves and mirrors."""

    def __init__(self, forks: Forks, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self.began = time.monotonic()
        self.stopped = False  # by SIGSTOP
        self.misread = False  # whether what it downloaded may have differed from what is there
        directory = Path(plan.directory)
        self._session = Session(
            forks, [plan.argument()], folder=folder, directory=directory, hang_seconds=HANG_SECONDS
        )

    @property
    def pid(self) -> int:
        return self._session.pid

    @property
    def running(self) -> bool:
        return self._session.running

    def events(self, name: str | None = None) -> list[Event]:
        lines = map(json.loads, self._session.output())
        events = [Event(line.pop("event"), line.pop("at"), line) for line in lines]
        return [event for event in events if name is None or event.name == name]

    def event(self, name: str) -> Event | None:
        """The first event of a name, if there is one."""
        return next(iter(self.events(name)), None)

    def send(self, number: int) -> None:
        self._session.send(number)
        self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def wait(self) -> int:
        """Wait for its end; the exit code must be one that a program of the product may have."""
        while self._session.running:
            time.sleep(POLL_SECONDS)
        code = self._session.wait()
        if code not in (FINISHED, REFUSED, REPLACED, FAILED, -signal.SIGKILL):
            raise ChildFailed(f"{self.plan.directory}: exit code {code}: {self._session.errors()}")
        return code

    def wipe(self) -> None:
        """Its machine does not come back: remove what it had on its disk."""
        shutil.rmtree(self.plan.directory, ignore_errors=True)

    def errors(self) -> str:
        return self._session.errors()


class Crew:
    """The fork servers of a case, each for one process at a time; a context that kills what still runs."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._forks: list[Forks] = []
        self._users: list[Writer | None] = []
        self._trainer: Forks | None = None

    def start(self, plan: Plan, folder: Path) -> Writer:
        free = [slot for slot, user in enumerate(self._users) if user is None or not user.running]
        slot = free[0] if free else len(self._forks)
        if not free:
            self._forks.append(
                self._stack.enter_context(Forks("campaigns.remote.program:main", IMPORTS, name="a fork"))
            )
            self._users.append(None)
        self._users[slot] = writer = Writer(self._forks[slot], plan, folder)
        return writer

    def trainer(self) -> Forks:
        """A fork server of the real trainer; the first call starts it, which takes some seconds."""
        if self._trainer is None:
            self._trainer = self._stack.enter_context(training_run.forks())
        return self._trainer

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        for user in self._users:
            if user is not None:
                with contextlib.suppress(ChildFailed):
                    user.send(signal.SIGKILL)
        self._stack.close()


class KillAt:
    """Kills a process at a stage of a request; a context around the life of the process."""

    def __init__(self, proxy: Proxy, kind: Kind, stage: Stage, count: int) -> None:
        self._proxy, self._kind, self._stage = proxy, kind, stage
        self._count = count
        self.writer: Writer | None = None
        self.done = False

    def __enter__(self) -> KillAt:
        self._proxy.watch = self._see
        return self

    def __exit__(self, *exception: object) -> None:
        self._proxy.watch = None

    def _see(self, stage: Stage, request: Request) -> None:
        """In the proxy's thread, while the request waits."""
        if (stage, request.kind) != (self._stage, self._kind) or self.writer is None or self.done:
            return
        self._count -= 1
        if self._count <= 0:
            self.done = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.writer.pid, signal.SIGKILL)


#: The stages at which a process is killed, and how often each is chosen.
_STAGES: dict[Kind, tuple[int, tuple[Stage, ...]]] = {
    "upload": (4, ("arrived", "half", "done")),
    "part": (1, ("arrived", "half", "done")),
    "complete": (1, ("arrived", "done")),
    "term": (3, ("arrived", "done")),
    "download": (2, ("arrived", "done")),
    "list": (1, ("done",)),
    "beat": (1, ("done",)),
    "end": (1, ("arrived", "done")),
    "read": (1, ("done",)),
    "head": (1, ("done",)),
    "delete": (1, ("arrived", "done")),
}


def kill_somewhere(
    proxy: Proxy,
    rng: random.Random,
    start: Callable[[], Writer],
    look: Callable[[Writer], object] = lambda _: None,
) -> tuple[Writer, str]:
    """Start a process, and kill it at a random stage of a request, or at a random time if that comes first.

    ``look`` is called again and again while it runs.
    Returns it, and for the counts where it was killed; empty if it ended itself.
    """
    kind = rng.choices(list(_STAGES), [weight for weight, _ in _STAGES.values()])[0]
    stage = rng.choice(_STAGES[kind][1])
    with KillAt(proxy, kind, stage, rng.randint(1, 6 if kind in ("upload", "list") else 2)) as killing:
        killing.writer = writer = start()
        limit = writer.began + writer.plan.patience + rng.uniform(0, 1)
        while writer.running and time.monotonic() < limit:
            look(writer)
            time.sleep(POLL_SECONDS)
        writer.send(signal.SIGKILL)
        code = writer.wait()
    if code != -signal.SIGKILL:
        return writer, ""
    return writer, f"{kind}, {stage}" if killing.done else "at any time"


def require_message(writer: Writer, code: int) -> None:
    """A process that fails says why, and where; in one line, unless it is about several checkpoints."""
    names = {REFUSED: "refused", REPLACED: "replaced", FAILED: "failed"}
    if code in names:
        event = writer.event(names[code])
        require(event is not None, f"{writer.plan.directory}: exit code {code} without a message")
        assert event is not None
        is_list = event.values.get("kind") == "NoIntactCheckpoint"
        message = event.values["message"]
        is_clear = writer.plan.url in message or writer.plan.directory in message
        text = f"{writer.plan.directory}: not one line that says where: {message}"
        require(is_clear and (is_list or "\n" not in message), text)


def with_folder(plan: Plan, folder: Path, number: int) -> Plan:
    """The plan of the next process, on another machine."""
    return replace(plan, number=number, directory=str(folder / f"machine-{number}" / "checkpoints"))
