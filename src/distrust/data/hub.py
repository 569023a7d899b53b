"""Data sets of the hub, and those that ``save_to_disk`` wrote: read by the library that they are made for.

It loads no code of a data set. What it loads lies in its own cache, and is mapped, not held in memory. It is
imported when such a data set is named: it takes a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrust.data.columns import Columns
from distrust.data.formats import Row
from distrust.errors import DataError

#: NAME or OWNER/NAME; anything else can only be a file.
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

_BATCH = 256


def is_name(name: str) -> bool:
    """Whether something of the hub can be called so, a data set or a model."""
    return _NAME.fullmatch(name) is not None


def load(name: str, *, split: str, subset: str | None, revision: str | None) -> Any:
    """A split of a data set of the hub, downloaded if it is not there already.

    Raises:
        DataError: for whatever the library says against it.
    """
    datasets = _library(name)
    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # of many libraries: network, formats, scripts that are refused
        raise DataError(
            f"{name}: no file or folder here, and no data set that the hub gives: {_reason(error)}"
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``: one split, or a folder of each."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_split(folder: Path, split: str) -> Path:
    """The folder of a split.

    Raises:
        DataError: there is no such split.
    """
    if not (folder / "dataset_dict.json").is_file():
        return folder
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; give one of {', '.join(splits)}")
    return folder / split


def load_saved(folder: Path) -> Any:
    """One split that ``save_to_disk`` wrote.

    Raises:
        DataError: for whatever the library says against it.
    """
    try:
        return _library(str(folder)).load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: cannot be loaded: {_reason(error)}") from error


def rows(name: str, table: Any, columns: Columns) -> Iterator[Row]:
    """The rows of a loaded split, counted from 1; of the columns that are needed, nothing else is decoded.

    Raises:
        DataError: what lies in the library's cache cannot be read.
    """
    number = 0
    try:
        needed = table.with_format(None).select_columns(columns.needed_from(table.column_names))
        for batch in needed.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, columns.select(dict(zip(batch, values, strict=True)))
    except Exception as error:  # of the library, and of whatever it reads with
        raise DataError(f"{name}: cannot be read after row {number}: {_reason(error)}") from error


def fingerprint(table: Any) -> str:
    """What the library tells data sets apart by."""
    return str(table._fingerprint)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: data sets of the hub need datasets ({error}): pip install 'distrust-trainer[train]'"
        ) from None
    return datasets


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:299] + "…"
