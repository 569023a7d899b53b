"""A directory that is removed, renamed, replaced, protected, unmounted or mounted over under its writer.

Where another writer could be active now, nothing may be written: the lock is a file that went with the
directory. A directory that is restored is written to again.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from campaigns.campaign import require
from campaigns.disks import volumes
from campaigns.disks.save_checker import SaveChecker
from campaigns.invariants import checkpoint_digests, temporary_files
from distrust import Checkpoint, CheckpointManager

NOBODY = 65534  # a user without rights
_PR_SET_DUMPABLE = 4  # see _become_nobody
_NEED_A_MOUNT = ("write protected", "unmounted", "mounted over")  # and root, or a user namespace


class Accident(NamedTuple):
    undo: Callable[[], None] | None  # None if it cannot be undone
    writer: CheckpointManager | None = None  # another writer, whose directory is there now, or None
    harmless: bool = False  # whether it is still the same directory, at the same path


def directory_replaced(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Something happens to the directory, between two saves or during one; then it is undone, or not."""
    name = rng.choice(list(_ACCIDENTS))
    if name in _NEED_A_MOUNT:
        volumes.private_mounts(home)
        home = volumes.make(rng.choice(["ext4", "tmpfs"]), home, mib=16)
    directory = home / "run" / "checkpoints"
    checker = SaveChecker(directory, rng, counts, f"directory {name}")
    nbytes = int(10 ** rng.uniform(0, 6.3))
    if name == "without permission":
        _become_nobody(home)
    for step in range(1, rng.randint(2, 3)):
        checker.save(step, nbytes)
    strike = _strike_during_save if rng.random() < 0.4 else _strike_between_saves
    strike(checker, name, step + 1, nbytes)


def _strike_between_saves(checker: SaveChecker, name: str, step: int, nbytes: int) -> None:
    accident = _ACCIDENTS[name](checker.directory)
    foreign = _save_foreign(checker, accident)
    for _ in range(checker.rng.randint(1, 3)):
        outcome = checker.attempt(step, nbytes)
        _require_foreign_untouched(foreign, accident, checker)
        if accident.harmless:
            checker.check(outcome)
        else:
            require(outcome.error is not None, f"saved into a directory that was {name}")
            checker.check(outcome, removable=name != "write protected", reachable=False)
    _recover(checker, accident, step + 1, nbytes)


def _strike_during_save(checker: SaveChecker, name: str, step: int, nbytes: int) -> None:
    """The save may have ended before: only the other writer's files must be untouched."""
    rng = checker.rng
    accidents: list[Accident] = []
    foreign: list[dict[str, str]] = []

    def during() -> None:
        time.sleep(rng.choice([0, 10 ** rng.uniform(-4.5, -2)]))
        accidents.append(_ACCIDENTS[name](checker.directory))
        foreign.append(_save_foreign(checker, accidents[0]))

    outcome = checker.attempt(step, nbytes, during=during)
    accident = accidents[0]
    _require_foreign_untouched(foreign[0], accident, checker)
    if outcome.error is None:
        checker.reported[step] = outcome.checkpoint
    if accident.undo is None:
        checker.reported.clear()
    _recover(checker, accident, step + 1, nbytes)


def _save_foreign(checker: SaveChecker, accident: Accident) -> dict[str, str]:
    if accident.writer is None:
        return {}
    for step in (1, 2, 3):
        accident.writer.save(Checkpoint(step=step, model={"another's": np.zeros(9)}))
    return checkpoint_digests(checker.directory)


def _require_foreign_untouched(foreign: dict[str, str], accident: Accident, checker: SaveChecker) -> None:
    if accident.writer is not None:
        untouched = checkpoint_digests(checker.directory) == foreign and not temporary_files(
            checker.directory
        )
        require(untouched, "wrote into a directory that is another writer's now")


def _recover(checker: SaveChecker, accident: Accident, step: int, nbytes: int) -> None:
    if accident.writer is not None:
        accident.writer.close()
    if accident.undo is not None:
        accident.undo()
        checker.forget_removed()
        checker.require_all()
    else:  # the next run makes a directory of its own, or uses the one that exists
        checker.reported.clear()
        checker.reopen()
        step += 10
    checker.save(step, nbytes)
    temporary = temporary_files(checker.directory)
    require(not temporary, f"temporary files are left after a save that succeeded: {temporary}")


def _remove(directory: Path, *, remake: bool = False) -> Accident:
    volumes.remove_all(directory)
    return Accident(undo=None, writer=CheckpointManager(directory) if remake else None)


def _remove_lock(directory: Path) -> Accident:
    (directory / ".lock").unlink()
    return Accident(undo=None)


def _rename(directory: Path, replace: Callable[[], object] = tuple, *, writer: bool = False) -> Accident:
    """Rename the directory, and put something in its place, perhaps with another writer."""
    away = _away(directory)
    directory.rename(away)
    replace()

    def undo() -> None:
        if directory.is_symlink() or directory.is_file():
            directory.unlink()
        else:
            shutil.rmtree(directory, ignore_errors=True)
        away.rename(directory)

    return Accident(undo, writer=CheckpointManager(directory) if writer else None)


def _away(directory: Path) -> Path:
    return directory.with_name("away")


def _link_to_another(directory: Path) -> Accident:
    another = directory.with_name("another")
    another.mkdir()
    return _rename(directory, lambda: directory.symlink_to(another), writer=True)


def _link_to_itself(directory: Path) -> Accident:
    return _rename(directory, lambda: directory.symlink_to(_away(directory)))._replace(harmless=True)


def _unmount(directory: Path) -> Accident:
    """Lazily: open files stay usable; the path leads to what is below the mount."""
    volumes.command("umount", "-l", str(directory.parents[1]))
    return Accident(undo=None)


def _mount_over(directory: Path) -> Accident:
    volumes.mount("tmpfs", directory, kind="tmpfs", options="size=8m")
    return Accident(lambda: volumes.command("umount", str(directory)), writer=CheckpointManager(directory))


def _take_permission(directory: Path) -> Accident:
    directory.chmod(0o555)
    return Accident(lambda: directory.chmod(0o755))


def _become_nobody(home: Path) -> None:
    if os.geteuid() != 0:  # permissions do not restrict root
        return
    for path in (home, *home.parents[:-1]):
        if not path.stat().st_mode & 0o001 and path != home:
            raise volumes.Skipped(f"permissions: {path} is not open to others")
    home.chmod(0o777)
    # Without permissions, Python's own modules may be out of reach: import all of them now.
    with CheckpointManager(home / "warm-up") as warm_up:
        warm_up.save(Checkpoint(step=1, model={"w": np.zeros(1)}))
        warm_up.validate(1)
    try:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except PermissionError as error:
        raise volumes.Skipped(f"permissions: {error.strerror}") from None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)  # else nobody may not read /proc/self


_ACCIDENTS: dict[str, Callable[[Path], Accident]] = {
    "removed": _remove,  # its parent exists
    "removed with the run": lambda directory: _remove(directory.parent),
    "removed and made again": lambda directory: _remove(directory, remake=True),
    "without its lock": _remove_lock,  # the lock is a file in it
    "renamed": _rename,  # the writer has its files open
    "renamed and made again": lambda directory: _rename(directory, writer=True),
    "behind a file": lambda directory: _rename(directory, lambda: directory.write_text("a file")),
    "behind a link to nothing": lambda directory: _rename(directory, lambda: directory.symlink_to("nothing")),
    "behind a link to another": _link_to_another,
    "moved and linked to": _link_to_itself,  # the same directory by another path
    "write protected": lambda directory: Accident(volumes.write_protect(directory.parents[1])),
    "unmounted": _unmount,  # lazily
    "mounted over": _mount_over,  # by another file system
    "without permission": _take_permission,  # for a user who is not root
}
