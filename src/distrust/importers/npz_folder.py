"""The directory format: ``metadata.json``, ``checksum.txt``, and optionally ``model.npz``, ``optimizer.npz``.

All problems of a folder are reported at once: files that are missing, not regular, without a checksum or with
a wrong one. Only files in the folder itself are read, and no link inside it is followed; the folder itself
may be reached by one. Each file is opened once: its checksum is that of the very bytes that are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name, read_into
from distrust.errors import CorruptCheckpoint, DistrustWarning, quote_untrusted, shorten
from distrust.importers import CHECKSUMS, DIRECTORY, MEMBERS, METADATA, MODEL, OPTIMIZER, metadata
from distrust.importers.host_arrays import PIECE_BYTES, HostArray
from distrust.importers.imported import Imported, ImportedHeader
from distrust.importers.metadata import merge_unique
from distrust.importers.validate_optimizer import STEP, M, V, validate_optimizer

if TYPE_CHECKING:
    from distrust.importers.npz import Depth

_ARRAY_FILES = (MODEL, OPTIMIZER)
#: Prefixes of the names of moments -> their section in our optimizer.
_MOMENTS = {"m.": M, "v.": V}
MAX_CHECKSUMS_BYTES = 1 << 20
#: A file that is not a zip is hashed only up to this size: a sparse file may be practically endless.
MAX_HASHED_INVALID_BYTES = 1 << 30
#: A message lists at most this many problems.
PROBLEMS_SHOWN = 8
#: A line of sha256sum: the digest, then the name.
_CHECKSUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?([^\r\n]+)", re.ASCII)


def header(path: Path) -> ImportedHeader:
    """See :func:`distrust.importers.read_header`."""
    with _open(path) as folder:
        return folder.header()


def verify(path: Path) -> ImportedHeader:
    """See :func:`distrust.importers.verify`."""
    with _open(path) as folder:
        header = folder.header()
        for name in folder.unlisted():
            # Not part of the checkpoint, so not damage; but the user may rely on the checksums to cover it.
            warnings.warn(
                f"{path}: {quote_untrusted(name)} is not in {CHECKSUMS}, and was not read",
                DistrustWarning,
                stacklevel=4,
            )
        _make_optimizer(header, folder.read_arrays("verify"))
        return header


def read(path: Path) -> tuple[ImportedHeader, Imported]:
    """See :func:`distrust.importers.load`."""
    with _open(path) as folder:
        header = folder.header()
        arrays = folder.read_arrays("load")
    return header, header.to_imported(arrays.get(MODEL, {}), _make_optimizer(header, arrays))


def _make_optimizer(header: ImportedHeader, arrays: Mapping[str, dict[str, HostArray]]) -> dict[str, Any]:
    """The optimizer's scalars and arrays, with the moments as ``m`` and ``v``; they match the model."""
    moments: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, array in arrays.get(OPTIMIZER, {}).items():
        if moment := _MOMENTS.get(name[:2]):
            moments.setdefault(moment, {})[name[2:]] = array
        else:
            others[name] = array
    what = f"{METADATA} and {OPTIMIZER}"
    scalars = header.content.optimizer_scalars
    optimizer = merge_unique(merge_unique(scalars, others, what), moments, what)
    validate_optimizer(
        optimizer,
        {name: array.shape for name, array in arrays.get(MODEL, {}).items()},
        step=header.step,
        moments_file=OPTIMIZER,
        step_field=f"{METADATA}: optimizer_scalars.step" if STEP in scalars else f"{OPTIMIZER}: step",
    )
    return optimizer


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Folder]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _Folder(path, descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> dict[str, HostArray]:
    with errors_with_path(path), _open(path) as folder:
        return {
            f"{section}.{name}": array
            for file, section in zip(_ARRAY_FILES, ("model", "optimizer"), strict=True)
            for name, array in folder.describe(file).items()
        }


class _Folder:
    """An open folder: replacing its path does not change what is read."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._names = set(os.listdir(descriptor))
        self._checksums: dict[str, str] = {}

    def header(self) -> ImportedHeader:
        """Check which files exist, and read the metadata, whose checksum is compared."""
        if not self._names:
            raise CorruptCheckpoint("an empty folder")
        problems = _Problems()
        members = sorted({*MEMBERS} & self._names)
        sizes = dict.fromkeys(members, 0)
        for name in members:
            with problems:
                sizes[name] = self._status(name).st_size
        with problems:
            self._checksums = self._read_checksums()
            missing = sorted({*self._checksums} - self._names)
            problems += [f"{quote_untrusted(name)} is missing" for name in missing]
            unproven = sorted({*members} - {*self._checksums, CHECKSUMS})
            problems += [f"{name} is not in {CHECKSUMS}" for name in unproven]
        raw = b""
        with problems:
            raw = self._read_metadata()
        problems.raise_all()
        entry = parse_checkpoint_name(self._path)
        return ImportedHeader(
            DIRECTORY,
            metadata.parse(raw, METADATA, self._path),
            kind=entry[2] if entry else "periodic",
            file_size=sum(sizes.values()),
            describe=lambda: _describe(self._path),
            lacks_arrays=not self._names & {*_ARRAY_FILES},
        )

    def read_arrays(self, depth: Depth) -> dict[str, dict[str, HostArray]]:
        """The arrays of each ``.npz``; every file that has a checksum is first compared with it."""
        problems = _Problems()
        arrays = {}
        for name in sorted((self._checksums.keys() | {*_ARRAY_FILES}) & self._names - {METADATA}):
            with problems:
                arrays[name] = self._read_verified(name, depth)
        problems.raise_all()
        return arrays

    def describe(self, name: str) -> dict[str, HostArray]:
        """The arrays of a file as their headers say; empty if the file does not exist."""
        if name not in self._names:
            return {}
        self._checksums = self._checksums or self._read_checksums()
        with self._open_file(name) as (descriptor, status):
            return self._read_headers(descriptor, name, status.st_size)

    def unlisted(self) -> list[str]:
        """Files outside the format that have no checksum; hidden ones belong to the system."""
        others = self._names - {*MEMBERS} - self._checksums.keys()
        return sorted(name for name in others if not name.startswith("."))

    def _read_checksums(self) -> dict[str, str]:
        if CHECKSUMS in self._names:
            return parse_checksums(self._read_small(CHECKSUMS, MAX_CHECKSUMS_BYTES))
        members = " ".join(sorted({*MEMBERS} & self._names))
        raise CorruptCheckpoint(
            f"{CHECKSUMS} is missing, so the files cannot be verified; if you trust them, create it in the "
            f"folder: sha256sum {members} > {CHECKSUMS}"
        )

    def _read_metadata(self) -> bytes:
        if METADATA not in self._names:
            # If the checksums list it, that problem was already reported.
            raise CorruptCheckpoint("" if METADATA in self._checksums else f"{METADATA} is missing")
        raw = self._read_small(METADATA, metadata.MAX_METADATA_BYTES)
        require_checksum(METADATA, self._checksums, hashlib.sha256(raw).hexdigest())
        return raw

    def _read_verified(self, name: str, depth: Depth) -> dict[str, HostArray]:
        from distrust.importers import npz  # numpy: listing checkpoints works without it

        with self._open_file(name) as (descriptor, status):
            if name in _ARRAY_FILES:
                self._read_headers(descriptor, name, status.st_size)
            require_checksum(name, self._checksums, _sha256(descriptor))
            if name not in _ARRAY_FILES:
                return {}
            squares = "v." if name == OPTIMIZER else ""
            arrays = npz.read(descriptor, name, depth, nonnegative=squares)
            # The checksum was computed in an earlier pass over the same file.
            if _version(status) != _version(os.fstat(descriptor)):
                raise CorruptCheckpoint(f"{name} changed while it was read")
            return arrays

    def _read_headers(self, descriptor: int, name: str, size: int) -> dict[str, HostArray]:
        from distrust.importers import npz

        try:
            return npz.read(descriptor, name, "headers")
        except CorruptCheckpoint:
            # A wrong checksum is the better explanation.
            if size <= MAX_HASHED_INVALID_BYTES:
                require_checksum(name, self._checksums, _sha256(descriptor))
            raise

    def _read_small(self, name: str, max_bytes: int) -> bytes:
        with self._open_file(name) as (descriptor, status):
            if status.st_size > max_bytes:
                raise CorruptCheckpoint(f"{name} has {status.st_size:,} bytes; the limit is {max_bytes:,}")
            raw = bytearray(status.st_size)
            read_into(descriptor, memoryview(raw), 0)
            return bytes(raw)

    @contextlib.contextmanager
    def _open_file(self, name: str) -> Iterator[tuple[int, os.stat_result]]:
        self._status(name)
        # Relative to the open folder, and without following links.
        with open_regular(name, folder=self._descriptor) as opened:
            yield opened

    def _status(self, name: str) -> os.stat_result:
        """The status of a regular file; anything else is refused."""
        status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            raise CorruptCheckpoint(
                f"{quote_untrusted(name)} is a link, which is not followed; put the file itself there"
            )
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint(f"{quote_untrusted(name)} is not a regular file")
        return status


class _Problems(list[str]):
    """What is wrong, each once. As a context it collects the CorruptCheckpoint raised inside."""

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

    def raise_all(self) -> None:
        """Raise all problems as one line, if there are any."""
        if self:
            more = f"; and {len(self) - PROBLEMS_SHOWN} more" if len(self) > PROBLEMS_SHOWN else ""
            raise CorruptCheckpoint("; ".join(self[:PROBLEMS_SHOWN]) + more)


def parse_checksums(raw: bytes) -> dict[str, str]:
    """Parse ``checksum.txt``: the digest of each file by name, as sha256sum prints them.

    Raises:
        CorruptCheckpoint: naming the first invalid line.
    """
    try:
        lines = str(raw, "utf-8-sig").splitlines()  # editors on Windows write a byte order mark
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{CHECKSUMS} is not UTF-8") from None
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise CorruptCheckpoint(f"{CHECKSUMS}, line {number}: not '<64 hex digits>  <file>'")
        digest, name = match.groups()
        # A plain name only: nothing outside the folder is ever opened.
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise CorruptCheckpoint(f"{CHECKSUMS}, line {number}: {shorten(name)!r} is not a plain file name")
        if name in digests:
            raise CorruptCheckpoint(f"{CHECKSUMS}, line {number}: {shorten(name)!r} occurs twice")
        digests[name] = digest.lower()
    return digests


def require_checksum(name: str, checksums: Mapping[str, str], digest: str) -> None:
    """Check a file's digest, if one is expected.

    Raises:
        CorruptCheckpoint: with the file and both digests.
    """
    expected = checksums.get(name, digest)
    if expected != digest:
        raise CorruptCheckpoint(
            f"{quote_untrusted(name)} does not match {CHECKSUMS}: expected {expected}, found {digest}"
        )


def _sha256(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, PIECE_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
