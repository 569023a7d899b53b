"""A file that appears under its name wholly or not at all.

It is written under a hidden name in the same folder, synced and renamed, and then the folder is synced. What
a killed process left is removed by the next one that writes the same file: a writer holds a lock on what it
writes, and the system lets go of it when the writer dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from distrust.checkpoint.disk import Disk
from distrust.errors import NOT_FOUND_ERRORS, ConfigError, WriteFailed


def require_writable(path: Path, *, force: bool, inputs: Iterable[str] = ()) -> None:
    """Refuse what may not be written over, before anything slow is done.

    Args:
        path: of the file to be.
        force: whether a file that is there is replaced.
        inputs: files and folders that are read: they are neither replaced nor added to.

    Raises:
        ConfigError: for a file that is there, or one that is read.
        WriteFailed: where its folder is not there.
    """
    for name in inputs:
        if _is_same(path, name):
            raise ConfigError(
                f"{path}: is read, and never replaced: what the data said before would be gone; give another "
                "name"
            )
        if os.path.isdir(name) and Path(os.path.realpath(name)) in Path(os.path.realpath(path)).parents:
            raise ConfigError(
                f"{path}: lies in the folder that is read, and would be read as its data; give another name"
            )
    folder = path.parent
    if not os.path.isdir(folder):
        what = "is no folder" if os.path.lexists(folder) else NOT_FOUND_ERRORS
        raise WriteFailed(f"{path}: not written: {folder}: {what}; make that folder first", path=path)
    if os.path.lexists(path):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is there already, and is no file; give another name")
        if not force:
            raise ConfigError(f"{path}: is there already; give another name, or --force to have it replaced")


def _is_same(path: Path, name: str) -> bool:
    try:
        return os.path.samefile(path, name)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool, disk: Disk | None = None) -> Iterator[BinaryIO]:
    """A file to write into; it has its name when the block ends, and vanishes if that raises.

    Args:
        path: its name; of a link, what that points to. Its folder is there.
        force: whether a file of that name is replaced.
        disk: what syncs and renames, in place of the operating system's: one that fails, for tests.

    Raises:
        ConfigError: there is a file of that name, and ``force`` does not say to replace it.
        WriteFailed: it cannot be written. What stood before still stands, unless the last step of all, the
            sync of the folder, failed: then the new file stands.
    """
    disk = disk or Disk()
    target = Path(os.path.realpath(path))  # of a link that leads to itself, the link: no file to write
    require_writable(path, force=force)
    with _errors_with_path(path):
        _sweep(target)
        temporary, file = _made(target)
    try:
        with _errors_with_path(path), file:
            with contextlib.suppress(FileNotFoundError):  # who may read it, still may, and nobody else
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            disk.sync(file.fileno())
            require_writable(path, force=force)  # still
            disk.rename(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    try:
        disk.sync_directory(target.parent)
    except OSError as error:
        raise WriteFailed(
            f"{path}: written and whole, but its folder could not be synced ({error.strerror}): a power cut "
            "may still take it away",
            path=path,
        ) from error


def _made(target: Path) -> tuple[Path, BinaryIO]:
    """A file under a name that nobody has, locked."""
    while True:
        temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(temporary.open("xb"))
            undo.callback(temporary.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                undo.pop_all()
                return temporary, file
            # Until it was locked, another writer took it for one of the dead.


@contextlib.contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"{path}: not written: {error.strerror or error}", path=path) from error


def _sweep(target: Path) -> None:
    """Remove what dead writers left: those that live hold a lock."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(target.parent):
        if leftover.fullmatch(name):
            with contextlib.suppress(OSError):
                descriptor = os.open(target.parent / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(target.parent / name)
                finally:
                    os.close(descriptor)
