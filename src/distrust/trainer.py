"""DistrustTrainer: the public entry point. Composes the training loop with the engines."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from signal import SIGINT
from typing import Any

from distrust import engines
from distrust.activity import in_notebook
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.config import TrainConfig
from distrust.config_text import RUN_CONFIG
from distrust.contract import Engine
from distrust.errors import ConfigError, DistrustWarning
from distrust.importers.start import read_start
from distrust.option_values import BUNDLED, EXAMPLES, MODEL_OBJECT
from distrust.paths import refuse_links
from distrust.ranks import Ranks, leads
from distrust.reporting import dashboards
from distrust.reporting.metrics import METRICS, PROVENANCE
from distrust.training.data_sources import Examples
from distrust.training.events import Observer, RunEnded
from distrust.training.mirroring import RunMirror
from distrust.training.preemption import watch_notices
from distrust.training.process import StopRequest, exclusive_run, run_in_thread
from distrust.training.progress import RunState
from distrust.training.recording import checkpoint_manager
from distrust.training.run import Run
from distrust.training.step import EngineHolder

#: What a run writes in its folder.
WRITTEN_NAMES = (RUN_SUBDIRECTORY, RUN_CONFIG, METRICS, PROVENANCE, *dashboards.WRITTEN_NAMES)


class DistrustTrainer:
    """Trains as a config says. Called again with the same config, it resumes where the run stopped.

    A process trains one run at a time.

    Args:
        config: what to train, on what data, and how.
        model: a model of transformers to train, instead of ``config.model``, with torch. It stays as it is: a
            run adapts a copy, which shares the frozen weights if their dtype and device are the config's.
        tokenizer: the tokenizer of that model.
        engine: the engine, or a factory that builds it from the config. Default: ``engines.create_engine``.
            An engine that is not built by a factory cannot be built again.
        observers: called with every event, in the training thread, which waits for them. Default: those of
            ``distrust train``, which show progress, write ``metrics.jsonl`` and serve ``report_to``.
        examples: dicts to train on, instead of ``config.data``. They are checked like the records of a file,
            and read once for each call of :meth:`train`; a generator can be read only once.
        eval_examples: dicts to evaluate on, instead of ``config.eval_data``.
        ranks: the processes that train together. Default: those that this one was started with.

    Raises:
        ConfigError: the config resets memory, but the engine cannot be built again; the model has no data;
            objects together with options that name or mix them, or one of model and tokenizer only.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        engine: Engine | Callable[[TrainConfig], Engine] | None = None,
        observers: Iterable[Observer] | None = None,
        examples: Examples | None = None,
        eval_examples: Examples | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        objects = None if model is None and tokenizer is None else (model, tokenizer)
        if objects is not None:
            if None in objects or engine is not None or config.model not in (BUNDLED, MODEL_OBJECT):
                raise ConfigError("give model and tokenizer together, and neither an engine nor config.model")
            config = replace(config, model=MODEL_OBJECT)
        self._objects, self._ranks = objects, ranks
        self._engines = EngineHolder(engine or self._create_engine)
        if not self._engines.can_rebuild and (config.reload_every or config.reload_above):
            raise ConfigError(
                "--reload-every and --reload-above build the engine again: give a factory, "
                "engine=lambda config: ..., instead of the engine"
            )
        if examples is None and not (config.data or config.from_) and config.model != BUNDLED:
            raise ConfigError(
                f"--model {config.model}: give the examples to train it on with --data; there are default "
                "examples for the bundled model only"
            )
        default = None if config.from_ else BUNDLED  # that of what it starts from
        data = EXAMPLES if examples is not None else config.data or default
        self._config = config = replace(config, data=data)
        self._examples, self._eval_examples = examples, eval_examples  # may be generators: not read here
        self._observers = None if observers is None else tuple(observers)
        self._mirror = RunMirror(config, (METRICS, PROVENANCE, RUN_CONFIG))
        self._manager = checkpoint_manager(config, self._mirror.settings)
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
            KeyboardInterrupt: in a notebook, after an interrupt, once the run is saved: no later cell runs.
            DistrustError: for everything else that a user can fix; see ``distrust/errors.py``.
        """
        with self._stop_request(KeyboardInterrupt) as stop:
            return self._run(stop)

    async def train_async(self) -> RunEnded:
        """:meth:`train` in a thread of its own, while the event loop continues.

        Cancelling stops the run after its current step. CancelledError is raised once the checkpoint is
        durable; cancelling again does not change that. Signals are handled if the event loop runs in the main
        thread. An interrupt in a notebook raises CancelledError, too: KeyboardInterrupt would end the kernel.

        Raises:
            DistrustError: as :meth:`train`; also if the run was cancelled and could not be saved.
        """
        from asyncio import CancelledError  # only if it is used

        with self._stop_request(CancelledError) as stop:
            return await run_in_thread(lambda: self._run(stop), ask_to_stop=stop.set)

    def stop(self) -> None:
        """Ask the run in progress to save and end after its current step; from any thread or observer.

        The same config resumes from there. Without a run in progress this does nothing. Of several ranks that
        still prepare, it ends the processes.
        """
        stop = self._stop  # read once: the run may end meanwhile
        if stop is not None:
            stop.set()

    @contextlib.contextmanager
    def _stop_request(self, interrupt: type[BaseException]) -> Iterator[StopRequest]:
        # The lock comes first: a second run must not replace the handlers of the first.
        with exclusive_run(self._config.run_directory), StopRequest() as stop:
            self._stop, self._state = stop, replace(self._state, running=True)
            try:
                yield stop
            finally:
                self._stop, self._state = None, replace(self._state, running=False)
        if stop.signal == SIGINT and in_notebook():
            raise interrupt

    def _run(self, stop: StopRequest) -> RunEnded:
        config, observers = self._config, self._observers
        refuse_links(*(config.run_directory / name for name in WRITTEN_NAMES))  # before anything is created
        with contextlib.ExitStack() as stack:
            stack.enter_context(watch_notices(config.on_preemption, stop))
            self._joined = ranks = stack.enter_context(self._ranks or engines.join_ranks(config))
            if not leads(ranks):
                observers = ()
                stack.enter_context(warnings.catch_warnings(action="ignore", category=DistrustWarning))
            elif observers is None:
                observers = stack.enter_context(dashboards.default_observers(config))
            if config.chat_template is not None:  # recorded: the file may change or disappear
                template = engines.read_chat_template(config.chat_template)
                config = replace(config, chat_template=template)
            run = Run(
                config=config,
                engines=self._engines,
                manager=self._manager,
                mirror=self._mirror,
                observers=observers,
                stop=stop,
                publish=self._publish,
                read_start=read_start,
                ranks=ranks,
            )
            return run.train(examples=self._examples, eval_examples=self._eval_examples)

    def _create_engine(self, config: TrainConfig) -> Engine:
        # Looked up here, so that it can be replaced in tests.
        return engines.create_engine(config, objects=self._objects, ranks=self._joined)

    def _publish(self, state: RunState) -> None:
        self._state = state  # one assignment, so other threads never see a mixture
