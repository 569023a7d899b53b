"""DistrustTrainer: the public entry point. Composes the training loop with the engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from distrust import engines
from distrust.checkpoint import CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.config import EXAMPLES, TrainConfig
from distrust.contract import Engine
from distrust.errors import ConfigError
from distrust.paths import refuse_links
from distrust.reporting import dashboards
from distrust.reporting.metrics import METRICS, PROVENANCE
from distrust.training.data_sources import Examples
from distrust.training.events import Observer, RunEnded
from distrust.training.process import StopRequest, exclusive_run, run_in_thread
from distrust.training.progress import RunState
from distrust.training.run import Run
from distrust.training.step import EngineHolder

#: What a run writes in its folder.
WRITTEN_NAMES = (RUN_SUBDIRECTORY, METRICS, PROVENANCE, *dashboards.WRITTEN_NAMES)


class DistrustTrainer:
    """Trains as a config says. Called again with the same config, it resumes where the run stopped.

    A process trains one run at a time.

    Args:
        config: what to train, on what data, and how.
        engine: the engine, or a factory that builds it from the config. Default: ``engines.create_engine``.
            An engine that is not built by a factory cannot be built again.
        observers: called with every event, in the training thread, which waits for them.
        examples: dicts to train on, instead of ``config.data``. They are checked like the records of a file,
            and read once for each call of :meth:`train`; a generator can be read only once.
        eval_examples: dicts to evaluate on, instead of ``config.eval_data``.

    Raises:
        ConfigError: the config resets memory, but the engine cannot be built again; or examples together
            with options that name or mix them.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: Engine | Callable[[TrainConfig], Engine] | None = None,
        observers: Iterable[Observer] = (),
        examples: Examples | None = None,
        eval_examples: Examples | None = None,
    ) -> None:
        # Looked up when an engine is built, so that it can be replaced in tests.
        source = (lambda config: engines.create_engine(config)) if engine is None else engine
        self._engines = EngineHolder(source)
        if not self._engines.can_rebuild and (config.reload_every or config.reload_above):
            raise ConfigError(
                "--reload-every and --reload-above build the engine again: give a factory, "
                "engine=lambda config: ..., instead of the engine"
            )
        self._config = config if examples is None else replace(config, data=EXAMPLES)
        self._examples, self._eval_examples = examples, eval_examples  # may be generators: not read here
        self._observers = tuple(observers)
        self._manager = CheckpointManager(
            config.run_directory / RUN_SUBDIRECTORY,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_every=config.keep_every,
            metric=config.metric,
            metric_mode=config.metric_mode,
            record_host=config.host,
        )
        self._state = RunState(out=config.run_directory, max_steps=config.max_steps)
        self._stop: StopRequest | None = None  # of the run in progress

    @property
    def state(self) -> RunState:
        """How far the run is, as of the last event; any thread may read it at any time.

        Before the first call of :meth:`train` it does not reflect what is on disk.
        """
        return self._state

    def train(self) -> RunEnded:
        """Train to the last step, or until something asks to stop; then the last checkpoint is durable.

        Raises:
            RunInProgress: another run of this process is in progress.
            DistrustError: for everything else that a user can fix; see ``distrust/errors.py``.
        """
        with self._stop_request() as stop:
            return self._run(stop)

    async def train_async(self) -> RunEnded:
        """:meth:`train` in a thread of its own, while the event loop continues.

        Cancelling stops the run after its current step. CancelledError is raised once the checkpoint is
        durable; cancelling again does not change that. Signals are handled if the event loop runs in the main
        thread.

        Raises:
            DistrustError: as :meth:`train`; also if the run was cancelled and could not be saved.
        """
        with self._stop_request() as stop:
            return await run_in_thread(lambda: self._run(stop), ask_to_stop=stop.set)

    def stop(self) -> None:
        """Ask the run in progress to save and end after its current step; from any thread or observer.

        The same config resumes from there. Without a run in progress this does nothing.
        """
        stop = self._stop  # read once: the run may end meanwhile
        if stop is not None:
            stop.set()

    @contextlib.contextmanager
    def _stop_request(self) -> Iterator[StopRequest]:
        # The lock comes first: a second run must not replace the handlers of the first.
        with exclusive_run(self._config.run_directory), StopRequest() as stop:
            self._stop, self._state = stop, replace(self._state, running=True)
            try:
                yield stop
            finally:
                self._stop, self._state = None, replace(self._state, running=False)

    def _run(self, stop: StopRequest) -> RunEnded:
        out = self._config.run_directory
        refuse_links(*(out / name for name in WRITTEN_NAMES))  # before anything is created
        run = Run(
            config=self._config,
            engines=self._engines,
            manager=self._manager,
            observers=self._observers,
            stop=stop,
            publish=self._publish,
        )
        return run.train(examples=self._examples, eval_examples=self._eval_examples)

    def _publish(self, state: RunState) -> None:
        self._state = state  # one assignment, so other threads never see a mixture
