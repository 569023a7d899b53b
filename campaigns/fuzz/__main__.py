"""The command: ``python -m campaigns.fuzz``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from campaigns import fuzz
from campaigns.campaign import Campaign, CounterExample, parser, run
from campaigns.fuzz import (
    families,
    imports,
    obstacles,
    older,
    permissions,
    readers,
    sizes,
    specimens,
    training,
)
from campaigns.fuzz.forging import Draft, Specimen
from campaigns.fuzz.worker import Worker

FILES_PER_CASE = 100
#: Of so many cases at random one is of folders of other programs.
ELSEWHERE_EVERY = 4
#: Of so many files in a case one is a real one, read in every way.
FILES_EVERY = 50
NAMED_TIMES = 4
GUIDED_RUNS = 20_000
ALLOWED_BYTES = 64 << 20
IN_MEMORY = Path("/dev/shm")
READ_IN_MEMORY = "files read in memory"
OLDER = "checkpoints in an older format, in every way"
READ_FROM_DISK = "files read from disk, in every way"
COVERAGE = (
    "edges of the reader's code reached",
    "features (edges and how often)",
    "files kept in the corpus",
)

Step = Callable[[Random, Counter[str]], None]
BenchStep = Callable[[training.Bench, Random], Counter[str]]


class Plan(NamedTuple):
    """What the cases do, by number.

    Attributes:
        reading: the first ones; a worker does them.
        apart: the next ones, which make processes of their own.
        elsewhere: the next ones, of other programs' folders; the engines' processes do them.
        random: all others; a worker does them, too.
        random_elsewhere: in the place of one of :data:`ELSEWHERE_EVERY` of them.
    """

    reading: Sequence[Step]
    apart: Sequence[Step]
    elsewhere: Sequence[BenchStep]
    random: Step
    random_elsewhere: BenchStep

    def step(self, number: int) -> Step:
        """What a case does that no engine does."""
        named = (*self.reading, *self.apart)
        return named[number] if number < len(named) else self.random

    def is_apart(self, number: int) -> bool:
        """Whether it makes processes of its own."""
        return 0 <= number - len(self.reading) < len(self.apart)

    def of_engines(self, number: int) -> BenchStep | None:
        """What a case does that the engines do."""
        beyond = number - len(self.reading) - len(self.apart)
        if 0 <= beyond < len(self.elsewhere):
            return self.elsewhere[beyond]
        is_theirs = beyond >= 0 and (beyond - len(self.elsewhere)) % ELSEWHERE_EVERY == 1
        return self.random_elsewhere if is_theirs else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    made = parser(fuzz.__doc__)
    made.add_argument(
        "--engine", choices=("random", "guided"), default="random", help="what leads the mutations"
    )
    made.add_argument("--replay", type=Path, help="read this file in every way, and nothing else")
    made.add_argument("--mebibytes", type=float, default=1.0, help="of the largest files (default: 1)")
    return run("fuzz", made, _body, cases=200, arguments=arguments)


def _body(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        directory = Path(name)
        if campaign.options.engine == "guided":
            _guided(campaign, directory)
            return
        asked = readers.Directory(directory / "files", *specimens.make(directory / "specimens"))
        if campaign.options.replay is not None:
            _add(campaign, _read(campaign.options.replay.read_bytes(), asked))
        else:
            elders = older.Directory(directory / "older" / "files", asked.good.path.read_bytes())
            _by_number(campaign, _plan(asked, elders, directory, campaign.options), directory)


def _by_number(campaign: Campaign, plan: Plan, directory: Path) -> None:
    def chance(number: int) -> Random:
        return Random(f"{campaign.options.seed}/{number}")

    def work(number: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        plan.step(number)(chance(number), counts)
        return counts

    def with_engines(bench: training.Bench, number: int) -> Counter[str]:
        step = plan.of_engines(number)
        assert step is not None
        return step(bench, chance(number))

    with (
        Worker(work, allowed=ALLOWED_BYTES) as worker,
        training.Engines(with_engines, directory / "elsewhere") as engines,
    ):
        for case in campaign.cases():
            if plan.of_engines(case.number) is not None:
                _add(campaign, engines.do(case.number))
            else:
                _add(campaign, work(case.number) if plan.is_apart(case.number) else worker.do(case.number))


def _add(campaign: Campaign, counts: Counter[str]) -> None:
    for what, number in counts.items():
        campaign.count(what, number)


def _plan(
    asked: readers.Directory, elders: older.Directory, directory: Path, options: argparse.Namespace
) -> Plan:
    size = int(options.mebibytes * (1 << 20))
    return Plan(
        reading=[
            *(partial(_change, asked, change) for change in families.CHANGES.values()),
            *(partial(_file, asked, make) for make in families.FILES.values()),
            partial(_obstacles, asked),
            *(partial(_older, elders, make) for make in older.FAMILIES.values()),
        ],
        apart=[
            partial(_permissions, directory),
            partial(_writing, directory),
            *(partial(_sizes, asked, name, size) for name in families.GROWING),
        ],
        elsewhere=[partial(_elsewhere, family) for family in imports.FAMILIES.values()],
        random=partial(_random, asked, elders),
        random_elsewhere=lambda bench, chance: bench.random(chance),
    )


def _read(raw: bytes, asked: readers.Directory) -> Counter[str]:
    """Read one file in every way."""
    counts: Counter[str] = Counter()
    readers.in_memory(raw, asked.good, counts)
    asked.ask(raw, counts)
    counts[READ_IN_MEMORY] += 1
    counts[READ_FROM_DISK] += 1
    return counts


def _change(
    asked: readers.Directory,
    change: Callable[[Draft, Random], None],
    chance: Random,
    counts: Counter[str],
) -> None:
    """One kind of change alone, a few times on each specimen."""
    for specimen in asked.specimens:
        for _ in range(NAMED_TIMES):
            draft = specimen.draft()
            try:
                change(draft, chance)
            except families.NOTHING_TO_CHANGE:
                continue
            counts.update(_read(draft.file(), asked))


def _file(
    asked: readers.Directory,
    make: Callable[[Specimen, Random], bytes],
    chance: Random,
    counts: Counter[str],
) -> None:
    """One kind of file, a few times of each specimen."""
    for specimen in asked.specimens:
        for _ in range(NAMED_TIMES):
            counts.update(_read(make(specimen, chance), asked))


def _obstacles(asked: readers.Directory, _: Random, counts: Counter[str]) -> None:
    for name, place in obstacles.OBSTACLES.items():
        with obstacles.placed(place, asked.hostile):
            try:
                asked.ask_what_is_there(0, counts)
            except CounterExample as found:
                raise CounterExample(f"{name}: {found}") from found
        counts["things in the place of a checkpoint"] += 1


def _older(elders: older.Directory, make: older.Make, chance: Random, counts: Counter[str]) -> None:
    """One kind of hostile checkpoint in an older format, a few times, with right checksums and with lies."""
    for turn in range(2 * NAMED_TIMES):
        elders.try_out(make, chance, counts, lies=turn % 2 == 0)
        counts[OLDER] += 1


def _random(asked: readers.Directory, elders: older.Directory, chance: Random, counts: Counter[str]) -> None:
    make = chance.choice([*older.FAMILIES.values()])
    elders.try_out(make, chance, counts, lies=chance.random() < 0.5)
    counts[OLDER] += 1
    for index in range(FILES_PER_CASE):
        raw = families.mutated(chance.choice(asked.specimens), chance)
        readers.in_memory(raw, asked.good, counts)
        counts[READ_IN_MEMORY] += 1
        if index % FILES_EVERY == 0:
            asked.ask(raw, counts)
            counts[READ_FROM_DISK] += 1


def _elsewhere(family: imports.Family, bench: training.Bench, chance: Random) -> Counter[str]:
    return bench.family(family, chance)


def _permissions(directory: Path, _: Random, counts: Counter[str]) -> None:
    for umask in permissions.UMASKS:
        counts["files and directories whose permissions were looked at"] += permissions.check(
            directory, umask
        )


def _writing(directory: Path, _: Random, counts: Counter[str]) -> None:
    for name, scene in obstacles.SCENES.items():
        obstacles.play(name, scene, directory)
        counts["things in the way of a save"] += 1


def _sizes(asked: readers.Directory, name: str, size: int, _: Random, counts: Counter[str]) -> None:
    counts["answers measured on files that cost"] += sizes.check(name, asked, size)


def _guided(campaign: Campaign, directory: Path) -> None:
    """Have libFuzzer lead, in a process of its own."""
    if importlib.util.find_spec("atheris") is None:
        print("--engine guided needs atheris: pip install atheris", file=sys.stderr)
        raise SystemExit(2)
    options = campaign.options
    command = [
        sys.executable,
        "-m",
        "campaigns.fuzz.guided",
        "--directory",
        str(directory),
        "--seed",
        str(options.seed),
    ]
    if options.seconds is not None:
        command += ["--seconds", str(int(options.seconds))]
    if options.cases is not None or options.seconds is None:
        command += ["--runs", str(options.cases or GUIDED_RUNS)]
    log = directory / "log"
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    _add(campaign, guided_counts(directory))
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log.read_text(errors="replace"))
    for what, number in zip(COVERAGE, covered[-1] if covered else (), strict=False):
        campaign.count(what, int(number))
    if done.returncode != 0:
        raise CounterExample(_kept(directory, log))


def guided_counts(directory: Path) -> Counter[str]:
    """What the guided engine wrote down."""
    path = directory / "counts.json"
    return Counter(json.loads(path.read_text())) if path.exists() else Counter()


def _kept(directory: Path, log: Path) -> str:
    """What the guided engine found, and where its file is kept."""
    told = directory / "counterexample.txt"
    if not told.exists():
        return f"the guided engine ended by itself: {log.read_text(errors='replace')[-2000:]}"
    kept = Path("counterexample.safetensors").absolute()
    shutil.copyfile(directory / kept.name, kept)
    return f"{told.read_text()}; again: python -m campaigns.fuzz --replay {kept}"


if __name__ == "__main__":
    sys.exit(main())
