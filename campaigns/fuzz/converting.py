"""What is promised of ``distrust.importers.convert``, whatever it is given.

- Each checkpoint has an outcome, in one line. An error is raised only where nothing can be converted.
- What is read is left alone: each file as it was, and nothing beside it.
- What was converted verifies, under the digest that was told; the same call again finds it there. For what
  was not, nothing stands in the target.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.campaign import CounterExample, require
from campaigns.fuzz import corruptions
from campaigns.fuzz.invariants import (
    MESSAGE_CHARACTERS,
    only_documented_errors,
    require_plain,
)
from distrust.checkpoint import catalog
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import DistrustError
from distrust.importers.convert import ConvertedCheckpoint, convert, target_directory

#: Larger files are sparse: who has no memory for such a one has not taken it for what it is not.
_LARGE_BYTES = 1 << 30


@contextlib.contextmanager
def target(directory: Path) -> Iterator[Path]:
    """A run that is not there yet, and is gone afterwards."""
    path = directory / "converted"
    corruptions.clear(path)
    try:
        yield path
    finally:
        corruptions.clear(path)


def convert_and_check(source: Path, to: Path, *, model: str | None = None) -> list[ConvertedCheckpoint]:
    """Convert; what came of it keeps every promise.

    Args:
        source: what is hostile.
        to: a run that is not there yet.
        model: the base model, if it is given.

    Raises:
        CounterExample: if a promise was not kept.
        DistrustError: if nothing can be converted.
    """
    before = as_it_lies(source)
    try:
        with only_documented_errors("convert"):
            done = convert(source, to, model=model)
    finally:
        require(as_it_lies(source) == before, "convert: what was read is not as it was")
    for one in done:
        _require_told(one, before)
        _require_standing(one)
    directory = target_directory(to)
    there = {path.name for path in directory.glob("*")} - {LOCK_NAME}
    well = {one.target.name for one in done if one.target is not None}
    require(there == well, f"convert: {sorted(well)} were converted, and {sorted(there)} are there")
    if well:
        with only_documented_errors("convert again"):
            again = convert(source, to, model=model)
        same = [(one.outcome, one.state_digest) for one in again]
        expected = [("already there" if one.succeeded else one.outcome, one.state_digest) for one in done]
        require(same == expected, f"convert: {expected}, and the same again: {same}")
    return done


def as_it_lies(path: Path) -> dict[str, Any]:
    """Everything that is there, links as links: what it is, and what it holds."""
    found: dict[str, Any] = {}
    for place in (path, *(path.rglob("*") if os.path.isdir(path) and not path.is_symlink() else ())):
        if not os.path.lexists(place):
            continue
        status = os.lstat(place)
        content = ""
        if place.is_symlink():
            content = os.readlink(place)
        elif stat.S_ISREG(status.st_mode) and status.st_size < _LARGE_BYTES:
            content = hashlib.sha256(place.read_bytes()).hexdigest()
        found[str(place)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    return found


def _require_told(one: ConvertedCheckpoint, before: dict[str, Any]) -> None:
    reason = one.reason or ""
    long = f"{len(reason):,} characters: {reason[:300]!a}…{reason[-300:]!a}"
    require(len(reason) <= MESSAGE_CHARACTERS, f"convert: a reason of {long}")
    require("\n" not in reason, f"convert: a reason of several lines: {reason[:500]!a}")
    require_plain("convert: the reason", reason)
    large = any(size >= _LARGE_BYTES for _, size, *_ in before.values())
    require("no memory" not in reason or large, f"convert: {reason[:500]}")


def _require_standing(one: ConvertedCheckpoint) -> None:
    require(one.succeeded is (one.target is not None), f"convert: {one.outcome}, and a target {one.target}")
    require(one.succeeded or bool(one.reason), f"convert: {one.outcome}, and no reason why")
    if one.target is not None:
        try:
            digest = catalog.verify(one.target).state_digest
        except DistrustError as error:
            raise CounterExample(f"convert: what was converted does not verify: {error}") from error
        require(digest == one.state_digest, "convert: told the digest of another state")
