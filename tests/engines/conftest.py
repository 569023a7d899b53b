"""Fixtures of the engine tests: no test waits for a disk."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_fsync(no_fsync: None) -> None:
    """fsync is disabled; durability is tested elsewhere, on recorded system calls."""
