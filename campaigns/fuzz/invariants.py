"""What must hold for every answer of a reader: what is raised and printed, and how long it takes."""

from __future__ import annotations

import contextlib
import time
import unicodedata
import warnings
from collections.abc import Iterator

from campaigns.campaign import CounterExample, require
from distrust.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    DistrustWarning,
    NoIntactCheckpoint,
    UnsupportedVersion,
)

SECONDS = 1.0  # for any answer
SECONDS_PER_MIB = 2.0  # besides
MESSAGE_CHARACTERS = 4000  # of an error, at most
_MIB = 1 << 20
#: Errors about the file. CheckpointUnreadable is not among them: it would mean that memory ran out.
_DOCUMENTED = (CorruptCheckpoint, UnsupportedVersion, NoIntactCheckpoint, CheckpointNotFound)
#: Unicode categories of control, format and separator characters.
_CONTROL_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def bound(nbytes: int) -> float:
    """How many seconds of the processor an answer may take."""
    return SECONDS + SECONDS_PER_MIB * nbytes / _MIB


def seconds() -> float:
    return time.process_time()


@contextlib.contextmanager
def only_documented_errors(name: str) -> Iterator[None]:
    """Let documented errors about the file through; every other exception or warning is a counterexample."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except CounterExample:
        raise
    except _DOCUMENTED as error:
        message = str(error)
        require(len(message) <= MESSAGE_CHARACTERS, f"{name}: a message of {len(message):,} characters")
        require_plain(f"{name}: the message", message)
        raise
    except BaseException as error:
        raise CounterExample(f"{name}: {type(error).__name__}: {str(error)[:500]!a}") from error
    for warning in caught:
        is_ours = issubclass(warning.category, DistrustWarning)
        require(is_ours, f"{name}: {warning.category.__name__}: {warning.message}")
        require_plain(f"{name}: the warning", str(warning.message))


def require_plain(description: str, text: str) -> None:
    """Require that a text holds no control character of a terminal."""
    if text.isprintable():
        return
    for letter in set(text) - {"\n"}:
        plain = unicodedata.category(letter) not in _CONTROL_CATEGORIES
        require(plain, f"{description} holds {letter!a}: {text[:500]!a}")
