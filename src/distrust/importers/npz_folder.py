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
from typing import Any

from distrust.checkpoint.files import open_regular, read_into
from distrust.errors import CorruptCheckpoint, DistrustWarning, quote_untrusted, shorten
from distrust.importers.detect import CHECKSUMS, DIRECTORY, MEMBERS, METADATA, MODEL, OPTIMIZER
from distrust.importers.host_arrays import PIECE_BYTES, Depth, HostArray
from distrust.importers.imported import Imported, ImportedHeader
from distrust.importers.metadata import MAX_METADATA_BYTES, merge_unique, parse_header
from distrust.importers.validate_optimizer import STEP, M, V, validate_optimizer

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


def _make_optimizer(header: ImportedHeader, arrays: Mapping[str, dict[str, HostArray]]) -> dict[str, Any]:
    """The optimizer's scalars and arrays, with the moments as ``m`` and ``v``; they match the model."""
    moments: dict[str, Any] = {}
    other_arrays: dict[str, Any] = {}
    for name, array in arrays.get(OPTIMIZER, {}).items():
        if moment := _MOMENTS.get(name[:2]):
            moments.setdefault(moment, {})[name[2:]] = array
        else:
            other_arrays[name] = array
    source = f"{METADATA} and {OPTIMIZER}"
    scalars = header.optimizer_scalars
    optimizer = merge_unique(merge_unique(scalars, other_arrays, source), moments, source)
    validate_optimizer(
        optimizer,
        {name: array.shape for name, array in arrays.get(MODEL, {}).items()},
        step=header.step,
        moments_file=OPTIMIZER,
        step_field=f"{METADATA}: optimizer_scalars.step" if STEP in scalars else f"{OPTIMIZER}: step",
    )
    return optimizer


class NpzFolder:
    """An open folder whose files exist and whose metadata is valid. Replacing its path changes nothing.

    Attributes:
        header: its metadata.
    """

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
        if depth == "verify":
            self._warn_of_unlisted()
        problems: list[str] = []
        arrays: dict[str, dict[str, HostArray]] = {}
        for name in sorted((self._checksums.keys() | {*_ARRAY_FILES}) & self._names - {METADATA}):
            with _collect(problems):
                arrays[name] = self._read_verified(name, depth)
        _raise_all(problems)
        return self.header.to_imported(arrays.get(MODEL, {}), _make_optimizer(self.header, arrays))

    def describe(self) -> dict[str, HostArray]:
        """The arrays by label, as their headers say."""
        arrays: dict[str, HostArray] = {}
        for file, section in ((MODEL, "model"), (OPTIMIZER, "optimizer")):
            if file in self._names:
                with self._open_file(file) as (descriptor, status):
                    headers = self._read_array_headers(descriptor, file, status.st_size)
                arrays |= {f"{section}.{name}": array for name, array in headers.items()}
        return arrays

    def _read_header(self) -> ImportedHeader:
        """Check which files exist, and read the metadata, whose checksum is compared."""
        if not self._names:
            raise CorruptCheckpoint("an empty folder")
        problems: list[str] = []
        members = sorted({*MEMBERS} & self._names)
        file_size, raw = 0, b""
        for name in members:
            with _collect(problems):  # a link or a folder does not hide other problems
                file_size += self._status(name).st_size
        with _collect(problems):
            self._checksums = self._read_checksums()
            missing = sorted({*self._checksums} - self._names)
            problems += [f"{quote_untrusted(name)} is missing" for name in missing]
            unproven = sorted({*members} - {*self._checksums, CHECKSUMS})
            problems += [f"{name} is not in {CHECKSUMS}" for name in unproven]
        with _collect(problems):
            if METADATA in self._names:
                raw = self._read_small(METADATA, MAX_METADATA_BYTES)
                require_checksum(METADATA, self._checksums, hashlib.sha256(raw).hexdigest())
            elif METADATA not in self._checksums:  # otherwise it was reported above
                problems.append(f"{METADATA} is missing")
        _raise_all(problems)
        return parse_header(
            raw,
            METADATA,
            self._path,
            format=DIRECTORY,
            file_size=file_size,
            lacks_arrays=not self._names & {*_ARRAY_FILES},
        )

    def _warn_of_unlisted(self) -> None:
        """Files outside the format have no checksum. The user may rely on checksums to cover everything."""
        for name in sorted(self._names - {*MEMBERS} - self._checksums.keys()):
            if not name.startswith("."):  # hidden files belong to the system
                warnings.warn(
                    f"{self._path}: {quote_untrusted(name)} is not in {CHECKSUMS}, and was not read",
                    DistrustWarning,
                    stacklevel=4,
                )

    def _read_checksums(self) -> dict[str, str]:
        if CHECKSUMS in self._names:
            return parse_checksums(self._read_small(CHECKSUMS, MAX_CHECKSUMS_BYTES))
        members = " ".join(sorted({*MEMBERS} & self._names))
        raise CorruptCheckpoint(
            f"{CHECKSUMS} is missing, so the files cannot be verified; if you trust them, create it in the "
            f"folder: sha256sum {members} > {CHECKSUMS}"
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
            squares = "v." if name == OPTIMIZER else ""
            arrays = npz.read(descriptor, name, depth, nonnegative=squares)
            # The checksum was computed in an earlier pass over the same file.
            if _version(status) != _version(os.fstat(descriptor)):
                raise CorruptCheckpoint(f"{name} changed while it was read")
            return arrays

    def _read_array_headers(self, descriptor: int, name: str, size: int) -> dict[str, HostArray]:
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


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the CorruptCheckpoint raised inside to the problems, each once."""
    try:
        yield
    except CorruptCheckpoint as error:
        if error.reason not in problems:
            problems.append(error.reason)


def _raise_all(problems: list[str]) -> None:
    if problems:
        suffix = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise CorruptCheckpoint("; ".join(problems[:PROBLEMS_SHOWN]) + suffix)


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
