"""Things that are no files in the place of a checkpoint, links out of the directory, and permissions.

A reader follows a link to a regular file and opens nothing else, without waiting. A writer follows no link:
it replaces or removes the link itself. A save leaves nothing that is more open than the umask allows,
including the temporary file just before its rename, which an audit hook sees.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.campaign import CounterExample, never, require
from campaigns.fuzz import corruptions, costs
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import direct_io
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import DistrustError, SaveFailed

_SECRET = "another user's secret"  # that no message may contain
_ALLOWED_BYTES = 1 << 30  # nothing here is about memory


def _link_outside(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A link to something outside of the directory."""

    def place(path: Path) -> None:
        outside = path.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        make(outside / "target")
        path.symlink_to(outside / "target")

    return place


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "an empty file": Path.touch,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": corruptions.make_socket,
    "a file of a tebibyte of zeros": corruptions.make_sparse,
    "a sparse file with a long header": lambda path: corruptions.make_sparse(path, 8 << 20),
    "a sparse file that is all header": lambda path: corruptions.make_sparse(path, (1 << 40) - 8),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a name that is too long": lambda path: path.symlink_to("x" * 4000),
    "a link to its directory": lambda path: path.symlink_to("."),
    "a link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to endless noise": lambda path: path.symlink_to("/dev/random"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to the input": lambda path: path.symlink_to("/dev/stdin"),
    "a link to the memory of the process": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to a file of the kernel": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to the kernel's log": lambda path: path.symlink_to("/proc/kmsg"),
    "a link to a pipe outside": _link_outside(os.mkfifo),
    "a link to a directory outside": _link_outside(os.mkdir),
    "a link to a secret": _link_outside(lambda path: path.write_text(_SECRET)),
}


@contextlib.contextmanager
def obstacle(make: Callable[[Path], object], path: Path) -> Iterator[None]:
    corruptions.clear(path)
    make(path)
    try:
        yield
    finally:
        corruptions.clear(path)
        corruptions.clear(path.parent.parent / "outside")


class Scene:
    """A directory of checkpoints, and one beside it that a writer must not touch."""

    def __init__(self, directory: Path) -> None:
        self.inside = directory / "checkpoints"
        self.lock = self.inside / LOCK_NAME
        self.secret = directory / "outside" / "secret"
        self.inside.mkdir(parents=True)
        self.secret.parent.mkdir()
        self.secret.write_text(_SECRET)

    def save(self, step: int) -> None:
        with CheckpointManager(self.inside, keep_last=1, keep_best=0) as manager:
            manager.save(Checkpoint(step=step, model={"a": np.zeros(4, np.float32)}))

    def require_refused(self, step: int) -> None:
        """Save where it must fail, and leave nothing behind."""
        names = {path.name for path in self.inside.iterdir()}
        try:
            self.save(step)
        except SaveFailed:
            new = {path.name for path in self.inside.iterdir()} - names - {LOCK_NAME}
            require(not new, f"a save that failed left {new}")
        else:
            raise CounterExample("it was saved")

    def file(self, step: int) -> Path:
        return self.inside / checkpoint_file_name(step, "periodic")


def _link_in_place(scene: Scene) -> None:
    scene.file(1).symlink_to(scene.secret)
    scene.save(1)
    require(not scene.file(1).is_symlink(), "the link still exists")


def _link_as_temporary(scene: Scene) -> None:
    stale = scene.inside / f".{scene.file(1).name}.{'0' * 16}.tmp"
    stale.symlink_to(scene.secret)
    scene.save(1)
    require(not stale.is_symlink(), "the link was not removed")


def _link_as_older(scene: Scene) -> None:
    """A checkpoint outside, linked, and to be cleaned up: the link goes, the checkpoint stays."""
    scene.save(1)
    outside = scene.file(1).rename(scene.secret.parent / "checkpoint")
    scene.file(1).symlink_to(outside)
    scene.save(2)
    replaced = not scene.file(1).is_symlink() and outside.exists()
    require(replaced, "the link had to be removed, and its target had to stay")


def _refused_after(place: Callable[[Scene], object]) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        place(scene)
        scene.require_refused(1)

    return play


SCENES: dict[str, Callable[[Scene], None]] = {
    "a link in the place of the checkpoint": _link_in_place,
    "a link in the place of a temporary file": _link_as_temporary,
    "a link in the place of an older checkpoint": _link_as_older,
    "a directory in the place of the checkpoint": _refused_after(lambda scene: scene.file(1).mkdir()),
    "a link in the place of the lock": _refused_after(lambda scene: scene.lock.symlink_to(scene.secret)),
    "a directory in the place of the lock": _refused_after(lambda scene: scene.lock.mkdir()),
}


def play(name: str, act: Callable[[Scene], None], directory: Path) -> None:
    """Play a scene in a process of its own; the file outside must not change."""
    folder = directory / "scene"
    scene = Scene(folder)
    try:
        with never((CounterExample, DistrustError), f"{name}: "):
            cost = costs.measure(lambda: act(scene), allowed=_ALLOWED_BYTES)
            require(cost.answer == "ok", cost.answer)
            require(scene.secret.read_text() == _SECRET, "a file outside was written to")
    finally:
        shutil.rmtree(folder)


UMASKS = (0o077, 0o027, 0o022, 0)  # from private to open
_FILE, _DIRECTORY = 0o666, 0o777
#: The lock, a checkpoint of each kind by each path, and the directories that were made for them.
_LEAST_PATHS = 7


def check_permissions(directory: Path, umask: int) -> int:
    """Save by every method under a umask; returns how many files and directories were checked."""
    folder = directory / "permissions"
    folder.mkdir()
    report = folder / "report"
    try:
        with never(CounterExample, f"umask {umask:03o}: "):
            cost = costs.measure(lambda: _save_and_check(folder, umask, report), allowed=_ALLOWED_BYTES)
            require(cost.answer == "ok", cost.answer)
            checked = report.read_text().splitlines()
            complete = len(checked) >= _LEAST_PATHS and any(name.endswith(".tmp") for name in checked)
            require(complete, f"only these were checked: {checked}")
        return len(checked)
    finally:
        shutil.rmtree(folder)


def _save_and_check(folder: Path, umask: int, report: Path) -> None:
    os.umask(umask)
    modes: list[tuple[str, int]] = []

    def before_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            modes.append((str(arguments[0]), os.stat(arguments[0]).st_mode & 0o7777))

    sys.addaudithook(before_rename)  # cannot be removed; the process ends soon
    state = {"a": np.zeros(5000, np.float32)}
    for path, flag in (("direct", direct_io.FLAG), ("buffered", 0)):
        direct_io.FLAG = flag
        with CheckpointManager(folder / path / "run" / "checkpoints") as manager:
            manager.save(Checkpoint(step=1, model=state))
            manager.save_async(Checkpoint(step=2, model=state)).wait()
            manager.save(Checkpoint(step=3, model=state), final=True)
        modes += [(str(file), file.stat().st_mode & 0o7777) for file in (folder / path).rglob("*")]
    for name, mode in modes:
        allowed = (_DIRECTORY if Path(name).is_dir() else _FILE) & ~umask
        require(not (mode & ~allowed), f"{name} has the permissions {mode:03o}, more than {allowed:03o}")
    report.write_text("\n".join(name for name, _ in modes))
