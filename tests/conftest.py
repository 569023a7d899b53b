"""Fixtures that several test folders share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from campaigns.remote import servers
from campaigns.remote.servers import MissingServer, Store
from campaigns.training_run import IMPORTS
from distrust import DistrustTrainer, TrainConfig
from distrust.testing.models import make_model, write_records
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import Event, Observer, RunEnded, StepEnded
from tests.forked_python import fork_server

# No example is timed: the machine may do other work. A third of the usual number: each run draws others.
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=33)
hypothesis.settings.load_profile("untimed")

# The processes that tests start compile the package once, not each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Until the tests are imported, nothing is garbage.
gc.disable()

# Shells make background jobs ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


#: The files that take longest. They come first, so that no worker is left with one of them at the end.
LONGEST = (
    "test_readme.py",
    "test_fuzz.py",
    "test_disturbed_trainers.py",
    "test_examples.py",
    "test_experiments.py",
    "test_conformance_runs.py",
    "test_lightning.py",
    "test_train_command.py",
    "test_mlx_engine.py",
    "test_architecture.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "mps"),
        default="cpu",
        help="where tests marked `device` train; `-m device` selects them (default: %(default)s)",
    )


#: Programs whose processes are forks, each with what it imports before, as far as that is installed.
FORKED = {
    # With mlx and lightning, and what their processes import on the way: seconds.
    "torch": [
        *(*IMPORTS, "distrust.engines.torch.elastic", "distrust.engines.mlx.engine"),
        *("distrust.checkpoint.arrays.of_mlx", "mlx_lm.models.llama", "mlx_lm.tuner.trainer"),
        *("transformers.models.llama.configuration_llama", "accelerate", "datasets", "lightning"),
        *("torchdata.stateful_dataloader", "trl", "tests.warmed_up"),
    ],
    "jax": ["jax.numpy", "ml_dtypes", "distrust.checkpoint.manager", "flax.nnx", "optax"],
    "fuzz": [
        *("campaigns.fuzz.__main__", "distrust.cli.convert", "distrust.cli.train"),
        *("distrust.training.run", "datasets"),
    ],
}


#: Modules that change how all processes of the tests behave, imported last.
EVERYWHERE = ["tests.delays"] if os.environ.get("DELAYS") else []


def pytest_configure(config: pytest.Config) -> None:
    """Start a server for each: workers share those of the process that starts them."""
    for module in EVERYWHERE:
        import_module(module)
    if hasattr(config, "workerinput"):
        return
    refuse_missing_device(config.getoption("--device"))
    servers = contextlib.ExitStack()
    for name, imports in FORKED.items():
        program = servers.enter_context(fork_server([*imports, *EVERYWHERE]))
        os.environ[f"FORKED_{name.upper()}"] = str(program)
    config.add_cleanup(servers.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Make workers forks, too: each would spend 15 seconds on imports.

    While they wait for those of torch, the other servers import on another core.
    """
    if sys.platform == "linux":
        for spec in specs:
            spec.python = os.environ["FORKED_TORCH"]
        for name in FORKED:
            process = subprocess.Popen([os.environ[f"FORKED_{name.upper()}"], "-c", "pass"])
            config.add_cleanup(process.wait)


def refuse_missing_device(name: str) -> None:
    """Whoever names a device wants tests there: if all were skipped, it would look like success."""
    if name == "cpu":
        return
    if find_spec("torch") is None:
        raise pytest.UsageError(f"--device {name}: torch is not installed")
    import torch

    if not (torch.cuda if name == "cuda" else torch.backends.mps).is_available():
        raise pytest.UsageError(f"--device {name}: torch {torch.__version__} finds none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their files."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _separate_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests and the processes they start use a separate cache, and keep no snapshots in shared memory."""
    os.environ["DISTRUST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["DISTRUST_SHM"] = ""  # those of snapshots give a folder of their own


@pytest.fixture(scope="session")
def forked_python() -> Path:
    """The path of a program like ``python`` whose processes have the imports of a training done."""
    return Path(os.environ["FORKED_TORCH"])


@pytest.fixture(scope="session")
def forked_jax() -> Path:
    """The same for checkpoints of jax's arrays."""
    return Path(os.environ["FORKED_JAX"])


@pytest.fixture(scope="session")
def forked_fuzz() -> Path:
    """The same for the campaign of hostile files; neither torch nor mlx is imported."""
    return Path(os.environ["FORKED_FUZZ"])


@pytest.fixture
def start_python() -> Callable[..., subprocess.Popen[str]]:
    """Starts ``python -c code arguments…`` with pipes; kills processes that still run after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(
        code: str, *arguments: object, python: Path | str = sys.executable, **environment: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_python(start_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python -c code arguments…`` to its end."""

    def run(
        code: str, *arguments: object, seconds: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        process = start_python(code, *arguments, **options)
        stdout, stderr = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


#: Steps of four examples each, on the tiny model; in float32 on GPUs, too, for tests that compare values.
TINY: dict[str, Any] = {
    "engine": "torch",
    "device": "cpu",
    "dtype": "float32",
    "max_steps": 7,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "lora_rank": 4,
    "lora_dropout": 0.2,
    "save_every": 3,
    "threads": 1,
}


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """Disables fsync: it matters only for power loss.

    ``test_power_cut``, ``test_atomic`` and ``test_metrics`` check the calls, not the disk.

    Module scope, because later tests in the same process may inject disk failures.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _freeze_earlier_objects() -> None:
    """Excludes from garbage collections what exists: each would spend a third of a second on imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven records, so an epoch does not end where a step does."""
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "eval.jsonl", 5, seed=9)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of ``--device``."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def tiny_config(data: Path) -> Callable[..., TrainConfig]:
    """The config of the fixture ``train``, without its model."""
    return lambda out, **options: TrainConfig(out=str(out), **{**TINY, "data": str(data), **options})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def share_server(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Iterator[Callable[[str], Store]]:
    """Starts a server, unless another worker has done so; skips if its program is not installed."""
    base = tmp_path_factory.getbasetemp()
    folder = Path(base if worker_id == "master" else base.parent)
    with contextlib.ExitStack() as stack:
        stores: dict[str, Store | str] = {}

        def share(name: str) -> Store:
            if name not in stores:
                try:
                    stores[name] = stack.enter_context(servers.share(name, folder))
                except MissingServer as error:
                    stores[name] = str(error)
            store = stores[name]
            if isinstance(store, str):
                pytest.skip(store)
            return store

        yield share


class Stopper:
    """An observer that sends a real signal to this process after a step."""

    def __init__(self, step: int | None, number: int = signal.SIGTERM) -> None:
        self.step = step
        self.number = number

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == self.step:
            signal.raise_signal(self.number)


Run = Callable[..., tuple[RunEnded, list[Event]]]


@pytest.fixture
def run(data: Path) -> Run:
    """Trains the toy engine: ``run(out, stop_after=3, **options)`` returns the last event and all events."""

    def run(
        out: Path,
        *,
        stop_after: int | None = None,
        engine: ToyEngine | None = None,
        observers: Sequence[Observer] = (),
        examples: Iterable[dict[str, Any]] | None = None,
        **options: Any,
    ) -> tuple[RunEnded, list[Event]]:
        events: list[Event] = []
        config = TrainConfig(out=str(out), **{**TOY, "data": str(data), **options})
        trainer = DistrustTrainer(
            config,
            engine=engine or ToyEngine(),
            observers=[events.append, Stopper(stop_after), *observers],
            examples=examples,
        )
        return trainer.train(), events

    return run


@pytest.fixture(scope="session")
def train(tiny_model: Path, tiny_config: Callable[..., TrainConfig], device: str) -> Run:
    """Trains the tiny model, with torch by default: seven steps, eleven records per epoch.

    torch trains on the device of ``--device``. With ``awaited`` it calls ``train_async`` and stops by a call
    instead of a signal.
    """

    def train(
        out: Path, *, stop_after: int | None = None, awaited: bool = False, **options: Any
    ) -> tuple[RunEnded, list[Event]]:
        events: list[Event] = []

        def watch(event: Event) -> None:
            events.append(event)
            if isinstance(event, StepEnded) and event.step == stop_after:
                trainer.stop() if awaited else signal.raise_signal(signal.SIGTERM)

        where = device if options.get("engine", "torch") == "torch" else "cpu"
        config = tiny_config(out, **{"model": str(tiny_model), "device": where, **options})
        trainer = DistrustTrainer(config, observers=[watch])
        return asyncio.run(trainer.train_async()) if awaited else trainer.train(), events

    return train
