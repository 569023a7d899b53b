"""Temporary copy of input that can be read only once: a program's examples, or a pipe.

The file has no name, so the system removes it however the process ends. Examples are stored as JSON Lines
with only the needed columns, and are then validated like those of a file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from distrust.data.columns import Columns
from distrust.data.fields import json_kind
from distrust.data.records import Location
from distrust.errors import DataError


class TempCopy:
    """An unnamed file that can be read repeatedly.

    Args:
        folder: where to create it; falls back to the system's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
        except OSError:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, from the beginning."""
        self._file.flush()
        # A duplicate shares the file position, so only one reader at a time.
        with open(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            yield file

    def copy_pipe(self, pipe: Path) -> None:
        """Copy a pipe to its end."""
        with pipe.open("rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 20)

    def copy_examples(self, examples: Iterable[Mapping[str, Any]], columns: Columns, *, name: str) -> None:
        """Copy the needed columns of examples; DataError for one that is no mapping of JSON values."""
        for index, example in enumerate(examples):
            location = Location(name, index, "index")
            if not isinstance(example, Mapping):
                raise DataError(
                    f"{location}: {json_kind(example)}, not a mapping; give a dict for each example"
                )
            fields = {
                str(key): example[key]
                for key in columns.needed_from(list(example))
                # A source class is optional: one of another type is left out, not refused.
                if key not in columns.source or isinstance(example[key], str | int | float)
            }
            try:
                self._file.write(json.dumps(fields, default=_to_builtin).encode() + b"\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{location}: {error}; give text, numbers, and messages of them") from None


def _to_builtin(value: Any) -> Any:
    """Scalars and arrays of numpy and of libraries like it, as numbers and lists."""
    if hasattr(value, "tolist"):
        return cast(Any, value).tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be trained on")
