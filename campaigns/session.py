"""Sessions: commands that run on their own and are watched, signalled and waited for.

A :class:`Command` starts them, or :class:`Forks` of a process that has its imports done. What they print goes
to files: no reader is needed, and the output of a dead process is complete. This module is also the fork
server: ``python -m campaigns.session MODULE:FUNCTION [IMPORT …]``
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from campaigns.child import HANG_SECONDS, PYTHON, Child, ChildFailed, default_sigint, python_environment

POLL_SECONDS = 0.0002  # a save takes a few ms
_END_SECONDS = 0.005  # how late the end of a process may be noticed


class Command:
    """A command line; the process runs from the first instruction of the interpreter on."""

    def __init__(self, command: Sequence[str], *, name: str) -> None:
        self.name = name  # for the counts
        self._command = command

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> subprocess.Popen[bytes]:
        with out.open("ab") as output, err.open("ab") as errors, default_sigint():
            return subprocess.Popen(
                [*self._command, *arguments], stdout=output, stderr=errors, env=python_environment()
            )


class Forks:
    """Forks of a fork server, one at a time; a context that ends the server.

    A fork of a process that has imported torch starts at once. The program is ``module:function``: it takes
    arguments and returns an exit code.
    """

    def __init__(
        self, program: str, imports: Sequence[str] = (), *, name: str, python: Sequence[str] = PYTHON
    ) -> None:
        self.name = name
        # No threads of OpenBLAS and of pyarrow's allocator: a fork would lose them.
        no_threads = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self.server = Child("campaigns.session", program, *imports, environment=no_threads, python=python)
        self._fork: _Fork | None = None
        self.server.receive(HANG_SECONDS)  # "ready"

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> _Fork:
        self.server.send({"arguments": list(arguments), "out": str(out), "err": str(err)})
        self._fork = _Fork(self.server)
        return self._fork

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fork is not None:
            self._fork.send_signal(signal.SIGKILL)
        self.server.__exit__()


class _Fork:
    def __init__(self, server: Child) -> None:
        self._server = server
        self.pid = int(server.receive())
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (line := self._server.read_line(0)) is not None:
            if not line:
                raise ChildFailed("the fork server has ended")
            self._code = int(line)
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Process(Protocol):
    """What a session watches: one process, or several that count as one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def send_signal(self, number: int, /) -> None: ...


class Launcher(Protocol):
    """Starts processes that append what they print to two files."""

    @property
    def name(self) -> str:
        """For the counts."""

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> Process: ...


class Session:
    def __init__(
        self,
        launcher: Launcher,
        arguments: Sequence[str],
        *,
        folder: Path,
        directory: Path,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self.directory = directory  # of the checkpoints that it writes
        self._folder = folder  # its output is appended to ``out.txt`` and ``err.txt`` there
        self._hang_seconds = hang_seconds  # a longer run counts as a hang
        out, err = folder / "out.txt", folder / "err.txt"
        for path in (out, err):
            path.touch()
        # Sessions append to the same files: each remembers where it begins.
        self._offsets = {path: path.stat().st_size for path in (out, err)}
        self._began = time.monotonic()
        self._process = launcher.start(arguments, out=out, err=err)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def process(self) -> Process:
        return self._process

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def running(self) -> bool:
        """Whether it runs; raises ChildFailed if it hangs."""
        if self._process.poll() is not None:
            return False
        if self.seconds > self._hang_seconds:
            self._process.send_signal(signal.SIGKILL)
            raise ChildFailed(f"{self._folder}: still running after {self.seconds:.0f} s")
        return True

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns the exit code, negative if a signal ended it."""
        while self.running:
            time.sleep(_END_SECONDS)
        code = self._process.poll()
        assert code is not None
        return code

    def output(self) -> list[str]:
        """The complete lines that it has printed so far."""
        *lines, _incomplete = self._read("out.txt").split("\n")
        return lines

    def errors(self) -> str:
        return self._read("err.txt")

    def _read(self, name: str) -> str:
        path = self._folder / name
        with path.open("rb") as file:
            file.seek(self._offsets[path])
            return file.read().decode(errors="replace")


def serve_forks() -> int:
    """The fork server: answer each order with the fork's process id and, once it has ended, its exit code."""
    program: Callable[[Sequence[str]], int] = pkgutil.resolve_name(sys.argv[1])
    for required in sys.argv[2:]:
        importlib.import_module(required)
    tasks = "/proc/self/task"
    if os.path.isdir(tasks) and len(os.listdir(tasks)) > 1:
        sys.exit("importing started threads, which a fork would not have")
    gc.freeze()  # a collection in a fork would copy the memory of every object
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _redirect(order["out"], order["err"])
            return program(order["arguments"])
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


def _redirect(out: str, err: str) -> None:
    """Leave the server's input and output alone: the fork has its own."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, append), (2, err, append)):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(serve_forks())
