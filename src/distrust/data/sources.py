"""What a config names -> sources: files, folders, data sets of the hub, and examples of a program.

A source is made of parts, each a file or a table. A part knows the digest of its content, so that what was
once checked and tokenized is found again, and gives its rows as often as one likes.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from distrust.bundled import CORPUS
from distrust.config import BUNDLED
from distrust.data import hub
from distrust.data.columns import Columns
from distrust.data.formats import JSON_LINES, PARQUET, Format, Row, format_of, is_binary, is_data, open_bytes
from distrust.data.records import Unit
from distrust.data.temp_copy import TempCopy
from distrust.errors import ConfigError, DataError, read_failure_reason

_BLOCK = 1 << 22

#: What files and folders of a split are called.
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a table.

    Attributes:
        name: as a message calls it.
        unit: what its rows are counted by.
        digest: of its content and of how it is read.
        rows: its rows, from the first; raises DataError if it cannot be read.
        parquet: opens it, where it is a Parquet file, for a reader of its tables; raises as ``rows`` does.
    """

    name: str
    unit: Unit
    digest: str
    rows: Callable[[], Iterator[Row]]
    parquet: Callable[[], contextlib.AbstractContextManager[BinaryIO]] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One of the things that a config names.

    Attributes:
        name: as the user gave it.
        parts: at least one.
    """

    name: str
    parts: tuple[Part, ...]


def open_source(
    name: str,
    columns: Columns,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    temp_folder: Path | None = None,
) -> Source:
    """What a name stands for.

    Args:
        name: a file, a folder, a data set of the hub, or ``bundled``.
        columns: those that are needed of it.
        split: of a data set of the hub or of a folder that has several.
        subset: of a data set of the hub.
        revision: of a data set of the hub.
        temp_folder: where the content of a pipe may lie.

    Raises:
        DataError: there is no such thing, or it cannot be read; one line.
        ConfigError: an option for the hub beside a file.
    """
    path = CORPUS if name == BUNDLED else Path(name)
    kind = _kind(path)
    if kind is None and hub.is_name(name) and not is_data(path):
        table = hub.load(name, split=split, subset=subset, revision=revision)
        return Source(name, (_table_part(name, table, columns),))
    for option, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise ConfigError(f"--{option} {value}: is for data sets of the hub; {name} is a file or folder")
    if kind != "folder":
        _require_split(path, split)
        return Source(name, (_file_part(path, str(path), columns, temp_folder),))
    with _readable(str(path)):
        saved = hub.saved_split(path, split) if hub.is_saved(path) else None
    if saved is not None:
        return Source(name, (_saved_part(saved, columns),))
    files = _files(path, split)
    return Source(name, tuple(_file_part(file, str(file), columns, temp_folder) for file in files))


def examples_source(
    examples: Iterable[Mapping[str, Any]], columns: Columns, *, name: str, temp_folder: Path
) -> Source:
    """The examples of a program, read once.

    Raises:
        DataError: one cannot be an example, or reading them fails with an OSError.
    """
    kept = TempCopy(temp_folder)
    with _readable(name):
        kept.copy_examples(examples, columns, name=name)
    return Source(name, (_spool_part(kept, JSON_LINES, columns, name=name, unit="index"),))


def _kind(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):
        return None
    except OSError:
        return "file"  # opening it tells why not
    return "folder" if stat.S_ISDIR(mode) else "file"


def _file_part(path: Path, name: str, columns: Columns, spool: Path | None) -> Part:
    with _readable(name):
        if not stat.S_ISREG(path.stat().st_mode):
            kept = TempCopy(spool or Path(os.devnull))
            kept.copy_pipe(path)
            return _spool_part(kept, JSON_LINES, columns, name=name, unit="line")
        form, packed = format_of(path)
        if not is_data(path) and is_binary(path, packed=packed):
            raise DataError(
                f"{name}: is no data file; give JSON Lines, JSON, CSV, TSV or Parquet (text also as .gz)"
            )
        before = _state(path)
        digest = _digest(path, form.name)

    @contextlib.contextmanager
    def opened() -> Iterator[BinaryIO]:
        with _readable(name):
            with open_bytes(path, packed=packed) as file:
                yield file
            if _state(path) != before:
                raise OSError("it changed while it was read; start again")

    def rows() -> Iterator[Row]:
        with opened() as file:
            yield from form.rows(file, columns)

    return Part(name, form.unit, digest, rows, opened if form is PARQUET else None)


def _spool_part(kept: TempCopy, form: Format, columns: Columns, *, name: str, unit: Unit) -> Part:
    def rows() -> Iterator[Row]:
        with _readable(name), kept.open() as file:
            # An example's index counts from 0, and the spool has one a line.
            shift = 1 if unit == "index" else 0
            yield from ((number - shift, fields) for number, fields in form.rows(file, columns))

    with _readable(name), kept.open() as file:
        digest = blake3(f"{form.name}\n".encode())
        _update(digest, file)
    return Part(name, unit, digest.hexdigest(), rows)


def _table_part(name: str, table: Any, columns: Columns) -> Part:
    digest = blake3(f"table {hub.fingerprint(table)}".encode()).hexdigest()
    return Part(name, "row", digest, lambda: hub.rows(name, table, columns))


def _saved_part(folder: Path, columns: Columns) -> Part:
    with _readable(str(folder)):
        digest = blake3(b"saved\n")
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"{file.name} {_digest(file, 'file')}\n".encode())
    table = hub.load_saved(folder)
    return Part(str(folder), "row", digest.hexdigest(), lambda: hub.rows(str(folder), table, columns))


def _files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that are of a split: by their names, as the hub tells them apart."""
    with _readable(str(folder)):
        found = sorted(path.relative_to(folder) for path in _visible(folder) if is_data(path))
        if not found:
            raise DataError(
                f"{folder}: holds no data files (.jsonl, .json, .csv, .tsv, .parquet, or those .gz)"
            )
        forms = sorted({format_of(folder / path)[0].name for path in found})
    if len(forms) > 1:
        raise DataError(f"{folder}: holds files of several formats ({', '.join(forms)}); name the files")
    splits = {path: _split_of(path) for path in found}
    if not any(splits.values()):
        if split != "train":
            raise DataError(f"{folder}: no file names a split, so all are train; there is no {split}")
        return [folder / path for path in found]
    wanted = _SPLITS.get(split, split)
    chosen = [folder / path for path in found if splits[path] == wanted]
    if not chosen:
        there = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"{folder}: no file is of the split {split}; give one of {there}")
    return chosen


def _visible(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those in it, without hidden ones. None is left out silently.

    Raises:
        DataError: a folder cannot be listed: what lies in it would be missed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {read_failure_reason(error)}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]
        paths = (Path(root, name) for name in names if name[0] not in "._")
        yield from (path for path in paths if path.is_file())


def _require_split(file: Path, split: str) -> None:
    """A file is all of a split: of the one that its name says, else of train."""
    if split != "train" and _split_of(Path(file.name)) != _SPLITS.get(split, split):
        raise DataError(f"{file}: is one file, and has no split {split}; name the file of that split")


def _split_of(path: Path) -> str | None:
    """The split that a file's name says, or else the nearest of its folders."""
    for name in reversed(path.parts):
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _digest(path: Path, how: str) -> str:
    digest = blake3(f"{how}\n".encode(), max_threads=blake3.AUTO)
    with path.open("rb") as file:
        _update(digest, file)
    return str(digest.hexdigest())


def _update(digest: Any, file: BinaryIO) -> None:
    while block := file.read(_BLOCK):
        digest.update(block)


def _state(path: Path) -> tuple[int, ...]:
    """What tells that a file was written to."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: {read_failure_reason(error)}") from error
