"""Checkpoints of Lightning's Trainer and of Fabric: each one verified file, written behind training.

The position in the data is Lightning's to keep: docs/integrations.md says when a resume is exact. Works with
``lightning``; and with ``pytorch_lightning`` if the program has imported that and not the other.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from distrust.checkpoint import Checkpoint, CheckpointFile, FileSaver, PendingSave, catalog, load_file
from distrust.checkpoint.checkpoint import MAX_STEP
from distrust.checkpoint.remote.location import require_path
from distrust.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, NoIntactCheckpoint, warn
from distrust.integrations.random import generators, set_generators

if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from lightning_fabric.plugins import CheckpointIO
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint
    from pytorch_lightning.strategies import SingleDeviceStrategy
else:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import SingleDeviceStrategy

_Path = str | os.PathLike[str]
_GENERATORS, _METRICS = "distrust_generators", "distrust_metrics"  # what the callbacks add to a checkpoint
_PROGRAM = {"program": "lightning"}  # in each file: who wrote it


class DistrustCheckpointIO(CheckpointIO):  # type: ignore[misc]
    """Plugin for ``Trainer(plugins=[...])`` and ``Fabric(plugins=[...])``, for one process on one device.

    Saves tensors and plain data; for anything else UnsupportedState says where it is. Never unpickles. A save
    that fails raises SaveFailed at the next save, at a load, or when ``fit`` ends; with Fabric call ``wait``.
    """

    def __init__(self) -> None:
        self._saver = FileSaver()
        self._pending: PendingSave | None = None
        self._replaced: list[Path] = []  # by that save
        self._mutex = threading.Lock()  # of that list

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _Path, storage_options: Any = None) -> None:
        """Copy a checkpoint, and write it in the background; first wait for the save before."""
        if storage_options is not None or "://" in os.fspath(path):
            raise ConfigError(f"{path}: only local files are supported, without storage_options")
        processes = torch.distributed
        if processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1:
            raise ConfigError("only one process on one device is supported")
        state = dict(checkpoint)
        # With Fabric, anything may have these names.
        steps = [state[name] for name in ("global_step", "step") if type(state.get(name)) is int]
        trees = [name for name in ("state_dict", _GENERATORS, _METRICS) if isinstance(state.get(name), dict)]
        sections = {name: state.pop(name) for name in trees if state[name]}
        converted = Checkpoint(
            step=next((step for step in steps if 0 <= step < MAX_STEP), 0),
            model=sections.get("state_dict", {}),
            optimizer={key: state.pop(key) for key in ("optimizer_states", "lr_schedulers") if key in state},
            rng=sections.get(_GENERATORS, {}),
            metrics=sections.get(_METRICS, {}),
            history={"lightning": state},
            run={"integration": _PROGRAM},
        )
        self.wait()
        self._pending = self._saver.save_async(path, converted)

    def load_checkpoint(
        self, path: _Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read and verify a checkpoint; its tensors are on the CPU. No code is loaded in any case."""
        if map_location is not None and str(map_location) != "cpu":
            raise ConfigError(f"map_location={map_location!r}: tensors are loaded to the CPU only")
        self.wait()  # it may be this file
        loaded = load_file(path, framework="torch")
        if "lightning" not in loaded.history:
            raise ConfigError(f"{path}: not written by Lightning or Fabric, but by another program")
        model = {"state_dict": dict(loaded.model)} if loaded.model else {}
        rng = {_GENERATORS: loaded.rng} if loaded.rng else {}
        return {**loaded.history["lightning"], **model, **loaded.optimizer, **rng}

    def remove_checkpoint(self, path: _Path) -> None:
        """Remove a file once the save in progress is durable: until then it may be the only intact one."""
        self._replaced.append(Path(path).absolute())
        if self._pending is None:
            self._remove_replaced()
        else:
            self._pending.add_done_callback(self._remove_replaced)

    def _remove_replaced(self) -> None:
        with self._mutex:
            if self._pending is None or self._pending.done:
                replaced, self._replaced = self._replaced, []
                for path in [] if self._pending and self._pending.has_failed else replaced:
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        warn(f"{path}: cannot be removed: {error.strerror}")

    def wait(self) -> None:
        """Wait until the last save is durable, and what it replaced is removed. Raises SaveFailed."""
        try:
            self._saver.wait()
        finally:
            self._remove_replaced()  # the background thread may not have, yet

    def teardown(self) -> None:
        """As :meth:`wait`, and return the memory; the next save allocates it again."""
        self.wait()
        self._saver.close()


class RandomState(Callback):  # type: ignore[misc]
    """Saves the global generators, as they are and as they were when the epoch began, and sets them again."""

    _loaded: Mapping[str, Any] | None = None
    _epoch: Mapping[str, Any] | None = None  # before the epoch's iterator was made

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        is_at_end = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # then the next one begins now
        checkpoint[_GENERATORS] = {"now": generators(), "epoch": None if is_at_end else self._epoch}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._loaded = checkpoint.get(_GENERATORS)
        if self._loaded is None:
            warn("the checkpoint was saved without RandomState: other random numbers follow")
        elif not self._loaded["epoch"] and "combined_loader" in checkpoint["loops"]["fit_loop"]["state_dict"]:
            warn("saved on an epoch's last batch, where Lightning loses the position of a stateful loader")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._loaded is not None:
            set_generators(self._loaded["epoch"] or self._loaded["now"])
        self._epoch = generators()  # no later hook comes before the first iterator

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._loaded is not None and self._loaded["epoch"]:
            set_generators(self._loaded["now"])  # the iterator is made, and no batch is fetched yet
        self._loaded = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._epoch = generators()  # the next one begins


class DistrustModelCheckpoint(ModelCheckpoint):  # type: ignore[misc]
    """ModelCheckpoint, with its options, whose files ``distrust ls`` and CheckpointManager read.

    ``ckpt_path="last"`` is the intact file of the last step in ``dirpath``. ``save_last`` is not needed for
    that, and writes everything twice. Saving a step again replaces its file, unless
    ``enable_version_counter=True``; two callbacks in one folder need different ``filename``.
    """

    FILE_EXTENSION = ".safetensors"

    def __init__(self, dirpath: _Path, **options: Any) -> None:
        if not hasattr(ModelCheckpoint, "_find_last_checkpoints"):
            raise ConfigError("this version of Lightning is not supported; tested: 2.6")
        if options.get("save_last") == "link":
            raise ConfigError('save_last="link": the file is not written yet; ckpt_path="last" needs no link')
        require_path(dirpath, "DistrustModelCheckpoint:")
        names = {"filename": "checkpoint-{step}", "auto_insert_metric_name": False}
        super().__init__(dirpath, **{**names, "enable_version_counter": False, **options})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy):  # others write in ways of their own
            raise ConfigError("DistrustModelCheckpoint needs a Trainer with one process on one device")
        if not isinstance(trainer.strategy.checkpoint_io, DistrustCheckpointIO):
            raise ConfigError("DistrustModelCheckpoint needs Trainer(plugins=[DistrustCheckpointIO()])")
        super().setup(trainer, pl_module, stage)
        savers = [each for each in trainer.callbacks if isinstance(each, DistrustModelCheckpoint)]
        if [(each.dirpath, each.filename) for each in savers].count((self.dirpath, self.filename)) > 1:
            advice = 'give one filename="best-{step}"'  # one would remove the other's files
            raise ConfigError(f"{self.dirpath}: two callbacks save under the same names: {advice}")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[_METRICS] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        problems: list[str] = []
        paths = Path(self.dirpath).glob("*.safetensors")
        files = [file for path in paths if (file := _read(catalog.read_header, path, problems))]
        # Not by the time of the file: a copy of the folder has others.
        for file in sorted(files, key=lambda file: (file.step, file.created or ""), reverse=True):
            if _read(catalog.verify_content, file.path, problems):
                if problems:
                    warn(problems)
                return {str(file.path)}
        if problems:
            raise NoIntactCheckpoint([*problems, "none is intact: move them away to start over"])
        return set()


def _read(read: Callable[[Path], CheckpointFile], path: Path, problems: list[str]) -> CheckpointFile | None:
    try:
        file = read(path)
        if file.is_foreign or file.header.run_info["extra"].get("integration") != _PROGRAM:
            raise CorruptCheckpoint("another program wrote it", path=path)
        return file
    except (CorruptCheckpoint, CheckpointNotFound) as error:
        if isinstance(error, CorruptCheckpoint) or path.is_symlink():  # else another process has removed it
            problems.append(f"skipped a checkpoint: {error}")
        return None
