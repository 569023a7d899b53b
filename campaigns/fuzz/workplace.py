"""Commands run on hostile folders, and what must hold for each.

A workplace is a template: folders that commands read and write, and beside them a folder ``outside``, as that
of another user, with secrets. Each case works on a fresh copy. Whatever is in it,

- the command ends with exit code 0, 1 or 2, in bounded time and memory, and prints no traceback, no secret
  and no control character;
- it changes its targets alone: everything else, in and outside of the folders, stays as it was;
- nothing of the folders is executed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from campaigns.campaign import CounterExample, never, require
from campaigns.fuzz import corruptions, invariants
from campaigns.fuzz.accesses import Access, Recorder
from campaigns.fuzz.snapshots import SPARSE_BYTES, Entry, snapshot
from distrust.cli import main

#: Of a command, in addition to what it takes on valid folders: short records take 40 microseconds each.
SECONDS_PER_MIB = 8.0
SECRET = "another user's secret"
#: What a temporary file or folder has instead of a fixed name.
_RANDOM = re.compile(r"[0-9a-f]{16}(?=\.tmp(?:/|$))")
_NO_MEMORY = re.compile(r"no memory|out of memory|MemoryError|Cannot allocate", re.IGNORECASE)
_CANARY = "executed"
#: Data and settings that a user may give through a pipe: a command waits for what comes.
_READ_BY_LIBRARIES = ("model", "adapter", "trainer")
_PIPED = ("data", "config.toml", "table.toml")
#: A text that writes a file when it is run as Python.
CODE = f"__import__('pathlib').Path({_CANARY!r}).touch()"


class Command(NamedTuple):
    """A command line; its paths are relative to the folders of a workplace."""

    arguments: tuple[str, ...]
    targets: tuple[str, ...] = ()  # what it may create, change and remove, with all that is below
    seconds: float = invariants.SECONDS  # of the processor, on valid folders

    def names_on_line(self) -> set[str]:
        """The paths that the user named: of these, links are followed."""
        paths = [Path(argument) for argument in self.arguments if not argument.startswith("-")]
        return {str(each) for path in paths for each in (path, *path.parents)}


Build = Callable[[Path], None]  # fills the folders of a template, which is the current folder


class Workplace:
    """Runs commands on copies of a template; used inside the process of a worker."""

    def __init__(self, directory: Path, commands: Mapping[str, Command], build: Build) -> None:
        self.commands = commands
        self.names: dict[str, list[str]] = {}  # of each command: the paths that it opens, lists or writes
        self._template = directory / "template"
        self._build = build
        self.live = directory / "live"
        self.inside = self.live / "inside"  # the current folder of every command
        self.outside = self.live / "outside"

    def prepare(self) -> None:
        """Make the template, and run each command on it: it must succeed, and shows which names it uses."""
        for folder in (self.live, self._template):
            corruptions.clear(folder)  # of a process that died
        self.inside.mkdir(parents=True)
        (self.outside / "folder" / "checkpoints").mkdir(parents=True)
        for path in (self.outside / "secret", self.outside / "folder" / "secret"):
            path.write_text(f"{SECRET}\n")
            path.chmod(0o600)
        os.chdir(self.inside)
        self._build(self.inside)
        self.live.rename(self._template)
        self._recorder = Recorder()
        for name, command in self.commands.items():
            self.renew()
            code, printed, accesses = self._run(command)
            if code != 0:
                raise AssertionError(f"{name}: exit code {code} on valid folders: {printed}")
            paths = [Path(access.what) for access in accesses if access.kind in ("reads", "writes")]
            self.names[name] = sorted(self._relative_names(paths, command))

    def renew(self) -> None:
        """Make a fresh copy."""
        corruptions.clear(self.live)
        shutil.copytree(self._template, self.live, symlinks=True)
        os.chdir(self.inside)

    def would_wait(self, name: str) -> bool:
        """Whether a name leads to what may take forever: a pipe that a user named, a tebibyte of data."""
        first = name.partition("/")[0]
        with contextlib.suppress(OSError):
            status = (self.inside / name).stat()
            is_long = first == "data" and status.st_size >= SPARSE_BYTES
            # Of the kernel's log, only the superuser can read, and only what comes.
            if os.path.realpath(self.inside / name) == "/proc/kmsg":
                return first in (*_PIPED, *_READ_BY_LIBRARIES)
            return first in _PIPED and (stat.S_ISFIFO(status.st_mode) or is_long)
        return False

    def try_out(
        self, name: str, label: str, *, links: Sequence[str] = (), unpacking: float = 0
    ) -> Counter[str]:
        """Run a command on the copy as it is now, and check every promise.

        Args:
            name: of the command.
            label: what was done to the copy.
            links: names that were replaced by links: those on the command line are followed.
            unpacking: seconds of the processor that it may take besides, to read what is packed.
        """
        command = self.commands[name]
        is_allowed = any(link in command.names_on_line() for link in links)
        original = snapshot(self.live)
        nbytes = sum(min(entry.size, 1 << 24) for entry in original.values())
        began = invariants.seconds()
        with never(CounterExample, f"{name}: {label}: "):
            code, printed, accesses = self._run(command)
            elapsed = invariants.seconds() - began
            require(code in (0, 1, 2), f"exit code {code}: {printed[-500:]!a}")
            bound = command.seconds + SECONDS_PER_MIB * nbytes / (1 << 20) + unpacking
            require(elapsed <= bound, f"{elapsed:.1f} s for {nbytes:,} bytes")
            # A sparse tebibyte of tensors cannot be mapped in a limited address space, which is right.
            is_mapped = any(
                entry.is_sparse and path.endswith(".safetensors") for path, entry in original.items()
            )
            self._require_harmless(printed, accesses, may_lack_memory=is_mapped)
            self._require_untouched(original, command, links_are_named=is_allowed)
        return Counter({f"exit code {code}": 1})

    def _require_harmless(self, printed: str, accesses: list[Access], *, may_lack_memory: bool) -> None:
        """What is printed is clear text, no code ran, and nobody was contacted."""
        invariants.require_plain("what is printed", printed)
        end = f"{printed[-500:]!a}"
        require("Traceback" not in printed, printed[-1500:])
        require(SECRET not in printed, f"the secret is printed: {end}")
        require(may_lack_memory or not _NO_MEMORY.search(printed), f"it took too much memory: {end}")
        forbidden = [access for access in accesses if access.kind in ("contacts", "starts")]
        require(not forbidden, f"it contacts or starts {forbidden}")
        require(not (self.inside / _CANARY).exists(), "code of the folder was run")

    def _run(self, command: Command) -> tuple[int, str, list[Access]]:
        """Exit code, what is printed, and what it did."""
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            self._recorder.record() as accesses,
        ):
            try:
                code = main(list(command.arguments))
            except SystemExit as error:  # of a parser of arguments
                code = error.code if isinstance(error.code, int) else 1
            except CounterExample:
                raise
            except BaseException as error:
                raise CounterExample(f"{type(error).__name__}: {str(error)[:500]!a}") from error
        return code, out.getvalue(), accesses

    def _require_untouched(
        self, original: dict[str, Entry], command: Command, *, links_are_named: bool
    ) -> None:
        targets = [str(self.inside / target) for target in command.targets]
        present = snapshot(self.live)
        for path in sorted(original.keys() | present.keys()):
            if original.get(path) == present.get(path) or any(_is_within(path, target) for target in targets):
                continue
            if links_are_named and _is_within(path, str(self.outside)):
                continue
            change = "was removed" if path not in present else "was created"
            if path in original and path in present:
                is_same_folder = (
                    original[path][::3] == present[path][::3]
                )  # mode and inode: only its list changed
                if is_same_folder and any(_is_within(target, path) for target in targets):
                    continue
                change = "was changed"
            raise CounterExample(f"{Path(path).relative_to(self.live)} {change}")

    def _relative_names(self, paths: list[Path], command: Command) -> set[str]:
        """The names of a command: those that it opened, and all that is below the folders on its line."""
        existing = [Path(path).relative_to(self.inside) for path in snapshot(self.inside)]
        # A name that seems to be in the current folder may be relative to another folder, that was open.
        basenames = {path.name for path in paths if path.parent == self.inside and not os.path.lexists(path)}
        paths = [path for path in paths if path.name not in basenames]
        line = {Path(name) for name in command.names_on_line()} - {Path()}
        names = {
            *(path.relative_to(self.inside) for path in paths if self.inside in path.parents),
            *(
                path
                for path in existing
                if path.name in basenames or not line.isdisjoint({path, *path.parents})
            ),
        }
        return {_RANDOM.sub("0" * 16, str(name)) for name in names - {Path()}}


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}{os.sep}")
