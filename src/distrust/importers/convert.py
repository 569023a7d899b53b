"""Converts checkpoints of other programs: each is verified, written atomically, read back and compared.

The source is never changed. :class:`CheckpointManager` writes the result: under its lock, durable, with
digests. The same call resumes an interrupted conversion: ``state_digest`` identifies finished checkpoints.
A directory holds one timeline: nothing is written next to checkpoints of another or of a resumed training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distrust import importers
from distrust.checkpoint import CheckpointFile, CheckpointManager, catalog, serialization
from distrust.checkpoint.files import checkpoint_file_name, parse_checkpoint_name
from distrust.engines import require_installed
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    ConfigError,
    CorruptCheckpoint,
    DistrustError,
    SaveFailed,
    quote_untrusted,
)
from distrust.importers import detect
from distrust.importers.detect import TRAINER_STATE, detect_format, is_adapter_folder, is_trainer_folder
from distrust.importers.imported import Imported
from distrust.paths import refuse_links
from distrust.run_record import RunRecord, with_conversion_source
from distrust.training import imported as adoption

__all__ = ["ConvertedCheckpoint", "Outcome", "convert", "read"]

Outcome = Literal["converted", "already converted", "refused", "damaged", "unreadable", "incomplete"]

_ONE_TRAINING = "two trainings never share a folder; give another --to"
_NO_MODEL = "it has no model, so no run can resume from it; `distrust show` shows what it has"


@dataclass(frozen=True, slots=True)
class ConvertedCheckpoint:
    """The result for one checkpoint."""

    source: Path  # its path
    # ``already converted``: with the same state; ``refused``: because of the target, or because no run here
    # could resume from it; ``unreadable``: by this process; ``incomplete``: without a model.
    outcome: Outcome
    reason: str | None = None  # why nothing was written, or what was not imported
    step: int | None = None  # completed optimizer steps; None if unknown
    target: Path | None = None  # our file; None if there is none
    state_digest: str | None = None  # the identity of its state
    # Whether its format has checksums of the weights, which were compared. In other formats, a bit that
    # flipped earlier is not detected.
    is_verified: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the target now holds the checkpoint."""
        return self.outcome in ("converted", "already converted")


def convert(
    source: Path,
    to: Path,
    *,
    force: bool = False,
    model: str | None = None,
    report: Callable[[ConvertedCheckpoint], None] = lambda _: None,
) -> list[ConvertedCheckpoint]:
    """Convert one checkpoint, or all of a directory by step. One that cannot be converted stops no other.

    Args:
        source: a checkpoint in an older format or of the transformers Trainer, a directory of them, a run, or
            an adapter folder of peft or mlx-lm.
        to: the directory for our files; for a run folder, its directory of checkpoints.
        force: replace a checkpoint with another state, and write next to checkpoints of another training.
            Checkpoints in an older format are never replaced.
        model: the base model of a Trainer's or peft's folder, if it is not where the folder says.
        report: called with each result at once: converting all of them may take long.

    Raises:
        CheckpointNotFound: if there is nothing to convert.
        ConfigError: if the target is, or is inside of, another program's checkpoint.
        CheckpointDirectoryLocked: if a training writes to the target.
        SaveFailed: if the target cannot be written to.
    """
    sources = _list_sources(source)
    for folder in (to.absolute(), *to.absolute().parents):  # before anything is created
        if _is_convertible(folder):
            problem = f"{folder} is a checkpoint of another program; give the folder of a new run"
            raise ConfigError(f"--to {to}: {problem}")
    results = []
    # The folders of this training's checkpoints, now and before they were moved.
    origins = {Path(os.path.realpath(path)).parent for path in sources}
    directory = target_directory(to)
    if directory != to:
        refuse_links(directory)
    with CheckpointManager(directory, keep_last=None, record_host=False) as manager:
        for path in sources:
            results.append(_convert(path, manager, origins, force=force, model=model))
            report(results[-1])
    return results


def target_directory(to: Path) -> Path:
    """The directory of checkpoints of a target: itself if it is one, else that of the run (to be)."""
    is_directory = to.name == catalog.RUN_SUBDIRECTORY or (to.is_dir() and bool(catalog.list_names(to)))
    return to if is_directory else to / catalog.RUN_SUBDIRECTORY


def _list_sources(source: Path) -> list[Path]:
    if _is_convertible(source):
        return [source]
    if not os.path.lexists(source):
        raise CheckpointNotFound(f"{source}: no such file or directory", path=source)
    if not os.path.isdir(source):
        raise CheckpointNotFound(f"{source}: not a checkpoint in a format that can be converted", path=source)
    directory = catalog.checkpoint_directory(source)
    # A run may have been created around the old checkpoints: then they are next to its own directory.
    for folder in (directory, source):
        entries = [
            entry
            for path in folder.iterdir()
            if (entry := parse_checkpoint_name(path)) and _is_convertible(path)
        ]
        if entries:
            entries.sort(key=lambda entry: (entry.step, entry.kind == "final"))
            return [entry.path for entry in entries]
    count = len(catalog.scan(directory).files)
    note = f"; {count} are already in this program's own format" if count else ""
    raise CheckpointNotFound(f"{source}: no checkpoints here that can be converted{note}", path=source)


def _is_convertible(path: Path) -> bool:
    return detect_format(path) is not None or is_trainer_folder(path) or is_adapter_folder(path)


def _convert(
    source: Path, manager: CheckpointManager, origins: set[Path], *, force: bool, model: str | None
) -> ConvertedCheckpoint:
    try:
        imported = read(source, model)
        checkpoint = imported.to_checkpoint()
    except DistrustError as error:
        outcome: Outcome = "damaged" if isinstance(error, CheckpointError) else "refused"
        outcome = "unreadable" if isinstance(error, CheckpointUnreadable) else outcome
        return ConvertedCheckpoint(source, outcome, str(error).removeprefix(f"{source}: "))
    step, is_verified = checkpoint.step, imported.format == detect.DIRECTORY
    if not checkpoint.model:  # metadata only
        return ConvertedCheckpoint(source, "incomplete", _NO_MODEL, step)
    # Relative: it says as little as possible of this machine, and stays valid if both folders move together.
    origin = os.path.relpath(os.path.realpath(source), os.path.realpath(manager.directory))
    checkpoint = replace(checkpoint, run=with_conversion_source(checkpoint.run, origin))
    path = manager.directory / checkpoint_file_name(step, imported.kind)
    manager.acquire()  # from here on nobody else writes to the target
    try:
        digest = serialization.state_digest(checkpoint, imported.kind)
        existing = _existing_state(path)
        if existing == digest:
            # It was converted earlier, so its former folder is one of this training, too.
            origins |= _origin(catalog.read_header(path))
            return ConvertedCheckpoint(source, "already converted", None, step, path, digest, is_verified)
        if not force:
            if existing is None:
                conflict = _other_training(manager, origins)
            else:
                states = f"{existing[:16]}, not {digest[:16]}"
                conflict = f"{path} has another state ({states}); --force replaces it"
            if conflict is not None:
                return ConvertedCheckpoint(source, "refused", conflict, step)
        manager.save(checkpoint, final=imported.kind == "final")
        written = catalog.verify(path).state_digest  # read back from the disk
        if written != digest:
            raise CorruptCheckpoint(f"reading it back gave another state: {written}, not {digest}", path=path)
    except DistrustError as error:
        reason = str(error)
        if isinstance(error, SaveFailed):
            if detect_format(path) is None:
                raise  # a failing disk would fail for the next checkpoint, too
            reason = f"{path} is in an older format, and is never replaced; give another folder"
        return ConvertedCheckpoint(source, "refused", reason, step)
    dropped = "; ".join(f"dropped: {line}" for line in adoption.list_dropped(checkpoint))
    return ConvertedCheckpoint(source, "converted", dropped or None, step, path, digest, is_verified)


def _other_training(manager: CheckpointManager, origins: set[Path]) -> str | None:
    """Why the target directory may not be written to: it has checkpoints of another training."""
    for file in manager.scan().files:
        origin = _origin(file)
        if not origin:  # a run here saved it
            return f"{file.path} belongs to a run that was resumed there, and {_ONE_TRAINING}"
        if not origin <= origins:
            former = f"came from {quote_untrusted(str(*origin))}, another training"
            return f"{file.path} {former}, and {_ONE_TRAINING}, or --force if it is the same training"
    return None


def _origin(file: CheckpointFile) -> set[Path]:
    """The folder that a checkpoint was converted from; empty if a run here saved it."""
    path = RunRecord.from_header(file.header).converted_from
    # Absolute in files of earlier versions.
    return {Path(os.path.normpath(os.path.realpath(file.path.parent) / Path(path))).parent} if path else set()


def read(source: Path, model: str | None) -> Imported:
    """The checkpoint, every byte verified as far as its format allows."""
    is_trainer = is_trainer_folder(source)
    if not is_trainer and not is_adapter_folder(source):
        header, imported = importers.load(source)
        CheckpointFile(source, header).require_name()
        return imported
    # Imported only when it is used: the other formats need no framework.
    if not is_trainer and os.path.isfile(source / detect.MLX_WEIGHTS):
        require_installed("mlx", purpose="this folder")
        from distrust.importers import mlx_adapter

        return mlx_adapter.read(source)
    require_installed("torch", purpose="this folder")
    from distrust.importers import trainer_folder

    imported = trainer_folder.read(source, model=model)
    entry = parse_checkpoint_name(source) if is_trainer else None
    if entry and entry.step != imported.step:
        reason = f"{TRAINER_STATE} says step {imported.step}, its name says {entry.step}"
        raise CorruptCheckpoint(reason, path=source)
    return replace(imported, kind=entry.kind) if entry else imported


def _existing_state(path: Path) -> str | None:
    """The digest of the state in the target file, or what is there instead; None if it does not exist."""
    if not os.path.lexists(path):
        return None
    if os.path.isdir(path) and detect_format(path) is None:
        raise CheckpointError(f"{path}: a folder has this name", path=path)
    try:
        return catalog.verify(path).state_digest or "in an older format"
    except CorruptCheckpoint:
        return "a damaged file"
