"""How each library saves and loads, in the shortest way that its documentation shows.

Imports are inside the functions: a process pays only for the library that it measures. Where the libraries
differ in what they do:

- distrust hashes every tensor, and syncs the file and its directory; loading checks every digest.
- safetensors, torch.save: one file, fsync of the file. Nothing is hashed or verified.
- torch.distributed.checkpoint (DCP): a folder; its ``FileSystemWriter`` syncs its files (``sync_files``, the
  default). It loads into existing tensors, which saves it fresh memory.
- orbax: a folder of compressed chunks, which tensorstore syncs. Its arrays are jax's: they are immutable, so
  a background save has nothing to copy.
- a cached DCP stager is measured at its second save (the first fills its cache), ours at its first.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import states
from benchmarks.states import Spec, Tree

Wait = Callable[[], object]
STEP = 1


class Library(ABC):
    """A way to save and load.

    Attributes:
        name: in the names of the cases.
        modules: that must be installed.
        device: of the tensors.
    """

    name: str
    modules: tuple[str, ...] = ("torch",)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def state(self, spec: Spec) -> Any:
        """The state in the form that this library takes."""
        return torch_state(spec, self.device)

    @abstractmethod
    def save(self, state: Any, path: Path) -> None:
        """Save; returns when the state is durable."""

    @abstractmethod
    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        """Load everything into memory of the caller's own, on the device."""


class Background(ABC):
    """A way to save in the background.

    Attributes:
        library: that it belongs to.
        name: in the names of the cases.
    """

    library: Library
    name: str

    def prepare(self, state: Any, path: Path) -> None:  # noqa: B027  # most need nothing
        """What a run does once before its first save: not timed, but its memory counts."""

    @abstractmethod
    def start(self, state: Any, path: Path) -> Wait:
        """Return when the state may change again; the returned function waits until it is durable."""


def torch_state(spec: Spec, device: str = "cpu") -> Any:
    """The state as torch tensors: in memory that numpy has touched, or drawn on a device."""
    import torch

    if device == "cpu":
        return states.map_arrays(states.make(spec), torch.from_numpy)
    items = max(1, spec.nbytes // spec.tensors // 4)
    names = [f"layers.{index}.weight" for index in range(spec.tensors)]
    return {
        "model": {name: torch.randn(items, device=device, dtype=torch.float32) for name in names},
        "optimizer": {},
    }


class Distrust(Library):
    """Ours."""

    name = "distrust"

    def save(self, state: Any, path: Path) -> None:
        with _manager(path) as manager:
            manager.save(_checkpoint(state))

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        manager = _manager(path)
        options = {} if self.device == "cpu" else {"device": self.device}
        return lambda: manager.load(STEP, framework="torch", **options)


class DistrustMapped(Distrust):
    """Ours, as views of the file."""

    name = "distrust mmap"

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        manager = _manager(path)
        return lambda: manager.load(STEP, framework="torch", mmap=True)


class DistrustBackground(Background):
    """Ours: the first save after ``reserve``."""

    library = Distrust()
    name = "distrust background"

    def prepare(self, state: Any, path: Path) -> None:
        self.manager = _manager(path)
        device = next(iter(state["model"].values())).device
        options = {} if device.type == "cpu" else {"device": str(device)}  # it is page-locked
        self.manager.reserve(states.nbytes(state), **options)

    def start(self, state: Any, path: Path) -> Wait:
        pending = self.manager.save_async(_checkpoint(state))
        return lambda: pending.wait()


class DistrustOverlap(DistrustBackground):
    """Ours, with the copy in the background as well."""

    name = "distrust overlap"

    def start(self, state: Any, path: Path) -> Wait:
        pending = self.manager.save_async(_checkpoint(state), overlap=True)
        return lambda: pending.wait()


class Safetensors(Library):
    """Loads by reading into the tensors' own memory (``backend="pread"``)."""

    name = "safetensors"
    modules = ("torch", "safetensors")

    def state(self, spec: Spec) -> Any:
        return states.flat(super().state(spec))

    def save(self, state: Any, path: Path) -> None:
        from safetensors.torch import save_file

        path.mkdir()
        save_file(state, self.file(path))
        _sync(self.file(path))

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        from safetensors.torch import load_file

        return lambda: load_file(self.file(path), backend="pread")

    @staticmethod
    def file(path: Path) -> Path:
        """The one file."""
        return path / "state.safetensors"


class SafetensorsClone(Safetensors):
    """Loads by mapping the file and cloning each tensor."""

    name = "safetensors clone"

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        from safetensors.torch import load_file

        return lambda: {name: tensor.clone() for name, tensor in load_file(self.file(path)).items()}


class SafetensorsBytes(Safetensors):
    """Loads by reading the file and handing the bytes over."""

    name = "safetensors bytes"

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        from safetensors.torch import load

        return lambda: load(self.file(path).read_bytes())


class Torch(Library):
    """``torch.save`` and ``torch.load(weights_only=True)``."""

    name = "torch"

    def save(self, state: Any, path: Path) -> None:
        import torch

        path.mkdir()
        torch.save(state, path / "state.pt")
        _sync(path / "state.pt")

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        import torch

        return lambda: torch.load(path / "state.pt", map_location=self.device, weights_only=True)


class Dcp(Library):
    """``torch.distributed.checkpoint``, in a single process."""

    name = "dcp"

    def save(self, state: Any, path: Path) -> None:
        dcp = _dcp()
        with _quiet():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        dcp, target = _dcp(), self.state(spec)

        def load() -> object:
            with _quiet():
                dcp.load(target, checkpoint_id=path, no_dist=True)
            return target

        return load


class TorchCheckpointing(Library):
    """``torch_checkpointing`` with its blocking saver; it loads into existing tensors.

    Without direct I/O, which fails here (0.1.1, on a disk that takes only aligned writes).
    """

    name = "torch_checkpointing"
    modules = ("torch", "torch_checkpointing")

    def save(self, state: Any, path: Path) -> None:
        with contextlib.closing(self._manager()) as manager:
            manager.save(str(path), state)
        for file in path.rglob("*"):
            if file.is_file():
                _sync(file)

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        target, manager = self.state(spec), self._manager()
        return lambda: manager.load(str(path), into=target)

    @staticmethod
    def _manager() -> Any:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_sync_save()
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        return CheckpointManager(config)


class DcpBackground(Background):
    """``async_save`` with its defaults: it copies into fresh memory each time."""

    library = Dcp()
    name = "dcp background"
    stager: Any = None

    def start(self, state: Any, path: Path) -> Wait:
        with _quiet():
            future = _dcp().async_save(state, checkpoint_id=path, async_stager=self.stager, no_dist=True)
        return lambda: future.result()


class DcpCached(DcpBackground):
    """``async_save`` into the memory of an earlier one."""

    name = "dcp background cached"

    def prepare(self, state: Any, path: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        plain = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self.stager = DefaultStager(plain)
        self.stager.stage(state)


class Orbax(Library):
    """``StandardCheckpointHandler`` on jax arrays."""

    name = "orbax"
    modules = ("jax", "orbax.checkpoint")

    def state(self, spec: Spec) -> Any:
        import jax

        tree: Tree = states.make(spec)
        # Its trees have string keys, and no lists of plain numbers.
        moments = {str(index): value for index, value in tree["optimizer"].get("state", {}).items()}
        parts = {"model": tree["model"], "optimizer": moments}
        items = {name: part for name, part in parts.items() if part}
        return jax.block_until_ready(jax.tree.map(jax.numpy.asarray, items))

    def save(self, state: Any, path: Path) -> None:
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(state))

    def loader(self, path: Path, spec: Spec) -> Callable[[], object]:
        import jax
        import orbax.checkpoint as ocp

        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.state(spec))
        checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        restore = ocp.args.StandardRestore(target)
        return lambda: jax.block_until_ready(checkpointer.restore(path, args=restore))


class OrbaxBackground(Background):
    """``StandardCheckpointer``, which saves in the background."""

    library = Orbax()
    name = "orbax background"

    def prepare(self, state: Any, path: Path) -> None:
        import orbax.checkpoint as ocp

        self.checkpointer = ocp.StandardCheckpointer()

    def start(self, state: Any, path: Path) -> Wait:
        self.checkpointer.save(path, state)
        return lambda: self.checkpointer.wait_until_finished()


SAVING: tuple[Library, ...] = (Distrust(), Safetensors(), Torch(), Dcp(), Orbax())
BACKGROUND: tuple[type[Background], ...] = (
    DistrustBackground, DistrustOverlap, DcpBackground, DcpCached, OrbaxBackground,
)  # fmt: skip
LOADING: tuple[Library, ...] = (
    Distrust(), DistrustMapped(), Safetensors(), SafetensorsClone(), SafetensorsBytes(), Torch(), Dcp(),
    Orbax(),
)  # fmt: skip


def _manager(path: Path) -> Any:
    from distrust import CheckpointManager

    return CheckpointManager(path, keep_last=None)


def _checkpoint(state: Any) -> Any:
    from distrust import Checkpoint

    return Checkpoint(step=STEP, model=state["model"], optimizer=state["optimizer"])


def _dcp() -> Any:
    return import_module("torch.distributed.checkpoint")  # the package does not mark it as exported


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _quiet() -> warnings.catch_warnings[Any]:
    """DCP warns that there is a single process; that is intended."""
    return warnings.catch_warnings(action="ignore")
