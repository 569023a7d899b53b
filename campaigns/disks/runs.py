"""The trainer on disks that fail: it warns, continues, and stops at the third failed save in a row."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from campaigns.campaign import require
from campaigns.disks import volumes
from campaigns.disks.volumes import Filler
from campaigns.session import Session
from campaigns.training_run import COMMAND, TrainingRun, reference_digest, train_toy
from distrust import CheckpointManager
from distrust.errors import DistrustWarning, SaveFailed
from distrust.testing.models import write_records
from distrust.training.events import CheckpointSaved, Event, StepEnded
from distrust.training.saver import MAX_FAILURES

_TOY_STEPS = 16  # some milliseconds
#: A run of some seconds, most of which it takes to load the model.
_REAL_OPTIONS = (
    *("--max-steps", "30", "--save-every", "2", "--batch-size", "1", "--max-length", "32"),
    *("--lora-rank", "2", "--lora-dropout", "0.1", "--threads", "1"),
)
_REAL_SECONDS = 150  # longer is a hang

Log = list[str]


class Trouble(NamedTuple):
    begin: Callable[[], object]  # makes it happen
    end: Callable[[], object]  # undoes it as far as possible
    loses: bool = False  # whether the checkpoints are lost for good


def toy_training(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Trouble from one step to a later one, or to the end; then the same command once more."""
    name = rng.choice(list(_TROUBLES))
    if name in _NEED_A_VOLUME:
        volumes.private_mounts(home)
    data = write_records(home / "records.jsonl")
    expected, _ = _train(home / "reference", data, save_every=1, watch=lambda _: None)
    if name in _NEED_A_VOLUME:
        home = volumes.make(rng.choice(["ext4", "tmpfs", "ext2"]), home, mib=8)
    out = home / "run"
    trouble = _TROUBLES[name](out / "checkpoints")
    save_every = rng.randint(1, 3)
    first = rng.randint(1, _TOY_STEPS - 1)
    last = first + rng.randint(1, 5) * save_every

    def watch(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step in (first, last):
            (trouble.begin if event.step == first else trouble.end)()

    result, log = _train(out, data, save_every=save_every, watch=watch)
    counts[f"toy run, {name}: failed saves"] += log.count("failed")
    _check_log(log, result)
    if isinstance(result, SaveFailed):
        counts[f"toy run, {name}: stopped"] += 1
        _check_message(result, out / "checkpoints")
        if last > _count_steps(log):
            trouble.end()
        if not trouble.loses:
            _require_saved(log, out / "checkpoints")
        result, _ = _train(out, data, save_every=save_every, watch=lambda _: None)
        require(not isinstance(result, SaveFailed), f"the same command, with nothing in its way: {result}")
        counts[f"toy run, {name}: resumed by the same command"] += 1
    else:
        counts[f"toy run, {name}: continued by itself"] += 1
    require(result == expected, f"it ended in state {result}, the undisturbed run in {expected}")


def _train(
    out: Path, data: Path, *, save_every: int, watch: Callable[[Event], None]
) -> tuple[str | SaveFailed | None, Log]:
    """The final state's digest, or the error that stopped it; and what happened, in order."""
    log: Log = []

    def observe(event: Event) -> None:
        if isinstance(event, StepEnded):
            log.append(f"step {event.step}")
        elif isinstance(event, CheckpointSaved):
            log.append(f"saved {event.step}")
        watch(event)

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        if "the next save tries again" in str(message):
            log.append("failed")

    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("always", DistrustWarning)
        warnings.showwarning = show_warning
        try:
            result = train_toy(out, data, observe, max_steps=_TOY_STEPS, save_every=save_every)
        except SaveFailed as error:
            return error, log
    return result.state_digest, log


def _check_log(log: Log, result: str | SaveFailed | None) -> None:
    failures = 0
    for entry in log:
        failures = 0 if entry.startswith("saved") else failures + (entry == "failed")
        require(failures < MAX_FAILURES, f"{failures} failures in a row, and it continued: {log}")
    too_early = failures < MAX_FAILURES - 1 and _count_steps(log) < _TOY_STEPS
    text = f"stopped after {failures} failures in a row and one more: {log}: {result}"
    require(not (too_early and isinstance(result, SaveFailed)), text)


def _check_message(error: SaveFailed, directory: Path) -> None:
    """The message of the error that stops a run says what is saved."""
    text, steps = str(error), CheckpointManager(directory).list_checkpoints()
    allowed = ["no longer exists", "nothing was saved yet", *(f"step {step} is saved" for step in steps)]
    says_it = "\n" not in text and any(phrase in text for phrase in allowed)
    require(says_it, f"steps {steps} exist, and the message is: {text}")


def _require_saved(log: Log, directory: Path) -> None:
    """The newest checkpoint that was reported durable exists, and is intact."""
    saved = [int(entry.split()[1]) for entry in log if entry.startswith("saved")]
    if saved:
        step = CheckpointManager(directory).load_latest().step
        require(step >= saved[-1], f"step {saved[-1]} was reported durable, step {step} is loaded")


def _count_steps(log: Log) -> int:
    return sum(entry.startswith("step") for entry in log)


def _fill_disk(directory: Path) -> Trouble:
    filler = Filler(directory.parents[1])
    return Trouble(lambda: filler.fill(0), filler.remove)


def _write_protect(directory: Path) -> Trouble:
    undo = contextlib.ExitStack()
    return Trouble(lambda: undo.callback(volumes.write_protect(directory.parents[1])), undo.close)


def _limit_file_size(_directory: Path) -> Trouble:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return Trouble(
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def _rename_directory(directory: Path) -> Trouble:
    away = directory.with_name("away")
    return Trouble(lambda: _rename(directory, away), lambda: _rename(away, directory))


def _rename(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        source.rename(target)


def _remove(directory: Path) -> Trouble:
    return Trouble(lambda: volumes.remove_all(directory), lambda: None, loses=True)


_TROUBLES: dict[str, Callable[[Path], Trouble]] = {
    "disk full": _fill_disk,
    "write protected": _write_protect,
    "ulimit -f": _limit_file_size,
    "directory renamed": _rename_directory,
    "directory removed": _remove,
    "run removed": lambda directory: _remove(directory.parent),
}
_NEED_A_VOLUME = ("disk full", "write protected")  # of their own


def real_reference() -> str:
    return reference_digest(COMMAND, _REAL_OPTIONS)


def real_training(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """``distrust train`` on a disk that another process fills, and frees in time or after the run stopped."""
    expected = real_reference()
    volumes.private_mounts(home)
    root = volumes.make(rng.choice(["ext4", "tmpfs", "ext3"]), home, mib=24)
    run = TrainingRun(root / "run", _REAL_OPTIONS, hang_seconds=_REAL_SECONDS, log_folder=home / "log")
    failures = rng.randint(1, MAX_FAILURES)
    full_from = 2 * rng.randint(1, 5)
    filler = Filler(root)
    session = run.start()
    _wait(session, lambda: max(run.steps(), default=0) >= full_from)
    filler.fill(0)
    _wait(session, lambda: session.errors().count("\n") >= failures)
    if failures < MAX_FAILURES:
        filler.remove()
    code = session.wait()
    stopped_at = _check_output(session.errors().splitlines(), code, run, counts)
    filler.remove()
    if stopped_at is not None:
        second = run.start()
        code = second.wait()
        resumed = re.search(rf"^(?!step ).*\bstep {stopped_at}\b", "\n".join(second.output()), re.MULTILINE)
        text = f"the same command: exit code {code}: {second.output()} {second.errors()}"
        require(code == 0 and resumed is not None, text)
        counts["distrust train, disk full: resumed by the same command"] += 1
    digest = run.final_digest()
    require(digest == expected, f"it ended in state {digest}, the undisturbed run in {expected}")


def _check_output(lines: list[str], code: int, run: TrainingRun, counts: Counter[str]) -> int | None:
    """The newest step, if the run stopped; None if it continued to its end."""
    counts["distrust train, disk full: failed saves"] += len(lines)
    require(all("No space left" in line for line in lines), f"it printed: {lines}")
    if code == 0:
        counts["distrust train, disk full: continued by itself"] += 1
        return None
    newest = max(run.steps(), default=0)
    says_it = code == 1 and len(lines) >= MAX_FAILURES and f"step {newest} is saved" in lines[-1]
    require(says_it, f"exit code {code}, step {newest} is the newest, and it printed: {lines}")
    counts["distrust train, disk full: stopped, exit code 1"] += 1
    return newest


def _wait(session: Session, condition: Callable[[], bool]) -> None:
    while session.running and not condition():
        time.sleep(0.001)
