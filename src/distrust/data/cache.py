"""What was checked and tokenized once, on disk: found again by what it was made of, and mapped into memory.

An entry's name is a digest of all that decides its content, so an entry is never out of date, and deleting
any of it costs time only. An entry is written under a temporary name, synced and renamed: what a killed
process leaves is never believed, and two processes may make the same one. Nothing is believed unread either:
at every start the arrays are read once, and their fingerprint must be the one that was recorded. What is
damaged is made again, with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from distrust.data.corpus import BLOCK, Chunk, Classes, Corpus, Locations, blocks, digest_arrays, with_sizes
from distrust.data.reading import DatasetStats
from distrust.data.records import Unit
from distrust.errors import ConfigError, DistrustWarning

Parts = Sequence[tuple[str, Unit]]

_TOKENS, _CHECKED, _UNFINISHED = "tokens-2", "checked-1", "unfinished-"
_MANIFEST = "corpus.json"

#: The files of an entry. The first five are what the fingerprint is of.
_DTYPES = {
    "input_ids": "<i4",
    "loss_mask": "|b1",
    "offsets": "<i8",
    "authority_weight": "<f8",
    "provenance_entropy": "<f8",
    "loss_tokens": "<i8",
    "part": "<i4",
    "line": "<i8",
    "class_of": "<i4",
}
_FINGERPRINTED, _PLACES = tuple(_DTYPES)[:5], tuple(_DTYPES)[5:]

#: Younger leavings may be of a process that has not locked them yet.
_SWEEP_AFTER_SECONDS = 60


class _DamagedError(Exception):
    """An entry is not what was written."""


def cache_folder(given: str | None) -> Path:
    """The cache: the one given, else $DISTRUST_CACHE, else distrust in the user's cache folder."""
    if given is not None:
        return Path(given)
    if os.environ.get("DISTRUST_CACHE"):
        return Path(os.environ["DISTRUST_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "distrust"


class Cache:
    """A folder of checked and tokenized data.

    Where nothing can be written into the folder, a temporary one serves, with a warning.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stats(self, key: str) -> DatasetStats | None:
        """What a check found that had nothing to say against the records, if it was made."""
        try:
            found = _open_sealed((self.folder / _CHECKED / f"{key}.json").read_bytes())
        except (OSError, _DamagedError):
            return None
        return DatasetStats(tuple(found["sizes"]), found["conversations"], found["first_conversation"])

    def store_stats(self, key: str, stats: DatasetStats) -> None:
        """Remember that a check had nothing to say; where that cannot be, it is made again."""
        with contextlib.suppress(OSError):
            folder = self.folder / _CHECKED
            _make(folder)
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=_UNFINISHED)
            try:
                with open(handle, "wb") as file:
                    file.write(_seal(asdict(stats)))
                os.replace(temporary, folder / f"{key}.json")
            except OSError:
                os.unlink(temporary)
                raise

    def corpus(
        self, key: str | None, parts: Parts, sizes: tuple[int, ...], build: Callable[[], Iterable[Corpus]]
    ) -> Corpus:
        """The corpus of a key: the one that is there, or else a new one.

        Args:
            key: of all that decides the corpus; None where that cannot be told: then nothing is kept.
            parts: the names of the sources' parts, for the locations.
            sizes: the examples of each source.
            build: gives the corpora of blocks of records, one after the other.

        Raises:
            ConfigError: there is no room for it.
            DataError: whatever ``make`` raises.
        """
        if key is not None:
            entry = self.folder / _TOKENS / key
            try:
                if entry.is_dir():
                    return _open(entry, parts)
            except (OSError, _DamagedError) as error:
                warnings.warn(
                    f"{entry}: the tokens kept there are damaged ({error}); they are made again",
                    DistrustWarning,
                    stacklevel=2,
                )
        with _unfinished(self.folder / _TOKENS, keep=key is not None) as (folder, kept):
            try:
                corpus = _corpus(folder, _write(folder, build(), parts, sizes), parts)
                if kept and key is not None:
                    _publish(folder, self.folder / _TOKENS / key)
            except OSError as error:
                raise ConfigError(
                    f"{folder.parent}: the tokens cannot be written there: {error.strerror or error}; give "
                    "another folder with --cache-dir"
                ) from error
            return corpus


@contextlib.contextmanager
def _unfinished(folder: Path, *, keep: bool) -> Iterator[tuple[Path, bool]]:
    """A folder to make an entry in, and whether it can be kept. It is gone afterwards, if it has its name."""
    try:
        if keep:
            _make(folder)
            _sweep(folder)
            made, kept = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder)), True
        else:
            made, kept = Path(tempfile.mkdtemp(prefix=f"distrust-{_UNFINISHED}")), False
    except OSError as error:
        warnings.warn(
            f"{folder}: cannot be written to ({error.strerror}): data is tokenized at every start; give "
            "another folder with --cache-dir",
            DistrustWarning,
            stacklevel=4,
        )
        made, kept = Path(tempfile.mkdtemp(prefix=f"distrust-{_UNFINISHED}")), False
    lock = os.open(made, os.O_RDONLY)  # as long as it is held, nobody sweeps the folder
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield made, kept
    finally:
        os.close(lock)
        # What is mapped of it stays as long as it is mapped.
        shutil.rmtree(made, ignore_errors=True)


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left: a living one holds the lock."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < _SWEEP_AFTER_SECONDS:
                continue
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _write(folder: Path, made: Iterable[Corpus], parts: Parts, sizes: tuple[int, ...]) -> dict[str, Any]:
    """All files of an entry, durable; the manifest is the last, and returned."""
    number = {name: index for index, (name, _) in enumerate(parts)}
    total = count = truncated = cut = 0
    classes = Classes()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _DTYPES}
        _append(files["offsets"], np.zeros(1, np.int64))
        for block in made:
            _append(files["input_ids"], block.input_ids)
            _append(files["loss_mask"], block.loss_mask)
            _append(files["offsets"], block.offsets[1:] + total)
            _append(files["authority_weight"], block.authority_weight)
            _append(files["provenance_entropy"], block.provenance_entropy)
            _append(files["loss_tokens"], block.loss_tokens)
            _append(files["part"], np.array([number[place.file] for place in block.locations], np.int32))
            _append(files["line"], np.array([place.line for place in block.locations], np.int64))
            _append(
                files["class_of"], classes.number(block.classes[number] for number in block.class_numbers)
            )
            total += len(block.input_ids)
            count += len(block)
            truncated += block.truncated
            cut += block.tokens_cut
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    manifest = {
        "n": count,
        "total": total,
        "sizes": sizes,
        "truncated": truncated,
        "tokens_cut": cut,
        "fingerprint": _fingerprint(folder, count, total),
        "places": _places(folder),
        "classes": classes.names,
    }
    with (folder / _MANIFEST).open("wb") as file:
        file.write(_seal(manifest))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)
    return manifest


def _append(file: BinaryIO, array: NDArray[np.generic]) -> None:
    for chunk in blocks(array):
        file.write(chunk)


def _open(folder: Path, parts: Parts) -> Corpus:
    """The corpus of an entry, mapped, after all of it has been read and found to be what was written.

    Raises:
        _DamagedError: it is not.
        OSError: it cannot be read.
    """
    manifest = _open_sealed((folder / _MANIFEST).read_bytes())
    n, total = manifest["n"], manifest["total"]
    lengths = {"input_ids": total, "loss_mask": total, "offsets": n + 1}
    for name, dtype in _DTYPES.items():
        if (folder / name).stat().st_size != lengths.get(name, n) * np.dtype(dtype).itemsize:
            raise _DamagedError(f"{name} has another length")
    if _fingerprint(folder, n, total) != manifest["fingerprint"] or _places(folder) != manifest["places"]:
        raise _DamagedError("its content is not what was written")
    return _corpus(folder, manifest, parts)


def _corpus(folder: Path, manifest: dict[str, Any], parts: Parts) -> Corpus:
    """The corpus of an entry's files, mapped."""
    arrays = {name: _map_array(folder / name, dtype) for name, dtype in _DTYPES.items()}
    sizes = tuple(manifest["sizes"])
    corpus = Corpus(
        **{name: arrays[name] for name in _FINGERPRINTED},
        locations=Locations(parts, arrays["part"], arrays["line"]),
        truncated=manifest["truncated"],
        tokens_cut=manifest["tokens_cut"],
        sizes=sizes,
        classes=tuple(manifest["classes"]),
        class_of=arrays["class_of"],
    )
    return corpus.with_cached(
        fingerprint=with_sizes(manifest["fingerprint"], sizes), loss_tokens=arrays["loss_tokens"]
    )


def _map_array(path: Path, dtype: str) -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _fingerprint(folder: Path, n: int, total: int) -> str:
    """By reading, not by way of the mapping: pages that are only checked do not count as the process's."""
    return digest_arrays(n, total, (_chunks(folder / name) for name in _FINGERPRINTED))


def _places(folder: Path) -> str:
    digest = blake3(b"distrust places 1\n", max_threads=blake3.AUTO)
    for name in _PLACES:
        for chunk in _chunks(folder / name):
            digest.update(chunk)
    return str(digest.hexdigest())


def _chunks(path: Path) -> Iterator[Chunk]:
    with path.open("rb") as file:
        while chunk := file.read(BLOCK):
            yield chunk


def _publish(folder: Path, entry: Path) -> None:
    """Give an entry its name. One that has it already is damaged, or the same made by another process."""
    try:
        folder.rename(entry)
    except OSError:
        aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=entry.parent))
        with contextlib.suppress(OSError):
            entry.rename(aside / entry.name)
            folder.rename(entry)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(entry.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(values: dict[str, Any]) -> bytes:
    """JSON that proves itself."""
    body = json.dumps(values)
    return json.dumps([body, blake3(body.encode()).hexdigest()]).encode()


def _open_sealed(raw: bytes) -> dict[str, Any]:
    try:
        body, digest = json.loads(raw)
        if blake3(body.encode()).hexdigest() == digest:
            return dict(json.loads(body))
    except (ValueError, TypeError, AttributeError):
        pass
    raise _DamagedError("its description is not what was written")
