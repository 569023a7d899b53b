"""The product broken on purpose, where it writes to a store: the campaign must find each.

A fault is planted in the process that calls :func:`plant`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _drop_condition() -> None:
    """Every creation succeeds; the probe alone still sees a condition."""
    from distrust.checkpoint.remote import client

    original = client.Client.create

    def create(self: Any, key: str, content: bytes) -> bool:
        if key.endswith("/probe"):
            return original(self, key, content)
        self.put(key, content)
        return True

    client.Client.create = create  # type: ignore[method-assign]


def _own_what_exists() -> None:
    """A term that exists is taken for one's own."""
    from distrust.checkpoint.remote import client

    original = client.Client.create

    def create(self: Any, key: str, content: bytes) -> bool:
        return original(self, key, content) or not key.endswith("/probe")

    client.Client.create = create  # type: ignore[method-assign]


def _own_nothing_that_exists() -> None:
    """A term that exists is taken for another's, also where only the answer to its creation was lost."""
    from distrust.checkpoint.remote import client

    original = client.Client.read

    def read(self: Any, key: str, begin: int, end: int) -> memoryview | None:
        content = original(self, key, begin, end)
        is_term = content is not None and "terms/" in key and key.endswith(".json")
        return memoryview(bytes(content) + b" ") if content is not None and is_term else content

    client.Client.read = read  # type: ignore[method-assign]


def _count_everything() -> None:
    """What a replaced writer uploads counts."""
    from distrust.checkpoint.remote import line

    def count_all(files: Any, bases: Any) -> Any:
        return sorted(files, key=lambda file: (file.step, file.kind == "final", file.term))

    line.line = count_all


def _verify_nothing() -> None:
    """What is downloaded is not compared with its digests."""
    from distrust.checkpoint import verified_read

    verified_read.check_digest = lambda *_: None


def _upload_by_name() -> None:
    """A file is opened when it is uploaded, not when it is saved: its name may be gone by then."""
    from distrust.checkpoint.remote import mirror

    class Lazy:
        def __init__(self, path: Path) -> None:
            self._path = path
            self._file: Any = None

        def __getattr__(self, name: str) -> Any:
            if self._file is None:
                self._file = open(self._path, "rb")  # noqa: SIM115
            return getattr(self._file, name)

        def close(self) -> None:
            if self._file is not None:
                self._file.close()

    vars(mirror)["open_regular_file"] = Lazy


def _never_confirm() -> None:
    """A writer does not look whether it was replaced."""
    from distrust.checkpoint.remote import terms

    original = terms.Terms.__init__

    class Blind:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            return getattr(self._client, name)

        def head(self, key: str) -> None:
            return None

    def construct(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._client = Blind(self._client)

    terms.Terms.__init__ = construct  # type: ignore[method-assign]


#: By name: plants the fault.
FAULTS: dict[str, Callable[[], None]] = {
    "no-condition": _drop_condition,
    "exists-is-mine": _own_what_exists,
    "exists-is-not-mine": _own_nothing_that_exists,
    "no-base": _count_everything,
    "no-verification": _verify_nothing,
    "by-name": _upload_by_name,
    "no-confirmation": _never_confirm,
}


def plant(name: str | None) -> None:
    """Break the product in this process; None breaks nothing."""
    if name is not None:
        FAULTS[name]()
