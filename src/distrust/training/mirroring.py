"""The mirror of a run: its settings, what is fetched from it at the start, and its news for the observers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue

from distrust.atomic import atomic_file
from distrust.checkpoint import CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.mirror import Mirror
from distrust.config import TrainConfig
from distrust.errors import RemoteError
from distrust.remote_copies import fetch_files
from distrust.training.events import CheckpointMirrored, Observer, Preparing


class RunMirror:
    """The mirror of a run, if it has one; ``files`` names those that go up with each checkpoint."""

    def __init__(self, config: TrainConfig, files: Sequence[str]) -> None:
        self.name = config.mirror_name  #: as the user gave it; None without a mirror
        self._config, self._files = config, files
        self._news = SimpleQueue[CheckpointMirrored]()  # the uploading thread fills it

    @property
    def settings(self) -> Mirror | None:
        """For the manager of the run's checkpoints."""
        if self.name is None:
            return None
        config, location = self._config, parse(self.name, "--mirror")
        return Mirror(
            str(location / RUN_SUBDIRECTORY),
            keep_last=config.mirror_keep_last,
            keep_best=config.mirror_keep_best,
            keep_every=config.mirror_keep_every,
            timeout=config.mirror_timeout,
            take_over=config.take_over,
            companions=[config.run_directory / name for name in self._files],
            on_mirrored=lambda *news: self._news.put(CheckpointMirrored(*news)),
        )

    def fetch_newer(self, manager: CheckpointManager, emit: Observer) -> None:
        """Download what this machine lacks: a newer checkpoint, and then the files beside it.

        Raises as :meth:`CheckpointManager.fetch_newest`.
        """
        if self.name is None:
            return
        run = self._config.run_directory
        emit(Preparing(f"looking for a newer checkpoint in {self.name}"))
        try:
            path = manager.fetch_newest()
        except RemoteError as error:
            if not error.temporary:
                raise
            remedy = "leave out --mirror" if self._config.mirror else f"give --out {run}"
            text = (
                f"{error}; the run may have gone on elsewhere: start again later, or {remedy} to go on here"
            )
            raise RemoteError(text, url=error.url, temporary=True) from None
        if path is None:
            return
        emit(Preparing(f"{path.name}: downloaded from {self.name}, verified"))
        missing = [name for name in self._files if not (run / name).exists()]
        with fetch_files(parse(self.name, "--mirror"), *missing) as folder:
            for path in sorted(folder.iterdir()):
                with atomic_file(run / path.name, force=False) as file:
                    file.write(path.read_bytes())

    def begin(
        self, manager: CheckpointManager, step: int, emit: Observer, on_wait: Callable[[], None]
    ) -> None:
        """Take the right to write, to go on from a step. Raises as :meth:`CheckpointManager.begin`."""
        if self.name is not None:
            emit(Preparing(f"making sure that no other process writes to {self.name}"))
            manager.begin(step, on_wait=on_wait)

    def poll(self, manager: CheckpointManager, emit: Observer) -> None:
        """Tell what has arrived there. Raises TakenOver if another process goes on with the run."""
        if self.name is not None:
            manager.begin()  # makes no request
            self._tell(emit)

    def _tell(self, emit: Observer) -> None:
        while not self._news.empty():  # nobody else takes from it
            emit(self._news.get())

    def finish(self, manager: CheckpointManager, emit: Observer) -> None:
        """Wait for the uploads, for at most the timeout. A warning says what is not there then."""
        if self.name is not None:
            if manager.mirrored != max(manager.list_checkpoints(), default=None):
                emit(Preparing(f"copying the last checkpoint to {self.name}"))
            manager.wait_mirrored()
            self._tell(emit)
