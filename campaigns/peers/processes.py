"""The processes of a trial: one that stays warm and answers, and one that is killed in mid-save."""

from __future__ import annotations

import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from campaigns.peers.outcomes import Reply
from campaigns.peers.subjects import SAVES, Subject
from campaigns.peers.worker import FAULT

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_SECONDS = 120.0
#: The first save that may be killed: two stand by then, and how long the second took is known.
FIRST_KILLED = 3
ATTEMPTS = 20


class Lines:
    """The lines that a process writes, each waited for no longer than is said."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)
        self._buffer = b""
        self._ended = False

    def close(self) -> None:
        """Wait no more."""
        self._selector.close()

    def next(self, seconds: float) -> bytes | None:
        """The next line; empty at the end, None when the time is over."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if self._ended:
                return b""
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(self._descriptor, 1 << 16)
            self._ended = not piece
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class Process:
    """A worker of one saver; killed on the way out, whatever it does then."""

    def __init__(self, *arguments: str, fault: str | None) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",  # how far a bar has come is nothing that was said
            **({FAULT: fault} if fault else {}),
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # not a pipe: one that nobody reads would stop it
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "campaigns.peers.worker", *arguments],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self.pid = self._popen.pid
        self.requests = self._popen.stdin
        self.lines = Lines(self._popen.stdout.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._popen.communicate()
        self.lines.close()
        self._said.close()

    def kill(self) -> int:
        """Kill it with SIGKILL and return how it ended."""
        self._popen.kill()
        return self._popen.wait()

    def ended(self) -> str:
        """How a process ended whose output has ended."""
        code = self._popen.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"ended with {code}: {' / '.join(lines[-3:])}"


class Warm:
    """The warm process of a saver, begun again whenever a trial took it down."""

    def __init__(self, subject: Subject, *, fault: str | None) -> None:
        self._subject = subject
        self._fault = fault
        self._process: Process | None = None
        #: What it prints of a directory in which nothing is wrong.
        self.usual: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @property
    def pid(self) -> int | None:
        """Of its process, where there is one now."""
        return None if self._process is None else self._process.pid

    def write(self, directory: Path, mib: int, last: int) -> None:
        """Save all checkpoints up to the step ``last``."""
        self._must({"verb": "write", "directory": str(directory), "mib": mib, "last": last})

    def expected(self, directory: Path, mib: int) -> dict[int, str]:
        """The proof of every step."""
        answer = self._must({"verb": "expected", "directory": str(directory), "mib": mib})
        return {int(step): proof for step, proof in answer.items()}

    def resume(self, directory: Path, mib: int) -> Reply:
        """Go on from what is there."""
        answer, crashed = self._ask({"verb": "resume", "directory": str(directory), "mib": mib})
        if crashed is not None:
            return Reply(crashed=crashed)
        words = tuple(word for word in answer["words"] if word not in self.usual)
        return Reply(answer.get("step"), answer.get("proof"), answer.get("error"), str(directory), words)

    def _must(self, request: dict[str, Any]) -> Any:
        answer, crashed = self._ask(request)
        if crashed is not None:
            raise RuntimeError(f"{self._subject.name}: {request['verb']}: {crashed}")
        return answer

    def _ask(self, request: dict[str, Any]) -> tuple[Any, str | None]:
        """The answer, or how the process ended instead."""
        process = self._process or Process("serve", self._subject.name, fault=self._fault)
        self._process = process
        with suppress(BrokenPipeError):  # it is dead already; that shows when it does not answer
            process.requests.write(json.dumps(request).encode() + b"\n")
            process.requests.flush()
        line = process.lines.next(TIMEOUT_SECONDS)
        if line:
            return json.loads(line), None
        crashed = f"no answer in {TIMEOUT_SECONDS:.0f} s" if line is None else process.ended()
        self._leave()
        return None, crashed

    def _leave(self) -> None:
        if self._process is not None:
            self._process.__exit__(None, None, None)
        self._process = None


def kill_in_mid_save(
    subject: Subject, parent: Path, mib: int, chance: random.Random, *, fault: str | None
) -> tuple[Path, int, str]:
    """Have it save step after step, and kill it at a random instant of a save.

    Returns:
        The directory, the step that was being saved (the one before it was reported), and what was done.
    """
    for attempt in range(ATTEMPTS):
        directory = parent / f"attempt-{attempt}"
        arguments = ("write", subject.name, str(directory), str(mib), str(SAVES * subject.interval))
        with Process(*arguments, fault=fault) as process:
            struck = _strike(process, subject, chance)
        if struck is not None:
            return directory, *struck
    raise RuntimeError(f"{subject.name}: no kill came in mid-save in {ATTEMPTS} processes")


def _strike(process: Process, subject: Subject, chance: random.Random) -> tuple[int, str] | None:
    """The step and what was done; None if every save was over too soon."""
    took = 0.0
    while True:
        event = _event(process)
        if event is None:
            return None
        _, step = event
        began = time.monotonic()
        after = chance.random() * took if step >= FIRST_KILLED * subject.interval else TIMEOUT_SECONDS
        line = process.lines.next(after)
        if line is None:
            process.kill()
            if process.lines.next(0.0):  # it was reported before the signal came
                return None
            return step, f"killed {after * 1000:.0f} ms into a save of about {took * 1000:.0f} ms"
        if not line:
            raise RuntimeError(f"{subject.name}: {process.ended()}")
        took = time.monotonic() - began


def _event(process: Process) -> tuple[str, int] | None:
    """The next event; None at the end."""
    line = process.lines.next(TIMEOUT_SECONDS)
    if line is None:
        raise RuntimeError("the writer hangs")
    return tuple(json.loads(line)) if line else None
