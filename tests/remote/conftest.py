"""A place of its own for each test in the object stores that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from campaigns.remote import servers
from campaigns.remote.servers import Store


class Remote(NamedTuple):
    """A place in a store; this process and those that it starts can reach it."""

    url: str  #: without objects below it
    store: Store


def _use(store: Store, monkeypatch: pytest.MonkeyPatch) -> Remote:
    for name in servers.FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return Remote(store.fresh_url(), store)


@pytest.fixture
def s3(share_server: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A place in SeaweedFS."""
    return _use(share_server("seaweedfs"), monkeypatch)


@pytest.fixture
def azure(share_server: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A place in Azurite."""
    return _use(share_server("azurite"), monkeypatch)


@pytest.fixture
def rclone(share_server: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A place in a store that ignores conditions."""
    return _use(share_server("rclone"), monkeypatch)
