"""What ``distrust.importers.convert`` promises, whatever it is given.

- Each checkpoint has an outcome in one line. An error is raised only if nothing can be converted.
- The source stays as it was, and nothing appears next to it.
- A converted checkpoint verifies under the reported digest, and converting again finds it. The target
  contains nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from campaigns.campaign import CounterExample, require
from campaigns.fuzz import corruptions
from campaigns.fuzz.invariants import MESSAGE_CHARACTERS, only_documented_errors, require_plain
from campaigns.fuzz.snapshots import snapshot
from distrust.checkpoint import catalog
from distrust.checkpoint.lock import LOCK_NAME
from distrust.errors import DistrustError
from distrust.importers.convert import ConvertedCheckpoint, convert, target_directory


@contextlib.contextmanager
def target(directory: Path) -> Iterator[Path]:
    """A run that does not exist yet, and is removed afterwards."""
    path = directory / "converted"
    corruptions.clear(path)
    try:
        yield path
    finally:
        corruptions.clear(path)


def convert_and_check(source: Path, to: Path, *, model: str | None = None) -> list[ConvertedCheckpoint]:
    """Convert a hostile checkpoint to a new run, and check every promise.

    Raises:
        CounterExample: if a promise was broken.
        DistrustError: if nothing can be converted.
    """
    original = snapshot(source)
    try:
        with only_documented_errors("convert"):
            results = convert(source, to, model=model)
    finally:
        require(snapshot(source) == original, "convert: the source is not as it was")
    for result in results:
        _require_reported(result, has_sparse=any(entry.is_sparse for entry in original.values()))
        _require_target(result)
    present = {path.name for path in target_directory(to).glob("*")} - {LOCK_NAME}
    expected = {result.target.name for result in results if result.target is not None}
    difference = f"{sorted(expected)} were converted, but {sorted(present)} are there"
    require(present == expected, f"convert: {difference}")
    if expected:
        with only_documented_errors("convert again"):
            repeated = [(one.outcome, one.state_digest) for one in convert(source, to, model=model)]
        outcomes = ["already converted" if one.succeeded else one.outcome for one in results]
        recognized = [*zip(outcomes, (one.state_digest for one in results), strict=True)]
        require(repeated == recognized, f"convert: expected {recognized} from a second call, got {repeated}")
    return results


def _require_reported(result: ConvertedCheckpoint, *, has_sparse: bool) -> None:
    reason = result.reason or ""
    excerpt = f"{len(reason):,} characters: {reason[:300]!a}…{reason[-300:]!a}"
    require(len(reason) <= MESSAGE_CHARACTERS, f"convert: a reason of {excerpt}")
    require("\n" not in reason, f"convert: a reason of several lines: {reason[:500]!a}")
    require_plain("convert: the reason", reason)
    require("no memory" not in reason or has_sparse, f"convert: {reason[:500]}")


def _require_target(result: ConvertedCheckpoint) -> None:
    is_consistent = result.succeeded is (result.target is not None)
    require(is_consistent, f"convert: {result.outcome}, and a target {result.target}")
    require(result.succeeded or bool(result.reason), f"convert: {result.outcome}, without a reason")
    if result.target is not None:
        try:
            digest = catalog.verify(result.target).state_digest
        except DistrustError as error:
            raise CounterExample(f"convert: the converted checkpoint does not verify: {error}") from error
        require(digest == result.state_digest, "convert: the reported digest is that of another state")
