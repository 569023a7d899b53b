"""The savers of arrays, each used as its own documentation shows.

Each finds its newest checkpoint by its own means. Those without (safetensors, ``torch.save``) are tried in
both ways in which they are used: over the same name, and with a new name for each step, of which the highest
is loaded. ``torch.distributed.checkpoint`` (DCP) writes a new folder for each step, and the newest that has
its ``.metadata`` is loaded. Imports are in the functions: a process imports only the library that it tries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from campaigns.peers.accidents import COMMON, Accident

TENSORS = 16
Arrays = dict[str, "np.ndarray[Any, Any]"]


def make_state(step: int, mib: int) -> Arrays:
    """Tensors of so many MiB in total; no two steps share a value."""
    state: Arrays = {
        f"layers.{index}.weight": base + np.float32(step) for index, base in enumerate(_bases(mib))
    }
    state["step"] = np.array([step], np.int32)
    return state


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

SAVES = 12


class Subject(ABC):
    """A way to save and to resume.

    Attributes:
        ours: whether a loss is a counterexample.
        interval: steps between two saves.
        damages: how many trials of each kind of damage.
        kills: how many kills.
    """

    name: str  # in the tables
    modules: tuple[str, ...] = ()  # that have to be installed
    packages: tuple[str, ...] = ()  # whose versions are shown
    ours = False
    accidents: tuple[Accident, ...] = COMMON  # that it is tried with
    interval = 1
    damages = 50
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
    """A saver of arrays."""

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
    """Ours."""

    name = "distrust"
    packages = ("distrust-trainer",)
    ours = True

    def open(self, directory: Path) -> None:
        from distrust import CheckpointManager

        self.manager = CheckpointManager(directory)

    def close(self) -> None:
        self.manager.close()

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        from distrust import Checkpoint

        self.manager.save(Checkpoint(step=step, model=arrays))

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        from distrust import CheckpointManager

        return CheckpointManager(directory).load_latest().model

    def path(self, directory: Path, step: int) -> Path:
        return directory / f"checkpoint-{step}.safetensors"


class DistrustBackground(Distrust):
    """Ours, in the background: killed anywhere between its start and its report."""

    name = "distrust, save_async"
    accidents = COMMON[:1]

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        from distrust import Checkpoint

        self.manager.save_async(Checkpoint(step=step, model=arrays)).wait()


class SingleFile(Store):
    """A file for each step, or the same one again and again."""

    suffix: str
    same_name = False

    def path(self, directory: Path, step: int) -> Path:
        return directory / (f"state{self.suffix}" if self.same_name else f"state-{step}{self.suffix}")

    def newest(self, directory: Path) -> Path | None:
        """The file of the highest step, whatever is in it."""
        if self.same_name:
            return self.path(directory, 0)
        files = directory.glob(f"state-*{self.suffix}")
        return max(files, key=lambda file: int(file.stem.split("-")[1]), default=None)


class Safetensors(SingleFile):
    """``save_file``."""

    name = "safetensors, new names"
    modules = packages = ("safetensors",)
    suffix = ".safetensors"

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        from safetensors.numpy import save_file

        save_file(arrays, self.path(directory, step))

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        from safetensors.numpy import load_file

        newest = self.newest(directory)
        return None if newest is None else load_file(newest)


class SafetensorsSame(Safetensors):
    """``save_file`` over the file before."""

    name = "safetensors, same name"
    same_name = True
    accidents = COMMON[:1]


class Torch(SingleFile):
    """``torch.save``; loaded with ``weights_only=True``."""

    name = "torch.save, new names"
    modules = packages = ("torch",)
    suffix = ".pt"

    def convert(self, arrays: Arrays) -> Any:
        return _tensors(arrays)

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        import torch

        torch.save(arrays, self.path(directory, step))

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        import torch

        newest = self.newest(directory)
        return None if newest is None else _arrays(torch.load(newest, weights_only=True))


class TorchSame(Torch):
    """``torch.save`` over the file before."""

    name = "torch.save, same name"
    same_name = True
    accidents = COMMON[:1]


class Dcp(Store):
    """``torch.distributed.checkpoint.save``, in a single process."""

    name = "DCP"
    modules = packages = ("torch",)

    def convert(self, arrays: Arrays) -> Any:
        return _tensors(arrays)

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        _dcp().save(arrays, checkpoint_id=self.path(directory, step), no_dist=True)

    def load(self, directory: Path, mib: int) -> Mapping[str, Any] | None:
        complete = (file.parent for file in directory.glob("step-*/.metadata"))
        newest = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)
        if newest is None:
            return None
        target = _tensors({name: array * 0 for name, array in make_state(0, mib).items()})
        _dcp().load(target, checkpoint_id=newest, no_dist=True)
        return _arrays(target)

    def path(self, directory: Path, step: int) -> Path:
        return directory / f"step-{step}"


class DcpBackground(Dcp):
    """``async_save``: killed anywhere between its start and its future's result."""

    name = "DCP, async_save"
    accidents = COMMON[:1]

    def save(self, directory: Path, step: int, arrays: Any) -> None:
        _dcp().async_save(arrays, checkpoint_id=self.path(directory, step), no_dist=True).result()


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
