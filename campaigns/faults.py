"""The product broken on purpose: shows that a campaign finds what it looks for.

A fault is planted in the process that calls :func:`plant`. Most are planted where the product meets the
system, so that they do not depend on how the product's modules are divided.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LEAK_BYTES = 64 << 10  # of each save
_leaked: list[Any] = []


def _replace(module: Any, name: str, replacement: Callable[..., Any]) -> None:
    setattr(module, name, replacement)


def _leak_at_each_rename(leak: Callable[[Any], object]) -> None:
    """Every commit of a file leaves something behind."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        original(source, target)
        _leaked.append(leak(target))

    _replace(os, "replace", replace)


def _start_thread(_: Any) -> threading.Thread | None:
    if len(_leaked) % 10:
        return None
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    return thread


def _write_in_place() -> None:
    """A file comes into being under its final name, piece by piece."""

    def replace(source: Any, target: Any) -> None:
        with open(source, "rb") as complete, open(target, "wb", buffering=0) as growing:
            while piece := complete.read(2000):
                growing.write(piece)
                time.sleep(0.0005)
        os.unlink(source)

    _replace(os, "replace", replace)


def _do_before_each_file(act: Callable[[Path], object]) -> None:
    """Do something to the directory before a temporary file is made in it."""
    from distrust.checkpoint.disk import Disk

    original = Disk.create

    def create(disk: Disk, path: Path) -> int:
        act(path)
        return original(disk, path)

    _replace(Disk, "create", create)


def _remove_same_name(path: Path) -> None:
    path.with_name(path.name[1:].split(".")[0] + ".safetensors").unlink(missing_ok=True)


def _remove_older(path: Path) -> None:
    for older in path.parent.glob("checkpoint-*.safetensors"):
        older.unlink()


def _children_clean_up() -> None:
    """A forked child removes its parent's unfinished file; its directory is the process's first argument."""
    import glob
    import sys

    def remove() -> None:
        for path in glob.glob(os.path.join(sys.argv[1], ".checkpoint-*.tmp")):
            os.unlink(path)

    os.register_at_fork(after_in_child=remove)


def _remove_best() -> None:
    from distrust.checkpoint import retention

    _replace(retention, "rank_by_metric", lambda *_: [])


def _no_mutex() -> None:
    """Clones of a manager do not wait for one another."""
    import contextlib

    from distrust.checkpoint import manager_state

    original = manager_state.ManagerState.reset

    def reset(state: Any) -> None:
        original(state)
        state.mutex = contextlib.nullcontext()

    _replace(manager_state.ManagerState, "reset", reset)


#: By name: plants the fault.
FAULTS: dict[str, Callable[[], None]] = {
    "descriptors": lambda: _leak_at_each_rename(lambda target: os.open(target, os.O_RDONLY)),  # one per save
    "memory": lambda: _leak_at_each_rename(lambda _: bytearray(b"x") * _LEAK_BYTES),  # 64 KiB per save
    "threads": lambda: _leak_at_each_rename(_start_thread),  # one per ten saves
    "slower": lambda: _leak_at_each_rename(lambda _: time.sleep(len(_leaked) * 2e-6)),  # 2 µs more per save
    "removes-nothing": lambda: _replace(os, "unlink", lambda *_, **__: None),  # clean-ups and sweeps
    "in-place": _write_in_place,  # a kill leaves half a file under the final name
    "removed-first": lambda: _do_before_each_file(_remove_same_name),  # a kill leaves no file under the name
    "one-only": lambda: _do_before_each_file(_remove_older),  # a kill leaves no checkpoint at all
    "no-lock": lambda: _replace(fcntl, "flock", lambda *_: None),  # every process gets the lock
    "children-keep-the-lock": lambda: _replace(os, "register_at_fork", lambda **_: None),
    "children-clean-up": _children_clean_up,  # of a parent that is still saving
    "removes-the-best": _remove_best,  # retention forgets the metric
    "no-mutex": _no_mutex,  # between clones of a manager
}


def plant(name: str | None) -> None:
    """Break the product in this process; None breaks nothing."""
    if name is not None:
        FAULTS[name]()
