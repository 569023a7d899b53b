"""Applies the retention rules to a directory, and removes damaged files on request.

Only intact checkpoints count towards a rule, and only intact ones are removed by one: files that this process
did not write are verified first, once. Damaged ones are left for the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from distrust.checkpoint import catalog, damage, retention, storage
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.retention import Candidate, Retention
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    DistrustWarning,
    WarningCollector,
)


class Retainer:
    """Decides what to keep, and removes the rest. The caller holds the state's mutex."""

    def __init__(self, state: ManagerState, rules: Retention) -> None:
        self._state = state
        self._rules = rules

    def clean_up_after_save(self, saved: Path, warnings: WarningCollector) -> None:
        """Remove what no rule keeps. A failure is only a warning: the saved checkpoint is durable."""
        try:
            self._clean_up(self._rules, warnings, saved=saved)
        except CheckpointError as error:
            warnings.append(DistrustWarning(f"{self._state.directory}: could not clean up: {error}"))

    def clean_up(self, warnings: WarningCollector, rules: Retention | None = None) -> list[int]:
        """Remove what no rule keeps; returns the removed steps."""
        self._begin()
        # Other writers' names may not be durable yet. Removing an older checkpoint relies on newer names.
        storage.sync_names(self._state.directory, self._state.disk)
        return self._clean_up(rules or self._rules, warnings)

    def list_superseded(self, warnings: WarningCollector) -> list[CheckpointFile]:
        """What :meth:`clean_up` would remove."""
        return self._select(self._rules, warnings, None)[1]

    def remove_damaged(self) -> Iterator[DamagedFile | DistrustWarning]:
        """Remove damaged files; gives each once it is removed, and a warning for each doubtful one."""
        self._begin()
        for finding in damage.find_damaged(self._state.directory):
            if isinstance(finding, DamagedFile):
                self._state.lock.confirm()  # reading may take long: the directory may be another by now
                storage.remove([finding.path], self._state.disk)
            yield finding

    def _begin(self) -> None:
        self._state.background.wait()
        self._state.acquire()

    def _clean_up(
        self, rules: Retention, warnings: WarningCollector, *, saved: Path | None = None
    ) -> list[int]:
        state = self._state
        state.lock.confirm()
        storage.remove_stale_files(state.directory, state.disk)  # what a failed save could not remove
        files, superseded = self._select(rules, warnings, saved)
        storage.remove([file.path for file in superseded], state.disk)  # the only removal of intact files
        # A step whose periodic file was removed still exists if it has a final one.
        remaining = {file.step for file in files if file not in superseded}
        return sorted({file.step for file in superseded} - remaining)

    def _select(
        self, rules: Retention, warnings: WarningCollector, saved: Path | None
    ) -> tuple[list[CheckpointFile], list[CheckpointFile]]:
        """All files that count, and those among them that no rule keeps."""
        state = self._state
        resumed_from = state.resumed_from and state.resumed_from.identity
        while True:
            # Damaged ones neither count nor are removed.
            files = [file for file in self._scan() if file.identity not in state.damaged]
            by_step = Scan.of(files).by_step()
            candidates = as_candidates(by_step.values())
            paths_to_keep = {by_step[step].path for step in retention.steps_to_keep(candidates, rules)}
            superseded = [
                file
                for file in files
                # The run may have to resume again from the one that it resumed from.
                if file.path not in {*paths_to_keep, saved} and file.identity != resumed_from
            ]
            # Verify before relying on a file: those that displace others in a rule, the final checkpoint of a
            # step whose periodic one goes, and those to remove (a damaged one is left).
            displacing = retention.steps_that_displace(candidates, rules) | {file.step for file in superseded}
            unverified = [
                file
                for file in [*(by_step[step] for step in displacing), *superseded]
                if file.identity not in state.intact
            ]
            if not unverified:
                return files, superseded
            for file in unverified:
                self._verify(file, warnings)  # the next iteration decides again, without damaged ones

    def _scan(self) -> tuple[CheckpointFile, ...]:
        files = self._state.scan().files
        self._state.forget_removed(files)
        return files

    def _verify(self, file: CheckpointFile, warnings: WarningCollector) -> None:
        try:
            catalog.verify(file.path)
        except CheckpointNotFound:
            return  # removed meanwhile
        except CorruptCheckpoint as error:
            self._state.damaged.add(file.identity)  # so that the warning comes once
            warnings.append(DamagedCheckpointWarning(f"{error}; it counts towards no rule and is kept"))
        else:
            self._state.intact.add(file.identity)


def as_candidates(files: Iterable[CheckpointFile]) -> list[Candidate]:
    """Files as the rules see them."""
    return [Candidate(file.step, file.kind == "final", file.metrics, file.measured_on) for file in files]
