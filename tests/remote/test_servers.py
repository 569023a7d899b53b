"""The stores that other tests use: what they promise of each."""

from __future__ import annotations

import pytest

from distrust.checkpoint.remote.client import connect
from distrust.checkpoint.remote.location import parse


@pytest.mark.parametrize(("name", "keeps_conditions"), [("s3", True), ("azure", True), ("rclone", False)])
def test_a_store_keeps_conditions_or_ignores_them(name, keeps_conditions, request):
    remote = request.getfixturevalue(name)
    client = connect(parse(remote.url, "URL"))
    assert client.list() == []
    assert client.create("terms/1", b"one")
    assert client.create("terms/1", b"other") != keeps_conditions
    assert [each.key for each in client.list()] == ["terms/1"]
