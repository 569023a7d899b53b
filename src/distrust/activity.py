"""What this process is doing, for messages about it when it takes long or is ended.

Another thread reads this while the one that works may be inside native code, so it is written beforehand: for
each record, which takes an assignment.
"""

from __future__ import annotations

import signal
import sys
import warnings

from distrust.errors import DistrustWarning

#: The signals that ask a run to stop, and a command to end.
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class _Activity:
    location: object = None  #: the record or file that is being read or tokenized; str() names it
    has_steps_to_lose = False  #: whether a run makes steps: ending the process loses those that are not saved
    warned: set[str] | None = None  #: what the run in progress has warned of once; None without a run


current = _Activity()


def warn_once(message: str) -> None:
    """Issue a DistrustWarning, but once in a run, which may build its engine more than once."""
    if message not in (current.warned or ()):
        warnings.warn(DistrustWarning(message), stacklevel=3)  # 1: this function, 2: its caller
    if current.warned is not None:
        current.warned.add(message)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
