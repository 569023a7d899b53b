"""Files and folders that appear under their name complete, or not at all.

The content is written under a hidden name in the same folder, synced and renamed; then the folder is synced.
A writer holds an flock on its hidden file or folder, which the system releases when the writer dies. So the
next writer of the same target can tell the leftovers of dead writers from the work of live ones, and removes
them.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from distrust.checkpoint.disk import Disk
from distrust.errors import NO_SUCH_FILE, ConfigError, ErrorTranslator, ExportFailed, WriteFailed
from distrust.paths import refuse_links

# O_NONBLOCK: opening a pipe of that name must not wait for a writer.
_OWN_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
POLL_SECONDS = 0.1


def require_writable(path: Path, *, force: bool, inputs: Iterable[str] = ()) -> None:
    """Check that a file may be written to, before anything slow is done.

    Args:
        path: of the new file.
        force: whether an existing file may be replaced.
        inputs: files and folders that are read: they are neither replaced nor added to.

    Raises:
        ConfigError: if the file exists, or belongs to an input.
        WriteFailed: if its folder does not exist, or something else than a file has its name.
    """
    for name in inputs:
        with contextlib.suppress(OSError, ValueError):  # one of them does not exist
            if os.path.samefile(path, name):  # by inode: a hard link is the same file
                raise ConfigError(f"{path}: is an input, and is never replaced; give another name")
        # Resolved: a link to the folder, or out of it, must not hide that they are the same.
        if os.path.isdir(name) and Path(os.path.realpath(name)) in Path(os.path.realpath(path)).parents:
            raise ConfigError(f"{path}: is in the input folder, and would be read as data; give another name")
    folder = path.parent
    if not os.path.isdir(folder):
        reason = "is not a folder" if os.path.lexists(folder) else NO_SUCH_FILE
        raise WriteFailed(f"{path}: not written: {folder}: {reason}; make that folder first", path=path)
    if os.path.lexists(path):  # a dangling link exists, too
        if path.exists() and not path.is_file():
            raise WriteFailed(f"{path}: exists already, and is not a file; give another name", path=path)
        if not force:
            raise ConfigError(f"{path}: exists already; give another name, or --force to replace it")


def require_free(target: Path) -> None:
    """Raise ExportFailed if anything but an empty folder exists at ``target``, or its parent is no folder."""
    with _write_errors(ExportFailed, target):
        parent = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise ExportFailed(f"{target}: cannot be created: {parent} is not a folder", path=target)
        if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or os.listdir(target)):
            text = f"{target}: exists already, and is not overwritten; remove it, or give another name"
            raise ExportFailed(text, path=target)


@contextlib.contextmanager
def atomic_file(
    path: Path, *, force: bool, follow_link: bool = False, disk: Disk | None = None
) -> Iterator[BinaryIO]:
    """Context manager that gives a file to write to. It gets its name at the end of the block.

    If the block raises, nothing changes. The folder exists.

    Args:
        path: of the file.
        force: whether an existing file may be replaced.
        follow_link: whether the target of a link is written: only if the user named that link.
        disk: replaces the operating system's calls, to test failures.

    Raises:
        ConfigError: if the file exists and ``force`` is not set.
        WriteFailed: if it cannot be written. Existing files are unchanged, unless only the last step
            failed, the sync of the folder: then the new file exists.
    """
    disk = disk or Disk()
    if not follow_link:
        refuse_links(path)
    # A link that appears at the target later is replaced by the rename, and never written through.
    target = Path(os.path.realpath(path)) if follow_link else path
    require_writable(path, force=force)
    errors = _write_errors(WriteFailed, path)
    with errors:
        _remove_stale(target)
        temporary, file = _create_locked(target)
    try:
        with errors, file:
            with contextlib.suppress(FileNotFoundError):  # keep the permissions of the replaced file
                os.fchmod(file.fileno(), stat.S_IMODE(target.lstat().st_mode))
            yield file
            file.flush()  # Python's buffer; the sync then covers all of it
            disk.sync(file.fileno())
            require_writable(path, force=force)  # again: another program may have created it meanwhile
            disk.rename(temporary, target)  # COMMITS
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    with _sync_errors(WriteFailed, path):
        disk.sync_directory(target.parent)  # now the name survives a power cut


@contextlib.contextmanager
def atomic_directory(target: Path, *, single_file: bool = False, disk: Disk | None = None) -> Iterator[Path]:
    """Context manager that gives a folder to write to. It becomes ``target`` at the end of the block.

    Other libraries may write into it as they like: every file is synced afterwards. If the block raises,
    nothing remains. Parents are created.

    Args:
        target: the name; nothing but an empty folder may exist there.
        single_file: ``target`` becomes the file of that name in the folder, not the folder.
        disk: as for :func:`atomic_file`.

    Raises:
        ExportFailed: if it cannot be written. Nothing exists at ``target`` then, unless only the last step
            failed, the sync of its parent folder: then it is complete.
    """
    disk = disk or Disk()
    require_free(target)
    errors = _write_errors(ExportFailed, target)
    with errors:
        changed = {target.parent, *(parent.parent for parent in target.parents if not parent.exists())}
        target.parent.mkdir(parents=True, exist_ok=True)  # their names are synced at the end
        _remove_stale(target)
        folder = _temporary(target)
        disk.make_directory(folder)
    try:
        with errors, hold_lock(folder):
            yield folder
            _sync_contents(folder, disk)
            require_free(target)  # again; and the system itself never replaces a folder that is not empty
            disk.rename(folder / target.name if single_file else folder, target)  # COMMITS
        with _sync_errors(ExportFailed, target):
            for parent in sorted(changed, reverse=True):
                disk.sync_directory(parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_errors(kind: type[ExportFailed | WriteFailed], path: Path) -> ErrorTranslator:
    suffix = ". Nothing was created" if kind is ExportFailed else ""
    return ErrorTranslator(
        (OSError,), lambda error: kind(f"{path}: not written: {error.strerror or error}{suffix}", path=path)
    )


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"


def _create_locked(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = _temporary(target)
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(temporary.open("xb"))
            undo.callback(temporary.unlink, missing_ok=True)  # also on an interrupt
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink:
                    undo.pop_all()  # keep both: the caller closes and renames
                    return temporary, file
            # Another process locked it first, to remove it as a leftover, or has removed it: try again.


@contextlib.contextmanager
def hold_lock(path: Path, *, flags: int = 0, on_wait: Callable[[int], None] | None = None) -> Iterator[None]:
    """Lock a file or folder, opened with these flags; raises OSError if its writer is alive.

    ``on_wait`` waits for it instead: it is called several times a second, with 0, 1, …, and may raise.
    """
    descriptor = os.open(path, _OWN_FILE | flags, 0o600)
    try:
        for turn in itertools.count():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if on_wait is None:
                    raise
                on_wait(turn)
                time.sleep(POLL_SECONDS)  # no signal handler could end a blocking flock
        yield
    finally:
        os.close(descriptor)


def _remove_stale(target: Path) -> None:
    """Remove what dead writers of this target left behind; live writers hold a lock."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in filter(leftover.fullmatch, os.listdir(target.parent)):
        path = target.parent / name
        with contextlib.suppress(OSError), hold_lock(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _sync_contents(folder: Path, disk: Disk) -> None:
    """Sync every file of a folder, and their names; give the files the folder's permissions."""
    permissions = folder.stat().st_mode & 0o666  # by the umask; some libraries create private files
    for root, _, names in os.walk(folder, topdown=False):  # a folder after its content
        for name in names:
            descriptor = os.open(Path(root, name), _OWN_FILE)
            try:
                os.fchmod(descriptor, permissions)
                disk.sync(descriptor)
            finally:
                os.close(descriptor)
        disk.sync_directory(Path(root))


def _sync_errors(kind: type[ExportFailed | WriteFailed], path: Path) -> ErrorTranslator:
    def translate(error: OSError) -> Exception:
        reason = f"written completely, but its folder could not be synced ({error.strerror})"
        return kind(f"{path}: {reason}: a power cut may still remove it", path=path)

    return ErrorTranslator((OSError,), translate)
