"""Every error a user can meet, one class per cause.

    DistrustError
    ├── ConfigError                     an option is wrong, unknown, or contradicts another
    ├── DataError                       records that cannot be trained on: every one with file, line and field
    ├── MissingDependency               an optional library that is not installed
    ├── ModelError                      a base model or tokenizer that cannot be loaded or used
    ├── ResumeRefused                   going on would not continue the same run
    ├── NonFiniteLoss                   a loss or gradient norm that is not finite; the step was not made
    ├── OutOfMemory                     a step that needs more memory than there is
    ├── ExportFailed                    an export was not written; nothing of it is at its target
    ├── WriteFailed                     a file was not written; what stood under its name still stands
    ├── RunInProgress                   another run of this process is training
    ├── RunNotFound                     a folder that holds no run
    └── CheckpointError
        ├── CheckpointNotFound          no such checkpoint
        ├── CorruptCheckpoint           a file that is not what was written
        ├── CheckpointUnreadable        a file that may be whole, but this process cannot read it now
        ├── UnsupportedVersion          a file of a later version of the format
        ├── NoGoodCheckpoint            there are checkpoints, and none of them is whole
        ├── UnsupportedState            a value that a checkpoint cannot hold exactly
        ├── CheckpointDirectoryLocked   another writer holds the directory
        └── SaveFailed                  the checkpoint was not written; what stood before still stands

    DistrustWarning                     something a user should know that stops nothing
    └── DamagedCheckpointWarning        a damaged checkpoint was skipped or does not count

The message is one line (or one line a finding) that says what is wrong, where, and what to do. What a
program may want of it is in attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: What is said of a path that is not there, everywhere.
NOT_FOUND_ERRORS = "no such file or directory"

_SHOWN_CHARACTERS = 200


class DistrustError(Exception):
    """The root: ``except DistrustError`` catches everything that is not a bug."""


class DistrustWarning(UserWarning):
    """Something a user should know that stops nothing."""


class DamagedCheckpointWarning(DistrustWarning):
    """A damaged checkpoint was skipped, or does not count towards a retention rule."""


class WarningCollector(list[DistrustWarning]):
    """Context manager that issues the warnings appended in its block, when the block ends.

    They point at the caller of the function that contains the block. So a public method issues them, and the
    functions below it need not know how deep they are.
    """

    def __enter__(self) -> WarningCollector:
        return self

    def __exit__(self, *exception: object) -> None:
        for warning in self:
            warnings.warn(warning, stacklevel=3)  # this method, the method with the block, its caller


class ConfigError(DistrustError):
    """An option is wrong, unknown, or contradicts another."""


class DataError(DistrustError):
    """Records that cannot be trained on.

    Attributes:
        problems: one line each: file, line, field, what is wrong.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class MissingDependency(DistrustError):
    """An optional library that is not installed. The message says how to install it.

    Attributes:
        library: the missing module.
        extra: the extra of this package that installs it.
    """

    def __init__(self, purpose: str, *, library: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed: {install_command(extra)}")
        self.library = library
        self.extra = extra


def install_command(extra: str) -> str:
    """The command that installs an extra of this package: from its checkout, if this code is in one."""
    checkout = Path(__file__).resolve().parents[2]
    package = checkout if (checkout / "pyproject.toml").is_file() else "distrust-trainer"
    return f"pip install '{package}[{extra}]'"


class ModelError(DistrustError):
    """A base model or tokenizer that cannot be loaded or used."""


class ResumeRefused(DistrustError):
    """Going on would not continue the same run.

    Attributes:
        differences: one line each: option, what it was, what it is.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class NonFiniteLoss(DistrustError):
    """A loss or gradient norm that is not finite. The step was not made.

    Attributes:
        step: the optimizer step that was not made.
        examples: ``file:line`` of the examples it was to be made on.
    """

    def __init__(self, message: str, *, step: int, examples: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step
        self.examples = tuple(examples)


class OutOfMemory(DistrustError):
    """A step that needs more memory than there is. The step was not made."""


class ExportFailed(DistrustError):
    """An export was not written; nothing of it is at its target.

    Attributes:
        path: the target.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class WriteFailed(DistrustError):
    """A file was not written; what stood under its name before still stands.

    Attributes:
        path: its name.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class RunInProgress(DistrustError):
    """Another run of this process is training: two at once would change each other's bits.

    Attributes:
        out: the folder of the run that is training.
    """

    def __init__(self, message: str, *, out: Path) -> None:
        super().__init__(message)
        self.out = out


class RunNotFound(DistrustError):
    """A folder that holds no run.

    Attributes:
        path: the folder.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class CheckpointError(DistrustError):
    """Something about a checkpoint, or a directory of them.

    Attributes:
        path: the file or directory it is about.
    """

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class CheckpointNotFound(CheckpointError):
    """No such checkpoint; the message lists what there is."""


class CorruptCheckpoint(CheckpointError):
    """A file that is not what was written.

    Attributes:
        reason: what is wrong, without the path.
        tensor: the first damaged tensor, where it is one.
    """

    def __init__(self, reason: str, *, path: Path | None = None, tensor: str | None = None) -> None:
        super().__init__(f"{path}: {reason}" if path is not None else reason, path=path)
        self.reason = reason
        self.tensor = tensor


class CheckpointUnreadable(CheckpointError):
    """A file that may be whole, but this process cannot read it now: permissions, open files, memory."""


class UnsupportedVersion(CheckpointError):
    """A file of a later version of the format: it may be whole, but this program cannot tell."""


class NoIntactCheckpoint(CheckpointError):
    """There are checkpoints, and none of them is whole: never a reason to start over silently."""


class UnsupportedState(CheckpointError):
    """A value that a checkpoint cannot hold exactly.

    Attributes:
        label: where in the state it stands, such as ``optimizer.state.0``.
    """

    def __init__(self, message: str, *, label: str) -> None:
        super().__init__(message)
        self.label = label


class CheckpointDirectoryLocked(CheckpointError):
    """Another writer holds the directory."""


class SaveFailed(CheckpointError):
    """The checkpoint was not written; what stood before still stands.

    Attributes:
        needed: bytes that the checkpoint needs, where known.
        free: bytes that the file system had free, where known.
    """

    def __init__(
        self, message: str, *, path: Path, needed: int | None = None, free: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.needed = needed
        self.free = free


class ErrorTranslator:
    """Context manager that raises what ``translate`` returns in place of an error of its block.

    A class, not a generator: since Python 3.12 a generator-based context manager keeps the frames of the
    original error, with every buffer in them, until the garbage collector runs.

    Args:
        kinds: the classes of errors to translate; others pass.
        translate: returns the error to raise.
    """

    def __init__(self, kinds: tuple[type[Exception], ...], translate: Callable[[Any], Exception]) -> None:
        self._kinds = kinds
        self._translate = translate

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, self._kinds):
            # Never bind the new error to a name: that is a cycle (error, traceback, this frame, error).
            raise self._translate(error) from (None if isinstance(error, DistrustError) else error)


def read_failure_reason(error: OSError) -> str:
    """Why a file was not read, behind its name."""
    return (
        NOT_FOUND_ERRORS
        if isinstance(error, FileNotFoundError)
        else f"cannot be read: {error.strerror or error}"
    )


def shorten(text: str) -> str:
    """Text out of a file, as a message may hold it: a hostile file has names of a million letters."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}…{text[-half:]}"


def quote_untrusted(text: str) -> str:
    """The same, and quoted if it holds anything that a terminal obeys and does not show."""
    text = shorten(text)
    return text if text.isprintable() else repr(text)
