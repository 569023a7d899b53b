"""Attempts at one run: each starts the same command on some ranks, and an accident ends it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

from campaigns.campaign import Campaign, require
from campaigns.disks.volumes import Filler
from campaigns.invariants import DurabilityRecord, require_writable
from campaigns.oracle import Rules
from campaigns.ranks import model
from campaigns.ranks.accidents import LONG_RANK_TIMEOUT, RANK_TIMEOUT, STOPS, Accident, Consequence, Scene
from campaigns.ranks.layouts import Layout
from campaigns.ranks.machines import Machines
from campaigns.ranks.processes import Group, lives
from campaigns.training_run import LOOP, TrainingRun
from campaigns.triggers import Trigger, after, once_printed, random_disk_event, wait_for
from distrust.checkpoint import Scan

STEPS = 40
RULES = Rules(keep_last=3)
#: An attempt that takes longer hangs.
HANG_SECONDS = 150.0
#: A save that is under way when an accident strikes may be finished first.
SAVE_SECONDS = 1.0
#: From the end of the survivors to that of every process, with an agent that waits for its ranks.
CLEAR_SECONDS = 15.0
#: Of what an attempt printed, in a violation.
PRINTED_LINES = 12
_POLL_SECONDS = 0.003
_STEP = re.compile(r"step (\d+)/\d+: loss")
_ENDINGS = ("Finished ", "Nothing to do", "Stopped by ")


def options(folder: Path) -> list[str]:
    """The options of the run, on what :mod:`campaigns.ranks.model` made in a folder."""
    return [
        "--model", str(folder / model.MODEL), "--data", str(folder / model.RECORDS),
        "--max-steps", str(STEPS), "--save-every", "1", "--keep-last", "3", "--keep-best", "0",
        "--gradient-accumulation", "4", "--batch-size", "1", "--max-length", "48", "--threads", "1",
        "--log-every", "1", "--eval-fraction", "0.1", "--eval-every", "7",
    ]  # fmt: skip


def count_of(accident: Accident) -> str:
    """The name of the count of an accident."""
    return f"  {accident.name}"


def time_of(accident: Accident) -> str:
    """The name of the longest time from an accident in the loop to the end of the other ranks."""
    return f"ms, at most, until the others had ended: {accident.name}"


class Moment(NamedTuple):
    """When an accident strikes: ``delay`` seconds after a trigger; ``phase`` describes it."""

    phase: str
    trigger: Trigger
    delay: float


def random_moment(rng: random.Random, *, in_the_loop: bool) -> Moment:
    """Mostly in the loop; otherwise while the ranks start, load and meet, or at the end of the run."""
    choice, count = rng.random(), rng.randint(1, 4)
    if not in_the_loop and choice < 0.15:
        return Moment("before the first step", after(rng.uniform(0, 2)), 0.0)
    if not in_the_loop and choice < 0.22:
        return Moment("at the end", once_printed(f"step {STEPS}/"), rng.uniform(0, 0.1))
    if choice < 0.6:
        return Moment("in a save", random_disk_event(rng, count), rng.choice([0.0, rng.uniform(0, 0.003)]))
    return Moment("in the loop", once_printed("step ", 2 * count), rng.uniform(0, 0.1))


class Surroundings(NamedTuple):
    """What an attempt has besides its processes."""

    machines: Machines | None = None
    filler: Filler | None = None


class DisturbedRun:
    """One run, over all its attempts."""

    def __init__(self, campaign: Campaign, training: TrainingRun, surroundings: Surroundings) -> None:
        self._campaign = campaign
        self._training = replace(training, hang_seconds=HANG_SECONDS)
        self._surroundings = surroundings
        self._record = DurabilityRecord(training.checkpoints, RULES)

    def disturb(self, layout: Layout, accident: Accident, moment: Moment, rng: random.Random) -> bool:
        """One attempt, and its end by an accident; False if the run is finished."""
        attempt = _Attempt(self._training, layout, accident, slack=self._campaign.options.slack)
        is_running = wait_for(attempt.session, self._record.watch(moment.trigger), moment.delay)
        if is_running and attempt.wait_for_ranks(accident.least_ranks):
            machines, filler = self._surroundings
            scene = Scene(rng, layout, attempt.group, machines, filler, attempt.start_agent)
            self._count(layout, accident, moment, attempt.strike(scene))
        attempt.wait()
        self._record.record_output(attempt.session)
        scan = self._record.require()
        attempt.require_codes(scan)
        attempt.require_saved(scan)
        if rng.random() < 0.3:
            require_writable(self._training.checkpoints)
        return not _is_finished(scan)

    def finish(self, layout: Layout) -> str:
        """Run the command to its end; returns the digest of the final state."""
        digest = replace(self._training, launcher=layout).finish()
        self._record.require()
        require_writable(self._training.checkpoints)
        return digest

    def _count(self, layout: Layout, accident: Accident, moment: Moment, seconds: float | None) -> None:
        self._campaign.count("accidents")
        for description in (count_of(accident), f"  {moment.phase}", f"  {layout.name}"):
            self._campaign.count(description)
        if seconds is not None:
            self._campaign.count_largest(time_of(accident), round(1000 * seconds))


class _Attempt:
    def __init__(self, training: TrainingRun, layout: Layout, accident: Accident, *, slack: float) -> None:
        timeout = RANK_TIMEOUT if accident.is_silent else LONG_RANK_TIMEOUT
        self._training = replace(training, launcher=layout).with_options("--rank-timeout", str(timeout))
        self._layout = layout
        self._accident = accident
        self._slack = slack
        self._consequence: Consequence | None = None
        self._in_the_loop = False  # whether the accident struck there
        self.session = self._training.start()
        assert isinstance(self.session.process, Group)
        self.group: Group = self.session.process

    def wait_for_ranks(self, least: int) -> bool:
        """Wait until enough ranks live; False if the attempt ends before."""
        while self.session.running:
            if len(self.group.ranks()) >= least:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def start_agent(self, index: int) -> int:
        """Start the agent of one machine, as when the machine returns."""
        folder = self._training.log_folder or self._training.out
        files = {"out": folder / "out.txt", "err": folder / "err.txt"}
        return self._layout.start_agent(index, self._training.arguments, **files)

    def strike(self, scene: Scene) -> float | None:
        """Let the accident happen; returns the seconds until the survivors had ended.

        None if it did not strike in the loop: while ranks start, they may wait for each other.
        """
        self._in_the_loop = self._is_in_loop()
        is_saving = bool(self._training.temporary())
        consequence = self._consequence = self._accident.strike(scene)
        began = time.monotonic()
        allowed = consequence.seconds + SAVE_SECONDS * is_saving + self._slack
        allowed = allowed if self._in_the_loop else HANG_SECONDS
        survivors = list(consequence.survivors)
        while survivors := [pid for pid in survivors if lives(pid)]:
            if time.monotonic() - began > allowed:
                self._raise_hang(survivors, f"{len(survivors)} of the other ranks live after {allowed:g} s")
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - began
        consequence.undo()
        return seconds if self._in_the_loop else None

    def wait(self) -> None:
        """Wait until no process is left."""
        began = time.monotonic()
        is_ending = self._consequence is not None and not self._consequence.finishes
        allowed = CLEAR_SECONDS + self._slack if is_ending else HANG_SECONDS
        while self.session.running:
            if time.monotonic() - began > allowed:
                self._raise_hang(self.group.server.living(), f"processes are left after {allowed:g} s")
            time.sleep(_POLL_SECONDS)

    def require_codes(self, scan: Scan) -> None:
        """The exit codes of what was started say how it ended."""
        consequence = self._consequence
        allowed = {0} if consequence is None else set(consequence.codes)
        if consequence is not None and consequence.finishes:
            self._require(not self._in_the_loop or _is_finished(scan), "the run did not go on to its end")
        if _is_finished(scan):
            allowed.add(0)
        if consequence is not None and not self._in_the_loop:
            allowed |= {1, *(-number for number in (SIGKILL, *STOPS)), *(128 + number for number in STOPS)}
        for pid, code in zip(self.group.pids, self.group.codes(), strict=True):
            killed = consequence is not None and pid in consequence.victims and code == -SIGKILL
            self._require(killed or code in allowed, f"exit code {code}, not one of {sorted(allowed)}")

    def require_saved(self, scan: Scan) -> None:
        """After an accident that the ranks can answer, the last step that was trained is saved."""
        if self._consequence is None or not self._consequence.saved or not self._in_the_loop:
            return
        steps = [int(match[1]) for match in map(_STEP.match, self.session.output()) if match]
        newest = scan.files[-1].step if scan.files else 0
        is_saved = not steps or newest == steps[-1]
        self._require(is_saved, f"step {steps[-1:]} was trained, step {newest} is saved")

    def _is_in_loop(self) -> bool:
        lines = self.session.output()
        is_in_loop = any(line.startswith(LOOP) for line in lines)
        is_ending = any(line.startswith((*_ENDINGS, f"step {STEPS}/")) for line in lines)
        return is_in_loop and not is_ending

    def _raise_hang(self, pids: Sequence[int], violation: str) -> None:
        self.group.abort(pids)
        self.group.server.end_all()
        self._require(False, violation)

    def _require(self, holds: bool, violation: str) -> None:
        title = f"{self._training.out}: {self._layout.name}, {self._accident.name}"
        printed = "\n".join([*self.session.output()[-PRINTED_LINES:], self.session.errors()])
        require(holds, f"{title}: {violation}\n{printed}")


def _is_finished(scan: Scan) -> bool:
    return bool(scan.files) and scan.files[-1].kind == "final"
