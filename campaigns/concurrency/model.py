"""What must be there, and who may write: the promises of a directory of checkpoints, as simply as they go.

No file, no lock and no thread: a dictionary, a name, and the rules of retention, written once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from campaigns.concurrency import content


class File(NamedTuple):
    """A checkpoint: its step, and whether it is a final one."""

    step: int
    final: bool


@dataclass(frozen=True)
class Rules:
    """What is kept: the last ones, the best ones, and one every so many steps; finals always."""

    keep_last: int | None
    keep_best: int
    keep_every: int | None

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Of these steps, finals apart."""
        ascending = sorted(steps)
        kept = set(ascending if self.keep_last is None else ascending[-self.keep_last :])
        kept |= set(sorted(ascending, key=content.metric)[: self.keep_best])
        return kept | {step for step in ascending if self.keep_every and step % self.keep_every == 0}


@dataclass
class Model:
    """A directory.

    Attributes:
        rules: of all its managers.
        files: versions by file.
        holder: the session that may write; None if any may.
        resumed: by session, the file and version that it was resumed from: that one stays.
    """

    rules: Rules
    files: dict[File, int] = field(default_factory=dict)
    holder: int | None = None
    resumed: dict[int, tuple[File, int]] = field(default_factory=dict)

    def may_write(self, session: int) -> bool:
        """Whether nobody else holds it."""
        return self.holder in (None, session)

    def commit(self, session: int, file: File, version: int) -> None:
        """A save, and the clean-up after it."""
        self.holder = session
        self.files[file] = version
        if session in self.resumed and file.step > self.resumed[session][0].step:
            del self.resumed[session]
        self.clean_up(session, written=file)

    def clean_up(
        self, session: int, *, keep_last: int | None = None, written: File | None = None
    ) -> list[int]:
        """Remove what no rule keeps; returns the steps of which nothing is left."""
        self.holder = session
        rules = self.rules if keep_last is None else replace(self.rules, keep_last=keep_last)
        kept = kept_files(self.files, rules)
        going = [
            file
            for file, version in self.files.items()
            if file not in kept and file != written and self.resumed.get(session) != (file, version)
        ]
        for file in going:
            del self.files[file]
        return sorted({file.step for file in going} - {file.step for file in self.files})

    def release(self, session: int) -> None:
        """The session closed, or nobody has it any more."""
        if self.holder == session:
            self.holder = None

    def take_up(self, session: int, file: File) -> None:
        """The session loaded and verified it."""
        self.resumed[session] = file, self.files[file]

    def newest(self) -> File:
        """What a run goes on from."""
        return max(self.files)

    def best(self) -> File:
        """The one with the best metric."""
        return min(by_step(self.files).values(), key=lambda file: content.metric(file.step))


def by_step(files: Iterable[File]) -> dict[int, File]:
    """The file that stands for each step: the final one, if there is one."""
    return {file.step: file for file in sorted(files)}


def kept_files(files: Iterable[File], rules: Rules) -> set[File]:
    """What stays."""
    standing = by_step(files)
    kept = rules.kept(standing)
    return {file for step, file in standing.items() if file.final or step in kept}
