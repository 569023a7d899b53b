"""What commands are given to read: a path, or a location in a store. The one place that tells them apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distrust.checkpoint import CheckpointFile, Scan, catalog
from distrust.checkpoint.remote.location import Location, parse_target
from distrust.checkpoint.remote.location import Target as Target

if TYPE_CHECKING:
    from distrust.checkpoint.remote.remote_run import RemoteRun

target = parse_target  #: for ``add_argument(type=target)``


def path_of(source: Target) -> Path:
    """The path that errors name; of a location one that prints as the URL."""
    return source.path if isinstance(source, Location) else source


def remote(location: Location) -> RemoteRun:
    """The run, or the one checkpoint, at a location."""
    from distrust.checkpoint.remote.remote_run import RemoteRun  # local targets do not pay for it

    return RemoteRun(location)


def is_one(source: Target) -> bool:
    """Whether it is one checkpoint, not a run or a directory. Raises CheckpointNotFound."""
    if isinstance(source, Location):
        return remote(source).is_one
    catalog.require_exists(source)
    return not catalog.is_directory(source)


def scan(source: Target) -> Scan:
    """All checkpoints of a run or directory, or the one, by their headers."""
    if isinstance(source, Location):
        return remote(source).scan()
    if is_one(source):
        return Scan.of([catalog.read_header(source)])
    return catalog.scan(catalog.checkpoint_directory(source))


def directory(source: Target) -> Target:
    """The checkpoints of a run, or what was named if it is no run."""
    if isinstance(source, Path):
        return catalog.checkpoint_directory(source)
    run = remote(source)
    run.files()  # says where they are
    return run.directory


def newest(source: Target) -> CheckpointFile:
    """As :func:`catalog.newest`: of several, the newest with an intact header."""
    return remote(source).newest() if isinstance(source, Location) else catalog.newest(source)


def checks(source: Target) -> dict[Path, Callable[[], CheckpointFile]]:
    """For each checkpoint, by path, what reads and verifies every byte. Raises CheckpointNotFound if none."""
    if isinstance(source, Location):
        from distrust.checkpoint.remote.fetch import object_path, verify

        client = (run := remote(source)).client
        return {object_path(client, file): partial(verify, client, file) for file in run.require_files()}
    return {path: partial(catalog.verify, path) for path in catalog.resolve(source)}


def runs(source: Target) -> list[Target]:
    """The runs directly below a folder or location, by name. One level: a run may be large."""
    if isinstance(source, Location):
        return [source / name for name in remote(source).run_names()]
    return [path for path in sorted(source.iterdir()) if os.path.isdir(path / catalog.RUN_SUBDIRECTORY)]
