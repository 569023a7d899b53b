"""Processes that want the same directory at the same instant: one gets it, the others a clear error.

The winner is killed, most often in mid-save, while all others try again. This module is also the process that
races: it obeys ``go INSTANT METHOD STEP``, and then ``save``, which prints each step when it is durable.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path

from campaigns.campaign import Campaign, Case, require
from campaigns.child import Child, parse_arguments, start_child
from campaigns.concurrency import model
from distrust import CheckpointManager
from distrust.errors import CheckpointDirectoryLocked

RACERS = (2, 5)  # processes
METHODS = ("acquire", "save", "save_async")  # that take the lock
#: From the order to its instant: every racer has read it by then.
NOTICE_SECONDS = 0.02


class _Race:
    def __init__(self, campaign: Campaign, case: Case, directory: Path, racers: list[Child]) -> None:
        self._campaign = campaign
        self._rng = case.rng
        self._directory = directory
        self._racers = racers
        self._expected: set[int] = set()
        self._round = 0

    def run_round(self) -> None:
        self._round += 1
        method = self._rng.choice(METHODS)
        instant = time.monotonic() + NOTICE_SECONDS
        base = self._round * 1_000_000
        for number, racer in enumerate(self._racers):
            racer.send(f"go {instant} {method} {base + number * 1000}")
        answers = [racer.receive_json() for racer in self._racers]
        winners = [number for number, answer in enumerate(answers) if answer["refused"] is None]
        require(len(winners) == 1, f"{len(winners)} of {len(answers)} processes may write at once ({method})")
        winner = self._racers.pop(winners[0])
        for number, answer in enumerate(answers):
            if number != winners[0]:
                line = answer["refused"]
                clear = "\n" not in line and f"pid {winner.pid} " in line and str(self._directory) in line
                require(clear, f"the error does not name the holder and the directory: {line!r}")
                self._campaign.count("refused with a clear line")
        if method != "acquire":
            self._expected.add(base + winners[0] * 1000)
        self._check()
        self._campaign.count("races" if self._round == 1 else "taken over from a killed holder")
        self._campaign.count_largest("slowest to get it, ms", round(answers[winners[0]]["seconds"] * 1e3))
        self._kill(winner)

    def _kill(self, winner: Child) -> None:
        if self._rng.random() < 0.8:
            winner.send("save")
            time.sleep(self._rng.uniform(0, 0.05))
        winner.kill()
        durable = [int(line) for line in winner.read_to_end()]
        existing = set(CheckpointManager(self._directory).list_checkpoints())
        self._expected.update(durable)
        lost = sorted(self._expected - existing)
        require(not lost, f"durable, and gone after the kill: {lost}; existing: {sorted(existing)}")
        # The save that it was about to report may be complete, too, or the first one after a mere acquire.
        unreported = max(self._expected, default=self._round * 1_000_000) + 1
        self._expected |= {step for step in existing if step == unreported or step % 1000 == 1}
        self._check()

    def _check(self) -> None:
        manager, expected = CheckpointManager(self._directory), sorted(self._expected)
        steps = manager.list_checkpoints()
        require(steps == expected, f"the holders saved {expected}, and the directory has {steps}")
        for step in steps[-3:]:
            model.version_of(manager.load(step), step=step)


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    module, directory = "campaigns.concurrency.races", folder / "checkpoints"
    count = case.rng.choice(RACERS)
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(start_child(campaign, module, directory)) for _ in range(count)]
        for racer in racers:
            racer.receive()  # "ready"
        race = _Race(campaign, case, directory, racers)
        while racers:
            race.run_round()


def main() -> None:
    options = parse_arguments(directory=Path)
    manager = CheckpointManager(options.directory, keep_last=None)
    print("ready", flush=True)
    step = 0
    for line in sys.stdin:
        if line == "save\n":
            for later in itertools.count(step + 1):
                manager.save(model.make_checkpoint(later, later, 5_000))
                print(later, flush=True)
        _, instant, method, number = line.split()
        step = int(number)
        checkpoint = model.make_checkpoint(step, step, 500)
        while time.monotonic() < float(instant):
            pass
        began = time.monotonic()
        try:
            if method == "acquire":
                manager.acquire()
            elif method == "save":
                manager.save(checkpoint)
            else:
                manager.save_async(checkpoint).wait()
            refused = None
        except CheckpointDirectoryLocked as error:
            refused = str(error)
        print(json.dumps({"refused": refused, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
