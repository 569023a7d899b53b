"""Fixtures of this folder: no test waits for a disk."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_fsync(no_fsync: None) -> None:
    """Tests of power loss check the calls, not the disk."""
