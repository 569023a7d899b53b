"""Small file systems in a private mount namespace, and what fills them.

Everything lies on a tmpfs of the namespace: the images of the file systems, too. So nothing is written to a
disk of the machine, and nothing is left when the last process of the namespace has ended. Root gets all of
them; another user, in a user namespace, only those that need no block device.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaigns.disks.isolated import Skipped

MIB = 1 << 20
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_RECURSIVE_PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE


class Kind(NamedTuple):
    """A file system, and how one is made.

    Attributes:
        make: the command that makes one in an image; none for those that need no image.
        smallest: in MiB.
        inodes: how their number is limited: an option of ``make``, or of the mount.
    """

    make: tuple[str, ...] = ()
    smallest: int = 8
    inodes: str = ""


_EXT = ("-q", "-F", "-m", "0", "-E", "lazy_itable_init=1")
KINDS = {
    "ext4": Kind(("mkfs.ext4", *_EXT), inodes="-N"),
    "ext3": Kind(("mkfs.ext3", *_EXT), inodes="-N"),  # cannot reserve space
    "ext2": Kind(("mkfs.ext2", *_EXT), inodes="-N"),  # nor that, and has no journal
    "xfs": Kind(("mkfs.xfs", "-q", "-f"), smallest=304),
    "btrfs": Kind(("mkfs.btrfs", "-q", "-f"), smallest=128),
    "tmpfs": Kind(inodes="nr_inodes="),
    "overlay": Kind(),  # on an ext4: what a container writes on
}


def private_mounts(home: Path) -> None:
    """Mounts that this process makes are its own from now on; ``home`` becomes a tmpfs of it.

    Raises:
        Skipped: if the system does not let us.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise Skipped("mount namespaces: this system has none")
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_MOUNTS) != 0:
        if libc.unshare(_NEW_MOUNTS | _NEW_USERS) != 0:
            raise Skipped(f"mount namespaces: {os.strerror(ctypes.get_errno())}")
        _be_root_in_it(user, group)
    if libc.mount(b"none", b"/", None, _RECURSIVE_PRIVATE, None) != 0:
        raise Skipped(f"private mounts: {os.strerror(ctypes.get_errno())}")
    mount("tmpfs", home, kind="tmpfs", options="mode=0755")


def _be_root_in_it(user: int, group: int) -> None:
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise Skipped(f"user namespaces: {error.strerror}") from None


def make(name: str, home: Path, *, mib: int, inodes: int | None = None, options: str = "") -> Path:
    """Make and mount a file system; returns where.

    Args:
        name: of :data:`KINDS`.
        home: of :func:`private_mounts`, or a directory in it.
        mib: its size; more where it cannot be so small.
        inodes: about how many it has.
        options: of the mount, besides.

    Raises:
        Skipped: if this machine or this user cannot.
    """
    kind = KINDS[name]
    root = home / name
    root.mkdir()
    wanted = [options] if options else []
    if name == "overlay":
        return _make_overlay(root, home, mib=mib)
    if not kind.make:
        wanted.append(f"size={mib}m")
        wanted += [f"{kind.inodes}{inodes}"] if inodes else []
        mount("tmpfs", root, kind="tmpfs", options=",".join(wanted))
        return root
    image = home / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(max(mib, kind.smallest) * MIB)
    command(*kind.make, *([kind.inodes, str(inodes)] if inodes else []), str(image))
    mount(image, root, kind=name, options=",".join(["loop", *wanted]))
    return root


def mount_again(name: str, home: Path) -> None:
    """Unmount and mount what :func:`make` made, as after a restart of the machine.

    Raises:
        Skipped: if that is not possible.
    """
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


def mount(what: object, where: Path, *, kind: str, options: str) -> None:
    """Mount.

    Raises:
        Skipped: if this machine or this user cannot.
    """
    command("mount", "-t", kind, "-o", options, str(what), str(where))


def command(program: str, *arguments: str) -> None:
    """Run a program of the system's administrator.

    Raises:
        Skipped: with what it says, if it fails.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    if found is None:
        raise Skipped(f"{program}: not installed")
    done = subprocess.run([found, *arguments], capture_output=True, text=True)
    if done.returncode > (program == "e2fsck"):  # which says 1 when it has mended something
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[0].removeprefix(f"{program}:").strip() if said else f"exit code {done.returncode}"
        raise Skipped(f"{program}: {reason}")


def make_limited(home: Path, *, mib: int) -> tuple[Path, Path]:
    """A btrfs, and in it a part that :func:`limit_bytes` can limit.

    Raises:
        Skipped: if this machine or this user cannot.
    """
    root = make("btrfs", home, mib=mib)
    command("btrfs", "quota", "enable", str(root))
    command("btrfs", "subvolume", "create", str(root / "part"))
    return root, root / "part"


def limit_bytes(root: Path, nbytes: int | None) -> None:
    """Set the quota of the part: so many bytes and no more, or as many as there are.

    Raises:
        Skipped: if the system does not let us.
    """
    first_part = "0/256"
    command("btrfs", "qgroup", "limit", "none" if nbytes is None else str(nbytes), first_part, str(root))


def free_bytes(root: Path) -> int:
    """What a file system says is free."""
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


class Filler:
    """A file that takes the room of a file system, and files that take its inodes.

    Args:
        root: where the files go.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / "filler"
        self._inodes = root / "fillers"
        self._writer: int | None = None

    def leave(self, nbytes: int) -> None:
        """Write until no more than about ``nbytes`` are free."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = MIB
            while (room := free_bytes(self._file.parent) - nbytes) > 0 and size:
                try:
                    os.write(descriptor, bytes(min(size, room)))
                except OSError:  # the last of it goes in smaller pieces
                    size //= 16
        finally:
            os.close(descriptor)

    def leave_inodes(self, count: int) -> None:
        """Make files until no more than ``count`` can be made."""
        self._inodes.mkdir(exist_ok=True)
        made: list[Path] = []
        try:
            while True:
                path = self._inodes / str(len(made))
                path.touch()
                made.append(path)
        except OSError:
            for path in made[len(made) - count :] if count else []:
                path.unlink()

    def in_the_background(self, *, after: float, piece: int) -> None:
        """Another process fills everything from ``after`` seconds on, in pieces of so many bytes."""
        self._writer = os.fork()
        if self._writer == 0:
            try:
                time.sleep(after)
                _write_forever(self._file, piece)
            finally:
                os._exit(0)

    def gone(self) -> None:
        """Free it all."""
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
    """Remove a directory and what is in it, and what somebody puts into it meanwhile."""
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)


def eventually(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether a condition comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
