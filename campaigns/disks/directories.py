"""A directory that is removed, renamed, replaced, protected, unmounted or mounted over under its writer.

Where another writer could be at work now, nothing may be written: an flock is on a file, and the file went
with the directory. What is put back is written to again.
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

from campaigns.campaign import CounterExample
from campaigns.disks import volumes
from campaigns.disks.isolated import Skipped
from campaigns.disks.witness import SaveChecker, contents, temporary
from distrust import Checkpoint, CheckpointManager

NOBODY = 65534
_SET_DUMPABLE = 4  # PR_SET_DUMPABLE
_MOUNTED = ("write protected", "unmounted", "mounted over")


class Accident(NamedTuple):
    """What happened to a directory.

    Attributes:
        mend: undoes it; None for what cannot be undone.
        other: the directory that stands there now and is another writer's, if one does.
        harmless: whether it is still the same directory, at the same path.
    """

    mend: Callable[[], None] | None
    other: CheckpointManager | None = None
    harmless: bool = False


def directory_taken_away(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """Something happens to the directory, between two saves or during one; then it is mended, or not."""
    what = chance.choice(list(_ACCIDENTS))
    if what in _MOUNTED:
        volumes.private_mounts(home)
        home = volumes.make(chance.choice(["ext4", "tmpfs"]), home, mib=16)
    directory = home / "run" / "checkpoints"
    witness = SaveChecker(directory, chance, counts, f"directory {what}")
    nbytes = int(10 ** chance.uniform(0, 6.3))
    if what == "without permission":
        _belongs_to_nobody(home)
    for step in range(1, chance.randint(2, 3)):
        witness.save(step, nbytes)
    if chance.random() < 0.4:
        _in_the_middle(witness, what, chance, step + 1, nbytes)
    else:
        _between(witness, what, chance, step + 1, nbytes)


def _between(witness: SaveChecker, what: str, chance: random.Random, step: int, nbytes: int) -> None:
    accident = _ACCIDENTS[what](witness.directory)
    others = _others(witness, accident)
    for _ in range(chance.randint(1, 3)):
        outcome = witness.try_to_save(step, nbytes)
        _require_left_alone(others, accident, witness)
        if accident.harmless:
            witness.judge(outcome)
        elif outcome.error is None:
            raise CounterExample(f"saved into a directory that was {what}")
        else:
            witness.judge(outcome, removable=what != "write protected", reachable=False)
    _mend(witness, accident, step + 1, nbytes)


def _in_the_middle(witness: SaveChecker, what: str, chance: random.Random, step: int, nbytes: int) -> None:
    """Then the save may have been over before: it is only required that nobody else's is touched."""
    happened: list[Accident] = []
    others: list[dict[str, str]] = []

    def meanwhile() -> None:
        time.sleep(chance.choice([0, 10 ** chance.uniform(-4.5, -2)]))
        happened.append(_ACCIDENTS[what](witness.directory))
        others.append(_others(witness, happened[0]))

    outcome = witness.try_to_save(step, nbytes, meanwhile=meanwhile)
    accident = happened[0]
    _require_left_alone(others[0], accident, witness)
    if outcome.error is None:
        witness.reported[step] = outcome.checkpoint
    if accident.mend is None:
        witness.reported.clear()
    _mend(witness, accident, step + 1, nbytes)


def _others(witness: SaveChecker, accident: Accident) -> dict[str, str]:
    if accident.other is None:
        return {}
    value = np.zeros(9)
    for step in (1, 2, 3):
        accident.other.save(Checkpoint(step=step, model={"another's": value}))
    return contents(witness.directory)


def _require_left_alone(others: dict[str, str], accident: Accident, witness: SaveChecker) -> None:
    if accident.other is not None:
        if contents(witness.directory) != others:
            raise CounterExample("wrote into a directory that is another writer's now")
        if temporary(witness.directory):
            raise CounterExample("left a temporary file in a directory that is another writer's now")


def _mend(witness: SaveChecker, accident: Accident, step: int, nbytes: int) -> None:
    if accident.other is not None:
        accident.other.close()
    if accident.mend is not None:
        accident.mend()
        witness.forget_removed()
        witness.require_all()
    else:  # the next run makes a directory of its own, or goes on in the one that is there
        witness.reported.clear()
        witness.reopen()
        step += 10
    witness.save(step, nbytes)
    if temporary(witness.directory):
        raise CounterExample(f"left over after a save that succeeded: {temporary(witness.directory)}")


def _removed(directory: Path) -> Accident:
    volumes.remove_all(directory)
    return Accident(mend=None)


def _removed_with_the_run(directory: Path) -> Accident:
    volumes.remove_all(directory.parent)
    return Accident(mend=None)


def _removed_and_made_again(directory: Path) -> Accident:
    volumes.remove_all(directory)
    return Accident(mend=None, other=CheckpointManager(directory))


def _without_its_lock(directory: Path) -> Accident:
    (directory / ".lock").unlink()
    return Accident(mend=None, other=None)


def _renamed(directory: Path) -> Accident:
    away = directory.with_name("away")
    directory.rename(away)
    return Accident(mend=lambda: _put_back(away, directory))


def _renamed_and_made_again(directory: Path) -> Accident:
    return _renamed(directory)._replace(other=CheckpointManager(directory))


def _behind_a_file(directory: Path) -> Accident:
    accident = _renamed(directory)
    directory.write_text("a file")
    return accident


def _behind_a_link_to_nothing(directory: Path) -> Accident:
    accident = _renamed(directory)
    directory.symlink_to(directory.with_name("nothing"))
    return accident


def _behind_a_link_to_another(directory: Path) -> Accident:
    accident = _renamed(directory)
    another = directory.with_name("another")
    another.mkdir()
    directory.symlink_to(another)
    return accident._replace(other=CheckpointManager(directory))


def _moved_and_linked_to(directory: Path) -> Accident:
    accident = _renamed(directory)
    directory.symlink_to(directory.with_name("away"))
    return accident._replace(harmless=True)


def _put_back(away: Path, directory: Path) -> None:
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)
    away.rename(directory)


def _write_protected(directory: Path) -> Accident:
    """By a second mount over the first one, which has a file open to be written, and so cannot be."""
    root = directory.parents[1]
    volumes.command("mount", "--bind", str(root), str(root))
    volumes.command("mount", "-o", "remount,bind,ro", str(root))
    return Accident(mend=lambda: volumes.command("umount", str(root)))


def _unmounted(directory: Path) -> Accident:
    """Lazily: whoever has a file open keeps it; the path leads to what is below."""
    volumes.command("umount", "-l", str(directory.parents[1]))
    return Accident(mend=None)


def _mounted_over(directory: Path) -> Accident:
    volumes.mount("tmpfs", directory, kind="tmpfs", options="size=8m")
    return Accident(
        mend=lambda: volumes.command("umount", str(directory)), other=CheckpointManager(directory)
    )


def _without_permission(directory: Path) -> Accident:
    directory.chmod(0o555)
    return Accident(mend=lambda: directory.chmod(0o755))


def _belongs_to_nobody(home: Path) -> None:
    """Permissions bind anybody but root."""
    if os.geteuid() != 0:
        return
    for path in (home, *home.parents[:-1]):
        if not path.stat().st_mode & 0o001 and path != home:
            raise Skipped(f"permissions: {path} is not open to others")
    home.chmod(0o777)
    warm_up = CheckpointManager(home / "warm-up")  # who has no permissions may not reach Python's own modules
    warm_up.save(Checkpoint(step=1, model={"w": np.zeros(1)}))
    warm_up.validate(1)
    warm_up.close()
    try:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except PermissionError as error:
        raise Skipped(f"permissions: {error.strerror}") from None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1)  # else nobody may not look into /proc/self


_ACCIDENTS: dict[str, Callable[[Path], Accident]] = {
    "removed": _removed,
    "removed with the run": _removed_with_the_run,
    "removed and made again": _removed_and_made_again,
    "without its lock": _without_its_lock,
    "renamed": _renamed,
    "renamed and made again": _renamed_and_made_again,
    "behind a file": _behind_a_file,
    "behind a link to nothing": _behind_a_link_to_nothing,
    "behind a link to another": _behind_a_link_to_another,
    "moved and linked to": _moved_and_linked_to,
    "write protected": _write_protected,
    "unmounted": _unmounted,
    "mounted over": _mounted_over,
    "without permission": _without_permission,
}
