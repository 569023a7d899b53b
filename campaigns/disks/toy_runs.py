"""The trainer's loop on disks that fail: it warns, goes on, and stops at the third failure in a row.

It trains the toy engine of the tests: a whole run takes some milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from campaigns.campaign import CounterExample
from campaigns.disks import volumes
from campaigns.disks.volumes import Filler
from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.errors import DistrustWarning, SaveFailed
from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import CheckpointSaved, Event, StepEnded
from distrust.training.saver import MAX_FAILURES

_STEPS = 16


class Trouble(NamedTuple):
    """What happens to a run's disk.

    Attributes:
        begin: has it happen.
        end: mends it as far as it can be mended.
        loses: whether the checkpoints are gone for good.
    """

    begin: Callable[[], None]
    end: Callable[[], None]
    loses: bool = False


def toy_training(chance: random.Random, home: Path, counts: Counter[str]) -> None:
    """Trouble from one step to a later one, or to the end; then the same command once more."""
    what = chance.choice(list(_TROUBLES))
    if what in _ON_A_VOLUME:
        volumes.private_mounts(home)
    data = _records(home / "records.jsonl")
    alone, _ = _train(home / "alone", data, save_every=1, watch=lambda _: None)
    assert not isinstance(alone, SaveFailed)
    root = home
    if what in _ON_A_VOLUME:
        root = volumes.make(chance.choice(["ext4", "tmpfs", "ext2"]), home, mib=8)
    out = root / "run"
    trouble = _TROUBLES[what](out / "checkpoints")
    save_every = chance.randint(1, 3)
    first = chance.randint(1, _STEPS - 1)
    last = first + chance.randint(1, 5) * save_every

    def watch(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == first:
            trouble.begin()
        if isinstance(event, StepEnded) and event.step == last:
            trouble.end()

    ended, log = _train(out, data, save_every=save_every, watch=watch)
    counts[f"toy run, {what}: failed saves"] += log.count("failed")
    _judge_log(log, ended)
    if isinstance(ended, SaveFailed):
        counts[f"toy run, {what}: stopped"] += 1
        _judge_message(ended, out / "checkpoints")
        if last > _steps_made(log):
            trouble.end()
        if not trouble.loses:
            _require_saved(log, out / "checkpoints")
        ended, _ = _train(out, data, save_every=save_every, watch=lambda _: None)
        if isinstance(ended, SaveFailed):
            raise CounterExample(f"the same command, with nothing in its way: {ended}")
        counts[f"toy run, {what}: the same command went on"] += 1
    else:
        counts[f"toy run, {what}: went on by itself"] += 1
    if ended != alone:
        raise CounterExample(f"it ended in state {ended}, the run that was left alone in {alone}")


Log = list[str]


def _train(
    out: Path, data: Path, *, save_every: int, watch: Callable[[Event], None]
) -> tuple[str | SaveFailed | None, Log]:
    """The final state's digest, or why it stopped; and what happened, in order."""
    log: Log = []

    def observe(event: Event) -> None:
        if isinstance(event, StepEnded):
            log.append(f"step {event.step}")
        elif isinstance(event, CheckpointSaved):
            log.append(f"saved {event.step}")
        watch(event)

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if "the next save tries again" in str(message):
            log.append("failed")

    config = TrainConfig(
        out=str(out), data=str(data), max_steps=_STEPS, save_every=save_every, batch_size=2, warmup_steps=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DistrustWarning)
        warnings.showwarning = warn
        try:
            trainer = DistrustTrainer(config, engine=ToyEngine(), observers=[observe])
            return trainer.train().state_digest, log
        except SaveFailed as error:
            return error, log


def _judge_log(log: Log, ended: str | SaveFailed | None) -> None:
    row = 0
    for entry in log:
        row = 0 if entry.startswith("saved") else row + (entry == "failed")
        if row >= MAX_FAILURES:
            raise CounterExample(f"{row} failures in a row, and it went on: {log}")
    if isinstance(ended, SaveFailed) and row < MAX_FAILURES - 1 and _steps_made(log) < _STEPS:
        raise CounterExample(f"stopped after {row} failures in a row and one more: {log}: {ended}")


def _judge_message(error: SaveFailed, directory: Path) -> None:
    text, there = str(error), CheckpointManager(directory).list_checkpoints()
    known = ["no longer exists", "nothing was saved yet"]
    known += [f"step {step} is saved" for step in there]
    if "\n" in text or not any(what in text for what in known):
        raise CounterExample(f"steps {there} stand, and the message is: {text}")


def _require_saved(log: Log, directory: Path) -> None:
    """The newest that was reported durable is there, and whole."""
    saved = [int(entry.split()[1]) for entry in log if entry.startswith("saved")]
    if saved:
        found = CheckpointManager(directory).load_latest().step
        if found < saved[-1]:
            raise CounterExample(f"step {saved[-1]} was reported durable, step {found} is loaded")


def _steps_made(log: Log) -> int:
    return sum(entry.startswith("step") for entry in log)


def _records(path: Path) -> Path:
    rng = random.Random(0)
    lines = [
        json.dumps(
            {
                "text": " ".join(rng.choice(["ore", "salt", "melts", "at", "9"]) for _ in range(2 + i % 5)),
                "authority_weight": round(rng.uniform(0, 0.9), 3),
                "provenance_entropy": round(rng.uniform(0, 1.5), 3),
            }
        )
        for i in range(11)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _full(directory: Path) -> Trouble:
    filler = Filler(directory.parents[1])
    return Trouble(begin=lambda: filler.leave(0), end=filler.gone)


def _protected(directory: Path) -> Trouble:
    root = str(directory.parents[1])

    def begin() -> None:
        volumes.command("mount", "--bind", root, root)
        volumes.command("mount", "-o", "remount,bind,ro", root)

    return Trouble(begin=begin, end=lambda: volumes.command("umount", root))


def _limited(_directory: Path) -> Trouble:
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    return Trouble(
        begin=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most)),
        end=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (before, most)),
    )


def _renamed(directory: Path) -> Trouble:
    away = directory.with_name("away")
    return Trouble(begin=lambda: _rename(directory, away), end=lambda: _rename(away, directory))


def _rename(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        source.rename(target)


def _removed(directory: Path) -> Trouble:
    return Trouble(begin=lambda: volumes.remove_all(directory), end=lambda: None, loses=True)


def _removed_with_the_run(directory: Path) -> Trouble:
    return _removed(directory.parent)


_TROUBLES: dict[str, Callable[[Path], Trouble]] = {
    "disk full": _full,
    "write protected": _protected,
    "ulimit -f": _limited,
    "directory renamed": _renamed,
    "directory removed": _removed,
    "run removed": _removed_with_the_run,
}
_ON_A_VOLUME = ("disk full", "write protected")
