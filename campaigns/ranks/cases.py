"""One case: a run, its attempts with their accidents, and how it must end."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from campaigns.campaign import Campaign, Case, require
from campaigns.disks import volumes
from campaigns.ranks.accidents import Accident
from campaigns.ranks.attempts import DisturbedRun, Surroundings, options, random_moment
from campaigns.ranks.layouts import Layout
from campaigns.ranks.machines import Machines
from campaigns.ranks.processes import Program, Server
from campaigns.training_run import TrainingRun

ATTEMPTS = 10  # at each run, at most
FRESH_EVERY = 20  # one case in so many starts new interpreters
# The shares of the runs that are on a disk which can be filled, and that divide their weights.
SMALL_DISK, SHARDED = 0.15, 0.15
# The shares of the attempts with the launcher, and with two machines, if their accident can do without.
LAUNCHED, TWO_MACHINES = 0.5, 0.2


class Mode(NamedTuple):
    """What each rank has of the weights."""

    name: str
    options: tuple[str, ...]
    counts: tuple[int, ...]  # the numbers of ranks on which a run has the same bits


REPLICATED = Mode("all", ("--lora-rank", "2", "--lora-dropout", "0.1"), (1, 2, 3, 4))
DIVIDED = Mode("--shard all", ("--lora-rank", "0", "--shard", "all"), (2,))


class Reference(NamedTuple):
    """How the undisturbed run ends: the digest of its state, and its metrics."""

    digest: str
    metrics: list[dict[str, float]]


@dataclass
class Bench:
    """What all cases share."""

    campaign: Campaign
    server: Server
    accidents: Sequence[Accident]  # that are selected and possible here
    machines: Machines | None
    folder: Path
    disk: Path | volumes.Skipped | None  # one that can be filled
    references: dict[str, Reference] = field(default_factory=dict)  # by the mode

    def make_model(self) -> None:
        program = Program("campaigns.ranks.model", [str(self.folder)])
        err = self.folder / "err.txt"
        pid = self.server.start(program, out=self.folder / "out.txt", err=err)
        while (code := self.server.codes().get(pid)) is None:
            time.sleep(0.01)
        require(code == 0, f"{self.folder}: no model: {err.read_text()}")

    def reference(self, mode: Mode) -> Reference:
        """Trained once, on the smallest number of ranks of the mode."""
        if mode.name not in self.references:
            layout = Layout(self.server, mode.counts[0], launched=False)
            out = self.folder / f"reference-{len(self.references)}"
            training = TrainingRun(out, self._options(mode), layout)
            self.references[mode.name] = Reference(training.finish(), training.metrics())
        return self.references[mode.name]

    def run(self, case: Case) -> None:
        """Disturb one run, finish it, and compare it with the undisturbed one."""
        rng, chosen = case.rng, self.campaign.options.shard
        mode = DIVIDED if (rng.random() < SHARDED if chosen is None else chosen == "all") else REPLICATED
        on_small_disk = isinstance(self.disk, Path) and rng.random() < SMALL_DISK
        parent = self.disk if isinstance(self.disk, Path) and on_small_disk else self.folder
        log = self.folder / f"log-{case.number}"  # not on a disk that is full
        training = TrainingRun(parent / f"case-{case.number}", self._options(mode), log_folder=log)
        expected = self.reference(mode)
        fresh = case.number % FRESH_EVERY == FRESH_EVERY - 1
        layout = Layout(self.server, 0, launched=False, fault=self.campaign.options.fault, fresh=fresh)
        filler = volumes.Filler(parent) if on_small_disk else None
        disturbed = DisturbedRun(self.campaign, training, Surroundings(self.machines, filler))
        for _ in range(ATTEMPTS):
            accident = self._random_accident(rng, on_small_disk, mode)
            layout = self._random_layout(rng, accident, mode, layout)
            moment = random_moment(rng, in_the_loop=accident.in_the_loop)
            if not disturbed.disturb(layout, accident, moment, rng):
                break
        last = replace(layout, count=_random_count(rng, mode, layout.count), machines=(), options=())
        last = replace(last, launched=rng.random() < LAUNCHED, fresh=False)
        out = training.out
        same = disturbed.finish(last) == expected.digest
        require(same, f"{out}: ended in another state than the undisturbed process")
        same = training.metrics() == expected.metrics
        require(same, f"{out}: metrics.jsonl differs from that of the undisturbed process")
        self.campaign.count("runs that ended in the undisturbed state")
        if mode is DIVIDED:
            self.campaign.count(f"  {mode.name}")
        for folder in (out, log):
            shutil.rmtree(folder)

    def _options(self, mode: Mode) -> list[str]:
        return [*options(self.folder), *mode.options]

    def _random_accident(self, rng: random.Random, on_small_disk: bool, mode: Mode) -> Accident:
        possible = [
            one
            for one in self.accidents
            if (on_small_disk or not one.full_disk) and one.least_ranks <= mode.counts[-1]
        ]
        return rng.choices(possible, [one.weight for one in possible])[0]

    def _random_layout(self, rng: random.Random, accident: Accident, mode: Mode, previous: Layout) -> Layout:
        """A layout that the accident can happen to, if possible of another number of ranks than before."""
        launched = rng.random() < LAUNCHED if accident.launched is None else accident.launched
        layout = replace(previous, launched=launched, options=accident.options, machines=())
        if accident.options:  # new interpreters would wait for other machines as long as torch does
            layout = replace(layout, fresh=False)
        if self.machines and (accident.two_machines or rng.random() < TWO_MACHINES):
            layout = replace(layout, machines=self.machines.both)
        least, even = accident.least_ranks, bool(layout.machines)
        return replace(layout, count=_random_count(rng, mode, previous.count, least=least, even=even))


def _random_count(
    rng: random.Random, mode: Mode, previous: int, *, least: int = 1, even: bool = False
) -> int:
    counts = [count for count in mode.counts if count >= least and not (even and count % 2)]
    return rng.choice([count for count in counts if count != previous] or counts)
