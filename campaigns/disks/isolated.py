"""One case in a process of its own: its limits, mounts and open files go with it, however it ends.

The case runs in a forked child, so that what a test changed in the product is changed there, too. The child
leads a session; when it has told what it found, or its time is over, everything in that session is killed.
Its mount namespace ends with its last process: the kernel unmounts what was mounted there, and lets go of
the loop devices, even if nobody lives to do it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from campaigns.campaign import CounterExample

_DIE_WITH_THE_PARENT = 1  # PR_SET_PDEATHSIG


class Skipped(Exception):
    """This machine, or this user, cannot run the case; the message says why."""


class Findings(NamedTuple):
    """What a case found.

    Attributes:
        counts: what was done, and how often.
        broken: the promise that was not kept, or None.
        skipped: why the case could not be run, or None.
    """

    counts: Counter[str]
    broken: str | None
    skipped: str | None


Work = Callable[[Counter[str]], None]


def run(work: Work, *, seconds: float) -> Findings:
    """Run a case in a child.

    Args:
        work: the case; it counts what it does. Whatever else than Skipped it raises is a broken promise.
        seconds: how long it may take; longer is a broken promise, too.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(work, writing)
    os.close(writing)
    try:
        line = _line(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # before it has made its session
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if line is None:
        return Findings(Counter(), f"the case did not end within {seconds:.0f} s", None)
    if not line:
        code = os.waitstatus_to_exitcode(status)
        return Findings(Counter(), f"the process of the case ended without a word, exit code {code}", None)
    told = json.loads(line)
    return Findings(Counter(told["counts"]), told["broken"], told["skipped"])


def _be_the_child(work: Work, writing: int) -> None:
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_THE_PARENT, signal.SIGKILL)
        counts: Counter[str] = Counter()
        broken = skipped = None
        try:
            work(counts)
        except Skipped as error:
            skipped = str(error)
        except CounterExample as error:
            broken = str(error)
        except BaseException as error:
            broken = f"{type(error).__name__} came out of it: {error}\n{traceback.format_exc()}"
        told = json.dumps({"counts": counts, "broken": broken, "skipped": skipped})
        os.write(writing, told.encode() + b"\n")
    finally:
        os._exit(0)


def _line(descriptor: int, deadline: float) -> bytes | None:
    """What the child tells, without the end of the line; nothing if it died before, None if it is late."""
    told = b""
    while not told.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b""
        told += part
    return told[:-1]
