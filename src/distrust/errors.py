"""Every error a user can meet, one class per cause.

    DistrustError
    ├── ConfigError                     an option is wrong, unknown, or contradicts another
    ├── DataError                       records that cannot be trained on, each with file, line and field
    ├── MissingDependency               an optional library is not installed
    ├── ModelError                      a base model or tokenizer cannot be loaded or used
    ├── ResumeRefused                   resuming would not continue the same run
    ├── NonFiniteLoss                   a loss, gradient, weight or moment is not finite
    ├── WrongResult                     the same step, made twice, has different results
    ├── OutOfMemory                     loading, a step or an evaluation needs more memory than is free
    ├── ExportFailed                    an export could not be written durably
    ├── WriteFailed                     a file was not written; an existing one is unchanged
    ├── RunInProgress                   another run of this process is training
    ├── RunNotFound                     a folder contains no run
    ├── RankLost                        another process of the run has ended or does not answer
    ├── RanksDiffer                     the processes of a run have other data, models or weights
    ├── RemoteError                     an object store cannot be used, refuses, or does not answer
    └── CheckpointError
        ├── CheckpointNotFound          no such checkpoint
        ├── CorruptCheckpoint           a file differs from what was written
        ├── CheckpointUnreadable        this process cannot read a file, which may be intact
        ├── UnsupportedVersion          a file has a later version of the format
        ├── NoIntactCheckpoint          there are checkpoints, and none of them is intact
        ├── UnsupportedState            a checkpoint cannot store a value exactly
        ├── CheckpointDirectoryLocked   another writer has locked the directory
        └── SaveFailed                  the checkpoint could not be saved durably
            └── TakenOver               another process continues the run elsewhere

    DistrustWarning                     something a user should know; the program continues
    └── DamagedCheckpointWarning        a damaged checkpoint was skipped, or counts towards no rule

A message is one line, or a line per finding, given as a list: what is wrong, where, and what to do. Invisible
characters in a line are escaped: no name with a newline in it can forge a line. Programs use the attributes.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

#: The reason in every message about a path that does not exist.
NO_SUCH_FILE = "no such file or directory"

_MAX_SHOWN_CHARACTERS = 200
_NOT_ASCII = re.compile("[^ -~]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Escape every invisible character the way JSON does, such as ``\u001b``.

    Args:
        text: from any source.
        lines: whether to keep newlines.
    """
    if text.isprintable():  # almost all text is
        return text
    allowed = "\n" if lines else ""
    return _NOT_ASCII.sub(lambda match: match[0] if match[0] in allowed else _escape(match[0]), text)


def _escape(character: str) -> str:
    import json
    import unicodedata

    if character.isprintable() or unicodedata.category(character) == "Zs":  # spaces of other scripts
        return character
    return json.dumps(character)[1:-1]


class _Lines(str):
    """Lines that are escaped already: a copy of an error, as from another process, is made of them."""


def _join_lines(lines: str | Iterable[str]) -> _Lines:
    if isinstance(lines, _Lines):
        return lines
    return _Lines("\n".join(printable(line) for line in ((lines,) if isinstance(lines, str) else lines)))


class DistrustError(Exception):
    """The root: ``except DistrustError`` catches every error that is not a bug."""

    exit_code = 1  #: of a command that ends with it

    def __init__(self, message: str | Iterable[str], *, path: Path | None = None) -> None:
        super().__init__(_join_lines(message))
        self.path = path  #: the file or folder it is about; None if there is none


class DistrustWarning(UserWarning):
    """Something a user should know; the program continues."""

    def __init__(self, message: str | Iterable[str]) -> None:
        super().__init__(_join_lines(message))


class DamagedCheckpointWarning(DistrustWarning):
    """A damaged checkpoint was skipped, or counts towards no retention rule."""


def warn(message: str | Iterable[str]) -> None:
    """Issue a DistrustWarning that points at the caller of the function that calls this one."""
    warnings.warn(DistrustWarning(message), stacklevel=3)  # 1: this function, 2: its caller


class WarningCollector(list[DistrustWarning]):
    """Context manager that issues the warnings deferred in its block, on this thread, when the block ends.

    They point at the caller of the function that contains the block, so that function is a public method.
    """

    def __enter__(self) -> None:
        self._token = _collector.set(self)

    def __exit__(self, *exception: object) -> None:
        _collector.reset(self._token)
        for warning in self:
            warnings.warn(warning, stacklevel=3)  # 1: this method, 2: the one with the block, 3: its caller


_collector: ContextVar[WarningCollector] = ContextVar("collector")


def defer_warning(warning: DistrustWarning) -> None:
    """Issue a warning when the block of the :class:`WarningCollector` ends: an error for it stops nothing."""
    _collector.get().append(warning)


class ConfigError(DistrustError):
    """An option is wrong, unknown, or contradicts another."""

    exit_code = 2


class DataError(DistrustError):
    """Records that cannot be trained on."""

    def __init__(self, message: str | Iterable[str], problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)  #: one line each: file, line, field, what is wrong


class MissingDependency(DistrustError):
    """An optional library that is not installed. The message says how to install it."""

    def __init__(self, purpose: str, *, library: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed: {install_command(extra)}")
        self.library = library  #: the missing module
        self.extra = extra  #: the extra of this package that installs it


def install_command(extra: str) -> str:
    """The command that installs an extra of this package: from its checkout, if this code is in one."""
    checkout = Path(__file__).resolve().parents[2]
    package = checkout if (checkout / "pyproject.toml").is_file() else "distrust-trainer"
    return f"pip install '{package}[{extra}]'"


class ModelError(DistrustError):
    """A base model or tokenizer that cannot be loaded or used."""


class ResumeRefused(DistrustError):
    """Resuming would not continue the same run."""

    def __init__(self, message: str | Iterable[str], differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)  #: one line each: option, old value, new value


class NonFiniteLoss(DistrustError):
    """A loss, a gradient norm, or an updated weight or moment is not finite. The step is never saved."""

    def __init__(self, message: str, *, step: int, examples: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step  #: the optimizer step
        self.examples = tuple(examples)  #: ``file:line`` of the examples of that step


class WrongResult(DistrustError):
    """The machine computes wrongly: the same step, made twice, has different results, or weights changed."""

    def __init__(self, message: Iterable[str], *, step: int, differences: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step  #: the optimizer step
        self.differences = tuple(differences)  #: one line each: tensor or quantity, and how it differs


class OutOfMemory(DistrustError):
    """Something needs more memory than is free, or than a limit allows. An interrupted step is not saved."""


class ExportFailed(DistrustError):
    """An export could not be written durably. Its message says if anything is at the target."""


class WriteFailed(DistrustError):
    """A file was not written; an existing file of that name is unchanged."""


class RunInProgress(DistrustError):
    """Another run of this process is training. Two at once would not be reproducible."""

    def __init__(self, message: str, *, out: Path) -> None:
        super().__init__(message)
        self.out = out  #: the folder of the run that is training


class RunNotFound(DistrustError):
    """A folder contains no run."""


class RankLost(DistrustError):
    """Another process of the run has ended or does not answer. The run can be resumed."""


class RanksDiffer(DistrustError):
    """The processes of a run have other data, models or weights, or are not at the same step."""


class CheckpointError(DistrustError):
    """An error about a checkpoint, or a directory of them."""


class CheckpointNotFound(CheckpointError):
    """No such checkpoint; the message lists those that exist."""


class CorruptCheckpoint(CheckpointError):
    """A file differs from what was written."""

    def __init__(self, reason: str, *, path: Path | None = None, tensor: str | None = None) -> None:
        # The parser does not know the path; errors_with_path adds it.
        super().__init__(f"{path}: {reason}" if path is not None else reason, path=path)
        self.reason = reason  #: what is wrong, without the path
        self.tensor = tensor  #: the first damaged tensor; None if the damage is not in one


class CheckpointUnreadable(CheckpointError):
    """This process cannot read a file (permissions, open files, memory), which may be intact."""


class UnsupportedVersion(CheckpointError):
    """A file has a later version of the format: this program cannot tell whether it is intact."""


class NoIntactCheckpoint(CheckpointError):
    """There are checkpoints, and none of them is intact. Never a reason to start over silently."""


class UnsupportedState(CheckpointError):
    """A checkpoint cannot store a value exactly."""

    def __init__(self, message: str, *, label: str) -> None:
        super().__init__(message)
        self.label = label  #: its position in the state, such as ``optimizer.state.0``


class CheckpointDirectoryLocked(CheckpointError):
    """Another writer has locked the directory."""


class SaveFailed(CheckpointError):
    """The checkpoint could not be saved durably. Existing checkpoints are unchanged."""

    def __init__(
        self, message: str, *, path: Path, needed: int | None = None, free: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.needed = needed  #: bytes that the checkpoint needs; None if unknown
        self.free = free  #: bytes that were free on the file system; None if unknown


class TakenOver(SaveFailed):
    """Another process continues the run elsewhere: this one must stop. What it saved here stays."""


class RemoteError(DistrustError):
    """An object store cannot be used, refuses, or does not answer."""

    def __init__(self, message: str | Iterable[str], *, url: str, temporary: bool = False) -> None:
        super().__init__(message)
        self.url = url  #: the object or prefix
        self.temporary = temporary  #: whether the same call may succeed later


class ErrorTranslator(contextlib.ContextDecorator):
    """Context manager that raises what ``translate`` returns in place of an error of its block.

    An error that ``translate`` returns unchanged passes as it is. It may also decorate a function.

    A class, not a generator: since Python 3.12 a generator-based context manager keeps the frames of the
    original error, with every buffer in them, until the garbage collector runs.
    """

    def __init__(self, kinds: tuple[type[Exception], ...], translate: Callable[[Any], Exception]) -> None:
        self._kinds = kinds  # other errors pass
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, self._kinds):
            return
        translated = self._translate(error)
        if translated is error:
            return
        try:
            raise translated from (None if isinstance(error, DistrustError) else error)
        finally:
            del translated  # else there is a cycle: error, traceback, this frame, error


def read_failure_reason(error: OSError) -> str:
    """Why a file cannot be read, to append to its name."""
    is_missing = isinstance(error, FileNotFoundError)
    return NO_SUCH_FILE if is_missing else f"cannot be read: {error.strerror or error}"


def shorten(text: str) -> str:
    """Shorten text from a file for a message: a hostile file may contain names of a million letters."""
    half = _MAX_SHOWN_CHARACTERS // 2
    # The ends of a path or name say most.
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:half]}…{text[-half:]}"


def quote_untrusted(text: str) -> str:
    """Shorten text, and quote it if it contains control characters, which a terminal would execute."""
    text = shorten(text)
    return text if text.isprintable() else repr(text)


def join_first(lines: Iterable[str], count: int, separator: str = ", ") -> str:
    """The first ``count`` lines, and how many more there are: a hostile file may have millions of faults."""
    lines = list(lines)
    suffix = f"{separator}and {len(lines) - count} more" if len(lines) > count else ""
    return separator.join(lines[:count]) + suffix
