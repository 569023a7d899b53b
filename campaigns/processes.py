"""Processes that a campaign starts, watches and disturbs: the real command, or a fork of a warm one.

Both go the same way: :class:`Launcher` starts one, :class:`Session` says how it ends, and what it has said.
What they print goes to files, so that nobody has to read along, and a dead one's words are all there.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from campaigns.campaign import CounterExample

#: A process that runs for so long hangs.
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.0002


class Child(Protocol):
    """What a session needs of a process; ``subprocess.Popen`` has it."""

    def poll(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""


class Launcher(Protocol):
    """Starts processes.

    Attributes:
        name: what they are, in a few words.
    """

    @property
    def name(self) -> str: ...

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> Child:
        """Start one that appends what it prints to two files."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C: what is started here does not inherit that."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Command:
    """A command line: a process of its own, from the first instruction on."""

    def __init__(self, command: Sequence[str], *, name: str) -> None:
        self.name = name
        self._command = command

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> subprocess.Popen[bytes]:
        with out.open("ab") as output, err.open("ab") as errors, _interruptible():
            return subprocess.Popen([*self._command, *arguments], stdout=output, stderr=errors)


class Forks:
    """Forks of a process that has imported what they need, one at a time; see ``fork_server.py``.

    Use it as a context: it ends the server.

    Args:
        program: ``module:function``; the function takes arguments and returns an exit code.
        imports: modules to import before, besides.
        name: what they are, in a few words.
    """

    def __init__(self, program: str, imports: Sequence[str] = (), *, name: str) -> None:
        self.name = name
        with _interruptible():
            self._server = subprocess.Popen(
                [sys.executable, "-m", "campaigns.fork_server", program, *imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(),
            )
        self._child: _Fork | None = None
        self._answer()

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> Child:
        assert self._server.stdin is not None
        order = {"arguments": list(arguments), "out": str(out), "err": str(err)}
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        self._child = _Fork(self, int(self._answer()))
        return self._child

    def exit_code(self) -> int | None:
        """Of the fork under way, once it has ended."""
        assert self._server.stdout is not None
        ended, _, _ = select.select([self._server.stdout], [], [], 0)
        return int(self._answer()) if ended else None

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)
        self._server.communicate()

    def _answer(self) -> str:
        """The next line. Read byte by byte: what a buffer held, ``select`` would not know of."""
        assert self._server.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._server.stdout.fileno(), 1)
            if not byte:
                raise RuntimeError("the fork server has ended")
            line += byte
        return line.decode()


def _environment() -> dict[str, str]:
    """For the server: it finds this package from anywhere, and has no pool of threads to lose in a fork."""
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OPENBLAS_NUM_THREADS": "1",
    }


class _Fork:
    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks = forks
        self._pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._forks.exit_code()
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


class Session:
    """One process, from its start to its end.

    Args:
        launcher: starts it.
        arguments: for it.
        folder: of the files that its output is appended to, ``out.txt`` and ``err.txt``.
        directory: of the checkpoints that it writes.
        patience_seconds: if it runs for so long, it hangs.
    """

    def __init__(
        self,
        launcher: Launcher,
        arguments: Sequence[str],
        *,
        folder: Path,
        directory: Path,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.directory = directory
        self._folder = folder
        self._patience_seconds = patience_seconds
        out, err = folder / "out.txt", folder / "err.txt"
        for path in (out, err):
            path.touch()
        self._parts = [(path, path.stat().st_size) for path in (out, err)]
        self._began = time.monotonic()
        self._child = launcher.start(arguments, out=out, err=err)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    @property
    def running(self) -> bool:
        """Whether it runs.

        Raises:
            CounterExample: if it has done so for far too long.
        """
        if self._child.poll() is not None:
            return False
        if self.seconds > self._patience_seconds:
            self._child.send_signal(signal.SIGKILL)
            raise CounterExample(f"{self._folder}: still running after {self.seconds:.0f} s")
        return True

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._child.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns the exit code, negative if a signal ended it."""
        while self.running:
            time.sleep(POLL_SECONDS)
        code = self._child.poll()
        assert code is not None
        return code

    def said(self) -> list[str]:
        """The whole lines that it has printed so far."""
        *lines, _unfinished = self._read(0).split("\n")
        return lines

    def complaints(self) -> str:
        """What it has written to its standard error."""
        return self._read(1)

    def _read(self, index: int) -> str:
        path, offset = self._parts[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
