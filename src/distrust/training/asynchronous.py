"""A run awaited: it trains in a thread of its own, and nobody who stops waiting leaves it behind unsaved."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

WAKING_SECONDS = 0.5

Result = TypeVar("Result")


async def run_in_thread(work: Callable[[], Result], *, ask_to_stop: Callable[[], None]) -> Result:
    """Run ``work`` in a new thread while the event loop goes on with other things.

    Cancelled, once or again, this asks ``work`` to stop and goes on waiting for it; then it raises
    CancelledError, or what ``work`` raised.
    """
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # from now on nobody can cancel it
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:  # handed to whoever awaits
            future.set_exception(error)

    # A new one: threads of a pool remember how many threads torch computed with before.
    thread = threading.Thread(target=run, name="train")
    thread.start()
    waiting = asyncio.wrap_future(future)
    cancelled: asyncio.CancelledError | None = None
    try:
        while not waiting.done():
            try:
                # Signal handlers run when the main thread does, and not every signal wakes it up.
                await asyncio.wait([waiting], timeout=WAKING_SECONDS)
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                ask_to_stop()
    finally:
        # Even if the event loop is torn down around it; else the thread has ended already.
        ask_to_stop()
        thread.join()
    result = waiting.result()
    if cancelled is not None:
        raise cancelled
    return result
