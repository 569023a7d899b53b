"""The savers of arrays, each used as its own documentation shows.

Each finds its newest checkpoint by its own means. Those without (safetensors, ``torch.save``, DCP) load the
highest step; the first two are also tried over the same name. A process imports only the library it tries.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from campaigns.peers.accidents import COMMON, KILLS, Accident

TENSORS = 16  # of the state
Arrays = dict[str, "np.ndarray[Any, Any]"]


def make_state(step: int, mib: int) -> Arrays:
    """Tensors of so many MiB in total; no two steps share a value."""
    weights = (base + np.float32(step) for base in _bases(mib))
    state: Arrays = {f"layers.{index}.weight": weight for index, weight in enumerate(weights)}
    return {**state, "step": np.array([step], np.int32)}


def step_of(state: Mapping[str, Any]) -> int:
    """The step that a state contains; -1 if it is damaged."""
    array = state.get("step")
    return -1 if array is None or array.size != 1 else int(array.reshape(-1)[0])


def proof_of(state: Mapping[str, Any]) -> str:
    """Digest of the names, dtypes, shapes and bytes of numpy arrays."""
    digest = blake3()
    for name, array in sorted(state.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@cache
def _bases(mib: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    columns = mib * 2**20 // (TENSORS * 4 * 64)
    return [rng.standard_normal((64, columns), np.float32) for _ in range(TENSORS)]


#: Called with "begin" or "saved", and the step.
Report = Callable[[str, int], None]
#: The step that it resumed from, and the proof of its values.
Resumed = tuple[int, str] | None

SAVES = 12  # of a process that is to be killed


class Subject(ABC):
    name: str  # in the tables
    modules: tuple[str, ...] = ()  # that have to be installed
    packages: tuple[str, ...] = ()  # whose versions are shown
    ours = False  # whether a loss is a counterexample
    accidents: tuple[Accident, ...] = COMMON  # that it is tried with
    interval = 1  # steps between two saves
    damages = 50  # trials of each kind of damage
    kills = 12

    @abstractmethod
    def write(self, directory: Path, mib: int, last: int, report: Report) -> None:
        """Save one checkpoint after the other, up to step ``last``."""

    @abstractmethod
    def resume(self, directory: Path, mib: int) -> Resumed:
        """Resume as its documentation shows; None if it finds no checkpoint."""

    @abstractmethod
    def expected_proofs(self, directory: Path, mib: int) -> dict[int, str]:
        """The proof of every step that :meth:`write` may save; may use the directory."""

    @abstractmethod
    def path(self, directory: Path, step: int) -> Path:
        """The file or folder of a step."""

    def files(self, directory: Path, step: int) -> list[Path]:
        path = self.path(directory, step)
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


class Store(Subject):
    def write(self, directory: Path, mib: int, last: int, report: Report) -> None:
        self.open(directory)
        for step in range(1, last + 1):
            arrays = self.convert(make_state(step, mib))
            report("begin", step)
            self.save(directory, step, arrays)
            report("saved", step)
        self.close()

    def resume(self, directory: Path, mib: int) -> Resumed:
        loaded = self.load(directory, mib)
        return None if loaded is None else (step_of(loaded), proof_of(loaded))

    def expected_proofs(self, directory: Path, mib: int) -> dict[int, str]:
        return {step: proof_of(make_state(step, mib)) for step in range(1, SAVES + 1)}

    def open(self, directory: Path) -> None:
        """Before the first save."""
        directory.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """After the last save."""

    def convert(self, arrays: Arrays) -> Any:
        """The state in this library's arrays."""
        return arrays

    @abstractmethod
    def save(self, directory: Path, step: int, arrays: Any) -> None:
        """Save; the library reports it as saved when this returns."""

    @abstractmethod
    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        """The newest state, as numpy arrays; None if there is none."""


class Distrust(Store):
    """Ours; in the background, it is killed anywhere between the start of a save and its report."""

    packages = ("distrust-trainer",)
    ours = True

    def __init__(self, *, background: bool = False) -> None:
        self.name = "distrust, save_async" if background else "distrust"
        self.accidents = KILLS if background else COMMON
        self._background = background

    def open(self, directory: Path) -> None:
        from distrust import CheckpointManager

        self.manager = CheckpointManager(directory)

    def close(self) -> None:
        self.manager.close()

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        from distrust import Checkpoint

        checkpoint = Checkpoint(step=step, model=arrays)
        if self._background:
            self.manager.save_async(checkpoint).wait()
        else:
            self.manager.save(checkpoint)

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        from distrust import CheckpointManager

        return CheckpointManager(directory).load_latest().model

    def path(self, directory: Path, step: int) -> Path:
        return directory / f"checkpoint-{step}.safetensors"


class Function(Store):
    """A function that saves to a path, and one that loads from it; the newest path has the highest step."""

    def __init__(
        self,
        name: str,
        module: str,
        pattern: str,
        save: Callable[[Any, Path], object],
        load: Callable[[Path, int], Mapping[str, Any]],
        *,
        convert: Callable[[Arrays], Any] = dict,
        marker: str = "",
        accidents: tuple[Accident, ...] = COMMON,
    ) -> None:
        self.name = name
        self.modules = self.packages = (module,)
        self.accidents = accidents
        self._pattern = pattern  # of the name; without a field, each step is saved over the one before
        self._save, self._load, self._convert = save, load, convert
        self._marker = marker  # a file that a complete folder has

    def convert(self, arrays: Arrays) -> Any:
        return self._convert(arrays)

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        self._save(arrays, self.path(directory, step))

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        paths = [path for path in directory.glob(self._pattern.format("*")) if (path / self._marker).exists()]
        newest = max(paths, key=lambda path: int("0" + re.sub(r"\D", "", path.name)), default=None)
        return None if newest is None else self._load(newest, mib)

    def path(self, directory: Path, step: int) -> Path:
        return directory / self._pattern.format(step)


def _save_dcp(arrays: Any, path: Path) -> None:
    _dcp().save(arrays, checkpoint_id=path, no_dist=True)


def _save_dcp_async(arrays: Any, path: Path) -> None:
    _dcp().async_save(arrays, checkpoint_id=path, no_dist=True).result()


def _load_dcp(path: Path, mib: int) -> Mapping[str, Any]:
    target = _tensors({name: array * 0 for name, array in make_state(0, mib).items()})
    _dcp().load(target, checkpoint_id=path, no_dist=True)
    return _arrays(target)


class Orbax(Store):
    """``CheckpointManager`` with ``StandardSave``, in the background, then waited for."""

    name = "orbax"
    modules = ("jax", "orbax.checkpoint")
    packages = ("orbax-checkpoint", "jax")

    def open(self, directory: Path) -> None:
        super().open(directory)
        self.manager = _orbax_manager(directory)

    def close(self) -> None:
        self.manager.close()

    def convert(self, arrays: Arrays) -> Any:
        import jax

        return jax.block_until_ready(jax.tree.map(jax.numpy.asarray, arrays))

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        import orbax.checkpoint as ocp

        self.manager.save(step, args=ocp.args.StandardSave(arrays))
        self.manager.wait_until_finished()

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        with _orbax_manager(directory) as manager:
            newest = manager.latest_step()
            if newest is None:
                return None
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.convert(make_state(0, mib)))
            loaded = manager.restore(newest, args=ocp.args.StandardRestore(target))
        return {name: np.asarray(array) for name, array in loaded.items()}

    def path(self, directory: Path, step: int) -> Path:
        return directory / str(step)


def _tensors(arrays: Mapping[str, Any]) -> Any:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, Any]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _dcp() -> Any:
    return import_module("torch.distributed.checkpoint")  # its names are not declared as exported


def _orbax_manager(directory: Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=3))


_SAFETENSORS: Any = (
    lambda arrays, path: import_module("safetensors.numpy").save_file(arrays, path),
    lambda path, mib: import_module("safetensors.numpy").load_file(path),
)
_TORCH: Any = (
    lambda arrays, path: import_module("torch").save(arrays, path),
    lambda path, mib: _arrays(import_module("torch").load(path, weights_only=True)),
)
_DCP: dict[str, Any] = {"load": _load_dcp, "convert": _tensors, "marker": ".metadata"}
STORES: tuple[Store, ...] = (
    Distrust(),
    Distrust(background=True),
    Function("safetensors, new names", "safetensors", "state-{}.safetensors", *_SAFETENSORS),
    Function("safetensors, same name", "safetensors", "state.safetensors", *_SAFETENSORS, accidents=KILLS),
    Function("torch.save, new names", "torch", "state-{}.pt", *_TORCH, convert=_tensors),
    Function("torch.save, same name", "torch", "state.pt", *_TORCH, convert=_tensors, accidents=KILLS),
    Function("DCP", "torch", "step-{}", _save_dcp, **_DCP),
    Function("DCP, async_save", "torch", "step-{}", _save_dcp_async, **_DCP, accidents=KILLS),
    Orbax(),
)
