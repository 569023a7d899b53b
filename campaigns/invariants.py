"""What stands in a directory after its writer was killed: what was promised, and how far the save had come.

Reads only, and takes no lock: what the dead writer left is there for the next one to meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from campaigns.campaign import CounterExample
from distrust import CheckpointManager
from distrust.checkpoint import Scan, catalog, retention
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import LOCK_NAME
from distrust.checkpoint.retention import Candidate, Retention
from distrust.errors import DistrustError, DistrustWarning

PAGE = 4096


def require_kept(directory: Path, reported: Iterable[Candidate], rules: Retention) -> Scan:
    """Check what is promised of a directory whose writer is dead; returns what is there.

    Args:
        directory: of checkpoints.
        reported: every checkpoint that was known to be durable at some time.
        rules: of the writer.

    Raises:
        CounterExample: if a file is damaged; if a checkpoint is gone that no rule removes; if the newest one
            is not what is loaded; if more is left behind than one save's temporary file.
    """
    reported = list(reported)
    try:
        scan = catalog.scan(directory)
        for path in [file.path for file in scan.files] + [file.path for file in scan.damaged]:
            catalog.verify(path)
    except DistrustError as error:
        raise CounterExample(f"{directory}: {error}") from error
    there = {file.step: Candidate(file.step, file.kind == "final", file.metrics) for file in scan.files}
    _require_there(directory, reported, there, rules)
    left = sorted(path.name for path in directory.glob(".checkpoint-*"))
    if len(left) > 1:
        raise CounterExample(f"{directory}: more than one save was under way: {', '.join(left)}")
    if there:
        _require_newest_loads(directory, max(there))
    return scan


def _require_there(
    directory: Path, reported: list[Candidate], there: dict[int, Candidate], rules: Retention
) -> None:
    # What was removed once stays removable: newer ones and better ones only ever come in addition.
    kept = retention.steps_to_keep({**{one.step: one for one in reported}, **there}.values(), rules)
    for one in reported:
        name = checkpoint_file_name(one.step, "final" if one.final else "periodic")
        if one.step in kept and one.step not in there:
            raise CounterExample(f"{directory}: {name} was durable, no rule removes it, and it is gone")
        if one.final and not there[one.step].final:
            raise CounterExample(f"{directory}: {name} was durable, and only a periodic one is there")


def _require_newest_loads(directory: Path, newest: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DistrustWarning)
        try:
            loaded = CheckpointManager(directory).load_latest()
        except (DistrustError, DistrustWarning) as error:
            raise CounterExample(f"{directory}: load_latest: {error}") from error
    if loaded.step != newest:
        raise CounterExample(f"{directory}: load_latest gave step {loaded.step}, and {newest} stands")


def require_writable(directory: Path) -> None:
    """Check that a dead writer's lock is free, and that what it left is swept by the next one.

    Raises:
        CounterExample: if not.
    """
    try:
        with CheckpointManager(directory) as manager:
            manager.acquire()
    except DistrustError as error:
        raise CounterExample(f"{directory}: the next writer is refused: {error}") from error
    strange = [
        path.name
        for path in directory.iterdir()
        if path.name != LOCK_NAME and not path.name.endswith(".safetensors")
    ]
    if strange:
        raise CounterExample(f"{directory}: the next writer left {', '.join(strange)}")


def phase(directory: Path, scan: Scan, reported: Iterable[Candidate], rules: Retention) -> str:
    """How far the save had come when its writer was killed, as the disk shows it."""
    for path in directory.glob(".checkpoint-*"):
        return _of_temporary(path)
    newest = max((file.step for file in scan.files), default=-1)
    if newest > max((one.step for one in reported), default=-1):
        if len(scan.files) > len(retention.steps_to_keep(_candidates(scan), rules)):
            return "renamed, the old one not yet removed"
        return "renamed, not yet reported"
    return "no save to be seen"


def _candidates(scan: Scan) -> list[Candidate]:
    return [Candidate(file.step, file.kind == "final", file.metrics) for file in scan.files]


def _of_temporary(path: Path) -> str:
    content = path.read_bytes()
    if not content:
        return "temporary file made"
    pages = [any(content[begin : begin + PAGE]) for begin in range(0, len(content), PAGE)]
    if not any(pages):
        return "space reserved"
    if pages[0]:
        return "header written, not renamed"
    # The header's pages come first, and are written last.
    return "data written" if all(pages[pages.index(True) :]) else "some of the data written"
