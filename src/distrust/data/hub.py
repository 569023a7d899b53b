"""Reads datasets of the hub, and those that ``save_to_disk`` wrote, with the library ``datasets``.

No code of a dataset is run. The library keeps what it loads in its own cache, memory-mapped. It is imported
on first use: importing it takes a second. Every failure is a DataError with the library's reason.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from distrust.checkpoint.files import NOT_REGULAR, open_regular_file
from distrust.data.columns import Columns
from distrust.data.formats import Row, is_data
from distrust.data.parquet import BATCH_ROWS, bounded_rows
from distrust.data.record_errors import RecordError
from distrust.errors import (
    NO_SUCH_FILE,
    DataError,
    ErrorTranslator,
    MissingDependency,
    quote_untrusted,
    warn,
)
from distrust.paths import require_regular_files

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # NAME or OWNER/NAME; anything else is a file
_STATE = "state.json"  # of a dataset that save_to_disk wrote
_MAX_STATE_BYTES = 1 << 26  # a longer one is cut, and so not valid JSON
#: Suffixes of files that are not data of a known format: weights, archives, documents.
_OTHER_FILES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz",
    ".arrow", ".zip", ".gz", ".tar", ".zst", ".txt", ".md", ".xlsx",
}  # fmt: skip
#: Usual names of folders: a path that begins with one is a path also where that folder is missing.
_FOLDERS = {
    "adapters", "checkpoints", "data", "dataset", "datasets", "exports",
    "model", "models", "out", "output", "outputs", "runs", "weights",
}  # fmt: skip


def is_name(name: str) -> bool:
    """Whether a string is the name of a dataset or a model of the hub, and not a path of this machine."""
    path = Path(name)
    is_file = is_data(path) or path.suffix.lower() in _OTHER_FILES
    return _NAME.fullmatch(name) is not None and not is_file and not _begins_with_folder(name)


def _begins_with_folder(name: str) -> bool:
    first, slash, _ = name.partition("/")
    return bool(slash) and (first in _FOLDERS or Path(first).is_dir())


def missing_reason(name: str) -> str:
    """What is wrong with a name that exists neither here nor, by :func:`is_name`, on the hub."""
    if _NAME.fullmatch(name) is None or not _begins_with_folder(name):
        return NO_SUCH_FILE
    first = name.partition("/")[0]
    cause = f"{first} is a folder here" if Path(first).is_dir() else f"{first}/… reads like a path"
    return f"{NO_SUCH_FILE}; not looked up on the hub, because {cause}"


def announce(kind: Literal["model", "dataset"], name: str) -> None:
    """Warn that a name is about to be looked up on the hub, unless the user has forbidden all access to it.

    Once for a name: loading a model takes several accesses.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _announce_once(f"{kind} {name}: not here, so it is looked up on the hub, {constants.ENDPOINT}")


@functools.cache
def _announce_once(access: str) -> None:
    warn(f"{access}; HF_HUB_OFFLINE=1 uses only what was downloaded before")


def load(name: str, *, split: str, subset: str | None, revision: str | None) -> Any:
    """Load a split of a dataset of the hub as a ``datasets.Dataset``, downloading it if it is not cached."""
    datasets = _library(name)
    announce("dataset", name)
    with _library_errors(
        lambda: f"{name}: not a file or folder here, and not loaded from the Hugging Face Hub"
    ):
        return datasets.load_dataset(name, subset, split=split, revision=revision)


def saved_split(folder: Path, split: str) -> Path | None:
    """The folder of a split that ``save_to_disk`` wrote; None if it did not write this folder."""
    if not (folder / "dataset_dict.json").is_file():  # a folder for each split
        return folder if (folder / _STATE).is_file() else None
    splits = sorted(path.name for path in folder.iterdir() if (path / _STATE).is_file())
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; give one of {', '.join(splits)}")
    return folder / split


def load_saved(folder: Path) -> Any:
    """Load one split that ``save_to_disk`` wrote as a ``datasets.Dataset``."""
    require_regular_files(folder)
    with _library_errors(lambda: f"{folder}: cannot be loaded"):
        names = _files_of_state(folder)
    for name in names:
        _require_own_file(folder, name)
    with _library_errors(lambda: f"{folder}: cannot be loaded"):
        return _library(str(folder)).load_from_disk(str(folder))


def _files_of_state(folder: Path) -> list[str]:
    with open_regular_file(folder / _STATE) as file:
        state = json.loads(file.read(_MAX_STATE_BYTES))
    return [str(entry["filename"]) for entry in state["_data_files"]]


def _require_own_file(folder: Path, name: str) -> None:
    """Raise DataError if a name in ``state.json``, which the library opens, is no file in the folder."""
    if Path(name).name != name:
        quoted = quote_untrusted(name)
        raise DataError(f"{folder / _STATE}: names {quoted}, which is not in this folder; save it again")
    path = folder / name
    if path.exists() and not path.is_file():  # the library says what is missing
        raise DataError(f"{quote_untrusted(str(path))}: {NOT_REGULAR}; remove it")


def rows(name: str, table: Any, columns: Columns, limit: int) -> Iterator[Row]:
    """The rows of a loaded split, numbered from 1; only the needed columns are decoded.

    A row of more than ``limit`` bytes is an error.
    """
    number = 0
    with _library_errors(lambda: f"{name}: cannot be read after row {number}"):
        table = table.with_format("arrow").select_columns(columns.needed_from(table.column_names))

        def decode(batch: Any) -> Iterator[dict[str, Any]]:
            # Arrow tables hold some types, such as Json, as text.
            values = table.features.decode_batch(batch.to_pydict())
            return (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))

        for batch in table.iter(BATCH_ROWS):
            for row in bounded_rows(batch, limit, decode):
                number += 1
                yield number, row if isinstance(row, RecordError) else columns.select(row, is_cells=True)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        purpose = f"{name}: a dataset of the hub"
        raise MissingDependency(purpose, library="datasets", extra="train") from error
    return datasets


def _library_errors(problem: Callable[[], str]) -> ErrorTranslator:
    """Translates the errors of many libraries, of the network and of refused scripts to DataError."""
    return ErrorTranslator((Exception,), lambda error: DataError(f"{problem()}: {_reason(error)}"))


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:299] + "…"  # some list every file of the repository
