"""Processes that a campaign starts and talks to, a line at a time.

An actor is a module of ``campaigns`` that is run by ``python -m``, takes orders on its standard input and
answers on its standard output. What it does not answer in time is a finding, too: with the stacks of its
threads, and whatever else it wrote on its standard error.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from campaigns.campaign import CounterExample

#: Of one answer. Nothing here takes a tenth of it, on a loaded machine either.
PATIENCE_SECONDS = 120.0
_TOLD_LINES = 40


class Actor:
    """One process.

    Args:
        module: what it runs.
        arguments: of its command line.
    """

    def __init__(self, module: str, *arguments: object) -> None:
        self._name = " ".join([module, *map(str, arguments)])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._read = b""
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            cwd=Path(__file__).parent.parent,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, line: str) -> None:
        """Give it an order."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("it is gone") from None

    def answer(self, seconds: float = PATIENCE_SECONDS) -> str:
        """The next line that it says.

        Raises:
            CounterExample: if it says none: because it failed, or hangs.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not self._more(deadline):
                raise self._failed("it ended")
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def rest(self, seconds: float = PATIENCE_SECONDS) -> list[str]:
        """All lines that it says until it ends: whoever holds its standard output must end, too."""
        deadline = time.monotonic() + seconds
        while self._more(deadline):
            pass
        lines, self._read = self._read, b""
        return lines.decode().splitlines()

    def end(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Close its standard input, and wait until it has ended well.

        Raises:
            CounterExample: if it does not.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._hangs() from None
        if code != 0:
            raise self._failed(f"it ended with {code}")

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # an order that it did not live to take
                    continue

    def _more(self, deadline: float) -> bool:
        """Read what is there, waiting for it; False at the end."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise self._hangs()
        part = os.read(self._process.stdout.fileno(), 1 << 16)
        self._read += part
        return bool(part)

    def _hangs(self) -> CounterExample:
        self._process.send_signal(signal.SIGABRT)  # Python then says where each thread stands
        self._process.wait()
        return self._failed("it hangs")

    def _failed(self, what: str) -> CounterExample:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace").splitlines()[-_TOLD_LINES:]
        return CounterExample("\n".join([f"{self._name}: {what}", *told]))
