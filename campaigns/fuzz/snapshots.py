"""What is below a folder: to show that nothing of it was changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Larger files are sparse: their content is not read.
SPARSE_BYTES = 1 << 30


class Entry(NamedTuple):
    """A file, folder, link or something else, as it was."""

    mode: int
    size: int
    modified: int
    inode: int
    content: str  # the digest of a file, or the target of a link

    @property
    def is_sparse(self) -> bool:
        return self.size >= SPARSE_BYTES


def snapshot(root: Path) -> dict[str, Entry]:
    """Every entry at a path and below it. Links are not followed."""
    return dict(_entries(str(root)))


def _entries(path: str) -> Iterator[tuple[str, Entry]]:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode) and status.st_size < SPARSE_BYTES:
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    yield path, Entry(status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    if stat.S_ISDIR(status.st_mode):
        for name in os.listdir(path):
            yield from _entries(os.path.join(path, name))
