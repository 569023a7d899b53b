"""Files and folders that appear complete are durable: synced, renamed, and the folder's names synced."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distrust import atomic
from distrust.atomic import atomic_directory, atomic_file, hold_lock
from distrust.checkpoint.disk import Disk


class CallRecorder(Disk):
    """Records each call with what it concerns."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def sync(self, descriptor: int) -> None:
        self.calls.append(("sync", os.fstat(descriptor).st_size))
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.calls.append(("rename", target))
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        self.calls.append(("sync_directory", path))
        super().sync_directory(path)


def test_the_whole_content_of_a_file_is_synced_before_its_name(tmp_path):
    disk = CallRecorder()
    path = tmp_path / "provenance.json"
    for content in (b"first", b"its replacement"):
        disk.calls.clear()
        with atomic_file(path, force=True, disk=disk) as file:
            file.write(content)
        assert disk.calls == [("sync", len(content)), ("rename", path), ("sync_directory", tmp_path)]


def test_the_names_of_new_parent_folders_are_synced(tmp_path):
    disk = CallRecorder()
    target = tmp_path / "x" / "y" / "t"
    with atomic_directory(target, disk=disk) as folder:
        (folder / "weights").write_bytes(b"12345")
    folders = [target.parent, target.parent.parent, tmp_path]
    assert disk.calls == [
        ("sync", 5),
        ("sync_directory", folder),
        ("rename", target),
        *(("sync_directory", parent) for parent in folders),
    ]


def test_a_lock_has_one_holder_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "POLL_SECONDS", 0)
    holders = []

    def hold(number):
        for _ in range(20):
            with hold_lock(tmp_path / "lock", flags=os.O_RDWR | os.O_CREAT, on_wait=lambda _: None):
                holders.append(number)
                assert holders == [number]
                os.sched_yield()
                holders.remove(number)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(hold, range(4))) == [None] * 4
