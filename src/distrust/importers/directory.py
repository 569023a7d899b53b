"""The directory format: ``metadata.json``, ``checksum.txt`` and, or not, ``model.npz`` and ``optimizer.npz``.

Everything wrong with the files of a folder is told at once: each that is missing, that is no regular file,
that has no checksum, or another one. Only what lies in the folder itself is read: a file that is a link is
refused, wherever it leads (the folder may be reached by one). Each file is opened once: its checksum is that
of the very bytes that are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name, read_into
from distrust.checkpoint.format import TensorInfo
from distrust.errors import CorruptCheckpoint, DistrustWarning, quote_untrusted
from distrust.importers import (
    CHECKSUMS,
    MEMBERS,
    METADATA,
    MODEL,
    OPTIMIZER,
    agreement,
    checksums,
    fields,
    npz,
)
from distrust.importers.fields import together
from distrust.importers.header import NO_DIGEST, OlderHeader

if TYPE_CHECKING:
    from distrust.checkpoint.arrays import Framework
    from distrust.checkpoint.checkpoint import Checkpoint

_ARRAYS = (MODEL, OPTIMIZER)
#: A file of so many bytes is digested even if it is no zip.
_DIGESTED_ANYHOW_BYTES = 1 << 30
#: So many findings are told, of a folder in which everything is wrong.
_TOLD = 8
_MOMENTS = {"m.": agreement.M, "v.": agreement.V}
#: The arrays of a file that are means of squares, by what their names begin with.
_SQUARES = {OPTIMIZER: "v."}

#: Is handed the descriptor of an ``.npz``, its name, and what the names of its squares begin with.
Use = Callable[[int, str, str | None], Any]


def header(path: Path) -> OlderHeader:
    """See :func:`distrust.importers.read_header`."""
    with _opened(path) as folder:
        return folder.header()


def verify(path: Path) -> OlderHeader:
    """See :func:`distrust.importers.verify`."""
    with _opened(path) as folder:
        found = folder.header()
        for name in folder.unlisted():
            # It is no part of the checkpoint; but whoever relies on checksums wants to know.
            warnings.warn(
                f"{path}: {quote_untrusted(name)} is not in {CHECKSUMS}, and was not read",
                DistrustWarning,
                stacklevel=4,
            )
        content = folder.each_array_file(npz.verify)
        _optimizer(found, content)
        return found


def read(path: Path, framework: Framework) -> tuple[OlderHeader, Checkpoint]:
    """See :func:`distrust.importers.read`."""
    from distrust.importers import state  # numpy: for who loads the arrays

    with _opened(path) as folder:
        found = folder.header()
        content = folder.each_array_file(npz.read)
    optimizer = _optimizer(found, content)
    return found, state.assemble(found, content.get(MODEL, {}), optimizer, framework=framework)


def _optimizer(header: OlderHeader, content: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's tree, of arrays whose names say where in it they belong; it agrees with the model."""
    sections: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for name, value in content.get(OPTIMIZER, {}).items():
        if section := _MOMENTS.get(name[:2]):
            sections.setdefault(section, {})[name[2:]] = value
        else:
            others[name] = value
    what = f"{METADATA} and {OPTIMIZER}"
    scalars = header.fields.optimizer_scalars
    tree = together(together(scalars, others, what), sections, what)
    agreement.require(
        tree,
        {name: array.shape for name, array in content.get(MODEL, {}).items()},
        step=header.step,
        of_moments=OPTIMIZER,
        of_step=f"{METADATA}: optimizer_scalars.step" if agreement.STEP in scalars else f"{OPTIMIZER}: step",
    )
    return tree


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Folder]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _Folder(path, descriptor)
    finally:
        os.close(descriptor)


class _Folder:
    """The folder of a checkpoint, open: whoever replaces it meanwhile does not change what is read."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._names = set(os.listdir(descriptor))
        self._expected: dict[str, str] = {}

    def header(self) -> OlderHeader:
        """Check what files there are, and read the metadata, compared with its checksum."""
        if not self._names:
            raise CorruptCheckpoint("an empty folder")
        findings = _Findings()
        members = sorted({*MEMBERS} & self._names)
        sizes = dict.fromkeys(members, 0)
        for name in members:
            with findings:
                sizes[name] = self._status(name).st_size
        with findings:
            self._expected = self._checksums()
            findings += [
                f"{quote_untrusted(name)} is missing" for name in sorted({*self._expected} - self._names)
            ]
            unproven = sorted({*members} - {*self._expected, CHECKSUMS})
            findings += [f"{name} is not in {CHECKSUMS}" for name in unproven]
        raw = b""
        with findings:
            raw = self._metadata()
        findings.require_none()
        named = parse_checkpoint_name(self._path)
        return OlderHeader(
            "directory",
            fields.parse(raw, METADATA, self._path),
            kind=named[2] if named else "periodic",
            file_size=sum(sizes.values()),
            tensors=lambda: _tensors(self._path),
            lacks_arrays=not self._names & {*_ARRAYS},
        )

    def each_array_file(self, use: Use) -> dict[str, Any]:
        """What ``use`` makes of each ``.npz``; every file that has a checksum is compared with it before."""
        findings = _Findings()
        made = {}
        for name in sorted((self._expected.keys() | {*_ARRAYS}) & self._names - {METADATA}):
            with findings:
                made[name] = self._proven(name, use if name in _ARRAYS else None)
        findings.require_none()
        return made

    def described(self, name: str) -> list[npz.Array]:
        """The arrays of a file, as their members say; none of a file that is not there."""
        if name not in self._names:
            return []
        self._expected = self._expected or self._checksums()
        with self._file(name) as (descriptor, status):
            return self._described(descriptor, name, status.st_size)

    def unlisted(self) -> list[str]:
        """Files that are no part of the format and that no checksum proves; hidden ones are the system's."""
        others = self._names - {*MEMBERS} - self._expected.keys()
        return sorted(name for name in others if not name.startswith("."))

    def _checksums(self) -> dict[str, str]:
        if CHECKSUMS in self._names:
            return checksums.parse(self._content(CHECKSUMS, checksums.MAX_CHECKSUMS_BYTES), CHECKSUMS)
        there = " ".join(sorted({*MEMBERS} & self._names))
        raise CorruptCheckpoint(
            f"{CHECKSUMS} is missing, so nothing tells whether the files are whole; if you trust them, make "
            f"it there: sha256sum {there} > {CHECKSUMS}"
        )

    def _metadata(self) -> bytes:
        if METADATA not in self._names:
            # Where the checksums name it, that was told.
            raise CorruptCheckpoint("" if METADATA in self._expected else f"{METADATA} is missing")
        raw = self._content(METADATA, fields.MAX_METADATA_BYTES)
        checksums.compare(METADATA, self._expected, hashlib.sha256(raw).hexdigest())
        return raw

    def _proven(self, name: str, use: Use | None) -> Any:
        """What ``use`` makes of a file, which has the right checksum and is the same before and after."""
        with self._file(name) as (descriptor, before):
            if use is not None:
                self._described(descriptor, name, before.st_size)
            checksums.compare(name, self._expected, checksums.of_file(descriptor))
            made = None if use is None else use(descriptor, name, _SQUARES.get(name))
            if _written(before) != _written(os.fstat(descriptor)):
                raise CorruptCheckpoint(f"{name} changed while it was read")
            return made

    def _described(self, descriptor: int, name: str, size: int) -> list[npz.Array]:
        try:
            return npz.describe(descriptor, name)
        except CorruptCheckpoint:
            # That the checksum is wrong says more. But a sparse file may be without end.
            if size <= _DIGESTED_ANYHOW_BYTES:
                checksums.compare(name, self._expected, checksums.of_file(descriptor))
            raise

    def _content(self, name: str, most: int) -> bytes:
        """A small file."""
        with self._file(name) as (descriptor, status):
            if status.st_size > most:
                raise CorruptCheckpoint(f"{name} has {status.st_size:,} bytes, and at most {most:,} are read")
            raw = bytearray(status.st_size)
            read_into(descriptor, memoryview(raw), 0)
            return bytes(raw)

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[tuple[int, os.stat_result]]:
        self._status(name)
        with open_regular(name, folder=self._descriptor) as opened:
            yield opened

    def _status(self, name: str) -> os.stat_result:
        """Of a regular file; where it is anything else, that is told."""
        status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            raise CorruptCheckpoint(
                f"{quote_untrusted(name)} is a link, and none is followed here: put the file there"
            )
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint(f"{quote_untrusted(name)} is not a regular file")
        return status


class _Findings(list[str]):
    """What is wrong, each once: entering it collects what is raised inside."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, CorruptCheckpoint):
            if error.reason and error.reason not in self:
                self.append(error.reason)
            return True
        return False

    def require_none(self) -> None:
        """Raise all of it as one line."""
        if self:
            more = f"; and {len(self) - _TOLD} more" if len(self) > _TOLD else ""
            raise CorruptCheckpoint("; ".join(self[:_TOLD]) + more)


def _written(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _tensors(path: Path) -> tuple[TensorInfo, ...]:
    """The arrays as their members describe them; checksums are looked at only where that makes no sense."""
    found = []
    with errors_with_path(path), _opened(path) as folder:
        for name, section in zip(_ARRAYS, ("model", "optimizer"), strict=True):
            found += [
                TensorInfo(f"{section}.{array.name}", array.dtype, array.shape, 0, array.nbytes, NO_DIGEST)
                for array in folder.described(name)
            ]
    return tuple(sorted(found))
