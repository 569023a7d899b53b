"""A folder, or a file, that appears under its name wholly or not at all.

Whoever writes it (transformers, peft) is no part of this package and writes as it likes. So everything is
written into a hidden folder beside the target, every file and folder of it is synced, and then it gets its
name, in one rename. What a killed process left behind is removed by the next export to the same target: a
writer holds a lock on its hidden folder, and the system lets go of it when the writer dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.disk import Disk
from distrust.errors import ExportFailed


def require_free(target: Path) -> None:
    """Refuse to write over anything; an empty folder is nothing.

    Raises:
        ExportFailed: if something is there, or nothing can be.
    """
    with _errors_with_path(target):
        above = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            raise ExportFailed(f"{target}: cannot be made: {above} is no folder", path=target)
        if os.path.lexists(target) and not _is_empty_folder(target):
            raise ExportFailed(
                f"{target}: is there already, and is not written over; remove it, or give another name",
                path=target,
            )


@contextlib.contextmanager
def atomic_directory(target: Path, *, single_file: bool = False, disk: Disk | None = None) -> Iterator[Path]:
    """A folder to write into; it becomes the target when the block ends, and vanishes if that raises.

    Args:
        target: the name; its parents are made.
        single_file: the target is the file of that name in the folder, not the folder.
        disk: what syncs and renames, in place of the operating system's: one that fails, for tests.

    Raises:
        ExportFailed: if it cannot be written. Nothing is at the target then, unless the last step of all,
            the sync of its parent folder, failed: then the whole of it stands.
    """
    disk = disk or Disk()
    require_free(target)
    with _errors_with_path(target):
        named_in = {target.parent, *(made.parent for made in target.parents if not made.exists())}
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        folder = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        disk.make_directory(folder)
    try:
        with _errors_with_path(target), _locked(folder):
            yield folder
            _sync(folder, disk)
            require_free(target)  # still; and the system itself replaces no folder that holds anything
            disk.rename(folder / target.name if single_file else folder, target)
        _sync_names(target, named_in, disk)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path, disk: Disk) -> None:
    """Have the disk hold every file of a folder, and their names; give them the folder's permissions."""
    permissions = folder.stat().st_mode & 0o666  # as the umask has it; some writers make files private
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, permissions)
                disk.sync(descriptor)
            finally:
                os.close(descriptor)
        disk.sync_directory(Path(root))


def _sync_names(target: Path, folders: set[Path], disk: Disk) -> None:
    """Have the disk hold the names of the target, and of the parents that were made for it."""
    try:
        for folder in sorted(folders, reverse=True):
            disk.sync_directory(folder)
    except OSError as error:
        raise ExportFailed(
            f"{target}: written and whole, but its folder could not be synced ({error.strerror}): "
            "a power cut may still take it away",
            path=target,
        ) from error


def _sweep(target: Path) -> None:
    """Remove what dead writers left: those that live hold a lock."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(target.parent):
        if leftover.fullmatch(name):
            folder = target.parent / name
            with contextlib.suppress(OSError), _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _errors_with_path(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportFailed(
            f"{target}: not written: {error.strerror or error}. Nothing is there", path=target
        ) from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)
