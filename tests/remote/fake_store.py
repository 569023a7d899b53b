"""A store in memory that fails as a test chooses. It keeps conditions, unless told not to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import BinaryIO

from distrust.checkpoint.remote.client import ObjectInfo
from distrust.checkpoint.remote.location import Location
from distrust.errors import RemoteError


class FakeStore:
    """The objects of a store; ``connect`` gives clients of it, each at one location."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  #: full key -> content, number of the write
        self.mutex = threading.RLock()
        self.writes = 0
        self.requests: list[tuple[str, str]] = []  #: of all clients: action, full key
        #: Called with action and key before each request; raises what the request is to raise.
        self.before: Callable[[str, str], None] = lambda action, key: None
        self.ignores_conditions = False
        self.loses_answers = False  #: the client's second try of a creation finds its first

    def connect(self, location: Location, **seconds: float) -> FakeClient:
        return FakeClient(self, location)


class FakeClient:
    def __init__(self, store: FakeStore, location: Location) -> None:
        self.store, self.location = store, location
        self._prefix = f"{location}/"

    def create(self, key: str, content: bytes) -> bool:
        with self._request("create", key) as name:
            if name in self.store.objects and not self.store.ignores_conditions:
                return False
            self._write(name, content)
            return not self.store.loses_answers

    def put(self, key: str, content: bytes | BinaryIO) -> None:
        if not isinstance(content, bytes):
            content.seek(0)
            content = content.read()
        with self._request("put", key) as name:
            self._write(name, content)

    def read(self, key: str, begin: int, end: int) -> memoryview | None:
        with self._request("read", key) as name:
            entry = self.store.objects.get(name)
            return None if entry is None else memoryview(entry[0])[begin:end]

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        with self._request("list", prefix) as name:
            names = [each for each in self.store.objects if each.startswith(name)]
            return [self._info(each) for each in names]

    def head(self, key: str) -> ObjectInfo | None:
        with self._request("head", key) as name:
            return self._info(name) if name in self.store.objects else None

    def delete(self, key: str) -> None:
        with self._request("delete", key) as name:
            self.store.objects.pop(name, None)

    def _info(self, name: str) -> ObjectInfo:
        content, number = self.store.objects[name]
        return ObjectInfo(name.removeprefix(self._prefix), len(content), str(number))

    def _write(self, name: str, content: bytes) -> None:
        self.store.writes += 1
        self.store.objects[name] = content, self.store.writes

    def _request(self, action: str, key: str) -> _Request:
        name = self._prefix + key
        self.store.before(action, name)
        self.store.requests.append((action, name))
        return _Request(self.store.mutex, name)


class _Request:
    def __init__(self, mutex: threading.RLock, name: str) -> None:
        self._mutex, self._name = mutex, name

    def __enter__(self) -> str:
        self._mutex.acquire()
        return self._name

    def __exit__(self, *error: object) -> None:
        self._mutex.release()


def outage(url: str = "s3://bucket/run") -> RemoteError:
    return RemoteError(f"{url}: the store does not answer", url=url, temporary=True)
