"""One case in a process of its own: its limits, mounts and open files go with it, however it ends.

The case runs in a forked child, so what a test changed in the product is changed there, too. The child leads
a session, all of which is killed at the end. Its mount namespace ends with its last process: the kernel
unmounts what was mounted there and releases the loop devices, even if no process lives to do it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from campaigns import child
from campaigns.campaign import CounterExample


class Skipped(Exception):
    """This machine, or this user, cannot run the case; the message says why."""


class Findings(NamedTuple):
    """The result of a case."""

    counts: Counter[str]  # what was done, and how often
    violation: str | None = None  # the invariant that does not hold, or None
    skipped: str | None = None  # why the case could not be run, or None


def run(work: Callable[[Counter[str]], None], *, seconds: float) -> Findings:
    """Run a case in a child.

    Args:
        work: the case; it counts what it does. Every exception but Skipped is a violation.
        seconds: a longer case is a violation, too.
    """
    try:
        findings = child.call(lambda: _run(work), seconds=seconds, new_session=True)
    except child.ChildFailed as error:
        return Findings(Counter(), f"the case: {error}")
    assert isinstance(findings, Findings)
    return findings


def _run(work: Callable[[Counter[str]], None]) -> Findings:
    counts: Counter[str] = Counter()
    try:
        work(counts)
    except Skipped as error:
        return Findings(counts, skipped=str(error))
    except CounterExample as error:
        return Findings(counts, violation=str(error))
    except BaseException as error:
        text = f"{type(error).__name__} escaped: {error}\n{traceback.format_exc()}"
        return Findings(counts, violation=text)
    return Findings(counts)
