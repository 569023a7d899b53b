"""A directory of checkpoints, modelled as simply as possible: what must exist, and who may write.

No file, no lock and no thread: a dictionary, the session that holds the directory, and the retention oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from campaigns.oracle import Rules, Saved, one_per_step, retained


@dataclass
class Model:
    """A directory.

    Attributes:
        resumed: by session, the checkpoint and version that it resumed from: that file is protected.
    """

    rules: Rules  # of all its managers
    files: dict[Saved, int] = field(default_factory=dict)  # versions by checkpoint
    holder: int | None = None  # the session that may write; None if any may
    resumed: dict[int, tuple[Saved, int]] = field(default_factory=dict)

    def may_write(self, session: int) -> bool:
        """Whether no other session holds it."""
        return self.holder in (None, session)

    def commit(self, session: int, saved: Saved, version: int) -> None:
        """A save, and the clean-up after it."""
        self.holder = session
        self.files[saved] = version
        if session in self.resumed and saved.step > self.resumed[session][0].step:
            del self.resumed[session]
        self.clean_up(session, written=saved)

    def clean_up(
        self, session: int, *, keep_last: int | None = None, written: Saved | None = None
    ) -> list[int]:
        """Remove what no rule retains; returns the steps of which nothing is left."""
        self.holder = session
        rules = self.rules if keep_last is None else self.rules._replace(keep_last=keep_last)
        keep = retained(self.files, rules)
        removed = [
            saved
            for saved, version in self.files.items()
            if saved not in keep and saved != written and self.resumed.get(session) != (saved, version)
        ]
        for saved in removed:
            del self.files[saved]
        return sorted({saved.step for saved in removed} - {saved.step for saved in self.files})

    def release(self, session: int) -> None:
        """The session closed, or its last manager was collected."""
        if self.holder == session:
            self.holder = None

    def resume(self, session: int, saved: Saved) -> None:
        """The session loaded and verified it."""
        self.resumed[session] = saved, self.files[saved]

    def by_step(self) -> dict[int, Saved]:
        """The checkpoint that is read for each step."""
        return one_per_step(self.files)

    def newest(self) -> Saved:
        """The checkpoint that a run resumes from."""
        return max(self.files)

    def best(self) -> Saved:
        """The one with the best metric."""
        return min(self.by_step().values(), key=lambda saved: saved.metric or 0.0)
