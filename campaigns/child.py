"""Child processes: spawned modules that exchange lines, and functions in forked children.

A child that dies, hangs or raises is a finding (:class:`ChildFailed`). Nothing here waits without a limit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from campaigns import faults
from campaigns.campaign import Campaign, CounterExample

ROOT = Path(__file__).resolve().parent.parent  # of the repository
PYTHON = (sys.executable, "-X", "faulthandler")
#: No single answer of a child takes a tenth of this, on a loaded machine either.
ANSWER_SECONDS = 120.0
#: No session and no forked function takes this long, unless it hangs.
HANG_SECONDS = 300.0
_ERROR_LINES = 40  # of a dead child's standard error
_PR_SET_PDEATHSIG = 1  # a signal to the child if its parent dies


class ChildFailed(CounterExample):
    """A child died, hung or raised; the message says which, and what it printed last."""


class Child:
    """A module, spawned by a command like ``python``, that exchanges lines; a context that kills it."""

    def __init__(
        self,
        module: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        python: Sequence[str] = PYTHON,
    ) -> None:
        self._name = " ".join([module, *map(str, arguments)])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe: a full one would block the child
        with default_sigint():
            self._process = subprocess.Popen(
                [*python, "-m", module, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**python_environment(), **(environment or {})},
                cwd=ROOT,
            )
        self._buffer = b""
        self._closed = False  # whether its output has ended

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, order: Any) -> None:
        """Send an order: a line of text, or anything else as a line of JSON."""
        assert self._process.stdin is not None
        line = order if isinstance(order, str) else json.dumps(order)
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(self._exit()) from None

    def read_line(self, seconds: float = ANSWER_SECONDS) -> str | None:
        """The next line; empty if the child closed its output, None if it printed nothing in time."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer and not self._closed:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = os.read(descriptor, 1 << 16)
            self._closed = not chunk
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def receive(self, seconds: float = ANSWER_SECONDS) -> str:
        """The next line; raises ChildFailed if there is none, because the child ended or hangs."""
        line = self.read_line(seconds)
        if not line:
            raise self._hang(seconds) if line is None else self._failure(self._exit())
        return line

    def receive_json(self) -> Any:
        return json.loads(self.receive())

    def read_to_end(self, seconds: float = ANSWER_SECONDS) -> list[str]:
        """All further lines. Every process that inherited the output must end, too."""
        lines = []
        while (line := self.read_line(seconds)) != "":
            if line is None:
                raise self._hang(seconds)
            lines.append(line)
        return lines

    def finish(self, seconds: float = ANSWER_SECONDS) -> None:
        """Close its input and wait for exit code 0; raises ChildFailed otherwise."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._hang(seconds) from None
        if code != 0:
            raise self._failure(f"ended with {code}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # an order that the child did not live to read
                if pipe is not None:
                    pipe.close()

    def _exit(self) -> str:
        return f"ended with {self._process.wait()}"

    def _hang(self, seconds: float) -> ChildFailed:
        self._process.send_signal(signal.SIGABRT)  # faulthandler then prints the stack of each thread
        self._process.wait()
        return self._failure(f"no answer in {seconds:.0f} s")

    def _failure(self, reason: str) -> ChildFailed:
        self.kill()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").splitlines()[-_ERROR_LINES:]
        return ChildFailed("\n".join([f"{reason}: {self._name}", *printed]))


def start_child(campaign: Campaign, module: str, *arguments: object) -> Child:
    fault = campaign.options.fault
    return Child(module, *arguments, *(("--fault", fault) if fault else ()))


def python_environment() -> dict[str, str]:
    """The environment in which a child imports the same code as this process."""
    paths = [str(ROOT), *filter(None, sys.path), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def default_sigint() -> Iterator[None]:
    """Children started here do not inherit that Ctrl-C is ignored, as in a background job of a shell."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Raised(NamedTuple):
    """An exception of a forked function, as text: a pipe does not carry every exception."""

    text: str
    is_finding: bool

    @classmethod
    def of(cls, error: BaseException) -> _Raised:
        if isinstance(error, CounterExample):
            return cls(str(error), True)
        trace = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__} escaped: {error}\n{trace}", False)


class ForkedWorker:
    """A function in a forked child; a context that kills it.

    The child starts at the first request, and again after it died. It sees the process as it was at the fork,
    patches included, and its own limits, mounts and open files go with it.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        *,
        setup: Callable[[], object] = tuple,
        seconds: float | None = None,
        new_session: bool = False,
    ) -> None:
        self._work = work  # called in the child with each request; its result must be picklable
        self._setup = setup  # called in the child once, before the first request
        self._seconds = seconds  # for each answer; by default :data:`HANG_SECONDS`
        self._new_session = new_session  # whether it leads a session, all of which is killed at the end
        self._pid: int | None = None
        self._pipe: Connection
        self._stacks: Any = None

    def request(self, order: Any = None) -> Any:
        """Call ``work`` in the child; raises its CounterExample, or ChildFailed if the child fails."""
        if self._pid is None:
            self._start()
        seconds = HANG_SECONDS if self._seconds is None else self._seconds
        try:
            self._pipe.send(order)
            if not self._pipe.poll(seconds):
                raise ChildFailed(f"no answer within {seconds:g} s\n{self._end(signal.SIGABRT)[1]}")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            code, stacks = self._end(0)
            raise ChildFailed(f"the process died: exit code {code}\n{stacks}") from None
        if isinstance(answer, _Raised):
            raise (CounterExample if answer.is_finding else ChildFailed)(answer.text)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pid is not None:
            self._end(signal.SIGKILL)

    def _start(self) -> None:
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _end
        self._pipe, child_end = Pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._pipe.close()
            self._serve(child_end)
        child_end.close()

    def _end(self, number: int) -> tuple[int, str]:
        """Signal and reap the child; its exit code, and its stacks if it was aborted."""
        assert self._pid is not None
        pid, self._pid = self._pid, None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        if self._new_session:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._pipe.close()
        with self._stacks as file:
            file.seek(0)
            return os.waitstatus_to_exitcode(status), file.read().decode(errors="replace")

    def _serve(self, pipe: Connection) -> NoReturn:
        """The child: answer requests until the pipe closes, and end past the interpreter's own end."""
        try:
            faulthandler.enable(self._stacks)
            if self._new_session:
                os.setsid()
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
            failure: _Raised | None = None
            try:
                self._setup()
            except BaseException as error:  # answered to the first request
                failure = _Raised.of(error)
            while True:
                order = pipe.recv()
                try:
                    answer = failure or self._work(order)
                except BaseException as error:
                    answer = _Raised.of(error)
                pipe.send(answer)
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)


def call(function: Callable[[], Any], *, seconds: float | None = None, new_session: bool = False) -> Any:
    """Call a function once in a forked child; see :class:`ForkedWorker`."""
    with ForkedWorker(lambda _: function(), seconds=seconds, new_session=new_session) as worker:
        return worker.request()


def parse_arguments(**types: Callable[[str], Any]) -> argparse.Namespace:
    """Parse the positional arguments of a child module, and plant the fault given by ``--fault``."""
    parser = argparse.ArgumentParser()
    for name, convert in types.items():
        parser.add_argument(name, type=convert)
    parser.add_argument("--fault")
    options = parser.parse_args()
    faults.plant(options.fault)
    return options
