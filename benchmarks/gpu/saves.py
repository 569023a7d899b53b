"""The limits of the machine; saves beside training and how long they stall it; to a file and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import libraries, limits, probes
from benchmarks.devices import seconds, synchronize
from benchmarks.gpu.setting import Setting
from distrust import Checkpoint, CheckpointManager

Figures = dict[str, Any]
LIBRARIES = {
    library.name: library
    for library in (libraries.Distrust, libraries.Torch, libraries.Dcp, libraries.TorchCheckpointing)
}


def measure_device(setting: Setting) -> Figures:
    """What the device and the bus can do."""
    return limits.device(setting.device, setting.spec(1 << 30, 1).nbytes, setting.matrix())


def measure_disk(setting: Setting) -> Figures:
    """GB/s of the disk with direct I/O: a raw write with its fsync, and a read."""
    spec = setting.spec(4 << 30, 1)
    with setting.empty_folder("raw", on_disk=True) as folder:
        write = limits.write(spec, folder, 2)["seconds"]
        read = limits.read_direct(folder / "raw")["seconds"]
    return {"write_gbs": spec.nbytes / write / 1e9, "read_gbs": spec.nbytes / read / 1e9}


def overlap(setting: Setting, *, is_gathered: bool) -> Figures:
    """Counts saves with a torn copy: the device is busy, and the state changes as soon as it may.

    A state that ``is_gathered`` is first copied on the device; any other to the host, tensor by tensor.
    """
    import torch

    from distrust.checkpoint.arrays import copy_streams

    if not is_gathered:  # as if it were large
        copy_streams.GATHER_BYTES = 0
    count, rounds = (1 << 16, 3) if setting.tiny else (16 << 20, 12)
    shapes = {f"t{number}": count if number % 4 else 1000 + number for number in range(16)}
    state = {name: torch.zeros(size, device=setting.device) for name, size in shapes.items()}
    matrix, torn = setting.matrix(), 0
    with setting.empty_folder("overlap") as folder, CheckpointManager(folder, keep_last=1) as manager:
        for step in range(1, rounds + 1):
            _multiply(matrix, 20)
            for tensor in state.values():  # in the queue behind the products when save_async begins
                tensor.fill_(step)
            overlaps = step % 2 == 0  # otherwise the state may change once the call returns
            pending = manager.save_async(Checkpoint(step=step, model=state), overlap=overlaps)
            _multiply(matrix, 20)
            if overlaps:
                pending.wait_copied()
            for tensor in state.values():
                tensor.fill_(-step)
            pending.wait()
            torn += any((array != step).any() for array in manager.load(step).model.values())
    return {"rounds": rounds, "torn": torn}


def stall(setting: Setting, nbytes: int, tensors: int) -> Figures:
    """How long training waits for a background save: until the call returns, and until the copy is made.

    Between the two the device makes passes, as between two updates. The second save counts.
    """
    spec = setting.spec(nbytes, tensors)
    state = libraries.torch_state(spec, setting.device)["model"]
    matrix, products = setting.matrix(), 2 if setting.tiny else 40  # about 55 ms on an H100
    clock, multiply = partial(seconds, device=setting.device), partial(_multiply, matrix, products)
    alone = clock(multiply, warm_up=1)
    with setting.empty_folder("stall") as folder, CheckpointManager(folder, keep_last=1) as manager:
        options: Any = {} if setting.device == "cpu" else {"device": setting.device}  # it is page-locked
        reserve = clock(lambda: manager.reserve(spec.nbytes + (1 << 20), **options))
        for step in (1, 2):
            synchronize(setting.device)
            began = time.perf_counter()
            pending = manager.save_async(Checkpoint(step=step, model=state), overlap=True)
            returned = time.perf_counter()
            passes = clock(multiply)
            passed = time.perf_counter()
            pending.wait_copied()
            copied = time.perf_counter()
            pending.wait()
            durable = time.perf_counter() - began
        loaded = manager.load(2, framework="torch", mmap=True, verify="lazy").model
        _require_equal({name: state[name] for name in [*state][:: max(1, len(state) // 16)]}, loaded)
    return {
        "stall_ms": (returned - began + copied - passed) * 1e3,
        "returns_ms": (returned - began) * 1e3,
        "waits_ms": (copied - passed) * 1e3,
        "passes_ms": passes * 1e3,
        "passes_alone_ms": alone * 1e3,
        "durable_s": durable,
        "reserve_s": reserve,
    }


def round_trip(setting: Setting, name: str) -> Figures:
    """GB/s from the device to a durable file and back, in memory's file system and on the disk."""
    library = LIBRARIES[name](setting.device)
    spec, small = setting.spec(4 << 30, 400), setting.spec(1 << 20, 8)
    saved = library.state(spec)
    figures: Figures = {}
    for medium in ("memory", "disk"):
        with setting.empty_folder("round-trip", on_disk=medium == "disk") as folder:
            library.save(library.state(small), folder / "warm-up")
            library.loader(folder / "warm-up", small)()
            save = partial(library.save, saved, folder / "saved")
            figures[f"save_{medium}_gbs"] = spec.nbytes / seconds(save, setting.device) / 1e9
            load = library.loader(folder / "saved", spec)
            if medium == "disk":
                with contextlib.suppress(RuntimeError):  # some systems cannot
                    probes.drop(folder / "saved")
                    figures["cold"] = True
            loaded: list[Any] = []
            load_once = partial(_load_into, loaded, load)
            figures[f"load_{medium}_gbs"] = spec.nbytes / seconds(load_once, setting.device) / 1e9
            if name == "distrust":
                _require_equal(saved["model"], loaded[0].model)
    return figures


def _load_into(loaded: list[Any], load: Callable[[], object]) -> None:
    loaded[:] = [load()]


def _require_equal(saved: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """A fast copy that is wrong is no result."""
    for name, tensor in saved.items():
        if not (tensor == loaded[name].to(tensor.device)).all():
            raise ValueError(f"{name}: what was loaded is not what was saved")


def _multiply(matrix: Any, count: int) -> None:
    for _ in range(count):
        matrix @ matrix
