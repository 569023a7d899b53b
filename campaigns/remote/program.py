"""A program that trains a toy and mirrors its checkpoints: what the campaign kills, stops and cuts off.

A step depends on the state before it alone, so an undisturbed run ends in a known state. A run that
``diverges`` also writes into its state which process made each step: then the state itself shows whether
anything that a replaced process made is still in it. What happens is printed, a line by one system call.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from campaigns.remote.faults import plant
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog
from distrust.checkpoint.remote import client, mirror, terms
from distrust.errors import CheckpointDirectoryLocked, CheckpointNotFound, DistrustError, TakenOver

#: Exit codes: it ended its work, another one holds the run, another one has taken over, any other error.
FINISHED, REFUSED, REPLACED, FAILED = 0, 2, 3, 4
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a process does; times are in seconds, and much shorter than those of a real run."""

    directory: str  # of its checkpoints here
    url: str  # of its mirror
    environment: dict[str, str]  # of the store
    number: int  # of the process, from 1
    seed: int  # of the training
    steps: int  # its length
    sizes: tuple[int, ...]  # items of each array
    diverges: bool = False  # whether its state tells which process made each step
    save_every: int = 1
    keep_there: int = 2  # of the newest, in the mirror; one is kept here
    keep_every_there: int | None = None  # steps
    step_seconds: float = 0.002
    patience: float  # after which a silent writer is replaced; the client's times are scaled like it
    timeout: float = 600.0  # that the end waits for the last upload
    give_up_after: float  # on a request that fails
    part_bytes: int = client.PART_BYTES  # larger files go up in several parts
    take_over: bool = False
    fault: str | None = None  # a fault that is put into the product; see ``faults.py``

    def argument(self) -> str:
        return json.dumps(asdict(self))


class Training:
    """A random walk, and who made each of its steps."""

    def __init__(self, plan: Plan) -> None:
        self.step = 0
        self._rng = np.random.default_rng(plan.seed)
        self._positions: list[Array] = [np.zeros(size) for size in plan.sizes]
        self._writer = plan.number if plan.diverges else 0
        self.writers: Array = np.zeros(plan.steps, np.int64)

    def advance(self) -> None:
        for position in self._positions:
            position += self._rng.normal(size=position.size) * np.tanh(1 + position)
        self.writers[self.step] = self._writer
        self.step += 1

    def checkpoint(self, number: int) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            model={"positions": self._positions},
            optimizer={"writers": self.writers},
            rng=dict(self._rng.bit_generator.state),
            run={"number": number},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        for position, saved in zip(self._positions, checkpoint.model["positions"], strict=True):
            position[:] = saved
        self.writers[:] = checkpoint.optimizer["writers"]
        self._rng.bit_generator.state = checkpoint.rng


def tell(event: str, **values: Any) -> None:
    """Print an event by one system call: a kill never leaves half a line."""
    os.write(1, json.dumps({"event": event, "at": time.monotonic(), **values}).encode() + b"\n")


def scale_times(plan: Plan) -> None:
    """Shorten the times of client and mirror, as the plan shortens the patience."""
    from obstore import store

    scale = plan.patience / mirror.Mirror("s3://bucket/any").patience
    mirror.PAUSE_SECONDS *= scale
    # This machine is not faster than a real one.
    terms._BRIEF_SECONDS = math.ceil(plan.give_up_after)
    client.PART_BYTES = plan.part_bytes
    client.connect.__kwdefaults__ |= {  # type: ignore[operator]
        "give_up_after": plan.give_up_after,
        "request_seconds": terms._BRIEF_SECONDS,
    }
    original, pauses = store.S3Store, {"init_backoff": 0.1, "max_backoff": 5}

    def open_store(bucket: str, *, retry_config: dict[str, Any], **options: Any) -> Any:
        backoff = {name: timedelta(seconds=seconds * scale) for name, seconds in pauses.items()}
        return original(bucket, retry_config={**retry_config, "backoff": {**backoff, "base": 2}}, **options)

    store.S3Store = open_store
    vars(client)["time"] = SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds * scale)
    )


def train(plan: Plan) -> None:
    settings = mirror.Mirror(
        plan.url,
        keep_last=plan.keep_there,
        keep_every=plan.keep_every_there,
        patience=plan.patience,
        timeout=plan.timeout,
        take_over=plan.take_over,
        on_mirrored=lambda step, url, seconds: tell("mirrored", step=step),
    )
    training = Training(plan)
    with CheckpointManager(plan.directory, mirror=settings, keep_last=1) as manager:
        manager.fetch_newest()
        with contextlib.suppress(CheckpointNotFound):
            training.restore(manager.load_latest())
        tell("resumed", step=training.step, writers=training.writers[: training.step].tolist())
        manager.begin(training.step)
        tell("took")
        while training.step < plan.steps:
            time.sleep(plan.step_seconds)
            training.advance()
            is_last = training.step == plan.steps
            if is_last:
                tell("ending")
            if is_last or training.step % plan.save_every == 0:
                pending = manager.save_async(training.checkpoint(plan.number), final=is_last)
                pending.wait_copied()


def main(arguments: Sequence[str]) -> int:
    plan = Plan(**json.loads(arguments[0]))
    os.environ |= plan.environment
    scale_times(plan)
    plant(plan.fault)
    try:
        train(plan)
    except CheckpointDirectoryLocked as error:
        tell("refused", message=str(error))
        return REFUSED
    except TakenOver as error:
        tell("replaced", message=str(error))
        return REPLACED
    except DistrustError as error:
        tell("failed", kind=type(error).__name__, message=str(error))
        return FAILED
    tell("finished", digest=catalog.newest(Path(plan.directory)).state_digest)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
