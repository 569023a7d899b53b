"""Calls that fail: whatever call of the commit protocol fails, and with whatever error, nothing is lost.

    python -m campaigns.failing_calls --seed 1 --seconds 600
    python -m campaigns.failing_calls --seed 1 --case 7

The programs and the disks are those of ``power_loss``, but a disk fails now and then: one call, some in a row
or all from one on, with EIO, ENOSPC and others. A sync that fails loses what was to be synced, and the one
after it reports success, as the kernel does. After each failure:

- it was reported as SaveFailed, where only a removal failed by a warning, and nothing else was raised;
- what stood before stands, whole; no temporary file is left, if it could be removed;
- on a disk that works again, the next save works;
- after a power cut, at every instant, all that ``power_loss`` promises.
"""

from __future__ import annotations

import errno
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from campaigns import campaign
from campaigns.campaign import Campaign, CounterExample
from campaigns.power_loss import Program, memory_folder, search
from distrust.errors import CheckpointError, DistrustWarning, SaveFailed

ERRORS = [
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENODEV
]  # fmt: skip


class TroubledProgram(Program):
    """One whose disk fails now and then."""

    def _do(self, todo: Callable[[], None]) -> None:
        if self._chance.random() < 0.5:
            self._disk.fails = self._trouble()
        before = len(self._disk.failed)
        # What an earlier one could not remove counts as standing: the next writer sweeps it.
        standing = {path: path.read_bytes() for path in self._directory.glob("*checkpoint-*")}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*could not clean up", DistrustWarning)
                todo()
        except SaveFailed as error:
            if len(self._disk.failed) == before:
                raise CounterExample(f"a disk that did not fail was said to: {error}") from error
            if todo == self._save:
                self._require_untouched(standing, self._disk.failed[before:])
        except Exception as error:
            # Of a clean-up by itself; after a save it is a warning.
            if not (type(error) is CheckpointError and self._disk.failed[-1:] == ["unlink"]):
                raise CounterExample(f"a failing disk gave {type(error).__name__}: {error}") from error
        finally:
            self._disk.fails = None

    def _trouble(self) -> Callable[[str, int], int | None]:
        """Which calls fail."""
        begin = self._disk.calls + self._chance.randint(1, 16)
        end = begin + self._chance.choice([1, 1, 2, 4, 1000])
        code = self._chance.choice(ERRORS)
        return lambda name, number: code if begin <= number < end else None

    def _require_untouched(self, standing: dict[Path, bytes], failed: list[str]) -> None:
        if "sync_directory" in failed:
            return  # the new one may stand; what is promised of it is looked at after each cut
        for path, content in standing.items():
            if path.suffix != ".tmp" and (not path.exists() or path.read_bytes() != content):
                raise CounterExample(f"{path.name} was changed by a save that failed: {failed}")
        if "unlink" not in failed and set(self._directory.glob(".*.tmp")) - standing.keys():
            raise CounterExample(f"a save that failed left its temporary file: {failed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""

    def body(run: Campaign) -> None:
        with tempfile.TemporaryDirectory(prefix="distrust-", dir=memory_folder()) as directory:
            search(run, Path(directory), lambda done: False, TroubledProgram)

    return campaign.run("failing_calls", campaign.parser(__doc__), body, cases=20, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
