"""Processes that start at the same instant and want the same directory: one gets it, the others a clear line.

The one that got it is killed, most often in the middle of a save; at the same instant all others try again.
So it goes until nobody is left.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from campaigns.campaign import Campaign, Case
from campaigns.child_lines import Actor
from campaigns.concurrency import content
from distrust import CheckpointManager

RACERS = (2, 5)
HOWS = ("acquire", "save", "save_async")
#: Between the order and its instant: all have taken it by then.
NOTICE_SECONDS = 0.02


class _Race:
    """One directory, and those who want it."""

    def __init__(self, campaign: Campaign, case: Case, directory: Path, racers: list[Actor]) -> None:
        self._campaign = campaign
        self._chance = case.chance
        self._directory = directory
        self._racers = racers
        self._expected: set[int] = set()
        self._round = 0

    def run(self) -> None:
        """Until nobody is left."""
        for racer in self._racers:
            racer.answer()
        while self._racers:
            self._one_round()

    def _one_round(self) -> None:
        self._round += 1
        how = self._chance.choice(HOWS)
        instant = time.monotonic() + NOTICE_SECONDS
        base = self._round * 1_000_000
        for number, racer in enumerate(self._racers):
            racer.tell(f"go {instant} {how} {base + number * 1000}")
        told = [json.loads(racer.answer()) for racer in self._racers]
        won = [number for number, answer in enumerate(told) if answer["refused"] is None]
        require = self._campaign.require
        require(len(won) == 1, f"{len(won)} of {len(told)} processes may write at once ({how})")
        winner = self._racers.pop(won[0])
        for number, answer in enumerate(told):
            if number != won[0]:
                line = answer["refused"]
                clear = "\n" not in line and f"pid {winner.pid} " in line and str(self._directory) in line
                require(clear, f"not clear who holds it, and what: {line!r}")
                self._campaign.count("refused with a clear line")
        if how != "acquire":
            self._expected.add(base + won[0] * 1000)
        self._check()
        self._campaign.count("races" if self._round == 1 else "taken over from a killed holder")
        slowest = max(self._campaign.counts["slowest to get it, ms"], round(told[won[0]]["seconds"] * 1e3))
        self._campaign.counts["slowest to get it, ms"] = slowest
        self._kill(winner)

    def _kill(self, winner: Actor) -> None:
        if self._chance.random() < 0.8:
            winner.tell("save")
            time.sleep(self._chance.uniform(0, 0.05))
        winner.kill()
        durable = [int(line) for line in winner.rest()]
        there = set(CheckpointManager(self._directory).list_checkpoints())
        self._expected.update(durable)
        # The one that it was about to report may stand, too.
        begun = {max(self._expected, default=self._round * 1_000_000) + 1}
        self._campaign.require(
            self._expected <= there,
            f"durable, and gone after the kill: {sorted(self._expected - there)}; there are {sorted(there)}",
        )
        self._expected |= {step for step in there - self._expected if self._follows(step, begun)}
        self._check()

    def _follows(self, step: int, begun: set[int]) -> bool:
        return step in begun or step % 1000 == 1  # the first after acquiring, which told no step

    def _check(self) -> None:
        manager = CheckpointManager(self._directory)
        there = manager.list_checkpoints()
        self._campaign.require(
            set(there) == self._expected,
            f"those who hold the directory saved {sorted(self._expected)}, and there are {there}",
        )
        for step in there[-3:]:
            content.version_of(manager.load(step), step=step)


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """A race, and who takes over."""
    directory = folder / "checkpoints"
    more = ["--fault", campaign.options.fault] if campaign.options.fault else []
    with contextlib.ExitStack() as stack:
        racers = [
            stack.enter_context(Actor("campaigns.concurrency.racer", directory, *more))
            for _ in range(case.chance.choice(RACERS))
        ]
        _Race(campaign, case, directory, racers).run()
