"""SIGKILL at random instants of the trainer, hundreds of times: how much work each kill costs.

    python -m campaigns.killed_steps --seed 1 --cases 60
    python -m campaigns.killed_steps --seed 1 --cases 20 --timed

The trainer trains the toy engine in forks, and reports each step that has ended. By default it hardly saves,
but keeps each step in shared memory, whatever that costs: a kill loses at most the last step. With --timed it
keeps none and saves every 2 seconds: a kill loses at most the work of 2 seconds, one step and one save. Every
run ends in the undisturbed state.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from campaigns.campaign import Campaign, Case, parser, require, run
from campaigns.training_run import train_toy
from distrust.checkpoint import CheckpointManager, step_snapshots
from distrust.checkpoint.step_snapshots import StepSnapshots
from distrust.testing.models import write_records
from distrust.training.events import CheckpointSaved, CheckpointStarted, RunStarted, StepEnded

MEMORY = "/dev/shm"
STEPS, KILLS = 60, 12
STEP_SECONDS = 0.01  # for which each step waits beside its work
TIMED_STEPS, INTERVAL = 500, 2.0


class Killed:
    """One session of a run in a fork: what it reported, and when."""

    def __init__(self, train: Callable[[Callable[[object], None]], object], seconds: float) -> None:
        self.resumed = 0  # the step that it began from
        self.ended: list[tuple[int, float]] = []  # each step that ended, and when
        self.saves: list[float] = []  # how long each save took
        self._save_began = 0.0
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException), warnings.catch_warnings(action="ignore"):
                train(lambda event: _report(writing, event))
                code = 0
            os._exit(code)
        os.close(writing)
        end = time.monotonic() + seconds
        is_open = True
        while is_open and (left := end - time.monotonic()) > 0:
            if select.select([reading], [], [], left)[0]:
                is_open = self._read(reading)
        self.killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while self._read(reading):
            pass
        os.close(reading)
        self.status = os.waitpid(pid, 0)[1]

    @property
    def has_ended(self) -> bool:
        """Whether it had ended before it was killed."""
        return os.WIFEXITED(self.status)

    def _read(self, descriptor: int) -> bool:
        content = os.read(descriptor, 1 << 16)
        for line in content.decode().splitlines():  # a line is written at once
            kind, step = line.split()
            if kind == "from":
                self.resumed = int(step)
                self.ended.append((int(step), time.monotonic()))
            elif kind == "step":
                self.ended.append((int(step), time.monotonic()))
            elif kind == "saving":
                self._save_began = time.monotonic()
            else:
                self.saves.append(time.monotonic() - self._save_began)
        return bool(content)


def _keep_every_step(stack: contextlib.ExitStack) -> None:
    """Take no step's time into account: on a busy machine the budget would allow fewer."""

    def wait_copied(snapshots: StepSnapshots) -> None:
        original(snapshots)
        snapshots.wait()

    original = StepSnapshots.wait_copied
    stack.enter_context(patch.object(StepSnapshots, "wait_copied", wait_copied))
    stack.enter_context(patch.object(step_snapshots, "seconds_between", lambda **_: 0.0))


def _report(descriptor: int, event: object) -> None:
    kinds = {RunStarted: "from", StepEnded: "step", CheckpointStarted: "saving", CheckpointSaved: "saved"}
    if kind := kinds.get(type(event)):
        os.write(descriptor, f"{kind} {event.step}\n".encode())  # type: ignore[attr-defined]
    if isinstance(event, StepEnded):
        time.sleep(STEP_SECONDS)


def one_case(campaign: Campaign, case: Case, folder: Path, data: Path, digests: dict[int, str]) -> None:
    timed, out = campaign.options.timed, folder / f"case-{case.number}"
    steps = TIMED_STEPS if timed else STEPS
    saves = {"save_every": "2s"} if timed else {"save_every": case.rng.choice([0, 0, 9])}
    options = {**saves, "step_snapshots": not timed}
    last_step, longest_save, slowness = 0, 0.0, 1
    for _ in range(KILLS):
        seconds = case.rng.uniform(0.5, 3.5 * INTERVAL) if timed else case.rng.uniform(0.05, 0.6)
        train = partial(train_toy, out, data, max_steps=steps, **options)
        killed = Killed(train, slowness * seconds)
        if not killed.ended:  # while it started: the next session tells
            slowness *= 2
            continue
        longest_save = max([longest_save, *killed.saves])
        if timed:
            _require_timed(campaign, killed, out, longest_save)
        else:
            lost = last_step - killed.resumed
            require(lost <= 1, f"{out}: step {last_step} had ended; resumed from {killed.resumed}")
            campaign.count(
                f"  kills that lost {'no step' if lost <= 0 else 'the last step'}", int(last_step > 0)
            )
        last_step = killed.ended[-1][0]
        if killed.has_ended:
            break
        campaign.count("kills")
        campaign.count("steps that had ended", last_step - killed.resumed)
    digest = train_toy(out, data, max_steps=steps).state_digest
    if steps not in digests:
        digests[steps] = train_toy(folder / "plain", data, max_steps=steps).state_digest
    require(digest == digests[steps], f"{out}: ended in another state than the undisturbed run")
    campaign.count("runs that ended in the undisturbed state")


def _require_timed(campaign: Campaign, killed: Killed, out: Path, longest_save: float) -> None:
    """The time since the newest durable state was reached is what a kill costs."""
    durable = max(CheckpointManager(out / "checkpoints").list_checkpoints(), default=0)
    reached = dict(killed.ended).get(durable, killed.ended[0][1])
    times = [moment for _, moment in killed.ended]
    longest_step = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    lost = killed.killed_at - reached
    allowed = INTERVAL + longest_step + longest_save
    if not killed.has_ended:
        require(lost <= allowed, f"{out}: {lost:.2f} s are lost after step {durable}, not {allowed:.2f} s")
        campaign.count_largest("milliseconds of work that a kill cost, at most", int(1000 * lost))
        campaign.count(f"  that lost {'more than' if lost > INTERVAL else 'at most'} {INTERVAL:g} s of work")


def body(campaign: Campaign) -> None:
    memory_folder = MEMORY if os.path.isdir(MEMORY) else None
    with (
        tempfile.TemporaryDirectory(dir=memory_folder) as memory,
        tempfile.TemporaryDirectory(prefix="killed-steps-", dir=campaign.options.directory) as folder,
        patch.dict(os.environ, DISTRUST_SHM=memory),
    ):
        data, digests = write_records(Path(folder, "records.jsonl")), dict[int, str]()
        with contextlib.ExitStack() as stack:
            _keep_every_step(stack)
            for case in campaign.cases():
                one_case(campaign, case, Path(folder), data, digests)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__, writes=True)
    options.add_argument("--timed", action="store_true", help="save every 2 seconds, and keep no steps")
    return run("killed_steps", options, body, cases=30, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
