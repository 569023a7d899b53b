"""Files of other programs, which may hold anything: read without running what they say.

Only regular files are opened, nothing is unpickled but tensors and plain containers, and no file can make
its reader take more memory than a small multiple of its own size. What is wrong is one line with the path.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distrust.checkpoint.files import open_regular
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    quote_untrusted,
)
from distrust.importers.bounded import parse_object


def read_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: if it is not there, too large, or anything else.
    """
    with errors_with_path(path), open_file(path) as file:
        raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise CorruptCheckpoint(f"larger than {max_bytes >> 20} MiB")
        return parse_object(raw, "the file")


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open to be read; nobody is waited for."""
    with open_regular(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
        yield file


@contextlib.contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Whatever a hostile file makes of its reader is one line."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(error.reason, path=path, tensor=error.tensor) from error
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path}: is not there", path=path) from None
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: cannot be read: {error.strerror or error}", path=path) from error
    except MemoryError as error:
        raise CheckpointUnreadable(f"{path}: cannot be read: no memory", path=path) from error
    except pickle.UnpicklingError as error:
        said = quote_untrusted(" ".join(str(error).split()))
        raise CorruptCheckpoint(
            f"holds other objects than tensors and plain containers ({said}); such a file can run any code "
            "when it is read, so it is not read",
            path=path,
        ) from error
    except Exception as error:  # the parsers raise of every kind
        said = quote_untrusted(" ".join(str(error).split()))
        reason = f"not a whole file of its kind ({type(error).__name__}: {said})"
        raise CorruptCheckpoint(reason, path=path) from error
