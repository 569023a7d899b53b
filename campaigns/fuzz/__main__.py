"""The command ``python -m campaigns.fuzz``."""

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
from typing import Any, NamedTuple

from campaigns import fuzz
from campaigns.campaign import Campaign, CounterExample, never, parser, run
from campaigns.fuzz import costs, families, forging, growing, imports, obstacles, older, readers, training

FILES_PER_CASE = 100  # at random
#: One in so many random cases has folders of other programs.
FOLDERS_EVERY = 4
#: One in so many files of a case is a real one, read by every method.
FILES_EVERY = 50
REPETITIONS = 4  # of each family and specimen
GUIDED_RUNS = 20_000  # by default
ALLOWED_BYTES = 64 << 20  # of the reading process, beyond its start
IN_MEMORY = Path("/dev/shm")  # quicker than a disk
READ_IN_MEMORY = "files read in memory"
OLDER = "checkpoints in an older format, by every method"
READ_FROM_DISK = "files read from disk, by every method"
COVERAGE = ("edges of the reader's code reached", "features (edges and how often)", "files in the corpus")

Step = Callable[[Random, Counter[str]], None]
FolderStep = Callable[[training.Bench, Random], Counter[str]]


class Plan(NamedTuple):
    reading: Sequence[Step]  # the first ones, done by a worker
    measuring: Sequence[Step]  # the next ones, which make processes of their own
    folders: Sequence[FolderStep]  # the next ones, done by the engines' processes
    random: Step  # all others, done by a worker
    random_folders: FolderStep  # instead of one in :data:`FOLDERS_EVERY` of them

    def step(self, number: int) -> Step:
        """What a case does that needs no engine."""
        named = (*self.reading, *self.measuring)
        return named[number] if number < len(named) else self.random

    def makes_processes(self, number: int) -> bool:
        return 0 <= number - len(self.reading) < len(self.measuring)

    def folder_step(self, number: int) -> FolderStep | None:
        """What a case does in the engines' processes, if it does."""
        index = number - len(self.reading) - len(self.measuring)
        if 0 <= index < len(self.folders):
            return self.folders[index]
        is_folder_case = index >= 0 and (index - len(self.folders)) % FOLDERS_EVERY == 1
        return self.random_folders if is_folder_case else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(fuzz.__doc__)
    engines = ("random", "guided")
    options.add_argument("--engine", choices=engines, default="random", help="what leads the mutations")
    options.add_argument("--replay", type=Path, help="read this file by every method, and nothing else")
    options.add_argument("--mebibytes", type=float, default=1.0, help="of the largest files (default: 1)")
    return run("fuzz", options, _body, cases=200, arguments=arguments)


def _body(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        directory = Path(name)
        if campaign.options.engine == "guided":
            _run_guided(campaign, directory)
            return
        files = readers.Directory(directory / "files", *forging.make_specimens(directory / "specimens"))
        if campaign.options.replay is not None:
            campaign.count_all(_read(campaign.options.replay.read_bytes(), files))
        else:
            older_files = older.Directory(directory / "older" / "files", files.valid.path.read_bytes())
            _run_cases(campaign, _plan(files, older_files, directory, campaign.options), directory)


def _run_cases(campaign: Campaign, plan: Plan, directory: Path) -> None:
    def rng(number: int) -> Random:
        return Random(f"{campaign.options.seed}/{number}")

    def work(number: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        plan.step(number)(rng(number), counts)
        return counts

    def work_on_folders(bench: training.Bench, number: int) -> Counter[str]:
        step = plan.folder_step(number) or plan.random_folders
        return step(bench, rng(number))

    with (
        costs.worker(work, allowed=ALLOWED_BYTES) as worker,
        training.Engines(work_on_folders, directory / "folders") as engines,
    ):
        for case in campaign.cases():
            if plan.folder_step(case.number) is not None:
                campaign.count_all(engines.run(case.number))
            elif plan.makes_processes(case.number):
                campaign.count_all(work(case.number))
            else:
                campaign.count_all(worker.request(case.number))


def _plan(
    files: readers.Directory, older_files: older.Directory, directory: Path, options: argparse.Namespace
) -> Plan:
    size = int(options.mebibytes * (1 << 20))
    return Plan(
        reading=[
            *(partial(_try_files, files, partial(_change, change)) for change in families.CHANGES.values()),
            *(partial(_try_files, files, make) for make in families.FILES.values()),
            partial(_try_obstacles, files),
            *(partial(_try_older, older_files, make) for make in older.FAMILIES.values()),
        ],
        measuring=[
            partial(_check_permissions, directory),
            partial(_play_scenes, directory),
            *(partial(_measure_sizes, files, name, size) for name in growing.GROWING),
        ],
        folders=[partial(training.Bench.run_family, family=each) for each in imports.FAMILIES.values()],
        random=partial(_try_random, files, older_files),
        random_folders=training.Bench.run_random,
    )


def _read(raw: bytes, files: readers.Directory) -> Counter[str]:
    counts: Counter[str] = Counter()
    readers.read_in_memory(raw, files.valid, counts)
    files.read(raw, counts)
    counts[READ_IN_MEMORY] += 1
    counts[READ_FROM_DISK] += 1
    return counts


def _change(change: Callable[[Any, Random], None], specimen: forging.Specimen, rng: Random) -> bytes:
    draft = specimen.draft()
    change(draft, rng)
    return draft.file()


def _try_files(
    files: readers.Directory,
    make: Callable[[forging.Specimen, Random], bytes],
    rng: Random,
    counts: Counter[str],
) -> None:
    """One kind of file, a few times of each specimen."""
    for specimen in files.specimens:
        for _ in range(REPETITIONS):
            try:
                raw = make(specimen, rng)
            except families.NOTHING_TO_CHANGE:
                continue
            counts.update(_read(raw, files))


def _try_obstacles(files: readers.Directory, _: Random, counts: Counter[str]) -> None:
    for name, make in obstacles.OBSTACLES.items():
        with obstacles.obstacle(make, files.hostile), never(CounterExample, f"{name}: "):
            files.read_all(0, counts)
        counts["things in the place of a checkpoint"] += 1


def _try_older(older_files: older.Directory, make: older.Make, rng: Random, counts: Counter[str]) -> None:
    """One kind of checkpoint in an older format, a few times, with correct checksums and with wrong ones."""
    for turn in range(2 * REPETITIONS):
        older_files.try_out(make, rng, counts, lies=turn % 2 == 0)
        counts[OLDER] += 1


def _try_random(
    files: readers.Directory, older_files: older.Directory, rng: Random, counts: Counter[str]
) -> None:
    make = rng.choice([*older.FAMILIES.values()])
    older_files.try_out(make, rng, counts, lies=rng.random() < 0.5)
    counts[OLDER] += 1
    for index in range(FILES_PER_CASE):
        raw = families.mutate(rng.choice(files.specimens), rng)
        readers.read_in_memory(raw, files.valid, counts)
        counts[READ_IN_MEMORY] += 1
        if index % FILES_EVERY == 0:
            files.read(raw, counts)
            counts[READ_FROM_DISK] += 1


def _check_permissions(directory: Path, _: Random, counts: Counter[str]) -> None:
    for umask in obstacles.UMASKS:
        counts["paths whose permissions were checked"] += obstacles.check_permissions(directory, umask)


def _play_scenes(directory: Path, _: Random, counts: Counter[str]) -> None:
    for name, scene in obstacles.SCENES.items():
        obstacles.play(name, scene, directory)
        counts["obstacles of a save"] += 1


def _measure_sizes(files: readers.Directory, name: str, size: int, _: Random, counts: Counter[str]) -> None:
    counts["answers measured on expensive files"] += costs.check_growth(name, files, size)


def _run_guided(campaign: Campaign, directory: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        print("--engine guided needs atheris: pip install atheris", file=sys.stderr)
        raise SystemExit(2)
    options = campaign.options
    runs = options.cases or (GUIDED_RUNS if options.seconds is None else -1)  # -1 for any number
    command = [sys.executable, "-m", "campaigns.fuzz.guided", "--directory", str(directory)]
    command += ["--seed", str(options.seed), "--seconds", str(int(options.seconds or 0)), "--runs", str(runs)]
    log = directory / "log"
    with log.open("wb") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    counts = directory / "counts.json"
    if counts.exists():
        campaign.count_all(json.loads(counts.read_text()))
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log.read_text(errors="replace"))
    for description, number in zip(COVERAGE, coverage[-1] if coverage else (), strict=False):
        campaign.count(description, int(number))
    if result.returncode != 0:
        raise CounterExample(_keep_finding(directory, log))


def _keep_finding(directory: Path, log: Path) -> str:
    """Copy the file that the guided engine found; returns the finding."""
    text = directory / "counterexample.txt"
    if not text.exists():
        return f"the guided engine ended by itself: {log.read_text(errors='replace')[-2000:]}"
    copy = Path("counterexample.safetensors").absolute()
    shutil.copyfile(directory / copy.name, copy)
    return f"{text.read_text()}; again: python -m campaigns.fuzz --replay {copy}"


if __name__ == "__main__":
    sys.exit(main())
