"""What is promised of every answer, whatever was asked of whatever file: what is raised, said, and taken."""

from __future__ import annotations

import contextlib
import time
import unicodedata
import warnings
from collections.abc import Iterator

from campaigns.campaign import CounterExample
from distrust.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    DistrustWarning,
    NoIntactCheckpoint,
    UnsupportedVersion,
)

SECONDS = 1.0
SECONDS_PER_MIB = 2.0
MESSAGE_CHARACTERS = 4000
_MIB = 1 << 20
#: What may be said of a file. CheckpointUnreadable is not among them: it would mean that memory ran out.
_SAID_OF_A_FILE = (CorruptCheckpoint, UnsupportedVersion, NoIntactCheckpoint, CheckpointNotFound)
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def bound(nbytes: int) -> float:
    """How many seconds of the processor an answer may take."""
    return SECONDS + SECONDS_PER_MIB * nbytes / _MIB


def seconds() -> float:
    """Of the processor, in all threads."""
    return time.process_time()


@contextlib.contextmanager
def only_what_is_promised(name: str) -> Iterator[None]:
    """Errors of the library go through, if they are about the file; everything else was never promised."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except CounterExample:
        raise
    except _SAID_OF_A_FILE as error:
        message = str(error)
        require(len(message) <= MESSAGE_CHARACTERS, f"{name}: a message of {len(message):,} characters")
        require_plain(f"{name}: the message", message)
        raise
    except BaseException as error:  # whatever it is, nobody was told of it
        raise CounterExample(f"{name}: {type(error).__name__}: {str(error)[:500]!a}") from error
    for warning in caught:
        right = issubclass(warning.category, DistrustWarning)
        require(right, f"{name}: {warning.category.__name__}: {warning.message}")
        require_plain(f"{name}: the warning", str(warning.message))


def require_plain(what: str, text: str) -> None:
    """That it holds no character that commands a terminal."""
    if text.isprintable():
        return
    for letter in set(text) - {"\n"}:
        require(unicodedata.category(letter) not in _UNSEEN, f"{what} holds {letter!a}: {text[:500]!a}")


def require(kept: bool, promise: str) -> None:
    """Check a promise.

    Raises:
        CounterExample: if it was not kept.
    """
    if not kept:
        raise CounterExample(promise)
