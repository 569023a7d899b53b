"""A writer that has children, in every way in which training programs have them.

It prints what is durable and the process ids of its children, and then takes orders:

    join    release its data loader, whose worker lives as long as there may be more requests
    wait    until the current save is durable
    save    again and again, until it is killed

The product is imported only after the fault is planted: some faults are in what it does when it is imported.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.child import parse_arguments
from campaigns.concurrency import descendant

#: Of a save that takes long enough to fork, and to kill, in the middle: 32 MiB.
LARGE = 4 << 20
#: So many forks while the lock is being taken.
FORKS_WHILE_ACQUIRING = 6


class Parent:
    """Saves, and starts children."""

    def __init__(self, folder: Path, ending: str, *, uses: bool) -> None:
        from distrust import CheckpointManager

        self.folder = folder  # its checkpoints are in ``checkpoints`` there
        self.manager = CheckpointManager(folder / "checkpoints", keep_last=None)
        self._ending = ending  # of its children
        self._uses = uses  # whether its children use the manager
        self._references: list[Any] = []  # else a child might be collected, and joined

    def fork(self, name: str = "0") -> None:
        """By hand."""
        pid = os.fork()
        if pid == 0:
            self._live(name)

    def multiprocessing(self) -> None:
        """By Python's own library."""
        import multiprocessing

        process = multiprocessing.get_context("fork").Process(target=self._live)
        process.start()
        self._references.append(process)

    def subprocess(self) -> None:
        """Another program, which inherits every descriptor that can be inherited."""
        code = "import sys; from pathlib import Path; from campaigns.concurrency import descendant\n"
        code += f"descendant.live(Path(sys.argv[1]), '0', None); descendant.end({self._ending!r})"
        command = [sys.executable, "-c", code, str(self.folder)]
        self._references.append(subprocess.Popen(command, close_fds=False))

    def thread(self) -> None:
        """By a thread, while the main thread saves."""
        forked = self._fork_in_thread(["0"])
        for step in itertools.count(10):
            self.save(step)
            if forked.is_set():
                return

    def acquiring(self) -> None:
        """By a thread, while the main thread takes and releases the lock."""
        self._uses = False  # the parent may have released the lock just then
        forked = self._fork_in_thread([str(number) for number in range(FORKS_WHILE_ACQUIRING)])
        while not forked.is_set():
            self.manager.close()
            self.manager.acquire()

    def loader(self) -> None:
        """As the worker of a data loader of torch."""
        from torch.utils.data import DataLoader, Dataset

        parent = self

        class Examples(Dataset[int]):
            def __len__(self) -> int:
                return 1

            def __getitem__(self, index: int) -> int:
                descendant.live(parent.folder, "0", parent.manager if parent._uses else None)
                return index

        loader = DataLoader(Examples(), num_workers=1, multiprocessing_context="fork")
        self._references.append(iter(loader))

    def join(self) -> None:
        """Read all from the loader, and release it."""
        for reference in self._references:
            if hasattr(reference, "__next__"):
                list(reference)
        self._references.clear()

    def save(self, step: int) -> None:
        """Save, and print that it is durable."""
        from campaigns.concurrency import content

        self.manager.save(content.make(step, step, 500))
        print(f"durable {step}", flush=True)

    def children(self, count: int) -> list[int]:
        """Their process ids, once all of them have used what they inherited."""
        pids = []
        deadline = time.monotonic() + 60
        for number in range(count):
            report = self.folder / f"{descendant.REPORT}-{number}"
            while not report.exists():
                if time.monotonic() > deadline:
                    raise ValueError("a child hangs")
                time.sleep(0.002)
            answer = json.loads(report.read_text())
            if answer["error"] is not None:
                raise ValueError(f"in the child: {answer['error']}")
            pids.append(answer["pid"])
        return pids

    def _live(self, name: str = "0") -> None:
        descendant.live(self.folder, name, self.manager if self._uses else None)
        descendant.end(self._ending)

    def _fork_in_thread(self, names: list[str]) -> threading.Event:
        forked = threading.Event()

        def fork() -> None:
            for name in names:
                self.fork(name)
            forked.set()

        threading.Thread(target=fork).start()
        return forked


METHODS: dict[str, Callable[[Parent], None]] = {
    "fork": Parent.fork,
    "multiprocessing": Parent.multiprocessing,
    "subprocess": Parent.subprocess,
    "thread": Parent.thread,
    "acquiring": Parent.acquiring,
    "loader": Parent.loader,
}


def main() -> None:
    options = parse_arguments(directory=Path, method=str, ending=str, saving=int, uses=int)

    from campaigns.concurrency import content

    parent = Parent(options.directory.parent, options.ending, uses=bool(options.uses))
    parent.save(1)
    pending = parent.manager.save_async(content.make(2, 2, LARGE)) if options.saving else None
    while pending is not None and not pending.done and not list(options.directory.glob(".checkpoint-2.*")):
        time.sleep(0.0005)  # the fork has to come in the middle of a write
    METHODS[options.method](parent)
    pids = parent.children(FORKS_WHILE_ACQUIRING if options.method == "acquiring" else 1)
    print(f"children {' '.join(map(str, pids))}", flush=True)
    for line in sys.stdin:
        if line == "join\n":
            parent.join()
        if line == "wait\n" and pending is not None:
            pending.wait()
            print("durable 2", flush=True)
        if line == "save\n":
            for step in itertools.count(1000):
                parent.save(step)
    sys.stdout.flush()
    os._exit(0)  # the campaign releases its children


if __name__ == "__main__":
    main()
