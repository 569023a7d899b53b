"""A function in a forked child, and what it raised there, or where it hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PATIENCE_SECONDS = 60.0


def in_child(folder: Path, body: Callable[[], None]) -> None:
    """Run it in a child, which ends past the interpreter's end.

    Raises:
        ValueError: if it raised, or did not end in time.
    """
    pid = os.fork()
    if pid == 0:
        _run(folder / f"child-{os.getpid()}", body)
    said = folder / f"child-{pid}"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG))[0] != pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise ValueError(f"a forked child hangs: {said.read_text()}")
        time.sleep(0.001)
    if ended[1] != 0:
        raise ValueError(f"in a forked child: {ended[1]}: {said.read_text()}")
    said.unlink()


def _run(said: Path, body: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        with said.open("w") as file:
            faulthandler.dump_traceback_later(PATIENCE_SECONDS / 2, file=file)
            try:
                body()
                status = 0
            except BaseException:
                traceback.print_exc(file=file)
    finally:
        os._exit(status)
