"""Checkpoints of other programs -> ours: each verified before, written atomically, read back and compared.

What is read is left alone: nothing of it is changed, moved or removed. What is written is one of our files,
by :class:`CheckpointManager`: under its lock, durable, with its digests. Nothing is cleaned up on the way. A
conversion that was stopped is gone on with by the same call: what stands already is recognised by its
``state_digest``. Two timelines never share a directory: where a training has gone on, or checkpoints of
another one stand, nothing is written.

Read are the two older formats (:mod:`distrust.importers`), the checkpoint folders of the transformers
Trainer, and adapter folders of peft and mlx-lm, which stand at step 0. Whatever there is to know of the
program that began the run stands in the checkpoint: ``run["imported_from"]`` names the format,
``metadata["foreign_config"]`` is that program's config.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from distrust import importers
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, catalog, serialization
from distrust.checkpoint.files import Entry, checkpoint_file_name, parse_checkpoint_name
from distrust.checkpoint.format import Kind
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
from distrust.importers.detect import ADAPTER_CONFIG, MLX_WEIGHTS, TRAINER_STATE, is_trainer_folder
from distrust.run_record import RunRecord, with_conversion_source
from distrust.training import imported

__all__ = ["ConvertedCheckpoint", "Outcome", "convert"]

Outcome = Literal["converted", "already there", "refused", "damaged", "unreadable", "incomplete"]
#: The outcomes after which a checkpoint stands in the target.
SUCCEEDED: tuple[Outcome, ...] = ("converted", "already there")

#: In ``run`` of what is written: where it was.
_NO_MODEL = "it holds no model, so there is nothing to go on from; `distrust show` tells what it does hold"
_TRAINER_FOLDER, _MLX_FOLDER = "distrust.importers.trainer_folder", "distrust.importers.mlx_adapter"


@dataclass(frozen=True, slots=True)
class ConvertedCheckpoint:
    """What became of one checkpoint.

    Attributes:
        source: where it is.
        outcome: ``converted``; ``already there``, with the same state; ``refused``, because of what stands
            there, or because no run here could go on from it; ``damaged``; ``unreadable`` by this process;
            ``incomplete``, without a model.
        reason: why nothing was written, or what to know of what was.
        step: optimizer steps made; None where that could not be read.
        target: our file, where one stands now.
        state_digest: the identity of its state.
        is_proven: whether its format has checksums of the weights, which were compared. Of the others a bit
            that flipped before is not found.
    """

    source: Path
    outcome: Outcome
    reason: str | None = None
    step: int | None = None
    target: Path | None = None
    state_digest: str | None = None
    is_verified: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the checkpoint stands in the target now."""
        return self.outcome in SUCCEEDED


def convert(
    source: Path,
    to: Path,
    *,
    force: bool = False,
    model: str | None = None,
    report: Callable[[ConvertedCheckpoint], None] | None = None,
) -> list[ConvertedCheckpoint]:
    """Convert one checkpoint, or all of a directory, by step.

    What cannot be converted is told, and the others are.

    Args:
        source: a checkpoint in an older format or of the transformers Trainer, a directory of them, a run, or
            an adapter folder of peft or mlx-lm.
        to: the directory that gets our files; of a run folder, its directory of checkpoints.
        force: replace what stands there with another state, and write beside checkpoints of another training.
            What is in an older format is never replaced.
        model: the base model of a Trainer's or peft's folder, if it does not lie where that says.
        report: told of each checkpoint as soon as it is done: to convert them all may take long.

    Raises:
        CheckpointNotFound: if there is nothing to convert.
        ConfigError: if the target is, or lies in, another program's checkpoint.
        CheckpointDirectoryLocked: if a training writes to the target.
        SaveFailed: if the target cannot be written to.
    """
    sources = _found(source)
    _require_place(to)
    done = []
    #: Where the steps of this training were found, now or before their folder was moved.
    origins = {Path(os.path.realpath(source)).parent for source in sources}
    with CheckpointManager(target_directory(to), keep_last=None) as manager:
        for path in sources:
            done.append(_convert(path, manager, origins, force=force, model=model))
            if report is not None:
                report(done[-1])
    return done


def target_directory(to: Path) -> Path:
    """The directory of checkpoints that a target stands for: itself if it is one, else that of a run.

    A run need not be there yet.
    """
    is_one = to.name == catalog.RUN_SUBDIRECTORY or (to.is_dir() and bool(catalog.list_names(to)))
    return to if is_one else to / catalog.RUN_SUBDIRECTORY


def _require_place(to: Path) -> None:
    """What other programs wrote is left as it is, so nothing is put into it."""
    absolute = to.absolute()
    for place in (absolute, *absolute.parents):
        if _is_convertible(place):
            raise ConfigError(f"--to {to}: {place} is a checkpoint of another program; give a run of its own")


def _found(source: Path) -> list[Path]:
    if _is_convertible(source):
        return [source]
    if not os.path.lexists(source):
        raise CheckpointNotFound(f"{source}: no such file or directory", path=source)
    if not os.path.isdir(source):
        raise CheckpointNotFound(f"{source}: no checkpoint in a format that can be converted", path=source)
    directory = catalog.checkpoint_directory(source)
    # What lies beside a run's own directory is older than that: a run may have been made of it in its place.
    entries = _entries(directory) or _entries(source)
    if not entries:
        ours = len(catalog.scan(directory).files)
        also = f"; {ours} are in this program's own format, and need none" if ours else ""
        raise CheckpointNotFound(f"{source}: no checkpoints here that can be converted{also}", path=source)
    return [path for path, *_ in sorted(entries, key=lambda entry: (entry[1], entry[2] == "final"))]


def _entries(directory: Path) -> list[Entry]:
    return [
        entry
        for path in directory.iterdir()
        if (entry := parse_checkpoint_name(path)) and _is_convertible(path)
    ]


def _is_convertible(path: Path) -> bool:
    return importers.detect_format(path) is not None or is_trainer_folder(path) or _is_adapter(path)


def _is_adapter(path: Path) -> bool:
    return os.path.isfile(path / ADAPTER_CONFIG)


def _convert(
    source: Path, manager: CheckpointManager, origins: set[Path], *, force: bool, model: str | None
) -> ConvertedCheckpoint:
    try:
        checkpoint, kind = _read(source, model)
    except DistrustError as error:
        outcome = _outcome(error)
        return ConvertedCheckpoint(source, outcome, str(error).removeprefix(f"{source}: "))
    step = checkpoint.step
    if not checkpoint.model:
        return ConvertedCheckpoint(source, "incomplete", _NO_MODEL, step)
    checkpoint = replace(checkpoint, run=with_conversion_source(checkpoint.run, os.path.realpath(source)))
    path = manager.directory / checkpoint_file_name(step, kind)
    manager.acquire()
    try:
        digest = serialization.state_digest(checkpoint, kind)
        standing = _standing(path)
        proven = importers.detect_format(source) == "directory"
        if standing == digest:
            origins |= _origin(catalog.read_header(path))
            return ConvertedCheckpoint(source, "already there", None, step, path, digest, proven)
        reason = None if force else _taken(path, standing, digest) or _of_another_training(manager, origins)
        if reason is not None:
            return ConvertedCheckpoint(source, "refused", reason, step)
        manager.save(checkpoint, final=kind == "final")
        _require_same(path, digest)
    except SaveFailed:
        if importers.detect_format(path) is None:
            raise  # the disk: the next one would fail, too
        reason = f"{path} is in an older format, and is never replaced; give another folder"
        return ConvertedCheckpoint(source, "refused", reason, step)
    except DistrustError as error:
        return ConvertedCheckpoint(source, "refused", str(error), step)
    lost = [f"dropped: {line}" for line in imported.list_dropped(checkpoint)]
    return ConvertedCheckpoint(source, "converted", "; ".join(lost) or None, step, path, digest, proven)


def _outcome(error: DistrustError) -> Outcome:
    if isinstance(error, CheckpointUnreadable):
        return "unreadable"
    return "damaged" if isinstance(error, CheckpointError) else "refused"


def _taken(path: Path, standing: str | None, digest: str) -> str | None:
    """Why a name is not free."""
    if standing is None:
        return None
    return f"{path} holds another state ({standing[:16]}, not {digest[:16]}); --force replaces it"


def _of_another_training(manager: CheckpointManager, origins: set[Path]) -> str | None:
    """Why a directory is not the place for a checkpoint: others there are no steps of the same training."""
    for file in manager.scan().files:
        came_from = _origin(file)
        if not came_from:
            said = f"{file.path} is of a training that goes on there"
            return f"{said}, and two never share a folder; give another --to"
        if not came_from <= origins:
            return (
                f"{file.path} came from {quote_untrusted(str(*came_from))}, another training, and two never "
                "share a folder; give another --to, or --force if it is the same one"
            )
    return None


def _origin(file: CheckpointFile) -> set[Path]:
    """The folder that a converted checkpoint lay in; nothing of what was saved by a run here."""
    source = RunRecord.from_header(file.header).converted_from
    return {Path(source).parent} if source else set()


def _read(source: Path, model: str | None) -> tuple[Checkpoint, Kind]:
    """The checkpoint, every byte of it verified as far as its format allows, and its kind."""
    if is_trainer_folder(source):
        named = parse_checkpoint_name(source)
        checkpoint = _reader("torch", _TRAINER_FOLDER).read(source, model=model)
        if named and named[1] != checkpoint.step:
            said = f"{TRAINER_STATE} says step {checkpoint.step}, its name says {named[1]}"
            raise CorruptCheckpoint(said, path=source)
        return checkpoint, named[2] if named else "periodic"
    if _is_adapter(source):
        if os.path.isfile(source / MLX_WEIGHTS):
            return _reader("mlx", _MLX_FOLDER).read(source), "periodic"
        return _reader("torch", _TRAINER_FOLDER).read_adapter(source, model=model), "periodic"
    header, checkpoint = importers.read(source)
    CheckpointFile(source, header).require_name()
    return checkpoint, header.kind


def _reader(engine: Literal["torch", "mlx"], module: str) -> Any:
    """Imported where it is needed: who converts another format needs no framework."""
    require_installed(engine, purpose="this folder")
    return import_module(module)


def _standing(path: Path) -> str | None:
    """The identity of what stands in the target; None if nothing does."""
    if not os.path.lexists(path):
        return None
    if os.path.isdir(path) and importers.detect_format(path) is None:
        raise CheckpointError(f"{path}: a folder has this name", path=path)
    try:
        return catalog.verify(path).state_digest or "in an older format"
    except CorruptCheckpoint:
        return "a damaged file"


def _require_same(path: Path, digest: str) -> None:
    """Read back what was written."""
    written = catalog.verify(path).state_digest
    if written != digest:
        raise CorruptCheckpoint(f"what was read back is another state: {written}, not {digest}", path=path)
