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
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from distrust.checkpoint.files import open_regular, read_into
from distrust.errors import CorruptCheckpoint, join_first, quote_untrusted, shorten, warn
from distrust.importers.detect import CHECKSUMS, DIRECTORY, MEMBERS, METADATA, MODEL, OPTIMIZER
from distrust.importers.host_arrays import PIECE_BYTES, Depth, HostArray
from distrust.importers.imported import MAX_METADATA_BYTES, Imported, ImportedHeader, merge_unique
from distrust.importers.optimizer import STEP, M, V, validate_optimizer

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
#: Of a file's status: changes when the file is written to.
_version = attrgetter("st_size", "st_mtime_ns", "st_ctime_ns")


class NpzFolder:
    """An open folder whose files exist and whose metadata is valid. Replacing its path changes nothing."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._names = set(os.listdir(descriptor))  # once: all checks see the same files
        self._checksums: dict[str, str] = {}  # file name -> SHA-256 in lower case
        self.header = self._read_header()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[NpzFolder]:
        """Open a folder for the time of a with statement."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    def read(self, depth: Depth) -> Imported:
        """Read and check everything; the arrays have data only if ``depth`` is "load"."""
        # Files outside the format have no checksum. The user may rely on checksums to cover everything.
        for name in sorted(self._names - {*MEMBERS} - self._checksums.keys()) if depth == "verify" else ():
            if not name.startswith("."):  # hidden files belong to the system
                message = f"{self._path}: {quote_untrusted(name)} is not in {CHECKSUMS}, and was not read"
                warn(message)
        arrays: dict[str, dict[str, HostArray]] = {}
        problems = _Problems()
        for name in sorted((self._checksums.keys() | {*_ARRAY_FILES}) & self._names - {METADATA}):
            with problems:
                arrays[name] = self._read_verified(name, depth)
        problems.require_none()
        model = arrays.get(MODEL, {})
        return self.header.to_imported(model, self._make_optimizer(model, arrays.get(OPTIMIZER, {})))

    def describe(self) -> dict[str, HostArray]:
        """The arrays by label, as their headers say."""
        arrays: dict[str, HostArray] = {}
        for file, section in ((MODEL, "model"), (OPTIMIZER, "optimizer")):
            if file in self._names:
                with self._open_file(file) as (descriptor, status):
                    headers = self._read_array_headers(descriptor, file, status.st_size)
                arrays |= {f"{section}.{name}": array for name, array in headers.items()}
        return arrays

    def _make_optimizer(self, model: dict[str, HostArray], arrays: dict[str, HostArray]) -> dict[str, Any]:
        """The optimizer's scalars and arrays, with the moments as ``m`` and ``v``; they match the model."""
        moments: dict[str, Any] = {}
        for name in [name for name in arrays if name[:2] in _MOMENTS]:
            moments.setdefault(_MOMENTS[name[:2]], {})[name[2:]] = arrays.pop(name)
        source, scalars = f"{METADATA} and {OPTIMIZER}", self.header.optimizer_scalars
        optimizer = merge_unique(merge_unique(scalars, arrays, source), moments, source)
        shapes = {name: array.shape for name, array in model.items()}
        field = f"{METADATA}: optimizer_scalars.step" if STEP in scalars else f"{OPTIMIZER}: step"
        validate_optimizer(optimizer, shapes, self.header.step, OPTIMIZER, field)
        return optimizer

    def _read_header(self) -> ImportedHeader:
        """Check which files exist, and read the metadata, whose checksum is compared."""
        if not self._names:
            raise CorruptCheckpoint("an empty folder")
        members = sorted({*MEMBERS} & self._names)
        file_size, raw = 0, b""
        problems = _Problems()
        for name in members:
            with problems:  # a link or a folder does not hide other problems
                file_size += self._status(name).st_size
        with problems:
            if CHECKSUMS not in self._names:
                raise CorruptCheckpoint(
                    f"{CHECKSUMS} is missing, so the files cannot be verified; if you trust them, create "
                    f"it in the folder: sha256sum {' '.join(members)} > {CHECKSUMS}"
                )
            self._checksums = parse_checksums(self._read_small(CHECKSUMS, MAX_CHECKSUMS_BYTES))
            missing = sorted({*self._checksums} - self._names)
            problems += [f"{quote_untrusted(name)} is missing" for name in missing]
            unproven = sorted({*members} - {*self._checksums, CHECKSUMS})
            problems += [f"{name} is not in {CHECKSUMS}" for name in unproven]
        with problems:
            if METADATA in self._names:
                raw = self._read_small(METADATA, MAX_METADATA_BYTES)
                require_checksum(METADATA, self._checksums, hashlib.sha256(raw).hexdigest())
            elif METADATA not in self._checksums:  # otherwise it was reported above
                problems.append(f"{METADATA} is missing")
        problems.require_none()
        lacks_arrays = not self._names & {*_ARRAY_FILES}
        return ImportedHeader(
            raw, METADATA, self._path, self.open, DIRECTORY, file_size=file_size, lacks_arrays=lacks_arrays
        )

    def _read_verified(self, name: str, depth: Depth) -> dict[str, HostArray]:
        from distrust.importers import npz  # numpy: listing checkpoints works without it

        with self._open_file(name) as (descriptor, status):
            if name in _ARRAY_FILES:
                # Bounds are checked before the whole file is hashed.
                self._read_array_headers(descriptor, name, status.st_size)
            require_checksum(name, self._checksums, _sha256(descriptor))
            if name not in _ARRAY_FILES:
                return {}  # listed in checksum.txt, but not part of the format
            arrays = npz.read(descriptor, name, depth, nonnegative="v." if name == OPTIMIZER else "")
            # The checksum was computed in an earlier pass over the same file.
            if _version(status) != _version(os.fstat(descriptor)):
                raise CorruptCheckpoint(f"{name} changed while it was read")
            return arrays

    def _read_array_headers(self, descriptor: int, name: str, size: int) -> dict[str, HostArray]:
        from distrust.importers import npz

        try:
            return npz.read(descriptor, name, "headers")
        except CorruptCheckpoint:
            if size <= MAX_HASHED_INVALID_BYTES:  # a wrong checksum is the better explanation
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
        if stat.S_ISREG(status.st_mode):
            return status
        problem = "is not a regular file"
        if stat.S_ISLNK(status.st_mode):
            problem = "is a link, which is not followed; put the file itself there"
        raise CorruptCheckpoint(f"{quote_untrusted(name)} {problem}")


class _Problems(list[str]):
    """Context manager that adds the CorruptCheckpoint of its block, once. A class: see ErrorTranslator."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, CorruptCheckpoint) and error.reason not in self:
            self.append(error.reason)
        return isinstance(error, CorruptCheckpoint)

    def require_none(self) -> None:
        """Raise one CorruptCheckpoint with all problems."""
        if self:
            raise CorruptCheckpoint(join_first(self, PROBLEMS_SHOWN, "; "))


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
    """Check a file's digest, if one is expected; raises CorruptCheckpoint with the file and both digests."""
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
