"""The mirror of a directory: uploads each durable checkpoint in the background, under a term (``terms.py``).

- Newest first. What a newer one makes needless is skipped; finals, and what a rule or a pin keeps, never are.
- A file is open from its commit until it is uploaded, so removing its name here does not lose it.
- A failure stops nothing: it is tried again without end, with one warning an outage. A lost term is raised.
- The thread lives as long as there is something to upload, and is no daemon: a program that ends without
  ``close()`` waits for it, for at most the timeout.
- The last but one, and the one that the run resumed from, stay there whatever the rules say: a writer that
  has just taken over may rely on them.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from distrust.checkpoint import catalog
from distrust.checkpoint.checkpoint_file import CheckpointFile, Scan
from distrust.checkpoint.files import errors_with_path, open_regular_file, parse_checkpoint_name
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.remote.client import Client, connect
from distrust.checkpoint.remote.line import RemoteFile, object_name
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.checkpoint.remote.terms import PATIENCE_SECONDS, Terms
from distrust.checkpoint.retainer import as_candidates
from distrust.checkpoint.retention import Retention, steps_to_keep
from distrust.errors import (
    CheckpointDirectoryLocked,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    DistrustWarning,
    RemoteError,
    defer_warning,
)

#: Seconds between two tries in an outage; the client has repeated each call for a while by then.
PAUSE_SECONDS = 10.0


@dataclass(frozen=True)
class Mirror:
    """Where checkpoints are copied to, and how. A rule that is None is that of the manager."""

    url: str | os.PathLike[str]  #: ``s3://BUCKET/PREFIX``, ``gs://``, ``az://CONTAINER/PREFIX``, or a folder
    keep_last: int | None = None
    keep_best: int | None = None
    keep_every: int | None = None
    patience: float = PATIENCE_SECONDS  #: seconds for which a sign of life of the last writer is awaited
    timeout: float = 600.0  #: seconds for which ``close()`` waits for uploads
    take_over: bool = False  #: the last writer is known to be dead: do not wait
    companions: Sequence[Path] = ()  #: files that go up with each one, beside the folder of checkpoints
    #: Called on the uploading thread with step, URL, and the seconds since it was durable here. It must not
    #: raise, or call the manager.
    on_mirrored: Callable[[int, str, float], None] | None = None
    connect: Callable[..., Client] = connect  #: replaces the client, to test failures

    def __post_init__(self) -> None:
        parse(self.url, "mirror")
        if not 0 < self.patience <= threading.TIMEOUT_MAX or not self.timeout >= 0:
            text = f"patience={self.patience}, timeout={self.timeout}"
            raise ConfigError(f"mirror: {text}: give seconds, more than 0 and at least 0")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_mirrored": None, "connect": connect}  # a process has its own


class _Upload(NamedTuple):
    file: CheckpointFile
    content: BinaryIO
    since: float  # when it was durable here, by the monotonic clock
    was_here: bool  # at the start: not written by this process, so it is verified first


class MirrorWriter:
    """The uploads of one directory. The caller of ``begin`` and ``offer`` holds its lock."""

    def __init__(self, settings: Mirror, rules: Retention, state: ManagerState, *, record_host: bool) -> None:
        self._settings, self._directory, self._record_host = settings, state.directory, record_host
        self._state = weakref.proxy(state)  # which has this one: a dropped manager releases its lock at once
        names = ("keep_last", "keep_best", "keep_every")
        values = {name: value for name in names if (value := getattr(settings, name)) is not None}
        self._rules = rules = replace(rules, **values)
        if rules.keep_last is not None:  # a writer that has just taken over may rely on the last but one
            self._rules = replace(rules, keep_last=max(2, rules.keep_last))
        self._location = parse(settings.url, "mirror")
        if self._location == parse(state.directory, "directory"):
            text = "is the directory itself; give another folder, or a URL"
            raise ConfigError(f"mirror {state.directory}: {text}")
        self._terms: Terms | None = None
        self._copies: tuple[CheckpointFile, ...] = ()  # there, that count; by step
        self._displaced: list[RemoteFile] = []  # there, that do not count
        self._base: int | None = None  # the step that the run resumed from
        self._listed: int | None = None  # the newest step there when it was fetched
        self._pinned: int | None = None
        self._changed = threading.Condition()
        self._pending: dict[Path, _Upload] = {}
        self._active: _Upload | None = None
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()  # of what fails at present
        self._warning: DistrustWarning | None = None  # that is an error, and was not raised yet

    @property
    def mirrored(self) -> int | None:
        """The newest step there; None if there is none, or before the first save."""
        return max((copy.step for copy in self._copies), default=None)

    def connect(self) -> Terms:
        """The way to the right to write. Makes no request, and needs no lock, until it is watched."""
        if self._terms is None:
            settings, location = self._settings, self._location
            self._client, self._beside = settings.connect(location), settings.connect(location.parent)
            self._terms = Terms(
                location,
                self._directory,
                connect=settings.connect,
                patience=settings.patience,
                take_over=settings.take_over,
                record_host=self._record_host,
            )
        return self._terms

    def begin(self, base: int | None, on_wait: Callable[[], None]) -> None:
        """Take the term, unless this process has it; then upload what is needed of the directory.

        ``base`` is the step from which the run goes on; None for the newest one there. ``on_wait`` is called
        every half second of a watch; what it raises ends the watch. Raises as CheckpointManager.begin.
        """
        terms = self.connect()
        if terms.number:
            terms.raise_if_lost()
            if self._warning is not None:
                defer_warning(self._warning)
                self._warning = None
            return
        try:
            terms.wait(on_wait)
            run, files = self._list()
            newest = files[-1].step if files else 0
            if self._listed is not None and newest > self._listed:  # a term would make that count no more
                text = f"{self._location}: another writer has gone on to step {newest} meanwhile; start again"
                raise CheckpointDirectoryLocked(text, path=self._directory)
            self._base = newest if base is None else base
            terms.take(self._base)
            self._copies = run.scan().files  # only now: from here on nothing of others is added
        except BaseException:
            self._leave(terms)  # the next call watches again
            raise
        self._displaced, self._listed = run.displaced, None
        for file in reversed(self._state.scan().files):  # the newest makes most others needless
            if file.identity not in self._state.damaged:  # else an older one is needed
                self.offer(file.path, was_here=True)

    def fetch_newest(self) -> Path | None:
        """Take the lock, and download the newest one there, unless an intact one here, by step, is as new."""
        self.connect()
        run, files = self._list()  # first: a store that fails leaves no folder behind
        self._state.acquire()
        self._listed = files[-1].step if files else 0
        if not files:
            return None
        for file in reversed(self._state.scan().files):
            if file.rank < files[-1].rank:
                break
            with contextlib.suppress(CorruptCheckpoint):
                catalog.verify(file.path)
                return None
        return run.fetch(files[::-1], self._directory, self._state.disk)[1]

    def offer(self, path: Path, *, was_here: bool = False) -> None:
        """Upload a file that is durable here."""
        try:
            file = catalog.read_header(path)
            upload = _Upload(file, open_regular_file(path), time.monotonic(), was_here)
        except (CheckpointError, OSError) as error:
            self._warn(f"{path}: is not mirrored: {error}")
            return
        with self._changed:
            self._pinned = self._state.pinned
            self._drop([self._pending[path]] if path in self._pending else [])
            self._pending[path] = upload
            self._drop_needless()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"mirror of {self._directory}")
                try:
                    thread.start()  # it waits for the condition, which this one holds
                    self._thread = thread
                except RuntimeError as error:  # no thread can be started; the next save tries again
                    self._warn(f"{path}: is not mirrored yet: {error}")

    def wait(self, path: Path, timeout: float | None) -> None:
        """Wait until an offered file is there, or a newer one; raises as PendingSave.wait_mirrored."""
        entry = parse_checkpoint_name(path)
        step = entry.step if entry is not None else 0

        def is_there() -> bool:
            return path not in self._pending and (self.mirrored or 0) >= step

        if not self._wait_until(lambda: is_there() or self._thread is None, timeout):
            raise TimeoutError(f"{path}: is not in {self._location} after {timeout:g} s")
        if not is_there():
            raise RemoteError(f"{path}: is not in {self._location}", url=str(self._location))

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the uploads, for at most ``timeout`` seconds; warn of the rest. May raise TakenOver."""
        self._wait_until(lambda: not self._pending, self._settings.timeout if timeout is None else timeout)
        self._give_up()
        warning, self._warning = self._warning, None
        if warning is not None:
            raise warning

    def close(self, timeout: float | None = None) -> None:
        """As :meth:`finish`; then give the term back."""
        if (terms := self._terms) is None:
            return
        try:
            self.finish(timeout)
        finally:  # also if an interrupt ends the wait
            if "uploads" not in self._warned:  # else the next writer has to watch, as after an error
                with contextlib.suppress(RemoteError):
                    terms.end()
            self._leave(terms)

    def _list(self) -> tuple[RemoteRun, list[RemoteFile]]:
        """What is there, and the checkpoints that count."""
        run = RemoteRun(self._location, self._client)
        files = run.files()
        if run.directory != self._location:  # readers would look only there
            text = f"is the mirror of a run; give {run.directory}"
            raise ConfigError(f"mirror {self._location}: {text}")
        return run, files

    def _leave(self, terms: Terms) -> None:
        """Watch and upload no more."""
        terms.abandon()
        self._terms = None
        with self._changed:
            self._drop(list(self._pending.values()))

    def _wait_until(self, is_over: Callable[[], bool], timeout: float | None) -> bool:
        """Wait, but not in vain: raises TakenOver once the term is lost, as nothing more arrives then."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                if self._terms is not None:
                    self._terms.raise_if_lost()
                left = end - time.monotonic()
                if is_over() or left <= 0:
                    return is_over()
                self._changed.wait(min(left, 1.0))

    def _run(self) -> None:
        end = math.inf
        while True:
            if not threading.main_thread().is_alive():  # nobody has called close()
                end = min(end, time.monotonic() + self._settings.timeout)
            if time.monotonic() > end:
                self._give_up()
            with self._changed:
                self._drop_needless()  # again: what was nearly there has failed, or is there
                upload, terms = self._newest(), self._terms
                if upload is None or terms is None:
                    self._thread = None  # under the condition: a later offer starts another one
                    self._changed.notify_all()
                    return
                self._active = upload
            self._try(upload, terms)

    def _try(self, upload: _Upload, terms: Terms) -> None:
        failure: Exception | None = None
        try:
            self._upload(upload, terms)
        except CorruptCheckpoint as error:  # it was here, and does not verify
            self._warn(f"not mirrored: {error}")
        except Exception as error:  # whatever it is, training goes on
            failure = error
        with self._changed:
            self._active = None
            if self._pending.get(upload.file.path) is not upload:
                pass  # it was dropped, and its file closed
            elif failure is None:
                self._drop([upload])
            elif terms.lost.is_set():
                self._drop(list(self._pending.values()))  # the next save raises TakenOver
            else:
                text = "training goes on, and the upload is tried again until it succeeds"
                self._warn(f"step {upload.file.step} is not mirrored yet: {failure}; {text}", "uploads")
                self._changed.wait_for(lambda: not self._pending, PAUSE_SECONDS)
            self._changed.notify_all()

    def _upload(self, upload: _Upload, terms: Terms) -> None:
        """Upload a file under a confirmed term, unless it is there already; then tidy up."""
        file = upload.file
        terms.confirm()  # first: what is there may be displaced by another writer
        states = ((copy.step, copy.kind, copy.state_digest) for copy in self._copies)
        is_new = (file.step, file.kind, file.state_digest) not in states
        if is_new:
            if upload.was_here:
                with errors_with_path(file.path):  # not by its name, which may be gone
                    catalog.verify_content(Path("/dev/fd", str(upload.content.fileno())))
            name = object_name(file.step, file.kind, terms.number, file.state_digest)
            self._client.put(name, upload.content)
            terms.confirm()  # else it does not count
            copy = CheckpointFile(Path(name), file.header)
            self._copies = tuple(sorted([*self._copies, copy], key=attrgetter("rank")))
        if "uploads" in self._warned:
            self._warn(f"{self._location}: reachable again; step {file.step} is there")
            self._warned.discard("uploads")
        if is_new and self._settings.on_mirrored is not None:
            seconds = time.monotonic() - upload.since
            self._settings.on_mirrored(file.step, str(self._location), seconds)
        try:
            self._clean_up(terms)
            for path in self._settings.companions:
                with contextlib.suppress(FileNotFoundError), open_regular_file(path) as content:
                    self._beside.put(path.name, content)
            self._warned.discard("others")
        except (RemoteError, OSError) as error:  # the checkpoint is there; the next upload tries again
            self._warn(f"step {file.step} is mirrored, but: {error}", "others")

    def _clean_up(self, terms: Terms) -> None:
        """Remove there what no rule keeps, and what does not count once the run has passed it."""
        by_step = Scan.of(self._copies).by_step()
        keep = steps_to_keep(as_candidates(by_step.values()), self._rules)
        keep |= {step for step in (self._base, self._pinned) if step is not None}
        superseded = [
            copy for copy in self._copies if copy.step not in keep or copy is not by_step[copy.step]
        ]
        newest = self._copies[-1].step
        passed = [file for file in self._displaced if file.step <= newest and file.kind != "final"]
        for key in [*(copy.path.name for copy in superseded), *(file.key for file in passed)]:
            self._client.delete(key)
        self._copies = tuple(copy for copy in self._copies if copy not in superseded)
        self._displaced = [file for file in self._displaced if file not in passed]
        terms.clean_up()

    def _newest(self) -> _Upload | None:
        return max(self._pending.values(), key=lambda each: each.file.rank, default=None)

    def _drop_needless(self) -> None:
        """Drop what the rules will not keep, and of the last ones all but the newest."""
        uploads, newest = list(self._pending.values()), self._newest()
        files = [*self._copies, *(each.file for each in uploads)]
        keep = steps_to_keep(as_candidates(files), replace(self._rules, keep_last=1)) | {self._pinned}
        is_saved = newest is not None and not newest.was_here  # then it counts, even after a step back
        exempt = newest if is_saved else None, self._active  # the latter is nearly there
        self._drop(each for each in uploads if each not in exempt and each.file.step not in keep)

    def _drop(self, uploads: Iterable[_Upload]) -> None:
        for upload in uploads:
            del self._pending[upload.file.path]
            upload.content.close()  # an upload that reads it fails

    def _give_up(self) -> None:
        """Drop what is pending, and warn of it."""
        with self._changed:
            uploads = list(self._pending.values())
            self._drop(uploads)
            self._changed.notify_all()
        if uploads:
            steps = ", ".join(map(str, sorted({each.file.step for each in uploads})))
            command = shlex.join(["distrust", "copy", str(self._directory), str(self._location)])
            self._warn(f"{self._location}: step {steps} is not there yet; to upload it: {command}")

    def _warn(self, text: str, subject: str = "") -> None:
        """Warn; of a subject once, until it is taken out of ``_warned``."""
        if subject in self._warned:
            return
        self._warned |= {subject} - {""}
        try:
            warnings.warn(DistrustWarning(text), stacklevel=2)
        except DistrustWarning as warning:  # no error may end the thread
            self._warning = warning
