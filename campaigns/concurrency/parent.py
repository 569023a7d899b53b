"""A writer that has children, in every way in which training programs have them.

It prints what is durable and its children's process ids, and takes orders: ``join`` releases its data loader,
``wait`` ends the current save, ``save`` saves until it is killed. The product is imported only after the
fault is planted: some faults are in what it does when it is imported. A child uses what it inherited and
lives until it is released; an flock on a file of its own shows whether it lives.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from campaigns.child import parse_arguments

if TYPE_CHECKING:
    from distrust import CheckpointManager

ENDINGS = ("exit", "_exit", "exception")  # how a child ends
RELEASE, ALIVE, REPORT = "release", "alive", "report"


def live(folder: Path, name: str, manager: CheckpointManager | None) -> None:
    """Show that it lives, use the manager, and wait for the release."""
    alive = os.open(folder / f"{ALIVE}-{name}", os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(alive, fcntl.LOCK_EX)
    error = None
    try:
        if manager is not None:
            _use(manager)
    except BaseException:
        error = traceback.format_exc()
    report = folder / f"{REPORT}-{name}"
    report.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "error": error}))
    report.with_suffix(".new").rename(report)
    deadline = time.monotonic() + 120  # should no release come, it does not live for ever
    while not (folder / RELEASE).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def end(ending: str) -> None:
    """End as a program does: through the interpreter's end, past it, or by an exception."""
    if ending == "_exit":
        os._exit(0)
    raise ZeroDivisionError if ending == "exception" else SystemExit(0)


def is_alive(folder: Path, name: str) -> bool:
    descriptor = os.open(folder / f"{ALIVE}-{name}", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _use(manager: CheckpointManager) -> None:
    """Read, and try to write: the parent lives, and holds the directory."""
    from campaigns.concurrency import model
    from distrust.checkpoint import lock
    from distrust.errors import CheckpointDirectoryLocked

    lock.WAIT_SECONDS = 0.02
    model.version_of(manager.load_latest())
    try:
        manager.save(model.make_checkpoint(999, 999, 16))
    except CheckpointDirectoryLocked:
        return
    raise ValueError("a child may write beside its parent")


#: Of a save that takes long enough to fork, and to kill, in the middle: 32 MiB.
LARGE = 4 << 20
#: So many forks while the lock is being taken.
FORKS_WHILE_ACQUIRING = 6


class Parent:
    def __init__(self, folder: Path, ending: str, *, uses: bool) -> None:
        from distrust import CheckpointManager

        self.folder = folder  # its checkpoints are in ``checkpoints`` there
        self.manager = CheckpointManager(folder / "checkpoints", keep_last=None)
        self._ending = ending  # of its children
        self._uses = uses  # whether its children use the manager
        self._references: list[Any] = []  # else a child might be collected, and joined

    def fork(self, name: str = "0") -> None:
        pid = os.fork()
        if pid == 0:
            self._live(name)

    def multiprocessing(self) -> None:
        import multiprocessing

        process = multiprocessing.get_context("fork").Process(target=self._live)
        process.start()
        self._references.append(process)

    def subprocess(self) -> None:
        """Another program, which inherits every descriptor that can be inherited."""
        code = "import sys; from pathlib import Path; from campaigns.concurrency import parent\n"
        code += f"parent.live(Path(sys.argv[1]), '0', None); parent.end({self._ending!r})"
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
        from torch.utils.data import DataLoader, Dataset

        parent = self

        class Examples(Dataset[int]):
            def __len__(self) -> int:
                return 1

            def __getitem__(self, index: int) -> int:
                live(parent.folder, "0", parent.manager if parent._uses else None)
                return index

        loader = DataLoader(Examples(), num_workers=1, multiprocessing_context="fork")
        self._references.append(iter(loader))

    def join(self) -> None:
        for reference in self._references:
            if hasattr(reference, "__next__"):
                list(reference)
        self._references.clear()

    def save(self, step: int) -> None:
        from campaigns.concurrency import model

        self.manager.save(model.make_checkpoint(step, step, 500))
        print(f"durable {step}", flush=True)

    def children(self, count: int) -> list[int]:
        """Their process ids, once all of them have used what they inherited."""
        pids = []
        deadline = time.monotonic() + 60
        for number in range(count):
            report = self.folder / f"{REPORT}-{number}"
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
        live(self.folder, name, self.manager if self._uses else None)
        end(self._ending)

    def _fork_in_thread(self, names: list[str]) -> threading.Event:
        forked = threading.Event()

        def fork() -> None:
            for name in names:
                self.fork(name)
            forked.set()

        threading.Thread(target=fork).start()
        return forked


METHODS = ("fork", "multiprocessing", "subprocess", "thread", "acquiring")  # and "loader", which is slower


def main() -> None:
    options = parse_arguments(directory=Path, method=str, ending=str, saving=int, uses=int)

    from campaigns.concurrency import model

    parent = Parent(options.directory.parent, options.ending, uses=bool(options.uses))
    parent.save(1)
    pending = parent.manager.save_async(model.make_checkpoint(2, 2, LARGE)) if options.saving else None
    while pending is not None and not pending.done and not list(options.directory.glob(".checkpoint-2.*")):
        time.sleep(0.0005)  # the fork has to come in the middle of a write
    getattr(parent, options.method)()
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
