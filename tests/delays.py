"""Importing this delays syncs, background saves and requests to stores at random: tests must not need speed.

DELAYS=1 make test
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from distrust.checkpoint.background import BackgroundWriter
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.remote.client import Client

DRAW = random.SystemRandom()  # exact runs compare the state of the usual one


def delay(function: Callable[..., Any], seconds: float, *, share: float) -> Callable[..., Any]:
    """The function, which begins up to ``seconds`` later in a share of the calls."""

    @wraps(function)
    def begin_later(*arguments: Any, **options: Any) -> Any:
        if DRAW.random() < share:
            time.sleep(DRAW.uniform(0, seconds))
        return function(*arguments, **options)

    return begin_later


start: Any = BackgroundWriter.start


def start_later(background: Any, path: Any, *, copy: Any, write: Any) -> Any:
    return start(background, path, copy=delay(copy, 0.4, share=0.3), write=write)


BackgroundWriter.start = start_later  # type: ignore[method-assign]
for owner, name, seconds, share in (
    (Disk, "sync", 0.2, 0.25),
    (Disk, "sync_directory", 0.2, 0.25),
    (Client, "put", 1.0, 0.5),
    *((Client, name, 0.2, 0.25) for name in ("create", "read", "list", "head", "delete")),
):
    setattr(owner, name, delay(getattr(owner, name), seconds, share=share))
