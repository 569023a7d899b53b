"""What can be read only once -> a file: a program's examples, a pipe.

The file has no name: whatever becomes of the process, nothing is left of it. It holds what is needed of the
examples, a JSON object a line, so that what is read of it passes the same door as a file.
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
    """A file without a name, which can be read as often as one likes.

    Args:
        folder: where it lies; the system's folder for temporary files if it cannot lie there.
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
        """Its content, from the beginning."""
        self._file.flush()
        with open(os.dup(self._file.fileno()), "rb") as file:  # it shares the place: one reader at a time
            file.seek(0)
            yield file

    def copy_pipe(self, pipe: Path) -> None:
        """Take over what a pipe holds."""
        with pipe.open("rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 20)

    def copy_examples(self, examples: Iterable[Mapping[str, Any]], columns: Columns, *, name: str) -> None:
        """Take over what is needed of examples.

        Raises:
            DataError: one is not a mapping, or holds what cannot be an example.
        """
        for index, example in enumerate(examples):
            location = Location(name, index, "index")
            if not isinstance(example, Mapping):
                raise DataError(
                    f"{location}: {json_kind(example)}, not a mapping; give a dict for each example"
                )
            needed = {
                str(key): example[key]
                for key in columns.needed_from(list(example))
                if key not in columns.source or isinstance(example[key], str | int | float)
            }
            try:
                self._file.write(json.dumps(needed, default=_plain).encode() + b"\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{location}: {error}; give text, numbers, and messages of them") from None


def _plain(value: Any) -> Any:
    """Scalars and arrays of numpy and of what is like it, as JSON has them."""
    if hasattr(value, "tolist"):
        return cast(Any, value).tolist()
    raise TypeError(f"a value of type {type(value).__name__} is not something to learn from")
