"""Failing calls: whichever call of the commit protocol fails, with whatever error, nothing is lost.

    python -m campaigns.failing_calls --seed 1 --seconds 600

The programs and disks are those of ``power_loss``, but one call, some in a row or all from one on fail. A
failure raises SaveFailed, or warns if only a removal failed; existing checkpoints are untouched, and the next
save on a working disk works. A sync that fails loses its data, and the next one reports success.
"""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from campaigns.campaign import parser, require, run
from campaigns.power.program import Program
from campaigns.power.search import search
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed

ERRORS = [
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENODEV
]  # fmt: skip


class FailingProgram(Program):
    def _perform(self, action: Callable[[], None]) -> None:
        if self._rng.random() < 0.5:
            self.disk.fails = self._random_failure()
        failures = len(self.disk.failed)
        # Temporary files that an earlier action could not remove may exist: the next writer removes them.
        existing = {path: path.read_bytes() for path in self._directory.glob("*checkpoint-*")}
        try:
            with warnings.catch_warnings(action="error"):
                warnings.filterwarnings("ignore", ".*could not clean up", DistrustWarning)
                action()
        except SaveFailed as error:
            require(len(self.disk.failed) > failures, f"reported for a disk that did not fail: {error}")
            if action == self._save:
                self._require_untouched(existing, self.disk.failed[failures:])
        except Exception as error:
            # Only a clean-up of its own raises this; after a save it is a warning.
            documented = type(error) is CheckpointError and self.disk.failed[-1:] == ["unlink"]
            require(documented, f"a failing disk gave {type(error).__name__}: {error}")
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
            same = path.suffix == ".tmp" or (path.exists() and path.read_bytes() == content)
            require(same, f"{path.name} was changed by a save that failed: {failed}")
        removed = "unlink" in failed or set(self._directory.glob(".*.tmp")) <= existing.keys()
        require(removed, f"a save that failed left its temporary file: {failed}")


def main(arguments: Sequence[str] | None = None) -> int:
    body = partial(search, program=FailingProgram)
    return run("failing_calls", parser(__doc__), body, cases=20, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
