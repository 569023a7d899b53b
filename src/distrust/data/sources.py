"""Opens the sources that a config names: files, folders, datasets of the hub, and examples of a program.

A source consists of parts, each a file or a table. A part has a digest of its content, so that the results of
an earlier check and tokenization can be found in the cache. Its rows can be read repeatedly: a pipe and a
program's examples, which can be read only once, are copied to an unnamed temporary file first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from blake3 import blake3

from distrust import remote_copies
from distrust.activity import current
from distrust.bundled import CORPUS
from distrust.checkpoint.files import open_regular_file
from distrust.checkpoint.remote.location import is_url, parse
from distrust.data import hub
from distrust.data.column_report import MAX_COLUMNS
from distrust.data.columns import Columns, Fields
from distrust.data.formats import (
    JSON_LINES,
    PARQUET,
    Row,
    data_suffix,
    format_of,
    is_binary,
    is_data,
    open_bytes,
)
from distrust.data.parquet import open_table
from distrust.data.record_errors import RecordError
from distrust.data.records import Location, Unit
from distrust.data.values import json_kind
from distrust.errors import ConfigError, DataError, ErrorTranslator, quote_untrusted, read_failure_reason
from distrust.option_values import BUNDLED, MAX_RECORD_BYTES
from distrust.paths import cache_folder, require_regular

_BLOCK = 1 << 22  # 4 MiB: enough for BLAKE3 to use several threads

#: Words in the names of files and folders that mean a split, as the hub recognizes them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a table."""

    name: str  # for messages
    unit: Unit  # how its rows are numbered
    digest: str  # BLAKE3, in hex, of its content and of how it is read
    rows: Callable[[], Iterator[Row]]  # all rows; raises DataError if it cannot be read
    max_record_bytes: int  # a larger row is an error
    #: Opens a Parquet file for a reader of its tables; raises as ``rows`` does. None for other parts.
    parquet: Callable[[], contextlib.AbstractContextManager[BinaryIO]] | None = None
    #: The names of all columns, if rows hold only those that are read; nothing for other parts.
    column_names: Callable[[], Iterable[str]] = tuple

    def located_rows(self) -> Iterator[tuple[Location, Fields | RecordError]]:
        """The rows with their locations."""
        try:
            for number, row in self.rows():
                current.location = location = Location(self.name, number, self.unit)
                yield location, row
        finally:
            current.location = None


@dataclass(frozen=True, slots=True)
class Source:
    """One of the sources that a config names."""

    name: str  # as the user gave it
    parts: tuple[Part, ...]  # at least one


def open_source(
    name: str,
    columns: Columns,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    temp_folder: Path | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
    digests: bool = True,
) -> Source:
    """Open the source with a name.

    Args:
        name: a file, a folder, a URL of either, a dataset of the hub, or ``bundled``.
        columns: the columns to read.
        split: of a dataset of the hub, or of a folder that has several.
        subset: of a dataset of the hub.
        revision: of a dataset of the hub.
        temp_folder: where the content of a pipe, or of a URL, is copied to; default: the cache.
        max_record_bytes: a larger row is an error, as ``TrainConfig`` says.
        digests: False if only some rows are read: files are not read to the end for their digest.

    Raises:
        DataError: there is no such source, or it cannot be read; one line.
        RemoteError: the store of a URL fails.
        ConfigError: an option of the hub together with a file.
    """
    path = CORPUS if name == BUNDLED else Path(name)
    kind = "URL" if is_url(name) else _kind(path)
    if kind is None and hub.is_name(name):
        table = hub.load(name, split=split, subset=subset, revision=revision)
        # The fingerprint is the library's own, of the content.
        digest = blake3(f"table {table._fingerprint}".encode()).hexdigest()
        return Source(name, (_table_part(name, table, columns, digest, max_record_bytes),))
    for option, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise ConfigError(f"--{option} {value}: is for datasets of the hub; {name} is a file or folder")
    if kind is None:
        raise DataError(f"{name}: {hub.missing_reason(name)}")
    if kind == "URL":
        files = _copies(name, split, temp_folder or cache_folder())
    elif kind == "folder":
        with _readable(str(path)):
            saved = hub.saved_split(path, split)
        if saved is not None:
            digest = _digest_folder(saved)
            table = hub.load_saved(saved)
            return Source(name, (_table_part(str(saved), table, columns, digest, max_record_bytes),))
        files = _files(path, split)
        require_regular(*files.values())  # nobody named a pipe
    else:
        _require_split(name, split)
        files = {str(path): path}
    parts = (_file_part(*named, columns, temp_folder, max_record_bytes, digests) for named in files.items())
    return Source(name, tuple(parts))


def examples_source(
    examples: Iterable[Mapping[str, Any]],
    columns: Columns,
    *,
    name: str,
    temp_folder: Path,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Source:
    """The examples of a program, iterated once.

    Raises:
        DataError: one is not a valid example, or iterating them fails with an OSError.
    """
    copy = _TempCopy(temp_folder)
    with _readable(name):
        copy.write_examples(examples, columns, name)
    return Source(name, (_copy_part(copy, columns, name, "index", max_record_bytes),))


def _kind(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a null byte in the name
        return None
    except OSError:
        return "file"  # opening it reports the reason
    return "folder" if stat.S_ISDIR(mode) else "file"


def _copies(name: str, split: str, cache: Path) -> dict[str, Path]:
    """Local copies of the objects that a URL names, by their URLs."""
    client, objects = remote_copies.find(location := parse(name, "--data"), cache=cache)
    if not objects:
        raise DataError(f"{name}: no such object")
    infos = {Path(info.key): info for info in objects}
    if client.location != location:  # its parent: it is one object
        _require_split(name, split)
    else:
        data = [path for path in infos if is_data(path) and all(part[0] not in "._" for part in path.parts)]
        infos = {path: infos[path] for path in _of_split(name, sorted(data), split)}
    copies = {
        str(client.location / info.key): remote_copies.copy_of(client, info, data_suffix(path), cache=cache)
        for path, info in infos.items()
    }
    with _readable(name):
        _require_one_format(name, copies.values())
    return copies


def _file_part(
    name: str, path: Path, columns: Columns, temp_folder: Path | None, max_record_bytes: int, digests: bool
) -> Part:
    with _readable(name):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # a device may have no end
            raise DataError(f"{name}: neither a file nor a pipe; name a file of records, with --data")
        if stat.S_ISFIFO(mode):  # can be read only once
            copy = _TempCopy(temp_folder or Path(os.devnull))  # nothing can be created below a device
            with path.open("rb") as pipe:
                shutil.copyfileobj(pipe, copy.file, 1 << 20)
            return _copy_part(copy, columns, name, "line", max_record_bytes)
        form, compressed = format_of(path)
        if not is_data(path) and is_binary(path, compressed=compressed):
            raise DataError(
                f"{name}: not a data file; give JSON Lines, JSON, CSV, TSV or Parquet (text also as .gz)"
            )
        version = _file_version(path)
        with open_regular_file(path) as file:
            current.location = name
            is_text = form is not PARQUET and not compressed
            digest = _digest(file, form.name, is_text=is_text) if digests else ""
            current.location = None

    @contextlib.contextmanager
    def open_part() -> Iterator[BinaryIO]:
        with _readable(name):
            with open_bytes(path, compressed=compressed) as file:
                yield file
            if _file_version(path) != version:  # the digest is of other content than the rows
                raise OSError("it changed while it was read; start again")

    def rows() -> Iterator[Row]:
        with open_part() as file:
            yield from form.rows(file, columns, max_record_bytes)

    if form is not PARQUET:
        return Part(name, form.unit, digest, rows, max_record_bytes)

    def column_names() -> list[str]:
        with open_part() as file:
            return list(open_table(file, max_record_bytes).schema_arrow.names)

    return Part(name, form.unit, digest, rows, max_record_bytes, open_part, column_names)


class _TempCopy:
    """An unnamed file: the system removes it however the process ends. It can be read repeatedly."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
        except OSError:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.column_names: dict[str, None] = {}  # of the examples, in order
        weakref.finalize(self, self.file.close)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, from the beginning."""
        self.file.flush()
        # A duplicate shares the file position, so only one reader at a time.
        with open(os.dup(self.file.fileno()), "rb") as file:
            file.seek(0)
            yield file

    def write_examples(self, examples: Iterable[Mapping[str, Any]], columns: Columns, name: str) -> None:
        """Write the needed columns as JSON Lines; DataError if an example is no mapping of JSON values."""
        for index, example in enumerate(examples):
            location = Location(name, index, "index")
            if not isinstance(example, Mapping):
                raise DataError(
                    f"{location}: {json_kind(example)}, not a mapping; give a dict for each example"
                )
            if len(self.column_names) < MAX_COLUMNS:
                self.column_names |= dict.fromkeys(map(str, islice(example, MAX_COLUMNS)))
            fields = {
                str(key): example[key]
                for key in columns.needed_from(list(example))
                # A source class is optional: one of another type is left out, not refused.
                if key not in columns.source or isinstance(example[key], str | int | float)
            }
            try:
                self.file.write(json.dumps(fields, default=_to_builtin).encode() + b"\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{location}: {error}; give text, numbers, and messages of them") from None


def _to_builtin(value: Any) -> Any:
    """Scalars and arrays of numpy and of libraries like it, as numbers and lists."""
    if hasattr(value, "tolist"):
        return cast(Any, value).tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be trained on")


def _copy_part(copy: _TempCopy, columns: Columns, name: str, unit: Unit, max_record_bytes: int) -> Part:
    def rows() -> Iterator[Row]:
        with _readable(name), copy.open() as file:
            shift = 1 if unit == "index" else 0  # indices count from 0, lines from 1
            lines = JSON_LINES.rows(file, columns, max_record_bytes)
            yield from ((number - shift, fields) for number, fields in lines)

    with _readable(name), copy.open() as file:
        digest = _digest(file, JSON_LINES.name)
    return Part(name, unit, digest, rows, max_record_bytes, column_names=lambda: copy.column_names)


def _table_part(name: str, table: Any, columns: Columns, digest: str, max_record_bytes: int) -> Part:
    def rows() -> Iterator[Row]:
        return hub.rows(name, table, columns, max_record_bytes)

    return Part(name, "row", digest, rows, max_record_bytes, column_names=lambda: table.column_names)


def _digest_folder(folder: Path) -> str:
    with _readable(str(folder)):
        digest = blake3(b"saved\n")
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            with open_regular_file(file) as content:
                digest.update(f"{file.name} {_digest(content, 'file')}\n".encode())
    return digest.hexdigest()


def _files(folder: Path, split: str) -> dict[str, Path]:
    """The data files of a split in a folder, by name, recognized by their names as the hub does."""
    with _readable(str(folder)):
        files = sorted(path.relative_to(folder) for path in _visible_files(folder) if is_data(path))
        _require_one_format(folder, [folder / path for path in files])
    return {str(folder / path): folder / path for path in _of_split(folder, files, split)}


def _require_one_format(folder: Path | str, files: Iterable[Path]) -> None:
    formats = sorted({format_of(path)[0].name for path in files})
    if len(formats) > 1:
        raise DataError(f"{folder}: holds files of several formats ({', '.join(formats)}); name the files")


def _of_split(folder: Path | str, files: Sequence[Path], split: str) -> list[Path]:
    """The data files of a split, of those with these names in a folder."""
    if not files:
        raise DataError(
            f"{folder}: contains no data files (.jsonl, .json, .csv, .tsv, .parquet, or those .gz)"
        )
    splits = {path: _split_of(path) for path in files}
    available = ", ".join(sorted({name for name in splits.values() if name}))
    if not available:
        if split != "train":
            raise DataError(f"{folder}: no file names a split, so all are train; there is no {split}")
        return list(splits)
    selected = [path for path, name in splits.items() if name == _SPLITS.get(split, split)]
    if not selected:
        raise DataError(f"{folder}: no file is of the split {split}; give one of {available}")
    return selected


def _visible_files(folder: Path) -> Iterator[Path]:
    """The files below a folder, except hidden ones; raises DataError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        # os.walk skips such folders by default: their files would be missing without a word.
        raise DataError(f"{error.filename}: {read_failure_reason(error)}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]  # in place: limits the walk
        for name in folders:
            if Path(root, name).is_symlink():  # it may lead anywhere, or round in a circle
                link = quote_untrusted(str(Path(root, name)))
                raise DataError(f"{link}: is a link to a folder, which is not followed; name it with --data")
        yield from (Path(root, name) for name in names if name[0] not in "._")


def _require_split(file: str, split: str) -> None:
    """A file is one split: the one in its name, else train."""
    if split != "train" and _split_of(Path(Path(file).name)) != _SPLITS.get(split, split):
        raise DataError(f"{file}: is one file, and has no split {split}; name the file of that split")


def _split_of(path: Path) -> str | None:
    """The split in a file's name, or else in the nearest of its folders."""
    for name in reversed(path.parts):
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _digest(file: BinaryIO, prefix: str, *, is_text: bool = False) -> str:
    # The prefix separates equal bytes that are read in different ways.
    digest = blake3(f"{prefix}\n".encode(), max_threads=blake3.AUTO)
    while block := file.read(_BLOCK):
        if is_text and not block.strip(b"\0"):  # a hole of a sparse file may be larger than any disk
            raise OSError(f"{len(block):,} zero bytes end at byte {file.tell():,}, so it is no text")
        digest.update(block)
    return str(digest.hexdigest())


def _file_version(path: Path) -> tuple[int, ...]:
    """Changes when a file is written to or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _readable(name: str) -> ErrorTranslator:
    """Translates OSError to DataError."""
    return ErrorTranslator((OSError,), lambda error: DataError(f"{name}: {read_failure_reason(error)}"))
