"""The product broken on purpose: what shows that a campaign finds what it looks for.

In the process that calls :func:`plant`. Where it can be, a fault is put where the product meets the system:
whichever way the product's modules are cut, it meets it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LEAK_BYTES = 64 << 10
_leaked: list[Any] = []


def _replaced(module: Any, name: str, by: Callable[..., Any]) -> None:
    setattr(module, name, by)


def _beside_each_rename(leak: Callable[[Any], object]) -> None:
    """Have every commit of a file leave something behind."""
    honest = os.replace

    def replace(source: Any, target: Any) -> None:
        honest(source, target)
        _leaked.append(leak(target))

    _replaced(os, "replace", replace)


def _descriptors() -> None:
    _beside_each_rename(lambda target: os.open(target, os.O_RDONLY))


def _memory() -> None:
    _beside_each_rename(lambda _: bytearray(b"x") * _LEAK_BYTES)


def _threads() -> None:
    def start() -> threading.Thread:
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        return thread

    _beside_each_rename(lambda _: start() if len(_leaked) % 10 == 0 else None)


def _slower() -> None:
    _beside_each_rename(lambda _: time.sleep(len(_leaked) * 2e-6))


def _removes_nothing() -> None:
    """A clean-up that does not clean up."""
    _replaced(os, "unlink", lambda *_, **__: None)


def _in_place() -> None:
    """A file that comes into being under its final name, piece by piece."""

    def replace(source: Any, target: Any) -> None:
        with open(source, "rb") as whole, open(target, "wb", buffering=0) as growing:
            while piece := whole.read(2000):
                growing.write(piece)
                time.sleep(0.0005)
        os.unlink(source)

    _replaced(os, "replace", replace)


def _before_each_file(spoil: Callable[[Path], object]) -> None:
    """Have something done to the directory before a new file is made in it, by its temporary name."""
    from distrust.checkpoint.disk import Disk

    honest = Disk.create

    def create(disk: Disk, path: Path) -> int:
        spoil(path)
        return honest(disk, path)

    _replaced(Disk, "create", create)


def _removed_first() -> None:
    """The file of the same name is removed before the new one is written."""
    _before_each_file(lambda path: path.with_name(path.name[1:].split(".")[0] + ".safetensors").unlink(True))


def _one_only() -> None:
    """The older checkpoints are removed before the new one is written."""

    def remove(path: Path) -> None:
        for older in path.parent.glob("checkpoint-*.safetensors"):
            older.unlink()

    _before_each_file(remove)


def _no_lock() -> None:
    """A lock that everybody gets."""
    _replaced(fcntl, "flock", lambda *_: None)


def _children_keep_the_lock() -> None:
    _replaced(os, "register_at_fork", lambda **_: None)


def _children_clean_up() -> None:
    """A child that takes its parent's unfinished file for one that somebody left behind.

    The directory is the first argument of the process.
    """
    import glob
    import sys

    def remove() -> None:
        for path in glob.glob(os.path.join(sys.argv[1], ".checkpoint-*.tmp")):
            os.unlink(path)

    os.register_at_fork(after_in_child=remove)


def _removes_the_best() -> None:
    from distrust.checkpoint import retention

    _replaced(retention, "rank_by_metric", lambda *_: [])


def _no_mutex() -> None:
    """Clones that do not wait for one another."""
    import contextlib

    from distrust.checkpoint import manager_state

    honest = manager_state.ManagerState.reset

    def begin(begun: Any) -> None:
        honest(begun)
        begun.mutex = contextlib.nullcontext()

    _replaced(manager_state.ManagerState, "reset", begin)


#: By name: what is to be broken.
FAULTS: dict[str, Callable[[], None]] = {
    "descriptors": _descriptors,
    "memory": _memory,
    "threads": _threads,
    "slower": _slower,
    "removes-nothing": _removes_nothing,
    "in-place": _in_place,
    "removed-first": _removed_first,
    "one-only": _one_only,
    "no-lock": _no_lock,
    "children-keep-the-lock": _children_keep_the_lock,
    "children-clean-up": _children_clean_up,
    "removes-the-best": _removes_the_best,
    "no-mutex": _no_mutex,
}


def plant(name: str | None) -> None:
    """Break the product in this process; None breaks nothing."""
    if name is not None:
        FAULTS[name]()
