"""The command ``distrust copy``: runs and checkpoints to and from a store."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from distrust.atomic import atomic_file
from distrust.checkpoint import CheckpointFile, CheckpointManager, catalog
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import checkpoint_file_name, errors_with_path, open_regular_file
from distrust.checkpoint.remote import fetch
from distrust.checkpoint.remote.client import connect
from distrust.checkpoint.remote.line import object_name
from distrust.checkpoint.remote.location import Location
from distrust.checkpoint.remote.pruner import hold_term
from distrust.cli import targets
from distrust.cli.arguments import TARGET, parser
from distrust.cli.targets import Target
from distrust.errors import CheckpointError, CheckpointNotFound, ConfigError, printable, warn
from distrust.paths import refuse_links
from distrust.remote_copies import read_companion
from distrust.reporting.display import size

#: What a run has beside its checkpoints.
COMPANIONS = ("metrics.jsonl", "provenance.json", "config.toml")


def main(arguments: list[str]) -> int:
    """Copy checkpoints, and what a run has beside them; exit code 1 if one is damaged."""
    arg = parser(
        "copy",
        description="Every byte is verified, and the newest checkpoint is copied first. What B already has "
        "stays: no state replaces another. Refused while a run writes to B.",
        examples=[
            "distrust copy runs/train s3://bucket/runs/train",
            "distrust copy s3://bucket/runs/train runs/train",
            "distrust copy s3://bucket/runs/train/checkpoints/checkpoint-50.1-0123456789abcdef.safetensors .",
        ],
    )
    arg.add_argument("a", type=targets.target, help=TARGET)
    arg.add_argument("b", type=targets.target, help="folder or URL for it; A or B is a URL")
    arg.add_argument(
        "--take-over",
        action="store_true",
        help="the last writer to B is known to be dead: do not wait 60 s for a sign of life",
    )
    options = arg.parse_args(arguments)
    a, b = options.a, options.b
    if isinstance(a, Path) and isinstance(b, Path):
        raise ConfigError("copy: neither A nor B is a URL; cp copies folders")
    if b.name.endswith(".safetensors"):
        raise ConfigError(f"copy: {b} names a file; give the folder or URL that is to contain it")
    if options.take_over and isinstance(b, Path):
        raise ConfigError(f"--take-over goes with a URL; {b} has a lock, which ends with its writer")

    contents, is_run = targets.scan(a), targets.directory(a) != a
    if not contents.all_intact and not contents.damaged:
        raise CheckpointNotFound(f"{a}: no checkpoints here", path=targets.path_of(a))
    for damaged in contents.damaged:
        warn(f"{damaged.path}: not copied: damaged: {damaged.reason}")
    for foreign in contents.foreign:
        warn(f"{foreign.path}: not copied: in an older format; `distrust convert` brings it to this one")
    directory = targets.directory(b)
    if is_run and directory == b:
        directory = b / catalog.RUN_SUBDIRECTORY
    if isinstance(directory, Path) and directory != b:  # its own name was not given
        refuse_links(directory)
    if missing := _missing(contents.files, directory):  # else it needs no term, and does not wait for one
        if isinstance(directory, Location):
            _to_store(a, missing, directory, take_over=options.take_over)
        elif isinstance(a, Location):
            _to_folder(a, missing, directory)
    if is_run:
        _copy_companions(a, b)
    return 1 if contents.damaged else 0


def _missing(files: tuple[CheckpointFile, ...], directory: Target) -> list[CheckpointFile]:
    """What a directory lacks, newest first; reports the others. Raises CheckpointError for another state."""
    contents = catalog.scan(directory) if isinstance(directory, Path) else targets.scan(directory)
    existing = {(file.step, file.kind): file for file in contents.files}
    missing = []
    for identity, file in reversed({(file.step, file.kind): file for file in files}.items()):
        twin = existing.get(identity)
        if twin is None:
            missing.append(file)
        elif twin.state_digest == file.state_digest:
            print(printable(f"{twin.path}: already there"))
        else:
            text = f"{twin.path}: holds another state than {file.path}, and is not replaced"
            raise CheckpointError(f"{text}; copy to another folder or URL", path=twin.path)
    return missing


def _to_folder(a: Location, files: list[CheckpointFile], directory: Path) -> None:
    run = targets.remote(a)
    with CheckpointManager(directory) as manager:
        manager.acquire()  # fails while a training writes here
        for file in files:
            path = directory / checkpoint_file_name(file.step, file.kind)
            if path.exists():
                raise CheckpointError(f"{path}: is damaged, and not replaced; move it away", path=path)
            with _copying(file, path) as report:
                fetch.fetch(run.client, run.object_of(file), path, Disk(), report=report)


def _to_store(a: Target, files: list[CheckpointFile], directory: Location, *, take_over: bool) -> None:
    print(printable(f"{directory}: making sure that no other process writes there"), flush=True)
    client, source = connect(directory), targets.remote(a) if isinstance(a, Location) else None
    with (
        hold_term(targets.remote(directory), take_over=take_over) as terms,
        tempfile.TemporaryDirectory() as folder,
    ):
        for file in files:
            name = object_name(file.step, file.kind, terms.number, file.state_digest)
            with _copying(file, (directory / name).path) as report:
                path = Path(folder, "checkpoint.safetensors") if source else file.path
                if source:
                    fetch.fetch(source.client, source.object_of(file), path, Disk(), report=report)
                # Open from here on, so that no rule of its run removes it.
                with errors_with_path(path), _Counted(path, report) as content:
                    if catalog.verify(path).state_digest != file.state_digest:
                        raise CheckpointError(f"{path}: was replaced meanwhile; start again", path=path)
                    terms.confirm()
                    client.put(name, content)
                terms.confirm()  # else it does not count


class _Counted(io.BufferedReader):
    """A file that reports how far it was read."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(open_regular_file(path).detach())
        self._report = report

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._report(self.tell())
        return content


@contextlib.contextmanager
def _copying(file: CheckpointFile, path: Path) -> Iterator[Callable[[int], None]]:
    """Show in a terminal how many bytes of a file are copied, and then say that it is there."""
    from distrust.reporting.console import ConsoleReporter
    from distrust.training.events import Preparing

    total = max(file.bytes >> 20, 1)
    with ConsoleReporter(log_every=1, stream=sys.stderr) as console:
        yield lambda nbytes: console(Preparing(f"{path.name}, MiB", min(nbytes >> 20, total), total))
    print(printable(f"{path}: copied, {size(file.bytes)}"), flush=True)


def _copy_companions(a: Target, b: Target) -> None:
    for name in COMPANIONS:
        content, existing = _read(a, name), _read(b, name)
        if content is None or (existing or b"").startswith(content):  # the metrics of a run only grow
            continue
        if existing is not None and not content.startswith(existing):
            warn(f"{b / name}: differs from {a / name}, and is not replaced")
            continue
        if isinstance(b, Location):
            connect(b).put(name, content)
        else:
            with atomic_file(b / name, force=True) as file:
                file.write(content)
        print(f"{b / name}: copied")


def _read(folder: Target, name: str) -> bytes | None:
    if isinstance(folder, Location):
        return read_companion(connect(folder), name)
    refuse_links(folder / name)
    with contextlib.suppress(FileNotFoundError), open_regular_file(folder / name) as file:
        return file.read()
    return None
