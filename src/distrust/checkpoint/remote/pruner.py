"""Removes checkpoints of a run in a store, by the rules and checks of ``retainer.py``, under a term."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.checkpoint_file import CheckpointFile, Scan
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.manager_state import ManagerState
from distrust.checkpoint.remote import fetch
from distrust.checkpoint.remote.client import connect
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.checkpoint.remote.terms import PATIENCE_SECONDS, Terms
from distrust.checkpoint.retainer import Retainer
from distrust.checkpoint.retention import Retention
from distrust.errors import RemoteError, WarningCollector


def prune(run: RemoteRun, rules: Retention, *, dry_run: bool) -> Iterator[CheckpointFile]:
    """Remove what no rule keeps, under a term; gives each file once it is removed. Raises as that.

    Reads every byte of what the rules rely on.
    """
    with contextlib.nullcontext() if dry_run else hold_term(run) as terms:
        with WarningCollector():
            superseded = Retainer(_RemoteState(run), rules).select(rules)[1]
        for file in superseded:
            if terms is not None:
                terms.confirm()  # reading may take long: another writer may have taken over
                run.client.delete(run.object_of(file).key)
            yield file


@contextlib.contextmanager
def hold_term(run: RemoteRun, *, take_over: bool = False) -> Iterator[Terms]:
    """Context manager that takes the right to write where a run's checkpoints are. What counts there stays.

    Raises as :meth:`Terms.take`.
    """
    run.files()  # says where they are
    path = run.location.path
    terms = Terms(run.directory, path, connect=connect, patience=PATIENCE_SECONDS, take_over=take_over)
    try:
        terms.wait()  # only then the last writer has ended, and a base cannot displace what it still adds
        terms.take(base=max((file.step for file in run.files()), default=0))
        yield terms
    finally:
        with contextlib.suppress(RemoteError):  # then the next writer has to watch
            terms.end()


class _RemoteState(ManagerState):
    """Lists and verifies what is in a store; it locks and saves nothing."""

    def __init__(self, run: RemoteRun) -> None:
        super().__init__(Path(str(run.location)), Disk())  # only a name: nothing is opened there
        self._run = run

    def scan(self) -> Scan:
        return self._run.scan()

    def verify(self, file: CheckpointFile) -> None:
        fetch.verify(self._run.client, self._run.object_of(file))
