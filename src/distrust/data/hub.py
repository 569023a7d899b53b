"""Reads datasets of the hub, and those that ``save_to_disk`` wrote, with the library ``datasets``.

No code of a dataset is run. The library keeps what it loads in its own cache, memory-mapped. It is imported
on first use: importing it takes a second. Every failure is a DataError with the library's reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distrust.data.columns import Columns
from distrust.data.formats import BATCH_ROWS, Row
from distrust.errors import DataError, ErrorTranslator, MissingDependency

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # NAME or OWNER/NAME; anything else is a file


def is_name(name: str) -> bool:
    """Whether a string can be the name of a dataset or a model of the hub."""
    return _NAME.fullmatch(name) is not None


def load(name: str, *, split: str, subset: str | None, revision: str | None) -> Any:
    """Load a split of a dataset of the hub as a ``datasets.Dataset``, downloading it if it is not cached."""
    datasets = _library(name)
    with _library_errors(
        lambda: f"{name}: not a file or folder here, and not loaded from the Hugging Face Hub"
    ):
        return datasets.load_dataset(name, subset, split=split, revision=revision)


def saved_split(folder: Path, split: str) -> Path | None:
    """The folder of a split that ``save_to_disk`` wrote; None if it did not write this folder."""
    if not (folder / "dataset_dict.json").is_file():  # a folder for each split
        return folder if (folder / "state.json").is_file() else None
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; give one of {', '.join(splits)}")
    return folder / split


def load_saved(folder: Path) -> Any:
    """Load one split that ``save_to_disk`` wrote as a ``datasets.Dataset``."""
    with _library_errors(lambda: f"{folder}: cannot be loaded"):
        return _library(str(folder)).load_from_disk(str(folder))


def rows(name: str, table: Any, columns: Columns) -> Iterator[Row]:
    """The rows of a loaded split, numbered from 1; only the needed columns are decoded."""
    number = 0
    with _library_errors(lambda: f"{name}: cannot be read after row {number}"):
        table = table.with_format(None).select_columns(columns.needed_from(table.column_names))
        for batch in table.iter(BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, columns.select(dict(zip(batch, values, strict=True)))


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
