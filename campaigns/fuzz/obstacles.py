"""Things that are no files where a checkpoint should be, and links that lead out of the directory.

A reader follows a link to a regular file: people move checkpoints and leave links. It opens nothing else, it
waits for nobody, and it says nothing of what a file elsewhere holds. A writer follows no link at all: what it
replaces, sweeps or removes is the link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from campaigns.campaign import CounterExample
from campaigns.fuzz import costs
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import DistrustError, SaveFailed

_SECRET = "a secret of somebody else"
_ALLOWED_BYTES = 1 << 30


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # its path may not be long
        made.bind(path.name)


def _sparse(path: Path, header_bytes: int) -> None:
    path.write_bytes(header_bytes.to_bytes(8, "little"))
    os.truncate(path, 1 << 40)


def _linked(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A link to something outside."""

    def place(path: Path) -> None:
        outside = path.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        make(outside / "thing")
        path.symlink_to(outside / "thing")

    return place


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "an empty file": lambda path: path.touch(),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": _socket,
    "a file of a tebibyte of zeros": lambda path: _sparse(path, 0),
    "a sparse file with a long header": lambda path: _sparse(path, 8 << 20),
    "a sparse file with a header as long as itself": lambda path: _sparse(path, (1 << 40) - 8),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a name that is too long": lambda path: path.symlink_to("x" * 4000),
    "a link to its directory": lambda path: path.symlink_to("."),
    "a link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to noise without end": lambda path: path.symlink_to("/dev/random"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to the input": lambda path: path.symlink_to("/dev/stdin"),
    "a link to the memory of the process": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to a file of the kernel": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to the kernel's log": lambda path: path.symlink_to("/proc/kmsg"),
    "a link to a pipe elsewhere": _linked(os.mkfifo),
    "a link to a directory elsewhere": _linked(os.mkdir),
    "a link to a secret": _linked(lambda path: path.write_text(_SECRET)),
}


@contextlib.contextmanager
def placed(place: Callable[[Path], object], path: Path) -> Iterator[None]:
    """One of the obstacles, at ``path``."""
    _clear(path)
    place(path)
    try:
        yield
    finally:
        _clear(path)
        _clear(path.parent.parent / "outside")


def _clear(path: Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Scene:
    """A directory of checkpoints, and one beside it that is none of a writer's business.

    Args:
        directory: of both.
    """

    def __init__(self, directory: Path) -> None:
        self.inside = directory / "checkpoints"
        self.secret = directory / "outside" / "secret"
        self.inside.mkdir(parents=True)
        self.secret.parent.mkdir()
        self.secret.write_text(_SECRET)

    def save(self, step: int) -> None:
        """Save a checkpoint, and clean up behind it."""
        with CheckpointManager(self.inside, keep_last=1, keep_best=0) as manager:
            manager.save(Checkpoint(step=step, model={"a": np.zeros(4, np.float32)}))

    def refused(self, step: int) -> None:
        """The same, where it has to fail, and to leave nothing behind."""
        before = {path.name for path in self.inside.iterdir()}
        try:
            self.save(step)
        except SaveFailed:
            left = {path.name for path in self.inside.iterdir()} - before - {LOCK_NAME}
            if left:
                raise CounterExample(f"a save that failed left {left} behind") from None
        else:
            raise CounterExample("it was saved")

    def file(self, step: int) -> Path:
        """Where a checkpoint belongs."""
        return self.inside / checkpoint_file_name(step, "periodic")


def _link_in_the_way(scene: Scene) -> None:
    scene.file(1).symlink_to(scene.secret)
    scene.save(1)
    if scene.file(1).is_symlink():
        raise CounterExample("the link still stands")


def _link_to_sweep(scene: Scene) -> None:
    stale = scene.inside / f".{scene.file(1).name}.{'0' * 16}.tmp"
    stale.symlink_to(scene.secret)
    scene.save(1)
    if stale.is_symlink():
        raise CounterExample("the link was not swept")


def _link_to_remove(scene: Scene) -> None:
    """A checkpoint elsewhere, linked, and to be cleaned up: the link goes, the checkpoint stays."""
    scene.save(1)
    elsewhere = scene.file(1).rename(scene.secret.parent / "kept")
    scene.file(1).symlink_to(elsewhere)
    scene.save(2)
    if scene.file(1).is_symlink() or not elsewhere.exists():
        raise CounterExample("the link was to be removed, and what it leads to was to stay")


def _lock_is(make: Callable[[Scene, Path], object]) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        make(scene, scene.inside / LOCK_NAME)
        scene.refused(1)

    return play


def _directory_in_the_way(scene: Scene) -> None:
    scene.file(1).mkdir()
    scene.refused(1)


SCENES: dict[str, Callable[[Scene], None]] = {
    "a link in the place of the checkpoint": _link_in_the_way,
    "a link in the place of a temporary file": _link_to_sweep,
    "a link in the place of an older checkpoint": _link_to_remove,
    "a directory in the place of the checkpoint": _directory_in_the_way,
    "a link in the place of the lock": _lock_is(lambda scene, lock: lock.symlink_to(scene.secret)),
    "a directory in the place of the lock": _lock_is(lambda _, lock: lock.mkdir()),
}


def play(name: str, scene: Callable[[Scene], None], directory: Path) -> None:
    """Play a scene in a process of its own; what lies outside is as it was.

    Raises:
        CounterExample: if it is not, or if the scene does not end as it should.
    """
    place = directory / "scene"
    made = Scene(place)
    try:
        cost = costs.measured(lambda: scene(made), allowed=_ALLOWED_BYTES)
        if cost.answer != "well":
            raise CounterExample(f"{name}: {cost.answer}")
        if made.secret.read_text() != _SECRET:
            raise CounterExample(f"{name}: a file elsewhere was written to")
    except (costs.Died, DistrustError) as error:
        raise CounterExample(f"{name}: {error}") from error
    finally:
        shutil.rmtree(place)
