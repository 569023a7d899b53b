"""Applies the retention rules to a directory, and removes damaged files on request.

Only intact checkpoints count towards a rule, and only intact ones are removed by one: files that this process
did not write are verified first, once. Damaged ones are left for the user.

A file is damaged if it was read completely and is not what was written. A doubtful file is left to the user,
with a warning that says why: a file that this process cannot read, one of a later version of the format or of
another program, a directory, an intact checkpoint under a wrong name (it may be the only copy of its step), a
checkpoint in a foreign format. Of a symbolic link only the link itself counts, never its target.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distrust.checkpoint import catalog, foreign, retention, storage
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import FORMAT, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, OPENING
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.retention import Candidate, Retention
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    DistrustWarning,
    UnsupportedVersion,
    defer_warning,
)


class Retainer:
    """Decides what to keep, and removes the rest. The caller holds the state's mutex."""

    def __init__(self, state: ManagerState, rules: Retention) -> None:
        self._state = state
        self._rules = rules

    def clean_up_after_save(self, saved: Path) -> None:
        """Remove what no rule keeps. A failure is only a warning: the saved checkpoint is durable."""
        try:
            self._clean_up(self._rules, saved)
        except CheckpointError as error:
            defer_warning(DistrustWarning(f"{self._state.directory}: could not clean up: {error}"))

    def clean_up(self, rules: Retention) -> list[int]:
        """Remove what no rule keeps; returns the removed steps."""
        self._begin()
        # Other writers' names may not be durable yet. Removing an older checkpoint relies on newer names.
        storage.sync_names(self._state.directory, self._state.disk)
        return self._clean_up(rules)

    def remove_damaged(self) -> Iterator[DamagedFile | DistrustWarning]:
        """Remove damaged files; gives each once it is removed, and a warning for each doubtful one."""
        self._begin()
        for finding in find_damaged(self._state.directory):
            if isinstance(finding, DamagedFile):
                self._state.lock.confirm()  # reading may take long: the directory may be another by now
                storage.remove([finding.path], self._state.disk)
            yield finding

    def _begin(self) -> None:
        self._state.background.wait()
        self._state.acquire()

    def _clean_up(self, rules: Retention, saved: Path | None = None) -> list[int]:
        state = self._state
        state.lock.confirm()
        storage.remove_stale_files(state.directory, state.disk)  # what a failed save could not remove
        files, superseded = self.select(rules, saved)
        storage.remove([file.path for file in superseded], state.disk)  # the only removal of intact files
        # A step whose periodic file was removed still exists if it has a final one.
        remaining = {file.step for file in files if file not in superseded}
        return sorted({file.step for file in superseded} - remaining)

    def select(
        self, rules: Retention, saved: Path | None = None
    ) -> tuple[list[CheckpointFile], list[CheckpointFile]]:
        """All files that count, and those among them that no rule keeps; never ``saved``."""
        state = self._state
        resumed_from = state.resumed_from and state.resumed_from.identity
        while True:
            scanned = state.scan().files
            state.forget_removed(scanned)
            files = [file for file in scanned if file.identity not in state.damaged]  # those never count
            by_step = Scan.of(files).by_step()
            candidates = as_candidates(by_step.values())
            paths_to_keep = {by_step[step].path for step in retention.steps_to_keep(candidates, rules)}
            superseded = [
                file
                for file in files
                # The run may have to resume again from the one that it resumed from.
                if file.path not in {*paths_to_keep, saved}
                and file.identity != resumed_from
                and file.step != state.pinned
            ]
            # Verify before relying on a file: those that displace others in a rule, the final checkpoint of a
            # step whose periodic one goes, and those to remove (a damaged one is left).
            displacing = retention.steps_that_displace(candidates, rules) | {file.step for file in superseded}
            relied_on = {file.path: file for file in [*map(by_step.__getitem__, displacing), *superseded]}
            unverified = [file for file in relied_on.values() if file.identity not in state.intact]
            if not unverified:
                return files, superseded
            for file in unverified:
                self._verify(file)  # the next iteration decides again, without damaged ones

    def _verify(self, file: CheckpointFile) -> None:
        try:
            self._state.verify(file)
        except CheckpointNotFound:
            return  # removed meanwhile
        except CorruptCheckpoint as error:
            self._state.damaged.add(file.identity)  # so that the warning comes once
            defer_warning(DamagedCheckpointWarning(f"{error}; it counts towards no rule and is kept"))
        else:
            self._state.intact.add(file.identity)


def as_candidates(files: Iterable[CheckpointFile]) -> list[Candidate]:
    """Files as the rules see them."""
    return [Candidate(file.step, file.kind == "final", file.metrics, file.measured_on) for file in files]


def find_damaged(directory: Path) -> Iterator[DamagedFile | DistrustWarning]:
    """Find the damaged files of a directory, by step, and a warning for each doubtful one.

    Each is given as soon as it was read. Remove it before asking for the next: that leaves other programs the
    least time to put an intact file in its place. Raises CheckpointError if the directory cannot be read.
    """
    for entry in catalog.list_names(directory):
        identity = _identity(entry.path)  # before reading, to detect a replacement during it
        finding = _classify(entry.path)
        if isinstance(finding, CorruptCheckpoint) and _identity(entry.path) != identity:
            finding = "it changed while it was read"
        if isinstance(finding, CorruptCheckpoint):
            yield DamagedFile(entry.path, entry.step, finding)
        elif finding is not None:
            yield DistrustWarning(f"{entry.path}: left: {finding}")


def collect_damaged(
    findings: Iterable[DamagedFile | DistrustWarning], report: Callable[[DamagedFile], None] | None
) -> list[DamagedFile]:
    """The damaged files among findings, each reported; warns of the others, for a public method's caller."""
    damaged: list[DamagedFile] = []
    for finding in findings:  # each takes long to find: report as it goes
        if isinstance(finding, DistrustWarning):
            warnings.warn(finding, stacklevel=3)  # points at the caller of the public method
            continue
        damaged.append(finding)
        if report is not None:
            report(finding)
    return damaged


def _classify(path: Path) -> CorruptCheckpoint | str | None:
    """The damage of a file; the reason for doubt, as text; None if it is intact."""
    if foreign.find_reader(path):
        try:
            catalog.verify(path)
        except CheckpointError as error:  # never removed
            return f"in an older format, and {str(error).removeprefix(f'{path}: ')}"
        return None
    if os.path.isdir(path) and not path.is_symlink():  # Path.is_dir() may raise for a link
        return "a directory; remove it yourself if nothing in it is needed"
    try:
        file = catalog.verify_content(path)
    except CheckpointNotFound:
        return catalog.dangling_link(path) if path.is_symlink() else None
    except CorruptCheckpoint as error:
        return _reason_to_keep(path, error) or error  # when in doubt, keep it
    except (CheckpointUnreadable, UnsupportedVersion) as error:  # it may be intact
        return str(error).removeprefix(f"{path}: ")
    try:
        file.require_name()
    except CorruptCheckpoint as error:
        name = checkpoint_file_name(file.step, file.kind)
        return f"every byte is right, but {error.reason}; rename it {name}, or move it away"
    return None


def _reason_to_keep(path: Path, error: CorruptCheckpoint) -> str | None:
    """Why a file that did not verify is kept; None if it may be removed."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno != errno.ELOOP:  # a link to itself has no content
        return error.reason  # the disk or network failed: the file may be intact
    try:
        is_foreign = path.is_file() and _is_of_another_program(path)
    except OSError as failure:
        return f"it cannot be read again: {failure.strerror}"
    return "a safetensors file of another program" if is_foreign else None


def _is_of_another_program(path: Path) -> bool:
    """Whether it has a valid safetensors header that is not a damaged one of this library."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:  # do not read what a damaged length asks for
            return False
        raw = file.read(length)
    if raw.startswith(OPENING):  # a damaged file of this library
        return False
    try:
        header: Any = json.loads(raw)
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return False
    if type(header) is not dict:
        return False
    metadata = header.pop(METADATA, None)
    if type(metadata) is dict and metadata.get("format") == FORMAT:  # ours, damaged elsewhere
        return False
    return bool(header) and all(
        type(tensor) is dict and tensor.keys() == {"dtype", "shape", "data_offsets"}
        for tensor in header.values()
    )


def _identity(path: Path) -> list[catalog.Identity | None]:
    """Identity of the name and of what it points to: of a link, either may be replaced."""
    identities: list[catalog.Identity | None] = []
    for status in (os.lstat, os.stat):
        try:
            identities.append(catalog.file_identity(status(path)))
        except OSError:
            identities.append(None)  # does not exist, or may not be read
    return identities
