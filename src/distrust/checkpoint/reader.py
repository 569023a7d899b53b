"""Finds, verifies and loads checkpoints: by step or path, the newest, the best. Needs no lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from distrust.checkpoint import arrays, catalog, foreign, retention, serialization
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.remote.location import require_path
from distrust.checkpoint.retainer import as_candidates
from distrust.checkpoint.retention import Retention
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    DistrustWarning,
    NoIntactCheckpoint,
    UnsupportedVersion,
    defer_warning,
    quote_untrusted,
    shorten,
)

Result = TypeVar("Result")
#: A checkpoint as a caller names it: a step of the manager's directory, or a path.
Target = int | str | os.PathLike[str]
Loaded = tuple[CheckpointFile, Checkpoint]
Verify = Literal["full", "lazy"]


class Reader:
    """Loads checkpoints of one directory, and records which ones verified."""

    def __init__(self, state: ManagerState, rules: Retention) -> None:
        self._state = state
        self._rules = rules

    def load(
        self, target: Target, framework: arrays.Framework, *, verify: Verify = "full", **options: Any
    ) -> Loaded:
        """Read and verify one checkpoint; the options are those of :func:`serialization.load`."""
        if verify not in get_args(Verify):
            raise ConfigError(f"verify={verify!r} is none of {', '.join(get_args(Verify))}")
        lazy = verify == "lazy"
        if lazy and not options["mapped"]:
            raise ConfigError('verify="lazy" needs mmap=True: without it everything is read now')
        file, checkpoint = self.read(target, lambda path: _load(path, framework, lazy=lazy, **options))
        # A lazy one is not verified yet; one in another directory is no file of this one.
        if file.path.parent == self._state.directory and not lazy:
            self._state.record_loaded(file)
        return file, checkpoint

    def load_first_intact(self, framework: arrays.Framework, *, best: bool = False, **options: Any) -> Loaded:
        """Read the newest checkpoint that verifies, or of those that do the one with the best metric."""
        while True:
            files = self._list_best_first() if best else self._list_newest_first()
            try:
                return self._load_first_of(files, lambda path: _load(path, framework, **options))
            except CheckpointNotFound:
                continue  # a writer removed one between listing and reading: list again

    def choose(self, step: int | None, framework: arrays.Framework, *, best: bool) -> Loaded:
        """Read a step, the best checkpoint, or else the newest; ConfigError for both, or a foreign one."""
        if step is not None and best:
            raise ConfigError("a step and the best one were asked for: give one of them")
        if step is not None:
            file, checkpoint = self.load(step, framework)
        else:
            file, checkpoint = self.load_first_intact(framework, best=best)
        foreign.require_converted(file)  # a foreign one names no base model and no config
        return file, checkpoint

    def validate(self, target: Target) -> None:
        """Verify a checkpoint."""
        file = self.read(target, catalog.verify)
        if file.path.parent == self._state.directory:  # a copy in another directory proves nothing
            self._state.intact.add(file.identity)

    def read(self, target: Target, read: Callable[[Path], Result]) -> Result:
        """Apply ``read`` to the path of a checkpoint."""
        while True:
            path = self._find(target)
            try:
                return read(path)
            except CheckpointNotFound:
                if not isinstance(target, int):
                    raise
                # A writer removed it between listing and reading: its step's final one may exist now.

    def _list_newest_first(self) -> list[CheckpointFile | DamagedFile]:
        contents = self._state.scan()
        files: list[CheckpointFile | DamagedFile] = [*contents.all_intact, *contents.damaged]
        files.sort(key=lambda file: file.rank, reverse=True)  # with damaged ones, to report them
        if not files:
            directory = self._state.directory
            raise CheckpointNotFound(f"{directory}: no checkpoints here", path=directory)
        return files

    def _list_best_first(self) -> list[CheckpointFile]:
        files = self._state.scan().by_step()
        # The same function decides what cleanup keeps: the best one is always there.
        steps = retention.rank_by_metric(as_candidates(files.values()), self._rules)
        if not steps:
            names = sorted({quote_untrusted(name) for file in files.values() for name in file.metrics})
            raise CheckpointNotFound(
                f"{self._state.directory}: no checkpoint has the metric {self._rules.metric!r}; "
                f"there are {shorten(', '.join(names)) or 'no metrics'} in steps {_format_steps(files)}",
                path=self._state.directory,
            )
        return [files[step] for step in steps]

    def _load_first_of(
        self, files: Sequence[CheckpointFile | DamagedFile], load: Callable[[Path], Loaded]
    ) -> Loaded:
        # Texts, not errors: an error holds the frames of its traceback, and with them a checkpoint.
        reasons: list[str] = []
        without_model: list[Path] = []
        for candidate in files:
            if isinstance(candidate, DamagedFile):
                if isinstance(candidate.error, UnsupportedVersion):
                    raise candidate.error  # an older checkpoint would lose what the later version did
                reasons.append(str(candidate.error))
                continue
            try:
                file, checkpoint = load(candidate.path)
            except CorruptCheckpoint as error:
                reasons.append(str(error))
                self._state.damaged.add(candidate.identity)  # cleanup need not verify it again
                continue
            if file.is_foreign and not checkpoint.model:  # metadata only: nothing to resume from
                without_model.append(file.path)
                continue
            # Never fall back silently: the skipped ones are newer, or better.
            for reason in reasons:
                defer_warning(DamagedCheckpointWarning(f"skipped a damaged checkpoint: {reason}"))
            for path in without_model:
                text = f"skipped a checkpoint without a model, metadata only: {path}"
                defer_warning(DistrustWarning(text))
            self._state.record_loaded(file)
            return file, checkpoint
        # Never start from the beginning silently: the user decides.
        raise self._no_intact(reasons, without_model, sorted({file.step for file in files}))

    def _no_intact(self, reasons: list[str], without_model: list[Path], steps: list[int]) -> CheckpointError:
        directory = self._state.directory
        lines = [
            f"{directory}: there are checkpoints, and none of them is intact:",
            *reasons,
            *(f"{path}: contains no model" for path in without_model),
            "move them away to start over, or restore one from a copy",
        ]
        if not reasons:
            lines = [
                f"{directory}: no checkpoint here contains a model: they are metadata only, which load(step) "
                f"reads; there are {_format_steps(steps)}"
            ]
        return NoIntactCheckpoint(lines, path=directory)

    def _find(self, target: Target) -> Path:
        if not isinstance(target, int):
            # A path is read as it is, in any directory.
            return require_path(target, "a checkpoint:").absolute()
        contents = self._state.scan()
        damaged = [file.error for file in contents.damaged if file.step == target]
        steps = contents.by_step()
        if target in steps:
            path = steps[target].path
            for error in damaged:
                defer_warning(DamagedCheckpointWarning(f"{error}; {path} is read instead"))
            return path
        if damaged:
            raise damaged[0]  # more helpful than "not found"
        directory = self._state.directory
        raise CheckpointNotFound(
            f"{directory}: no checkpoint of step {target}; there are {_format_steps(steps)}", path=directory
        )


def _load(path: Path, framework: arrays.Framework, **options: Any) -> Loaded:
    if reader := foreign.find_reader(path):  # always read whole: it has no digests to verify parts by
        if options.get("device") is not None:
            raise ConfigError(f"{path}: is in a foreign format: leave out device=")
        header, checkpoint = reader.read(path, framework=framework)
        file = CheckpointFile(path, header)
        file.require_name()  # as for the core's own format
        return file, checkpoint
    return serialization.load(path, framework=framework, **options)


def _format_steps(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
