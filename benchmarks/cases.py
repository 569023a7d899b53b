"""Everything that is measured, as named cases. Each runs once in a process of its own.

Before the clock starts, a library saves or loads a 1 MiB state in the same way: imports, thread pools and
caches of compiled code are the cost of a run, not of a save. Nothing else is warmed up unless a case says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks import commands, limits, probes, trainer
from benchmarks.libraries import BACKGROUND, LOADING, SAVING, STEP, Background, Library, Safetensors
from benchmarks.states import COMMANDS, WARM_UP, Spec

Figures = dict[str, float]
Group = Literal["saving", "loading warm", "loading cold", "headers", "commands"]

OURS = "distrust"
SMALL = "-small"
LINUX = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Task:
    """Where a case runs and what it measures.

    Attributes:
        spec: the state.
        folder: empty, and removed afterwards.
        prepared: holds a folder for each name in :attr:`Case.reads`.
    """

    spec: Spec
    folder: Path
    prepared: Path


@dataclass(frozen=True, slots=True)
class Case:
    """A case.

    Attributes:
        name: in results, and for ``--cases``.
        group: cases of a group run one after the other, because they are compared.
        run: measures once; every figure is in seconds or bytes, as its name says.
        reads: what must be prepared, from :data:`PREPARE`.
        modules: that must be installed.
        fits: the states that it is measured with.
    """

    name: str
    group: Group
    run: Callable[[Task], Figures]
    reads: str | None = None
    modules: tuple[str, ...] = ()
    fits: Callable[[Spec], bool] = lambda spec: spec != COMMANDS


def save(library: Library, task: Task) -> Figures:
    """A blocking save, until it is durable."""
    library.save(library.state(WARM_UP), task.folder / "warm-up")
    state = library.state(task.spec)
    memory = probes.PeakMemory()
    began = time.perf_counter()
    library.save(state, task.folder / "saved")
    return {"seconds": time.perf_counter() - began, **memory.figures()}


def save_in_background(background: type[Background], task: Task) -> Figures:
    """A background save: the time until it returned, and until it was durable."""
    library = background.library
    _start(background, library.state(WARM_UP), task.folder / "warm-up")
    state = library.state(task.spec)
    memory = probes.PeakMemory()
    measured = background()
    measured.prepare(state, task.folder / "saved")
    began = time.perf_counter()
    wait = measured.start(state, task.folder / "saved")
    returned = time.perf_counter()
    wait()
    durable = time.perf_counter()
    return {"returns_seconds": returned - began, "durable_seconds": durable - began, **memory.figures()}


def load(library: Library, task: Task, *, cold: bool) -> Figures:
    """Load everything, with the page cache holding the whole file or nothing of it."""
    name = _base(library)
    library.loader(task.prepared / f"{name}{SMALL}", WARM_UP)()
    loader = library.loader(task.prepared / name, task.spec)
    (probes.drop if cold else probes.warm)(task.prepared / name)
    memory = probes.PeakMemory()
    began = time.perf_counter()
    loaded = loader()
    seconds = time.perf_counter() - began
    del loaded  # opened before the clock starts
    return {"seconds": seconds, **memory.figures()}


def inspect(task: Task) -> Figures:
    """Our header: read, verified and parsed."""
    from distrust import CheckpointManager

    CheckpointManager(task.prepared / f"{OURS}{SMALL}").inspect(STEP)
    manager = CheckpointManager(task.prepared / OURS)
    began = time.perf_counter()
    inspection = manager.inspect(STEP)
    names = [tensor.name for tensor in inspection.tensors]
    return {"seconds": time.perf_counter() - began, "tensors": float(len(names))}


def open_safetensors(task: Task) -> Figures:
    """``safe_open`` and ``keys()`` of the file that safetensors wrote, whose header is shorter."""
    from safetensors import safe_open

    def keys(path: Path) -> list[str]:
        with safe_open(Safetensors.file(path), framework="np") as file:
            return list(file.keys())

    keys(task.prepared / f"safetensors{SMALL}")
    began = time.perf_counter()
    names = keys(task.prepared / "safetensors")
    return {"seconds": time.perf_counter() - began, "tensors": float(len(names))}


def prepare(name: str, task: Task) -> None:
    """Write what a case reads: the state as saved by a library, or a folder of small checkpoints."""
    if task.spec == COMMANDS:
        commands.write_small_checkpoints(task.prepared / name, int(name.partition(" ")[0]))
        return
    (library,) = (library for library in SAVING if library.name == name)
    library.save(library.state(WARM_UP), task.prepared / f"{name}{SMALL}")
    library.save(library.state(task.spec), task.prepared / name)


def _start(background: type[Background], state: object, path: Path) -> None:
    warm_up = background()
    warm_up.prepare(state, path)
    warm_up.start(state, path)()


def _base(library: Library) -> str:
    """The variants of a library read what the library saved."""
    return library.name.partition(" ")[0]


def _file(task: Task) -> Path:
    """The raw reads read our own checkpoint, so that all read the same bytes from the disk."""
    (file,) = (task.prepared / OURS).glob("*.safetensors")
    return file


def _saving() -> Iterator[Case]:
    for library in SAVING:
        yield Case(f"{library.name} save", "saving", partial(save, library), modules=library.modules)
    for background in BACKGROUND:
        modules = background.library.modules
        yield Case(background.name, "saving", partial(save_in_background, background), modules=modules)
    yield Case(
        "trainer save",
        "saving",
        lambda task: trainer.save(task.spec, task.folder),
        modules=("transformers", "peft", "accelerate"),
        fits=lambda spec: spec.lora,
    )
    for name, threads in {"one thread": 1, "all cores": limits.CORES}.items():
        yield Case(f"copy, {name}", "saving", partial(_copy, threads))
    if LINUX:
        for in_flight in (1, 2, 3):
            yield Case(f"raw write, {in_flight} in flight", "saving", partial(_write, in_flight))


def _loading() -> Iterator[Case]:
    for cold in (False, True) if LINUX else (False,):
        group: Group = "loading cold" if cold else "loading warm"
        heat = "cold" if cold else "warm"
        for library in LOADING:
            yield Case(
                f"{library.name} load {heat}",
                group,
                partial(load, library, cold=cold),
                reads=_base(library),
                modules=library.modules,
            )
    for name, fresh in {"touched": False, "fresh": True}.items():
        yield Case(
            f"read, cached, {name} memory", "loading warm", partial(_read_cached, fresh=fresh), reads=OURS
        )
    for name, all_cores in {"one thread": False, "all cores": True}.items():
        yield Case(f"BLAKE3, {name}", "loading warm", partial(_digest, all_cores=all_cores))
    if LINUX:
        yield Case("read, cold", "loading cold", lambda task: limits.read_cold(_file(task)), reads=OURS)
        yield Case(
            "read, cold, direct", "loading cold", lambda task: limits.read_direct(_file(task)), reads=OURS
        )


def _headers() -> Iterator[Case]:
    yield Case("distrust inspect", "headers", inspect, reads=OURS, modules=("torch",))
    yield Case(
        "safetensors keys",
        "headers",
        open_safetensors,
        reads="safetensors",
        modules=("torch", "safetensors"),
    )


def _commands() -> Iterator[Case]:
    def only(spec: Spec) -> bool:
        return spec == COMMANDS

    yield Case("python -c pass", "commands", lambda task: commands.start_python(), fits=only)
    for count in (commands.FEW, commands.MANY):
        name = f"{count} checkpoints"
        yield Case(f"distrust ls, {name}", "commands", partial(_ls, folder=name), reads=name, fits=only)


def _copy(threads: int, task: Task) -> Figures:
    return limits.copy(task.spec, threads)


def _write(in_flight: int, task: Task) -> Figures:
    return limits.write(task.spec, task.folder, in_flight)


def _read_cached(task: Task, *, fresh: bool) -> Figures:
    return limits.read_cached(_file(task), fresh=fresh)


def _digest(task: Task, *, all_cores: bool) -> Figures:
    return limits.digest(task.spec, all_cores=all_cores)


def _ls(task: Task, *, folder: str) -> Figures:
    return commands.ls(task.prepared / folder)


CASES: tuple[Case, ...] = (*_saving(), *_loading(), *_headers(), *_commands())
