"""Fixtures of this folder: nothing here waits for a disk."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_fsync(no_fsync: None) -> None:
    """Where power loss matters, tests watch the calls and not the disk."""
