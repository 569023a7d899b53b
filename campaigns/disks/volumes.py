"""Small file systems in a private mount namespace, and what fills them.

Everything is on a tmpfs of the namespace, so nothing is written to a disk of the machine. Whatever this
machine or user cannot do raises Skipped. A case runs in a forked process that leads a session
(:func:`run_case`): when its last process has ended, the kernel unmounts and releases everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaigns import child
from campaigns.campaign import CounterExample


class Skipped(Exception):
    """This machine, or this user, cannot run the case; the message says why."""


class Findings(NamedTuple):
    counts: Counter[str]  # what was done, and how often
    violation: str | None = None  # the invariant that does not hold, or None
    skipped: str | None = None  # why the case could not be run, or None


def run_case(work: Callable[[Counter[str]], None], *, seconds: float) -> Findings:
    """Run a case, which counts what it does, in a child; every exception but Skipped is a violation."""
    try:
        findings: Findings = child.call(lambda: _work(work), seconds=seconds, new_session=True)
    except child.ChildFailed as error:
        return Findings(Counter(), f"the case: {error}")
    return findings


def _work(work: Callable[[Counter[str]], None]) -> Findings:
    counts: Counter[str] = Counter()
    try:
        work(counts)
    except Skipped as error:
        return Findings(counts, skipped=str(error))
    except CounterExample as error:
        return Findings(counts, violation=str(error))
    except BaseException as error:
        text = f"{type(error).__name__} escaped: {error}\n{traceback.format_exc()}"
        return Findings(counts, violation=text)
    return Findings(counts)


MIB = 1 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC_PRIVATE = 0x4000 | 0x40000  # MS_REC, MS_PRIVATE


class Kind(NamedTuple):
    make: tuple[str, ...] = ()  # the command that makes one in an image; empty for those that need no image
    smallest: int = 8  # in MiB
    inodes: str = ""  # how their number is limited: an option of ``make``, or of the mount


_EXT = ("-q", "-F", "-m", "0", "-E", "lazy_itable_init=1")
KINDS = {
    "ext4": Kind(("mkfs.ext4", *_EXT), inodes="-N"),
    "ext3": Kind(("mkfs.ext3", *_EXT), inodes="-N"),  # cannot reserve space
    "ext2": Kind(("mkfs.ext2", *_EXT), inodes="-N"),  # nor that, and has no journal
    "xfs": Kind(("mkfs.xfs", "-q", "-f"), smallest=304),
    "btrfs": Kind(("mkfs.btrfs", "-q", "-f"), smallest=128),
    "tmpfs": Kind(inodes="nr_inodes="),
    "overlay": Kind(),  # on an ext4: the file system of a container
}


def private_mounts(home: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise Skipped("mount namespaces: this system has none")
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNS) != 0:
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER) != 0:
            raise Skipped(f"mount namespaces: {os.strerror(ctypes.get_errno())}")
        _map_to_root(user, group)
    if libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None) != 0:
        raise Skipped(f"private mounts: {os.strerror(ctypes.get_errno())}")
    mount("tmpfs", home, kind="tmpfs", options="mode=0755")


def _map_to_root(user: int, group: int) -> None:
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise Skipped(f"user namespaces: {error.strerror}") from None


def make(name: str, home: Path, *, mib: int, inodes: int | None = None) -> Path:
    """Make and mount a file system of :data:`KINDS` in the home of :func:`private_mounts`; returns where."""
    kind = KINDS[name]
    root = home / name
    root.mkdir()
    if name == "overlay":
        return _make_overlay(root, home, mib=mib)
    if not kind.make:
        options = [f"size={mib}m", *([f"{kind.inodes}{inodes}"] if inodes else [])]
        mount("tmpfs", root, kind="tmpfs", options=",".join(options))
        return root
    image = home / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(max(mib, kind.smallest) * MIB)
    command(*kind.make, *([kind.inodes, str(inodes)] if inodes else []), str(image))
    mount(image, root, kind=name, options="loop")
    return root


def mount_again(name: str, home: Path) -> None:
    """Unmount and mount what :func:`make` made, as after a restart of the machine."""
    command("umount", str(home / name))
    image = home / f"{name}.img"
    if name.startswith("ext"):
        command("e2fsck", "-p", str(image))
    mount(image, home / name, kind=name, options="loop")


def _make_overlay(root: Path, home: Path, *, mib: int) -> Path:
    upper = make("ext4", home, mib=mib)
    for part in ("lower", "upper", "work"):
        (upper / part).mkdir()
    parts = f"lowerdir={upper}/lower,upperdir={upper}/upper,workdir={upper}/work"
    mount("overlay", root, kind="overlay", options=parts)
    return root


def mount(source: object, target: Path, *, kind: str, options: str) -> None:
    command("mount", "-t", kind, "-o", options, str(source), str(target))


def write_protect(root: Path) -> Callable[[], None]:
    """Make a mounted directory read-only; returns what undoes it."""
    # A second mount over the first one, which cannot be made read-only while a file is open for writing.
    command("mount", "--bind", str(root), str(root))
    command("mount", "-o", "remount,bind,ro", str(root))
    return lambda: command("umount", str(root))


def command(program: str, *arguments: str) -> None:
    """Run a program of the system's administrator; raises Skipped, with its message, if it fails."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    executable = shutil.which(program, path=path)
    if executable is None:
        raise Skipped(f"{program}: not installed")
    result = subprocess.run([executable, *arguments], capture_output=True, text=True)
    if result.returncode > (program == "e2fsck"):  # exit code 1: it has repaired something
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[0].removeprefix(f"{program}:").strip() if lines else f"exit code {result.returncode}"
        raise Skipped(f"{program}: {reason}")


def make_limited(home: Path, *, mib: int) -> tuple[Path, Path]:
    """Make a btrfs, and in it a part that :func:`limit_bytes` can limit."""
    root = make("btrfs", home, mib=mib)
    command("btrfs", "quota", "enable", str(root))
    command("btrfs", "subvolume", "create", str(root / "part"))
    return root, root / "part"


def limit_bytes(root: Path, nbytes: int | None) -> None:
    first_part = "0/256"
    command("btrfs", "qgroup", "limit", "none" if nbytes is None else str(nbytes), first_part, str(root))


def free_bytes(root: Path) -> int:
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


class Filler:
    """A file that uses up the space of a file system, and files that use up its inodes."""

    def __init__(self, root: Path) -> None:
        self._file = root / "filler"
        self._inodes = root / "fillers"
        self._writer: int | None = None

    def fill(self, free: int) -> None:
        """Write until no more than about ``free`` bytes are free."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = MIB
            while (excess := free_bytes(self._file.parent) - free) > 0 and size:
                try:
                    os.write(descriptor, bytes(min(size, excess)))
                except OSError:  # the last bytes fit only in smaller pieces
                    size //= 16
        finally:
            os.close(descriptor)

    def fill_inodes(self, free: int) -> None:
        """Make files until no more than ``free`` can be made."""
        self._inodes.mkdir(exist_ok=True)
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            while True:
                path = self._inodes / str(len(paths))
                path.touch()
                paths.append(path)
        for path in paths[len(paths) - free :]:
            path.unlink()

    def fill_in_background(self, *, delay: float, piece: int) -> None:
        """Fill everything by another process, after ``delay`` seconds, in pieces of so many bytes."""
        self._writer = os.fork()
        if self._writer == 0:
            try:
                time.sleep(delay)
                _write_forever(self._file, piece)
            finally:
                os._exit(0)

    def remove(self) -> None:
        if self._writer is not None:
            os.kill(self._writer, signal.SIGKILL)
            os.waitpid(self._writer, 0)
            self._writer = None
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self._inodes, ignore_errors=True)


def _write_forever(path: Path, piece: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    while True:
        try:
            os.write(descriptor, bytes(piece))
        except OSError:
            piece = max(1, piece // 4)
            time.sleep(0.0005)


def remove_all(directory: Path) -> None:
    """Remove a directory with its content, also while files are added to it."""
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Wait for a condition; False if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
