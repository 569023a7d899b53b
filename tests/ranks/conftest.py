"""Fixtures of the tests with several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks.world import World


@pytest.fixture(scope="session")
def world(forked_python: Path) -> Iterator[World]:
    """Up to four ranks that run scenarios together. Idle ones cost next to nothing."""
    with World(forked_python) as world:
        yield world
