"""What a disk may hold after a power cut, by what POSIX permits and file systems do.

What was synced exists: a file's content by its sync, its name by the sync of its directory. Anything else may
have reached the disk or not, in any order: pages whole, torn at a sector or zeros, any size the file had, and
names. A rename replaces its target atomically, but the old name may still exist. The models are SQLite's
crash tests, and Pebble's crash clones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from campaigns.power import recording as op

PAGE_BYTES = 4096  # what the page cache writes
SECTOR_BYTES = 512  # what a disk writes in one piece

#: The content of each file, and None for a directory.
Image = Mapping[Path, bytes | None]
#: What became of everything that was not synced; the last five differ from page to page, or name to name.
Fate = Literal["lost", "kept", "zeros", "cut", "torn", "all but one", "only one", "random"]
FATES: tuple[Fate, ...] = ("lost", "kept", "zeros", "cut", "torn", "all but one", "only one", "random")


class _Change(NamedTuple):
    """Of the names in a directory: the node loses the name ``removed`` and gets the name ``added``."""

    removed: Path | None
    added: Path | None
    node: int


@dataclass
class _File:
    durable: bytes = b""
    pending: list[op.Reserve | op.Write | op.Truncate] = field(default_factory=list)

    def content(self, fate: Fate, rng: Random) -> bytes:
        if not self.pending or fate == "lost":
            return self.durable
        versions, sizes = self._history()
        if fate in ("kept", "zeros", "torn", "all but one", "only one"):
            size = sizes[-1]
        else:
            size = rng.choice([*sizes, *range(0, max(sizes), PAGE_BYTES)])
        pages = [versions.get(at, []) for at in range(0, size, PAGE_BYTES)]
        odd = rng.randrange(len(pages)) if pages else 0
        content = b"".join(_page(page, fate, odd=index == odd, rng=rng) for index, page in enumerate(pages))
        return content[:size]

    def sync(self, writer: int = 0) -> None:
        """Make durable what one writer has written; the first one also sets the size."""
        unsynced = [each for each in self.pending if getattr(each, "writer", 0) != writer]
        self.pending = [each for each in self.pending if getattr(each, "writer", 0) == writer]
        self.durable = self.content("kept", Random(0))
        self.pending = unsynced

    def _history(self) -> tuple[dict[int, list[bytes]], list[int]]:
        """The versions of each page, by its offset, oldest first; and the sizes that the file had."""
        versions = {
            at: [self.durable[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")]
            for at in range(0, len(self.durable), PAGE_BYTES)
        }
        sizes = [len(self.durable)]
        for operation in self.pending:
            if isinstance(operation, op.Truncate):
                sizes.append(operation.size)
            elif isinstance(operation, op.Reserve):
                sizes.append(max(sizes[-1], operation.size))
            else:
                for at in range(0, len(operation.content), PAGE_BYTES):
                    page = operation.content[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
                    versions.setdefault(operation.offset + at, [bytes(PAGE_BYTES)]).append(page)
                sizes.append(max(sizes[-1], operation.offset + len(operation.content)))
        return versions, sizes


def _page(versions: list[bytes], fate: Fate, *, odd: bool, rng: Random) -> bytes:
    """A page after a cut; ``odd`` is the one page that differs from the others of its file."""
    blank = bytes(PAGE_BYTES)
    if not versions:
        return blank
    first, last = versions[0], versions[-1]
    if fate == "random":
        return _tear(*rng.choices([*versions, blank], k=2), rng=rng)
    if fate == "torn" and odd:
        return _tear(last, rng.choice([first, blank]), rng=rng)
    if fate == "zeros":
        return first if len(versions) == 1 else blank
    if fate in ("all but one", "only one"):
        return first if odd == (fate == "all but one") else last
    return last


def _tear(begin: bytes, end: bytes, *, rng: Random) -> bytes:
    edge = SECTOR_BYTES * rng.randint(0, PAGE_BYTES // SECTOR_BYTES)
    return begin[:edge] + end[edge:]


class World:
    """The disk while a program runs: what it certainly holds, and what it may hold."""

    def __init__(self, root: Path, image: Image) -> None:
        self.names: dict[Path, int] = {}
        self._root = root  # the folder that everything happens in
        self._durable: dict[Path, int] = {}
        self._pending: dict[Path, list[_Change]] = {}
        self._files: dict[int, _File | None] = {}
        self._nodes: dict[int, int] = {}  # by the recorder's numbers of files
        for path, content in image.items():  # durable at first
            node = self._new_node(None if content is None else _File(content))
            self.names[path] = self._durable[path] = node

    def apply(self, operation: op.Operation) -> None:
        match operation:
            case op.MakeDirectory(path):
                self._change(_Change(None, path, self._new_node(None)))
            case op.Create(path, file):
                self._nodes[file] = self._new_node(_File())
                self._change(_Change(None, path, self._nodes[file]))
            case op.Reserve() | op.Write() | op.Truncate():
                self._file(operation.file).pending.append(operation)
            case op.Sync(file, writer):
                self._file(file).sync(writer)
            case op.SyncFailed(file):
                # The pages count as clean from now on: some were written, and no sync writes the others.
                dropped = self._file(file)
                dropped.durable = dropped.content("random", Random(len(dropped.pending)))
                dropped.pending.clear()
            case op.Rename(source, target):
                self._change(_Change(source, target, self.names[source]))
            case op.Unlink(path):
                self._change(_Change(path, None, self.names[path]))
            case op.SyncDirectory(path):
                _apply_changes(self._durable, self._pending.pop(path, []))

    def is_certain(self, path: Path) -> bool:
        """Whether a name exists after a cut, whatever becomes of what is pending."""
        if path == self._root:
            return True
        changes = self._pending.get(path.parent, [])
        stays = path in self._durable and all(path != change.removed for change in changes)
        return stays and self.is_certain(path.parent)

    def after_cut(self, names: Fate, contents: Fate, rng: Random) -> Image:
        """One disk that a cut at this instant may leave."""
        nodes = dict(self._durable)
        for pending in self._pending.values():
            _apply_changes(nodes, _surviving(pending, names, rng))
        image: dict[Path, bytes | None] = {}
        for path, node in sorted(nodes.items()):
            if path.parent != self._root and path.parent not in image:
                continue  # its directory was lost
            file = self._files[node]
            image[path] = None if file is None else file.content(contents, rng)
        return image

    @property
    def has_pending(self) -> bool:
        """Whether a cut may leave more than one disk."""
        return any(self._pending.values()) or any(file and file.pending for file in self._files.values())

    def _new_node(self, file: _File | None) -> int:
        self._files[len(self._files)] = file
        return len(self._files) - 1

    def _file(self, number: int) -> _File:
        file = self._files[self._nodes[number]]
        if file is None:
            raise TypeError("a directory was written to")
        return file

    def _change(self, change: _Change) -> None:
        path = change.added or change.removed
        assert path is not None
        _apply_changes(self.names, [change])
        self._pending.setdefault(path.parent, []).append(change)


def _apply_changes(names: dict[Path, int], changes: Iterable[_Change]) -> None:
    for change in changes:
        if change.removed is not None and names.get(change.removed) == change.node:
            del names[change.removed]
        if change.added is not None:
            names[change.added] = change.node


def _surviving(pending: list[_Change], fate: Fate, rng: Random) -> Iterator[_Change]:
    """The changes that reached the disk, in the order in which they did."""
    odd = rng.randrange(len(pending)) if pending else 0
    order = rng.sample(range(len(pending)), len(pending)) if fate == "random" else range(len(pending))
    for index in order:
        survives = {
            "lost": False,
            "kept": True,
            "zeros": index < odd,
            "cut": index >= odd,
            "torn": True,
            "all but one": index != odd,
            "only one": index == odd,
            "random": rng.random() < 0.5,
        }[fate]
        if survives:
            change = pending[index]
            # A rename that was cut in the middle leaves both names.
            both = change.added is not None and index == odd and fate in ("torn", "random")
            yield change._replace(removed=None) if both else change


def build(target: Path, root: Path, image: Image) -> None:
    """Make a folder that holds what ``image`` says of ``root``."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for path, content in image.items():
        copy = target / path.relative_to(root)
        if content is None:
            copy.mkdir()
        else:
            copy.write_bytes(content)
