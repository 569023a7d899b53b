"""A writer that has children, in every way in which training programs have them.

It says what is durable and who its children are, and then takes orders:

    join    let its data loader go, whose worker lives as long as somebody may ask it for more
    wait    until the save under way is durable
    save    on and on, until it is killed
"""

from __future__ import annotations

import argparse
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

from campaigns.concurrency import child
from campaigns.faults import plant

#: Of a save that takes long enough to be forked, and killed, in the middle: 32 MiB.
LARGE = 4 << 20
#: While a lock is being taken, so often.
FORKS_WHILE_ACQUIRING = 6


class Parent:
    """Saves, and starts children.

    Args:
        folder: its checkpoints are in ``checkpoints`` there.
        ending: of its children.
        uses: whether its children use the manager.
    """

    def __init__(self, folder: Path, ending: str, *, uses: bool) -> None:
        from distrust import CheckpointManager

        self.folder = folder
        self.manager = CheckpointManager(folder / "checkpoints", keep_last=None)
        self._ending = ending
        self._uses = uses
        self._kept: list[Any] = []

    def fork(self, name: str = "0") -> None:
        """By hand."""
        pid = os.fork()
        if pid == 0:
            child.live(self.folder, name, self.manager if self._uses else None)
            child.end(self._ending)

    def multiprocessing(self) -> None:
        """By Python's own library."""
        import multiprocessing

        def body() -> None:
            child.live(self.folder, "0", self.manager if self._uses else None)
            child.end(self._ending)

        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        self._kept.append(process)

    def subprocess(self) -> None:
        """Another program, that inherits every descriptor that can be inherited."""
        code = "import sys; from pathlib import Path; from campaigns.concurrency import child\n"
        code += f"child.live(Path(sys.argv[1]), '0', None); child.end({self._ending!r})"
        self._kept.append(subprocess.Popen([sys.executable, "-c", code, str(self.folder)], close_fds=False))

    def thread(self) -> None:
        """By a thread, while the main one saves."""
        forked = threading.Event()

        def fork() -> None:
            self.fork()
            forked.set()

        threading.Thread(target=fork).start()
        for step in itertools.count(10):
            self.save(step)
            if forked.is_set():
                return

    def acquiring(self) -> None:
        """By a thread, while the main one takes the lock and lets go of it."""
        forked = threading.Event()

        def fork() -> None:
            for number in range(FORKS_WHILE_ACQUIRING):
                self.fork(str(number))
            forked.set()

        self._uses = False  # the parent may have let go of the lock just then
        thread = threading.Thread(target=fork)
        thread.start()
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
                child.live(parent.folder, "0", parent.manager if parent._uses else None)
                return index

        loader = DataLoader(Examples(), num_workers=1, multiprocessing_context="fork")
        self._kept.append(iter(loader))

    def join(self) -> None:
        """Take what the loader has, and let it go."""
        for kept in self._kept:
            if hasattr(kept, "__next__"):
                list(kept)
        self._kept.clear()

    def save(self, step: int) -> None:
        """And say that it is durable."""
        from campaigns.concurrency import content

        self.manager.save(content.make(step, step, 500))
        print(f"durable {step}", flush=True)

    def children(self, names: int) -> list[int]:
        """Their process ids, once all of them have used what they inherited.

        Raises:
            ValueError: for what one of them met.
        """
        pids = []
        deadline = time.monotonic() + 60
        for number in range(names):
            said = self.folder / f"{child.SAID}-{number}"
            while not said.exists():
                if time.monotonic() > deadline:
                    raise ValueError("a child hangs")
                time.sleep(0.002)
            answer = json.loads(said.read_text())
            if answer["error"] is not None:
                raise ValueError(f"in the child: {answer['error']}")
            pids.append(answer["pid"])
        return pids


HOWS: dict[str, Callable[[Parent], None]] = {
    "fork": Parent.fork,
    "multiprocessing": Parent.multiprocessing,
    "subprocess": Parent.subprocess,
    "thread": Parent.thread,
    "acquiring": Parent.acquiring,
    "loader": Parent.loader,
}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("how", choices=HOWS)
    options.add_argument("ending", choices=child.ENDINGS)
    options.add_argument("--saving", action="store_true")
    options.add_argument("--uses", action="store_true")
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)

    from campaigns.concurrency import content

    parent = Parent(given.directory.parent, given.ending, uses=given.uses)
    parent.save(1)
    pending = parent.manager.save_async(content.make(2, 2, LARGE)) if given.saving else None
    while pending is not None and not pending.done and not list(given.directory.glob(".checkpoint-2.*")):
        time.sleep(0.0005)  # it is to be forked in the middle of a write
    HOWS[given.how](parent)
    pids = parent.children(FORKS_WHILE_ACQUIRING if given.how == "acquiring" else 1)
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
    os._exit(0)  # its children are let go of by whoever started it


if __name__ == "__main__":
    main()
