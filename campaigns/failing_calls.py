"""Failing calls: whichever call of the commit protocol fails, with whatever error, nothing is lost.

    python -m campaigns.failing_calls --seed 1 --seconds 600
    python -m campaigns.failing_calls --seed 1 --case 7

The programs and the disks are those of ``power_loss``, but a disk fails now and then: one call, some in a row
or all from one on, with EIO, ENOSPC and others. A sync that fails loses what was to be synced, and the next
one reports success, as the kernel does. After each failure:

- SaveFailed was raised, or a warning where only a removal failed, and nothing else;
- the checkpoints that existed are untouched; no temporary file is left, if it could be removed;
- on a disk that works again, the next save works;
- after a power cut at any instant, everything that ``power_loss`` requires holds.
"""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from campaigns.campaign import CounterExample, parser, run
from campaigns.power.program import Program
from campaigns.power.search import search
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed

ERRORS = [
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENODEV
]  # fmt: skip


class FailingProgram(Program):
    """A program whose disk fails now and then."""

    def _perform(self, action: Callable[[], None]) -> None:
        if self._rng.random() < 0.5:
            self.disk.fails = self._random_failure()
        failures = len(self.disk.failed)
        # Temporary files that an earlier action could not remove may exist: the next writer removes them.
        existing = {path: path.read_bytes() for path in self._directory.glob("*checkpoint-*")}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*could not clean up", DistrustWarning)
                action()
        except SaveFailed as error:
            if len(self.disk.failed) == failures:
                raise CounterExample(
                    f"a failure was reported for a disk that did not fail: {error}"
                ) from error
            if action == self._save:
                self._require_untouched(existing, self.disk.failed[failures:])
        except Exception as error:
            # Only a clean-up of its own raises this; after a save it is a warning.
            if not (type(error) is CheckpointError and self.disk.failed[-1:] == ["unlink"]):
                raise CounterExample(f"a failing disk gave {type(error).__name__}: {error}") from error
        finally:
            self.disk.fails = None

    def _random_failure(self) -> Callable[[str, int], int | None]:
        begin = self.disk.calls + self._rng.randint(1, 16)
        end = begin + self._rng.choice([1, 1, 2, 4, 1000])
        code = self._rng.choice(ERRORS)
        return lambda name, number: code if begin <= number < end else None

    def _require_untouched(self, existing: dict[Path, bytes], failed: list[str]) -> None:
        if "sync_directory" in failed:
            return  # the new file may exist; it is checked after each cut
        for path, content in existing.items():
            if path.suffix != ".tmp" and (not path.exists() or path.read_bytes() != content):
                raise CounterExample(f"{path.name} was changed by a save that failed: {failed}")
        if "unlink" not in failed and set(self._directory.glob(".*.tmp")) - existing.keys():
            raise CounterExample(f"a save that failed left its temporary file: {failed}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(
        "failing_calls",
        parser(__doc__),
        lambda campaign: search(campaign, lambda operation: False, FailingProgram),
        cases=20,
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
