"""Awaits a run in a thread of its own. Cancelling never leaves an unsaved run behind."""

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
    """Run ``work`` in a new thread while the event loop continues.

    When cancelled, once or repeatedly, it calls ``ask_to_stop`` and still waits for ``work``; then it raises
    CancelledError, or what ``work`` raised.
    """
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # from here on the future cannot be cancelled
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:  # raised again in the awaiting task
            future.set_exception(error)

    # Not a pool: pool threads keep the number of torch threads that earlier work has set.
    thread = threading.Thread(target=run, name="train")
    thread.start()
    waiting = asyncio.wrap_future(future)
    cancelled: asyncio.CancelledError | None = None
    try:
        while not waiting.done():
            try:
                # Python runs signal handlers in the main thread only, and not every signal wakes it up.
                await asyncio.wait([waiting], timeout=WAKING_SECONDS)
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                ask_to_stop()
    finally:
        # Needed if the event loop is torn down; otherwise the thread has already ended.
        ask_to_stop()
        thread.join()
    result = waiting.result()
    if cancelled is not None:
        raise cancelled
    return result
