"""The right to write to a mirror: numbered terms, as no lock in a store dies with its holder.

1. A writer creates ``terms/00000007.json`` with a create-only request, so one process has each term. A nonce
   tells its own request, whose answer was lost, from another's. The base says from which step it goes on.
2. The holder overwrites ``.beat``. A newcomer watches it by its own clock: no two clocks are compared. If it
   does not change for ``patience`` seconds, or ``.end`` exists, the newcomer takes the next term.
3. Nothing else is conditional. A holder looks for the next term before and after each upload; the upload that
   slips through does not count (``line.py``).

Everything rests on create-only, so a store that lets a second creation through is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint.lock import LOCK_NAME
from distrust.checkpoint.remote.client import Client
from distrust.checkpoint.remote.line import TERMS, Term, parse_term, parse_terms, term_key
from distrust.checkpoint.remote.location import Location
from distrust.errors import (
    CheckpointDirectoryLocked,
    ConfigError,
    RemoteError,
    TakenOver,
    quote_untrusted,
    warn,
)

BEAT_SECONDS = 15.0
#: Seconds for which a sign of life of the last writer is awaited.
PATIENCE_SECONDS = 60.0
_BRIEF_SECONDS = BEAT_SECONDS / 2  # a request that hangs does not delay a beat beyond the patience
NOTICE_AFTER = 4.0  # seconds of a wait in silence
_TERM_BYTES = 64 << 10


class Terms:
    """One writer's way to a term. The caller holds the lock of the local directory."""

    def __init__(
        self,
        location: Location,
        directory: Path,
        *,
        connect: Callable[..., Client],
        patience: float,
        take_over: bool,
        record_host: bool = True,
    ) -> None:
        self._directory = directory
        self._client = connect(location, give_up_after=_BRIEF_SECONDS, request_seconds=_BRIEF_SECONDS)
        self._patience, self._take_over, self._record_host = patience, take_over, record_host
        self._watcher = threading.Thread(target=self._watch, name="watch the mirror")
        self._watched: Term | None = None
        self._error: Exception | None = None
        self._stop = threading.Event()
        arguments = weakref.ref(self), min(BEAT_SECONDS, patience / 4), self._stop
        self._beats = threading.Thread(target=_keep_beating, args=arguments, name="beat of the mirror")
        self.lost = threading.Event()  #: set once it is known that another writer has a later term
        self.number = 0  #: of the term that this process has taken; 0 before

    def watch(self) -> None:
        """Begin to watch the last holder, in the background."""
        if self._watcher.ident is None:  # it was not started
            self._watcher.start()

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait for the end of the watch, and call ``on_wait`` every half second; raises as :meth:`take`."""
        self.watch()
        notice_at = time.monotonic() + NOTICE_AFTER
        while self._watcher.is_alive():
            on_wait()
            self._watcher.join(0.5)
            if self._watched is not None and time.monotonic() > notice_at:
                notice_at = math.inf
                holder = f"{self._client.location}: {self._holder(self._watched.number)}"
                text = f"waiting for a sign of life, at most {self._patience:g} s (take_over does not wait)"
                warn(f"{holder} did not end cleanly, or still writes here; {text}")
        if self._error is not None:
            raise self._error

    def take(self, base: int) -> None:
        """Wait for the end of the watch, and take the next term; ``base`` is the step to go on from.

        Raises:
            CheckpointDirectoryLocked: another writer is alive, or was faster.
            RemoteError: the store fails, or ignores conditions.
        """
        self.wait()
        newest = self._require_silence()  # it may have come back while the model was loaded
        number = newest.number + 1 if newest is not None else 1
        holder = {"pid": os.getpid()} | ({"host": os.uname().nodename} if self._record_host else {})
        values = {"nonce": secrets.token_hex(16), "base": base, "lock": _identify_lock(self._directory)}
        content = json.dumps(values | holder).encode()
        if not self._client.create(term_key(number, "json"), content):
            existing = self._client.read(term_key(number, "json"), 0, _TERM_BYTES)
            if existing is None or bytes(existing) != content:  # else the answer to this request was lost
                raise self._describe_lock(number, "has just taken")
        self.number = number
        self._beats.start()

    def beat(self) -> None:
        """Show that the holder lives, and learn whether another has taken over."""
        with contextlib.suppress(RemoteError, TakenOver):  # the uploads report the former, a save the latter
            self._client.put(term_key(self.number, "beat"), str(time.monotonic_ns()).encode())
            self.confirm()

    def confirm(self) -> None:
        """Raise TakenOver if another writer has a later term; asks the store."""
        if self._client.head(term_key(self.number + 1, "json")) is not None:
            self.lost.set()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise TakenOver if it is known that another writer has a later term."""
        if self.lost.is_set():
            raise TakenOver(
                f"{self._client.location}: another process has taken over this run (term {self.number + 1}, "
                f"this was {self.number}): nothing more is saved. What this one saved stays in "
                f"{self._directory}",
                path=self._directory,
            )

    def clean_up(self) -> None:
        """Remove beats and ends of earlier terms. The terms stay: by them a replaced writer learns of it."""
        for term in parse_terms(self._client.list(TERMS)).values():
            for kind in ["beat"] * bool(term.beat) + ["end"] * term.has_ended:
                if term.number < self.number:
                    self._client.delete(term_key(term.number, kind))

    def abandon(self) -> None:
        """Watch and beat no more."""
        self._stop.set()

    def end(self) -> None:
        """Give the term back, so that nobody has to watch. Raises RemoteError."""
        self.abandon()
        if self.number and not self.lost.is_set():
            if self._beats.is_alive():
                self._beats.join(_BRIEF_SECONDS)  # a beat under way does not come after the end
            self._client.put(term_key(self.number, "end"), b"1")

    def _watch(self) -> None:
        try:
            self._probe()
            end = time.monotonic() + self._patience
            self._watched = self._newest()
            while self._watched and not self._may_follow(self._watched) and time.monotonic() < end:
                if self._stop.wait(self._patience / 20) or not threading.main_thread().is_alive():
                    return
                self._watched = self._require_silence()
        except Exception as error:  # raised by the caller that waits
            self._error = error

    def _probe(self) -> None:
        # False the first time, too, if an earlier writer has probed it, or an answer was lost.
        created = [self._client.create(f"{TERMS}probe", content) for content in (b"1", b"2")]
        if created[1]:
            url = str(self._client.location)
            text = f"{url}: this store ignores conditions (If-None-Match), so two writers could not be told "
            raise RemoteError(f"{text}apart; use another store for the mirror", url=url)

    def _newest(self) -> Term | None:
        return max(parse_terms(self._client.list(TERMS)).values(), default=None)

    def _require_silence(self) -> Term | None:
        """The newest term; raises if its holder has shown a sign of life, or is a new one."""
        newest = self._newest()
        if newest is not None and newest != self._watched and not self._may_follow(newest):
            raise self._describe_lock(newest.number, "holds")
        return newest

    def _may_follow(self, term: Term) -> bool:
        """Whether no watch is needed."""
        if term.has_ended or self._take_over:
            return True
        lock = _identify_lock(self._directory)
        return bool(lock) and self._read(term.number).get("lock") == lock  # the holder had it, and is dead

    def _describe_lock(self, number: int, verb: str) -> CheckpointDirectoryLocked:
        return CheckpointDirectoryLocked(
            f"{self._client.location}: another writer {verb} this mirror ({self._holder(number)}); wait "
            "until it ends, stop it, or use another mirror",
            path=self._directory,
        )

    def _holder(self, number: int) -> str:
        values = self._read(number)
        return quote_untrusted(f"pid {values.get('pid')} on {values.get('host', 'a machine without a name')}")

    def _read(self, number: int) -> dict[str, object]:
        content = self._client.read(term_key(number, "json"), 0, _TERM_BYTES)
        with contextlib.suppress(ValueError):
            return parse_term(content if content is not None else b"")
        return {}  # who holds it is not known: it is watched as any other


def _identify_lock(directory: Path) -> str:
    """Identifies the lock of a directory, on this machine, since it was started; a copy has another one.

    Empty where there is none, as for a command that has no local directory.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        status = os.lstat(directory / LOCK_NAME)
    except (OSError, ConfigError):
        return ""
    return hashlib.sha256(f"{boot} {status.st_dev} {status.st_ino}".encode()).hexdigest()[:32]


def _keep_beating(holder: weakref.ref[Terms], seconds: float, stop: threading.Event) -> None:
    due = time.monotonic()
    # A daemon could be in the client when the interpreter ends. A dropped holder must not seem alive.
    while threading.main_thread().is_alive() and (terms := holder()) and not terms.lost.is_set():
        if time.monotonic() >= due:
            terms.beat()
            due = time.monotonic() + seconds
        del terms
        if stop.wait(min(seconds, 1.0)):
            return
