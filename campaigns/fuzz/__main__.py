"""The command ``python -m campaigns.fuzz``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from campaigns import fuzz
from campaigns.campaign import Campaign, CounterExample, never, parser, run
from campaigns.fuzz import (
    commands,
    costs,
    families,
    forging,
    growing,
    imports,
    model_folders,
    obstacles,
    older,
    places,
    readers,
    texts,
    training,
)
from campaigns.fuzz.workplace import Workplace

FILES_PER_CASE = 400  # at random
#: What the random cases do, in turn.
TURNS = ("files", "folders", "commands", "files", "models", "commands", "files", "commands")
#: One in so many files of a case is a real one, read by every method.
FILES_EVERY = 100
REPETITIONS = 4  # of each family and specimen
GUIDED_RUNS = 20_000  # by default
ALLOWED_BYTES = 64 << 20  # of the reading process, beyond its start
IN_MEMORY = Path("/dev/shm")  # quicker than a disk
#: The most obstacles that a case puts at the names of a command: without and with a framework.
LIGHT_PLACES, MODEL_PLACES = 300, 40
READ_IN_MEMORY = "files read in memory"
OLDER = "checkpoints in an older format, by every method"
READ_FROM_DISK = "files read from disk, by every method"
COVERAGE = ("edges of the reader's code reached", "features (edges and how often)", "files in the corpus")

#: The processes that do the cases: one that reads files, this one, which makes more, those of the engines,
#: and one each for commands with and without a framework.
Process = Literal["reader", "own", "engines", "commands", "models"]
Work = Callable[[Random], Counter[str]]


class Step(NamedTuple):
    """What a case does, and where."""

    process: Process
    work: Work


class Plan(NamedTuple):
    named: Sequence[Step]  # the first cases
    random: Mapping[str, Step]  # the others, by kind
    turns: Sequence[str] = TURNS  # the kinds of the others, repeated

    def step(self, number: int) -> Step:
        if number < len(self.named):
            return self.named[number]
        return self.random[self.turns[(number - len(self.named)) % len(self.turns)]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(fuzz.__doc__)
    engines = ("random", "guided")
    options.add_argument("--engine", choices=engines, default="random", help="what leads the mutations")
    kinds = sorted({*TURNS})
    options.add_argument("--kind", choices=kinds, help="only random cases of this kind")
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
            benches = _benches(directory, files)
            plan = _plan(benches, campaign.options)
            if campaign.options.kind is not None:
                plan = plan._replace(named=(), turns=(campaign.options.kind,))
            _run_cases(campaign, plan, benches)


def _run_cases(campaign: Campaign, plan: Plan, benches: Benches) -> None:
    def work(number: int) -> Counter[str]:
        return plan.step(number).work(Random(f"{campaign.options.seed}/{number}"))

    with contextlib.ExitStack() as stack:
        worker = partial(costs.worker, allowed=training.ALLOWED_BYTES)
        reader = stack.enter_context(costs.worker(work, allowed=ALLOWED_BYTES))
        engines = stack.enter_context(training.Engines(work, benches.engines))
        light = stack.enter_context(worker(work, prepare=benches.commands.prepare))
        models = stack.enter_context(worker(work, prepare=benches.models.prepare))
        requests: dict[Process, Callable[[int], Mapping[str, int]]] = {
            "reader": reader.request,
            "own": work,
            "engines": engines.run,
            "commands": light.request,
            "models": models.request,
        }
        for case in campaign.cases():
            campaign.count_all(requests[plan.step(case.number).process](case.number))


class Benches(NamedTuple):
    """Where the cases are done."""

    directory: Path
    files: readers.Directory
    older: older.Directory
    engines: training.Bench
    commands: Workplace
    models: Workplace


def _benches(directory: Path, files: readers.Directory) -> Benches:
    return Benches(
        directory,
        files,
        older.Directory(directory / "older" / "files", files.valid.path.read_bytes()),
        training.Bench(directory / "folders"),
        commands.light_workplace(directory / "commands"),
        commands.models_workplace(directory / "models"),
    )


def _plan(benches: Benches, options: argparse.Namespace) -> Plan:
    files, light, models = benches.files, benches.commands, benches.models
    size = int(options.mebibytes * (1 << 20))
    reading: list[Work] = [
        *(partial(_try_files, files, partial(_change, change)) for change in families.CHANGES.values()),
        *(partial(_try_files, files, make) for make in families.FILES.values()),
        partial(_try_obstacles, files),
        *(partial(_try_older, benches.older, make) for make in older.FAMILIES.values()),
    ]
    measuring: list[Work] = [
        partial(_check_permissions, benches.directory),
        partial(_play_scenes, benches.directory),
        *(partial(_measure_sizes, files, name, size) for name in growing.GROWING),
    ]
    return Plan(
        named=[
            *(Step("reader", work) for work in reading),
            *(Step("own", work) for work in measuring),
            *(
                Step("engines", partial(benches.engines.run_family, family=family))
                for family in imports.FAMILIES.values()
            ),
            *(
                Step("commands", partial(places.try_command, light, name, most=LIGHT_PLACES))
                for name in commands.LIGHT
            ),
            *(Step("commands", partial(texts.try_family, light, name)) for name in texts.FAMILIES),
            *(
                Step("models", partial(places.try_command, models, name, most=MODEL_PLACES))
                for name in commands.MODELS
            ),
            *(
                Step("models", partial(model_folders.try_family, models, name))
                for name in model_folders.FAMILIES
            ),
        ],
        random={
            "files": Step("reader", partial(_try_random, files, benches.older)),
            "folders": Step("engines", benches.engines.run_random),
            "commands": Step("commands", partial(_try_commands, light)),
            "models": Step("models", partial(model_folders.try_at_random, models)),
        },
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
) -> Counter[str]:
    """One kind of file, a few times of each specimen."""
    counts: Counter[str] = Counter()
    for specimen in files.specimens:
        for _ in range(REPETITIONS):
            try:
                raw = make(specimen, rng)
            except families.NOTHING_TO_CHANGE:
                continue
            counts.update(_read(raw, files))
    return counts


def _try_obstacles(files: readers.Directory, _: Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, make in obstacles.OBSTACLES.items():
        with obstacles.obstacle(make, files.hostile), never(CounterExample, f"{name}: "):
            files.read_all(0, counts)
        counts["things in the place of a checkpoint"] += 1
    return counts


def _try_older(older_files: older.Directory, make: older.Make, rng: Random) -> Counter[str]:
    """One kind of checkpoint in an older format, a few times, with correct checksums and with wrong ones."""
    counts: Counter[str] = Counter()
    for turn in range(2 * REPETITIONS):
        older_files.try_out(make, rng, counts, lies=turn % 2 == 0)
        counts[OLDER] += 1
    return counts


def _try_random(files: readers.Directory, older_files: older.Directory, rng: Random) -> Counter[str]:
    counts: Counter[str] = Counter()
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
    return counts


def _try_commands(light: Workplace, rng: Random) -> Counter[str]:
    return places.try_at_random(light, rng) + texts.try_at_random(light, rng)


def _check_permissions(directory: Path, _: Random) -> Counter[str]:
    checked = sum(obstacles.check_permissions(directory, umask) for umask in obstacles.UMASKS)
    return Counter({"paths whose permissions were checked": checked})


def _play_scenes(directory: Path, _: Random) -> Counter[str]:
    for name, scene in obstacles.SCENES.items():
        obstacles.play(name, scene, directory)
    return Counter({"obstacles of a save": len(obstacles.SCENES)})


def _measure_sizes(files: readers.Directory, name: str, size: int, _: Random) -> Counter[str]:
    return Counter({"answers measured on expensive files": costs.check_growth(name, files, size)})


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
