"""Ends every rank of a run soon after one has ended, whatever its main thread is waiting in.

A rank has a receive open from the next rank and from the leader, whose only messages are signs of life: if
that process dies, the operating system ends the receive. Whoever notices, or fails itself, writes it to the
store, where every rank looks five times a second. The first entry counts: it says why the run ends.

The main thread may then end by itself for a moment. The leader finishes a save under way and ends first:
torchrun takes the first end with an error for the cause, and kills the other processes 30 s later.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
import torch.distributed

from distrust.errors import DistrustError, printable
from distrust.ranks import Ranks

POLL_SECONDS = 0.2
GRACE_SECONDS = 0.5  # for the main thread to end, and for other ranks to report
LEADER_SECONDS = 600.0  # for its last save
_ALIVE = -1  # what is sent; else an exit code
_FOREVER = timedelta(days=36500)
_MAX_CHARACTERS = 4000  # of a message
dist: Any = torch.distributed  # which exports few of its names


class Failure(NamedTuple):
    """Why a run ends."""

    code: int  #: exit code of all ranks
    text: str
    leader_is_lost: bool = False  #: it was killed or does not answer: nobody waits for it


@dataclass
class Watch:
    """The watch of one rank; begins at once."""

    ranks: Ranks
    store: Any
    group: Any  #: a process group of gloo that nothing else uses
    timeout: float  #: seconds without a sign of life after which a rank is lost
    finish: Callable[[], object] = bool  #: waits for a save under way

    def __post_init__(self) -> None:
        index, count = self.ranks.index, self.ranks.count
        self._failure: Failure | None = None  # the first one in the store
        self._claim: Failure | None = None  # the first one that this rank knows of
        self._has_waited = False  # a collective has failed here
        self._silent = [0] if index else []  # ranks where none has; if there is no store, the leader
        self._wake, self._known, self._leaving, self._over = (Event() for _ in range(4))
        self._watchers = {(index - 1) % count, *(() if index else range(count))} - {index}
        self._sends: deque[Any] = deque(maxlen=8 * count)  # those that may be under way
        self._silence = dict.fromkeys({0, (index + 1) % count} - {index}, 0.0)  # seconds
        self._receivers = {peer: Thread(target=self._receive, args=(peer,)) for peer in self._silence}
        self._threads = [*self._receivers.values(), Thread(target=self._follow), Thread(target=self._guard)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def explain(self, error: Exception) -> str:
        """Why a collective has failed here."""
        self._has_waited = True
        self._wake.set()
        self._known.wait(GRACE_SECONDS)
        reason = "" if self._silent else f"cannot reach another rank ({str(error)[:200]})"
        return self._settle(self._loss((self._silent or [self.ranks.index])[0], reason)).text

    def leave(self, error: BaseException) -> Failure:
        """End this rank's part with an error, a follower after the leader; returns why the run ends."""
        self._leaving.set()
        code, text = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
        if isinstance(error, DistrustError):
            text = str(error)
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            number = getattr(error, "code", 130)
            code, text = number if isinstance(number, int) and number else 1, f"interrupted ({number})"
        text = f"{self.ranks.describe(self.ranks.index)}: {text}"
        failure = self._settle(Failure(code, text[:_MAX_CHARACTERS]))
        if not isinstance(error, KeyboardInterrupt):  # whoever interrupts does not want to wait
            self._await_save(failure)
        self._end_threads(failure.code, seconds=GRACE_SECONDS)
        return failure

    def end(self) -> None:
        """End the watch after all ranks have come to the end of the run: no end is an accident any more."""
        self._over.set()
        self._leaving.set()
        self._end_threads(0, seconds=self.timeout)

    def announce(self, failure: Failure) -> None:
        """Print why the run ends, if that is up to this rank: without the leader, to one on each machine."""
        index, is_first = self.ranks.index, self.ranks.local_index == 0
        if index == 0 or (failure.leader_is_lost and (is_first or index == 1)):
            with contextlib.suppress(OSError):  # not a stream: the main thread may hold its lock
                os.write(2, f"distrust: {printable(failure.text, lines=True)}\n".encode())

    def _settle(self, failure: Failure) -> Failure:
        """Report a failure; returns the first one of the run."""
        self._claim = self._claim or failure
        self._wake.set()
        self._known.wait(2 * GRACE_SECONDS)
        self._failure = self._failure or self._claim  # the store may not answer
        self._known.set()
        return self._failure

    def _loss(self, rank: int, reason: str = "") -> Failure:
        reason = reason or f"does not answer within --rank-timeout {self.timeout:g} s"
        text = f"{self.ranks.describe(rank)} {reason}; the same command resumes"
        return Failure(1, text, leader_is_lost=rank == 0 != self.ranks.index)

    def _receive(self, peer: int) -> None:
        message = torch.tensor([_ALIVE])
        try:
            while message.item() == _ALIVE:
                self._silence[peer] = 0.0
                dist.irecv(message, peer, group=self.group).wait(_FOREVER)
        except RuntimeError:
            message[0] = 1
        if message.item() and not self._over.is_set():
            self._settle(self._loss(peer, "is gone: it was killed, or its machine is lost"))

    def _guard(self) -> None:
        """Exchange signs of life, and end the process after a failure."""
        now, unsent, quarter = time.monotonic(), 0.0, self.timeout / 4
        while not self._known.wait(POLL_SECONDS):
            passed = min(time.monotonic() - now, quarter)  # more: this process was suspended
            now, unsent = time.monotonic(), unsent + passed
            for peer, receiver in self._receivers.items():
                self._silence[peer] += passed
                if self._silence[peer] > self.timeout and receiver.is_alive():
                    self._settle(self._loss(peer))
            if unsent >= quarter:
                unsent = 0.0
                self._send(_ALIVE)
        if self._failure and not self._leaving.wait(GRACE_SECONDS):
            self._await_save(self._failure)
            self.announce(self._failure)
            os._exit(self._failure.code)

    def _follow(self) -> None:
        """Read the store, which may not answer."""
        while not self._known.is_set():
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
            try:
                self._failure = self._failure or self._look()
            except (RuntimeError, ValueError, TypeError):  # it has ended with its host
                self._failure = self._failure or self._claim
            if self._failure:
                self._known.set()

    def _look(self) -> Failure | None:
        """The first failure in the store; this rank's becomes it if there is none."""
        if self._claim:
            self.store.compare_set("failure", "", json.dumps(self._claim))
        elif self._has_waited:
            self.store.set(f"waited/{self.ranks.index}", "")
            ranks = range(self.ranks.count)
            self._silent = [rank for rank in ranks if not self.store.check([f"waited/{rank}"])]
        if not self.store.check(["failure"]):
            return None
        code, text, leader_is_lost = json.loads(self.store.get("failure"))
        return Failure(int(code) % 256 or 1, str(text)[:_MAX_CHARACTERS], bool(leader_is_lost))

    def _await_save(self, failure: Failure) -> None:
        """Wait for the leader's last save; on a follower, for the leader's end."""
        with contextlib.suppress(Exception):  # the other failure came first
            self.finish()
        if self.ranks.index and not failure.leader_is_lost:
            self._receivers[0].join(LEADER_SECONDS)

    def _send(self, value: int) -> None:
        for peer in self._watchers:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._sends.append(dist.isend(torch.tensor([value]), peer, group=self.group))

    def _end_threads(self, code: int, *, seconds: float) -> None:
        """End the threads: a receive under way at the interpreter's end would abort the process."""
        self._known.set()
        self._wake.set()
        self._send(code)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
