"""Local copies, in the cache, of what is in a store. Nothing is written into a folder that a run owns.

A copy is named by digests of its URL and of the version, so that no name that a store says becomes a path.
It appears complete. The store is asked each time: without its answer, the copy may be of an old version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distrust.activity import current
from distrust.atomic import atomic_file, hold_lock
from distrust.checkpoint.remote.client import Client, ObjectInfo, connect
from distrust.checkpoint.remote.fetch import blocks, object_path
from distrust.checkpoint.remote.location import Location
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.checkpoint.retainer import as_candidates
from distrust.checkpoint.retention import Retention, rank_by_metric
from distrust.errors import ConfigError, DataError, RemoteError, WriteFailed
from distrust.paths import cache_folder, cache_name, refuse_links
from distrust.run_record import RunRecord

_COMPANION_BYTES = 1 << 30


def fetch_checkpoint(location: Location, *, step: int | None = None, best: bool = False) -> tuple[Path, Path]:
    """Download one checkpoint, by default a run's newest, unless an intact copy is here; raises as a read.

    Returns the copy, and the name of the object.
    """
    run, current.location = RemoteRun(location), location  # a slow download is named
    if run.is_one and (best or step is not None):
        raise ConfigError(f"--step and --best go with a run; {location} is one checkpoint")
    files = run.require_files()[::-1]
    if best:
        read = run.scan().files
        rules = Retention(**RunRecord.from_header(read[-1].header).best_rules) if read else Retention()
        ranked = rank_by_metric(as_candidates(read), rules)
        if not ranked:
            raise run.not_found(f"no checkpoint has the metric {rules.metric!r}")
        files = [file for each in ranked for file in files if file.step == each]
    elif step is not None:
        steps = ", ".join(map(str, sorted({file.step for file in files})))
        files = [file for file in files if file.step == step]
        if not files:
            raise run.not_found(f"no checkpoint of step {step}; there are {steps}")
    folder = cache_folder() / "fetched" / cache_name(location)
    with _one_process(folder / ".download.lock"):
        file, path = run.fetch(files, folder)
    current.location = None
    return path, object_path(run.client, file)


def read_companion(client: Client, name: str) -> bytes | None:
    """A file beside the checkpoints of a run; None if there is none. One request, so of one version."""
    content = client.read(name, 0, _COMPANION_BYTES)
    if content is not None and len(content) == _COMPANION_BYTES:
        raise DataError(f"{client.location / name}: is larger than any of a run")
    return None if content is None else bytes(content)


@contextlib.contextmanager
def fetch_files(location: Location, *names: str) -> Iterator[Path]:
    """Context manager that gives a temporary folder with those of a run's files that exist."""
    client = connect(location)
    with tempfile.TemporaryDirectory(prefix="distrust-") as folder:
        for name in names:
            if (content := read_companion(client, name)) is not None:
                Path(folder, name).write_bytes(content)
        yield Path(folder)


def find(location: Location, *, cache: Path) -> tuple[Client, list[ObjectInfo]]:
    """The object at a location, with a client of what contains it, or the objects below the location."""
    try:
        folder = connect(location)
        if location.key and (info := (client := connect(location.parent)).head(location.name)):
            return client, [info]
        return folder, folder.list()
    except RemoteError as error:
        copies = sorted((cache / "data-1").glob(f"{_digest(str(location))}-*"), key=os.path.getmtime)
        hint = f". An earlier start has copied it: to use that, give {copies[-1]}" if copies else ""
        raise RemoteError(f"{error}{hint}", url=error.url, temporary=error.temporary) from None


def copy_of(client: Client, info: ObjectInfo, suffix: str, *, cache: Path) -> Path:
    """The copy of a version of an object.

    Raises RemoteError, DataError if it was replaced meanwhile, ConfigError if it cannot be written.
    """
    url = str(client.location / info.key)
    path = cache / "data-1" / f"{_digest(url)}-{_digest(info.etag)}{suffix}"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # training data may be confidential
        refuse_links(path.parent)
        with _one_process(path.with_name(f".{path.name}.lock")):
            # A store without ETags may have another version of that size.
            if not info.etag or not path.is_file() or path.stat().st_size != info.size:
                _download(client, info, path)
    except (OSError, WriteFailed) as error:
        remedy = "give another folder with --cache-dir or $DISTRUST_CACHE"
        raise ConfigError(f"{url}: no copy in the cache: {error}; {remedy}") from error
    return path


@contextlib.contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Context manager for a download: other processes, such as ranks, wait, and find it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without locks, each process downloads it
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(hold_lock(lock, flags=os.O_RDWR | os.O_CREAT, on_wait=lambda _: None))
        yield


def _download(client: Client, info: ObjectInfo, path: Path) -> None:
    current.location = url = client.location / info.key
    if info.size > (free := shutil.disk_usage(path.parent).free):
        raise WriteFailed(f"{url}: has {info.size:,} bytes, and {path.parent} has {free:,} free", path=path)
    changed = DataError(f"{url}: was replaced while it was downloaded; start again")

    def read(begin: int, end: int) -> memoryview:
        content = client.read(info.key, begin, end)
        if content is None or len(content) != end - begin:
            raise changed
        return content

    with atomic_file(path, force=True) as file:
        for _, block in blocks(read, 0, info.size):
            file.write(block)
        if client.head(info.key) != info:  # its blocks may be of two versions
            raise changed
    current.location = None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
