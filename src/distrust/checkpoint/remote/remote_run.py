"""The checkpoints of a run in a store: listed, chosen, and downloaded. Reads only, and needs no term.

Users name the run or its ``checkpoints``, as on a disk. One listing says which there are, the terms which of
them count, and the headers what they hold.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from distrust.checkpoint import catalog
from distrust.checkpoint.checkpoint_file import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.remote import fetch, line
from distrust.checkpoint.remote.client import Client, ObjectInfo, connect
from distrust.checkpoint.remote.line import RemoteFile
from distrust.checkpoint.remote.location import Location
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    NoIntactCheckpoint,
    UnsupportedVersion,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
_FOLDER = f"{catalog.RUN_SUBDIRECTORY}/"
_SUFFIX = ".safetensors"
#: Requests at once; each takes some 50 ms, most of it waiting.
_REQUESTS_IN_FLIGHT = 16
#: Seconds for which a request is repeated: somebody waits for the answer.
_GIVE_UP_AFTER = 10.0
_TERM_BYTES = 64 << 10
_STALE_SECONDS = 60  # nothing locks a folder of the cache


class RemoteRun:
    """A run, its checkpoints, or one of them, in a store. A ``client`` is one at the location of the run.

    Its construction raises as :func:`connect`; every method raises RemoteError if the store fails, and
    CheckpointError as its local counterpart.
    """

    def __init__(self, location: Location, client: Client | None = None) -> None:
        self.location = location
        self.is_one = location.name.endswith(_SUFFIX)  #: whether it is one checkpoint
        self.client = client or connect(
            location.parent if self.is_one else location, give_up_after=_GIVE_UP_AFTER
        )
        self.directory = location  #: of the checkpoints, once :meth:`files` has listed them
        self.displaced: list[RemoteFile] = []  #: objects that do not count, once they are listed

    def files(self) -> list[RemoteFile]:
        """The checkpoints that count, by step, kind and term, by their names alone."""
        if self.is_one:
            info = self.client.head(self.location.name)
            if info is None or (file := line.parse_key(info)) is None:
                raise self.not_found(f"no such checkpoint{', by its name' if info else ''}")
            return [file]
        infos, folder = self.client.list(), ""
        if inner := [info for info in infos if info.key.startswith(_FOLDER)]:
            infos, folder = [info._replace(key=info.key.removeprefix(_FOLDER)) for info in inner], _FOLDER
            self.directory = self.location / catalog.RUN_SUBDIRECTORY
        files = [file for info in infos if "/" not in info.key and (file := line.parse_key(info))]
        terms = line.parse_terms(infos)
        numbers = line.bounding_terms(files, terms)
        bases = _in_parallel(lambda number: self._base(folder + line.term_key(number, "json")), numbers)
        counting = line.line(files, dict(zip(numbers, bases, strict=True)))
        self.displaced = [file for file in files if file not in counting]
        return [file._replace(key=folder + file.key) for file in counting]

    def run_names(self) -> list[str]:
        """The names of the runs directly below the location: those with a folder of checkpoints."""
        paths = [info.key.split("/") for info in self.client.list()]
        return sorted({path[0] for path in paths if path[1:2] == [catalog.RUN_SUBDIRECTORY] and path[2:]})

    def scan(self) -> Scan:
        """List the checkpoints that count, with their headers. A damaged one that was named is an error."""

        def read(file: RemoteFile) -> CheckpointFile | DamagedFile | None:
            try:
                return fetch.read_header(self.client, file)
            except CheckpointNotFound:
                return None  # removed since it was listed
            except (CorruptCheckpoint, UnsupportedVersion) as error:
                if self.is_one:
                    raise
                return DamagedFile(fetch.object_path(self.client, file), file.step, error)

        return Scan.of(file for file in _in_parallel(read, self.files()) if file is not None)

    def object_of(self, file: CheckpointFile) -> RemoteFile:
        """The object of a listed checkpoint."""
        key = str(file.path).removeprefix(f"{self.client.location}/")
        listed = line.parse_key(ObjectInfo(key, file.bytes, ""))
        assert listed is not None  # noqa: S101 - it was listed
        return listed

    def require_files(self) -> list[RemoteFile]:
        """As :meth:`files`; CheckpointNotFound if there are none."""
        if files := self.files():
            return files
        raise self.not_found("no checkpoints here")

    def newest(self) -> CheckpointFile:
        """The newest checkpoint with an intact header. Warns of newer ones that are damaged."""
        return self._first_intact(reversed(self.require_files()), partial(fetch.read_header, self.client))

    def fetch(
        self, files: Iterable[RemoteFile], folder: Path, disk: Disk | None = None
    ) -> tuple[RemoteFile, Path]:
        """Download the first that is intact, and warn of those before it; returns it, and its path here.

        The folder is created. What is there already and intact stays; a file of another state is replaced.
        """
        from distrust.checkpoint import storage  # not needed for a listing

        disk = disk or Disk()
        with storage.errors_for_directory(folder):
            storage.make_directory(folder, disk)
        storage.remove_stale_files(folder, disk, min_age=_STALE_SECONDS)  # of downloads that were killed

        def get(file: RemoteFile) -> tuple[RemoteFile, Path]:
            path = folder / checkpoint_file_name(file.step, file.kind)
            if not self._is_here(file, path):
                fetch.fetch(self.client, file, path, disk)
            return file, path

        return self._first_intact(files, get)

    def not_found(self, reason: str) -> CheckpointNotFound:
        """The error for what is not there."""
        return CheckpointNotFound(f"{self.location}: {reason}", path=self.location.path)

    def _first_intact(self, files: Iterable[RemoteFile], read: Callable[[RemoteFile], Result]) -> Result:
        """What ``read`` returns for the first that is intact, and there; warns of those before it."""
        skipped: list[str] = []
        for file in files:
            try:
                result = read(file)
            except (CheckpointNotFound, CorruptCheckpoint, UnsupportedVersion) as error:
                if self.is_one:
                    raise
                skipped.append(str(error))
                continue
            for reason in skipped:
                text = f"skipped a damaged checkpoint: {reason}"
                warnings.warn(text, DamagedCheckpointWarning, stacklevel=3)
            return result
        text = f"{self.location}: there are checkpoints, and none of them is intact:"
        raise NoIntactCheckpoint([text, *skipped], path=self.location.path)

    def _is_here(self, file: RemoteFile, path: Path) -> bool:
        """Whether the file at ``path`` is that checkpoint, and intact."""
        with contextlib.suppress(CheckpointError):  # there is none, or it is damaged: it is downloaded
            return catalog.verify(path).digest == fetch.read_header(self.client, file).digest
        return False

    def _base(self, key: str) -> int:
        """The step from which the holder of a term goes on."""
        content = self.client.read(key, 0, _TERM_BYTES)
        try:
            base: int = line.parse_term(content if content is not None else b"")["base"]
        except ValueError as error:
            path = (self.client.location / key).path
            text = f"{path}: damaged: {error}, so that nobody can tell which checkpoints count; restore it"
            raise CheckpointError(text, path=path) from None
        return base


def _in_parallel(call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        return list(pool.map(call, items))
