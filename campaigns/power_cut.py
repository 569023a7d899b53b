"""What a disk may hold after a power cut, by what POSIX says and file systems do.

What was not synced may have reached the disk or not, in any order:

- of a file's content, each page was written or not, or in part (a disk writes sectors), or is zeros where the
  size was set before; the size is any that the file had since its last sync, or ends with any page between;
- of a directory, each new name, rename and removal is there or not, whatever came before or after it. A
  rename replaces the target in one instant, but the old name may be there still.

What was synced is there: a file's content by the sync of the file, its name by that of its directory. The
models are SQLite's crash tests, and Pebble's crash clones, which keep a random part of what was not synced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from campaigns.recording import (
    Create,
    MakeDirectory,
    Operation,
    Rename,
    Reserve,
    Sync,
    SyncDirectory,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)

PAGE_BYTES = 4096
SECTOR_BYTES = 512

#: The content of each file, and None for a directory.
Image = Mapping[Path, bytes | None]
#: What became of everything that was not synced; the last four differ from page to page, or name to name.
Fate = Literal["lost", "kept", "zeros", "cut", "torn", "all but one", "only one", "random"]
FATES: tuple[Fate, ...] = ("lost", "kept", "zeros", "cut", "torn", "all but one", "only one", "random")


class _Change(NamedTuple):
    """Of the names in a directory: ``came`` names the node from now on, ``gone`` does no longer."""

    gone: Path | None
    came: Path | None
    node: int


@dataclass
class _File:
    durable: bytes = b""
    pending: list[Reserve | Write | Truncate] = field(default_factory=list)

    def content(self, fate: Fate, chance: Random) -> bytes:
        """After a cut."""
        if not self.pending or fate == "lost":
            return self.durable
        versions, sizes = self._history()
        if fate in ("kept", "zeros", "torn", "all but one", "only one"):
            size = sizes[-1]
        else:
            size = chance.choice([*sizes, *range(0, max(sizes), PAGE_BYTES)])
        pages = [versions.get(at, []) for at in range(0, size, PAGE_BYTES)]
        odd = chance.randrange(len(pages)) if pages else 0
        content = b"".join(
            _page(page, fate, odd=index == odd, chance=chance) for index, page in enumerate(pages)
        )
        return content[:size]

    def sync(self) -> None:
        """Everything is durable."""
        self.durable = self.content("kept", Random(0))
        self.pending.clear()

    def _history(self) -> tuple[dict[int, list[bytes]], list[int]]:
        """By where a page begins: what it held, first and last; and the sizes that the file had."""
        versions = {
            at: [self.durable[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")]
            for at in range(0, len(self.durable), PAGE_BYTES)
        }
        sizes = [len(self.durable)]
        for done in self.pending:
            if isinstance(done, Truncate):
                sizes.append(done.size)
            elif isinstance(done, Reserve):
                sizes.append(max(sizes[-1], done.size))
            else:
                for at in range(0, len(done.content), PAGE_BYTES):
                    page = done.content[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
                    versions.setdefault(done.offset + at, [bytes(PAGE_BYTES)]).append(page)
                sizes.append(max(sizes[-1], done.offset + len(done.content)))
        return versions, sizes


def _page(versions: list[bytes], fate: Fate, *, odd: bool, chance: Random) -> bytes:
    """A page after a cut; ``odd``: the one that fared otherwise than its file."""
    blank = bytes(PAGE_BYTES)
    if not versions:
        return blank
    first, last = versions[0], versions[-1]
    if fate == "random":
        return _torn(*chance.choices([*versions, blank], k=2), chance=chance)
    if fate == "torn" and odd:
        return _torn(last, chance.choice([first, blank]), chance=chance)
    if fate == "zeros":
        return first if len(versions) == 1 else blank
    if fate == "all but one":
        return first if odd else last
    if fate == "only one":
        return last if odd else first
    return last


def _torn(begin: bytes, end: bytes, *, chance: Random) -> bytes:
    edge = SECTOR_BYTES * chance.randint(0, PAGE_BYTES // SECTOR_BYTES)
    return begin[:edge] + end[edge:]


class World:
    """The disk while a program runs: what is on it for certain, and what may be.

    Args:
        root: what everything happens in.
        image: what is in it at first, durable.
    """

    def __init__(self, root: Path, image: Image) -> None:
        self.now: dict[Path, int] = {}
        self._root = root
        self._durable: dict[Path, int] = {}
        self._pending: dict[Path, list[_Change]] = {}
        self._files: dict[int, _File | None] = {}
        self._nodes: dict[int, int] = {}  # of the recorder's files
        for path, content in image.items():
            node = self._node(None if content is None else _File(content))
            self.now[path] = self._durable[path] = node

    def apply(self, done: Operation) -> None:
        """Take an operation into account."""
        match done:
            case MakeDirectory(path):
                self._change(_Change(None, path, self._node(None)))
            case Create(path, file):
                self._nodes[file] = self._node(_File())
                self._change(_Change(None, path, self._nodes[file]))
            case Reserve() | Write() | Truncate():
                self._file(done.file).pending.append(done)
            case Sync(file):
                self._file(file).sync()
            case SyncFailed(file):
                # The pages count as clean from now on: some were written, and no sync writes the others.
                lost = self._file(file)
                lost.durable = lost.content("random", Random(len(lost.pending)))
                lost.pending.clear()
            case Rename(source, target):
                self._change(_Change(source, target, self.now[source]))
            case Unlink(path):
                self._change(_Change(path, None, self.now[path]))
            case SyncDirectory(path):
                _make(self._durable, self._pending.pop(path, []))

    def is_certain(self, path: Path) -> bool:
        """Whether a name is there after a cut, whatever becomes of what is pending."""
        if path == self._root:
            return True
        changes = self._pending.get(path.parent, [])
        stays = path in self._durable and all(path != change.gone for change in changes)
        return stays and self.is_certain(path.parent)

    def after_cut(self, names: Fate, contents: Fate, chance: Random) -> Image:
        """One disk that a cut at this instant may leave."""
        there = dict(self._durable)
        for pending in self._pending.values():
            _make(there, _chosen(pending, names, chance))
        image: dict[Path, bytes | None] = {}
        for path, node in sorted(there.items()):
            if path.parent != self._root and path.parent not in image:
                continue  # in a directory that is not there
            file = self._files[node]
            image[path] = None if file is None else file.content(contents, chance)
        return image

    @property
    def something_pending(self) -> bool:
        """Whether a cut may leave more than one disk."""
        return any(self._pending.values()) or any(file and file.pending for file in self._files.values())

    def _node(self, file: _File | None) -> int:
        self._files[len(self._files)] = file
        return len(self._files) - 1

    def _file(self, number: int) -> _File:
        file = self._files[self._nodes[number]]
        if file is None:
            raise TypeError("a directory was written to")
        return file

    def _change(self, change: _Change) -> None:
        place = change.came or change.gone
        if place is None:
            raise ValueError("a change of no name")
        _make(self.now, [change])
        self._pending.setdefault(place.parent, []).append(change)


def _make(names: dict[Path, int], changes: Iterable[_Change]) -> None:
    for change in changes:
        if change.gone is not None and names.get(change.gone) == change.node:
            del names[change.gone]
        if change.came is not None:
            names[change.came] = change.node


def _chosen(pending: list[_Change], fate: Fate, chance: Random) -> Iterator[_Change]:
    """The changes that reached the disk, in the order in which they did."""
    odd = chance.randrange(len(pending)) if pending else 0
    for index in (
        chance.sample(range(len(pending)), len(pending)) if fate == "random" else range(len(pending))
    ):
        reached = {
            "lost": False,
            "kept": True,
            "zeros": index < odd,
            "cut": index >= odd,
            "torn": True,
            "all but one": index != odd,
            "only one": index == odd,
            "random": chance.random() < 0.5,
        }[fate]
        if reached:
            change = pending[index]
            # Both names of a file that was being renamed.
            half = change.came is not None and index == odd and fate in ("torn", "random")
            yield change._replace(gone=None) if half else change
