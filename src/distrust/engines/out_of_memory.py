"""What a framework says when memory is out, as a line for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distrust.errors import OutOfMemory


@contextlib.contextmanager
def translate_out_of_memory(*said: str) -> Iterator[None]:
    """Out of memory is the user's to mend.

    Args:
        said: what is in the text of the plain RuntimeErrors that mean it, in small letters; errors of classes
            of their own mean nothing else.

    Raises:
        OutOfMemory: in place of them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if type(error) is RuntimeError and not any(words in reason.lower() for words in said):
            raise
        raise OutOfMemory(
            "there is not enough memory for a step: lower --batch-size (and raise --gradient-accumulation) "
            f"or --max-length, or add --gradient-checkpointing ({reason[:200]})"
        ) from error
