"""On-disk cache of checked and tokenized data, found by a digest of its inputs and memory-mapped.

An entry is named by a digest of everything that determines its content, so it is never stale, and deleting it
only costs time. It is written under a temporary name, synced and renamed: the leftovers of a killed process
are never read. One process builds it, and others wait, such as the ranks of a run; without locks on that file
system, each builds it. Entries are not trusted: each process reads the arrays once and compares their
fingerprint with the recorded one. A damaged entry is rebuilt, with a warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from distrust.atomic import atomic_file, hold_lock
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import open_regular_file
from distrust.data.column_report import ColumnReport
from distrust.data.corpus import (
    BLOCK,
    OPTIONAL_ARRAYS,
    REQUIRED_ARRAYS,
    Classes,
    Corpus,
    Counts,
    Locations,
    Parts,
    add_sizes,
    blocks,
    digest_arrays,
)
from distrust.data.reading import DatasetStats
from distrust.errors import ConfigError, DistrustError, DistrustWarning, WriteFailed
from distrust.paths import refuse_links

# The numbers are the versions of the formats: increment one when an entry's content changes.
_TOKENS, _CHECKED, _TEMPORARY = "tokens-4", "checked-3", "unfinished-"
_MANIFEST = "corpus.json"

#: The files of an entry. Those of optional arrays exist only where the corpus has them.
_DTYPES = {
    "input_ids": "<i4",
    "loss_mask": "|b1",
    "offsets": "<i8",
    "authority_weight": "<f8",
    "provenance_entropy": "<f8",
    "sequence_offsets": "<i8",
    "token_weights": "<f4",
    "loss_tokens": "<i8",
    "part": "<i4",  # which part of the sources an example is from
    "line": "<i8",
    "class_of": "<i4",
}
#: Files that have a digest of their own; the others are fingerprinted.
_SIDE_FILES = ("loss_tokens", "part", "line", "class_of")

_REMEDY = "give another folder with --cache-dir"
_MAX_SEALED_BYTES = 64 << 20  # a description names at most the classes and sources


class _DamagedError(Exception):
    """An entry is not what was written."""


class Cache:
    """A folder of checked and tokenized data, created on the first write.

    If it cannot be written to, a temporary one is used, with a warning. While another process builds what is
    needed, ``on_wait`` is called several times a second, with 0, 1, …; it may raise.
    """

    def __init__(self, folder: Path, on_wait: Callable[[int], None] = lambda _: None) -> None:
        self.folder, self._on_wait = folder, on_wait

    def stats(self, key: str) -> DatasetStats | None:
        """The stats of data that was checked without errors before; None if it was not."""
        try:
            values = _open_sealed(self.folder / _CHECKED / f"{key}.json")
        except (OSError, _DamagedError):
            return None
        used, ignored, similar = values.pop("columns").values()
        columns = ColumnReport(tuple(used), tuple(ignored), similar)
        return DatasetStats(**{**values, "sizes": tuple(values["sizes"]), "columns": columns})

    def store_stats(self, key: str, stats: DatasetStats) -> None:
        """Record that data was checked without errors. On failure it is checked again at the next start."""
        folder = self.folder / _CHECKED
        with contextlib.suppress(OSError, DistrustError):
            _create(folder)
            with atomic_file(folder / f"{key}.json", force=True) as file:
                file.write(_seal(asdict(stats)))

    def corpus(self, key: str | None, parts: Parts, build: Callable[[], Iterable[Corpus]]) -> Corpus:
        """Load the corpus of a key, or build and store it. It is memory-mapped.

        Args:
            key: digest of all that determines the corpus; None if that is unknown: then nothing is stored.
            parts: the names of the sources' parts, for the locations.
            build: returns the corpora of consecutive blocks of records.

        Raises:
            ConfigError: it cannot be written, for example because the disk is full.
            DataError: from ``build``, or no record is left to train on.
        """
        entry = None if key is None else self.folder / _TOKENS / key
        if entry is not None:
            with contextlib.suppress(OSError, _DamagedError):
                return _load(entry, parts)  # without the lock: an entry does not change
        with _sole_builder(entry, self._on_wait):
            if entry is not None and os.path.isdir(entry):  # damaged, or built by another process meanwhile
                try:
                    return _load(entry, parts)
                except (OSError, _DamagedError) as error:
                    problem = f"{entry}: the cached tokens are damaged ({error}); tokenizing again"
                    warnings.warn(problem, DistrustWarning, stacklevel=2)
                    shutil.rmtree(entry, ignore_errors=True)
            with _temporary_entry(entry) as folder:
                try:
                    corpus = _map_corpus(folder, _write(folder, build(), parts), parts)
                    if entry is not None and folder.parent == entry.parent:
                        _publish(folder, entry)
                except OSError as error:
                    problem = f"{folder.parent}: cannot write the tokens: {error.strerror or error}"
                    raise ConfigError(f"{problem}; {_REMEDY}") from error
                return corpus


@contextlib.contextmanager
def _sole_builder(entry: Path | None, on_wait: Callable[[int], None]) -> Iterator[None]:
    """Hold the lock of an entry, and remove what killed builders of any entry have left."""
    with contextlib.ExitStack() as stack:
        # Where nothing can be written or locked, each process builds for itself.
        with contextlib.suppress(OSError, WriteFailed):
            if entry is not None:
                _create(entry.parent)
                stack.enter_context(_lock(entry, on_wait))
                for path in entry.parent.glob(f"{_TEMPORARY}[0-9a-z]*"):
                    target = entry.with_name(path.name.split("-")[1])
                    builder = contextlib.nullcontext() if target == entry else _lock(target)
                    with contextlib.suppress(BlockingIOError), builder:  # it is alive
                        shutil.rmtree(path, ignore_errors=True)
        yield


def _lock(entry: Path, on_wait: Callable[[int], None] | None = None) -> AbstractContextManager[None]:
    """Of a file that stays: a new one of the same name would be a second lock."""
    # NFS locks only what is open for writing.
    return hold_lock(entry.with_suffix(".lock"), flags=os.O_RDWR | os.O_CREAT, on_wait=on_wait)


@contextlib.contextmanager
def _temporary_entry(entry: Path | None) -> Iterator[Path]:
    """A folder to build an entry in, beside it if possible. Removed at the end unless renamed."""
    temporary = None
    if entry is not None:
        try:
            _create(entry.parent)
            temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{entry.name}-", dir=entry.parent))
        except (OSError, WriteFailed) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is a link, which is not followed"
            problem = f"{entry.parent}: cannot be written to ({reason}): data is tokenized at every start"
            warnings.warn(f"{problem}; {_REMEDY}", DistrustWarning, stacklevel=4)
    temporary = temporary or Path(tempfile.mkdtemp(prefix=f"distrust-{_TEMPORARY}"))
    try:
        yield temporary
    finally:
        # Files that are mapped stay readable until they are unmapped.
        shutil.rmtree(temporary, ignore_errors=True)


def _create(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # training data may be confidential
    refuse_links(folder)


def _write(folder: Path, corpora: Iterable[Corpus], parts: Parts) -> dict[str, Any]:
    """Write all files of an entry durably, the manifest last; returns the manifest."""
    part_numbers = {name: index for index, (name, _) in enumerate(parts)}
    total = count = sequences = 0
    sizes: tuple[int, ...] = ()
    counts = Counts()
    is_weighted = False
    classes = Classes()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _DTYPES}
        for name in ("offsets", "sequence_offsets"):
            _append(files[name], np.zeros(1, np.int64))
        for block in corpora:
            ends = block.bounds[1:]
            weights = block.token_weights
            arrays = {
                **{name: getattr(block, name) for name in (*REQUIRED_ARRAYS, "loss_tokens")},
                "offsets": block.offsets[1:] + total,  # a block's offsets begin at 0
                "sequence_offsets": ends + total,
                "token_weights": np.ones(len(block.input_ids), np.float32) if weights is None else weights,
                "part": np.array([part_numbers[location.file] for location in block.locations], np.int32),
                "line": np.array([location.line for location in block.locations], np.int64),
                "class_of": classes.number(block.classes[number] for number in block.class_numbers),
            }
            for name, array in arrays.items():
                _append(files[name], array)
            total, count, sequences = total + len(block.input_ids), count + len(block), sequences + len(ends)
            sizes = tuple(map(sum, zip(sizes, block.sizes, strict=True))) if sizes else block.sizes
            counts += block.counts
            is_weighted |= weights is not None
        _sync_files(files.values())
    counts.require_examples(count, ", ".join(part_numbers))
    for name, is_used in (("sequence_offsets", sequences > count), ("token_weights", is_weighted)):
        if not is_used:
            (folder / name).unlink()
    manifest = {
        "n": count,
        "total": total,
        "sequences": sequences,
        "sizes": sizes,
        "counts": asdict(counts),
        "fingerprint": _fingerprint(folder, count, total),
        "side_files": _digest_side_files(folder),
        "classes": classes.names,
    }
    with (folder / _MANIFEST).open("wb") as file:
        file.write(_seal(manifest))
        _sync_files([file])
    Disk().sync_directory(folder)
    return manifest


def _append(file: BinaryIO, array: NDArray[np.generic]) -> None:
    for chunk in blocks(array):
        file.write(chunk)


def _load(folder: Path, parts: Parts) -> Corpus:
    """Verify an entry and map it; raises _DamagedError or OSError."""
    manifest = _open_sealed(folder / _MANIFEST)
    n, total = manifest["n"], manifest["total"]
    sequence_ends = manifest["sequences"] + 1
    lengths = {"input_ids": total, "loss_mask": total, "token_weights": total, "offsets": n + 1}
    lengths["sequence_offsets"] = sequence_ends  # the others have n items
    for name, dtype in _files(folder).items():
        if (folder / name).stat().st_size != lengths.get(name, n) * np.dtype(dtype).itemsize:
            raise _DamagedError(f"{name} has another length")
    # Read everything before mapping: a damaged page must not reach the training loop.
    digests = _fingerprint(folder, n, total), _digest_side_files(folder)
    if digests != (manifest["fingerprint"], manifest["side_files"]):
        raise _DamagedError("its content is not what was written")
    return _map_corpus(folder, manifest, parts)


def _map_corpus(folder: Path, manifest: dict[str, Any], parts: Parts) -> Corpus:
    arrays: dict[str, Any] = {
        name: np.asarray(np.memmap(folder / name, dtype=dtype, mode="r"))
        for name, dtype in _files(folder).items()
    }
    sizes = tuple(manifest["sizes"])
    fingerprinted: dict[str, Any] = {name: arrays.get(name) for name in (*REQUIRED_ARRAYS, *OPTIONAL_ARRAYS)}
    corpus = Corpus(
        **fingerprinted,
        locations=Locations.from_arrays(parts, arrays["part"], arrays["line"]),
        counts=Counts(**manifest["counts"]),
        sizes=sizes,
        classes=tuple(manifest["classes"]),
        class_of=arrays["class_of"],
    )
    return corpus.with_cached(
        fingerprint=add_sizes(manifest["fingerprint"], sizes), loss_tokens=arrays["loss_tokens"]
    )


def _fingerprint(folder: Path, n: int, total: int) -> str:
    # Reads the files rather than a mapping: pages that are only verified do not count as the process's.
    names = [name for name in _files(folder) if name not in _SIDE_FILES]
    return digest_arrays(n, total, {name: _chunks(folder / name) for name in names})


def _files(folder: Path) -> dict[str, str]:
    """The files of an entry, and their dtypes."""
    absent = {name for name in OPTIONAL_ARRAYS if not (folder / name).exists()}
    return {name: dtype for name, dtype in _DTYPES.items() if name not in absent}


def _digest_side_files(folder: Path) -> str:
    digest = blake3(b"distrust side files 1\n", max_threads=blake3.AUTO)
    for name in _SIDE_FILES:
        for chunk in _chunks(folder / name):
            digest.update(chunk)
    return str(digest.hexdigest())


def _chunks(path: Path) -> Iterator[bytes]:
    with open_regular_file(path) as file:
        while chunk := file.read(BLOCK):
            yield chunk


def _publish(folder: Path, entry: Path) -> None:
    """Rename a complete entry. An existing one is equal, and stays: another process has mapped it."""
    with contextlib.suppress(OSError):
        folder.rename(entry)  # commits: from here on the entry can be found
    Disk().sync_directory(entry.parent)


def _sync_files(files: Iterable[BinaryIO]) -> None:
    for file in files:
        file.flush()  # Python's buffer; the sync then covers all of it
        Disk().sync(file.fileno())


def _seal(values: dict[str, Any]) -> bytes:
    """JSON together with its digest."""
    body = json.dumps(values)
    return json.dumps([body, blake3(body.encode()).hexdigest()]).encode()


def _open_sealed(path: Path) -> dict[str, Any]:
    """The values of a sealed file; raises _DamagedError or OSError."""
    with open_regular_file(path) as file:
        raw = file.read(_MAX_SEALED_BYTES)  # a longer one is cut, and so damaged
    try:
        body, digest = json.loads(raw)
        if blake3(body.encode()).hexdigest() == digest:
            return dict(json.loads(body))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise _DamagedError("its description is not what was written")
