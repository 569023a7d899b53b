"""The product broken on purpose, where several processes train together: the campaign must find each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def _replace(module_or_class: Any, name: str, replacement: Callable[..., Any]) -> None:
    setattr(module_or_class, name, replacement)


def _reverse_sum() -> None:
    """The gradients of a round of micro-batches are added from the last to the first."""
    from distrust.engines.torch.exchange import Exchange

    original = Exchange._add

    def add(exchange: Any, arriving: Any, sums: Any) -> None:
        original(exchange, arriving._replace(owners=arriving.owners[::-1]), sums)

    _replace(Exchange, "_add", add)


def _forget_checkpoint() -> None:
    """A follower takes part in the hand-over of the checkpoint, and begins anew."""
    from distrust.training import handover, resume_point

    original = handover.load_on_all

    def load(ranks: Any, *arguments: Any, **options: Any) -> Any:
        checkpoint = original(ranks, *arguments, **options)
        return checkpoint if ranks.index == 0 else None

    _replace(resume_point, "load_on_all", load)


def _rename_early() -> None:
    """A file that several ranks write has its name as soon as the leader has written its part."""
    import os

    from distrust.checkpoint import shared_writer

    original = shared_writer._Part._write_run

    def write(part: Any, *arguments: Any) -> Any:
        digests = original(part, *arguments)
        if part._peers.index == 0:
            part._file.path.unlink(missing_ok=True)
            os.link(part._file._temporary, part._file.path)
        return digests

    _replace(shared_writer._Part, "_write_run", write)


def _leave_at_once() -> None:
    """A rank ends as soon as all have come to the end, whether the others know that or not: some are slow."""
    from distrust.engines.torch.watch import Watch

    _replace(Watch, "end", lambda watch: time.sleep(0.5 * watch.index))


def _watch_nobody() -> None:
    """No rank notices the end of another one but by its own collectives."""
    from distrust.engines.torch.watch import Watch

    _replace(Watch, "_receive", lambda *_: None)


def _survive_agent() -> None:
    """Ranks do not ask for a signal when their agent dies."""
    from distrust.cli import train

    _replace(train, "end_with_agent", lambda: None)


#: By name: plants the fault.
FAULTS: dict[str, Callable[[], None]] = {
    "reversed-sum": _reverse_sum,
    "follower-loads-nothing": _forget_checkpoint,
    "renamed-before-the-reports": _rename_early,
    "one-phase-farewell": _leave_at_once,
    "no-watch": _watch_nobody,
    "no-pdeathsig": _survive_agent,
}


def plant(name: str | None) -> None:
    """Break the product in this process and its forks; None breaks nothing."""
    if name is not None:
        FAULTS[name]()
