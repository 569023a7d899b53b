"""The engines by name: what each one needs, and how it is created. No other module branches on the name."""

from __future__ import annotations

import os
import platform
import sys
from importlib.util import find_spec
from typing import Any, Literal

from distrust.checkpoint import CheckpointFile
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY, scan
from distrust.config import TrainConfig
from distrust.contract import DEFAULT_RECORDED_ENGINE, Engine
from distrust.engines.loading import locate
from distrust.errors import ConfigError, MissingDependency
from distrust.paths import local_folder
from distrust.ranks import SINGLE, Ranks
from distrust.run_record import RunRecord

EngineName = Literal["torch", "mlx"]
#: Engine -> the module that has to be installed, and the extra of this package that installs it.
ENGINES: dict[EngineName, tuple[str, str]] = {"torch": ("torch", "train"), "mlx": ("mlx_lm", "mlx")}


def create_engine(
    config: TrainConfig, *, objects: tuple[Any, Any] | None = None, ranks: Ranks = SINGLE
) -> Engine:
    """Load the model, tokenizer, adapter and optimizer that ``config`` describes.

    Args:
        config: of the run.
        objects: a model and a tokenizer of transformers to train instead of those that it names.
        ranks: the processes among which the gradients are summed.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
        MissingDependency: if the engine's library is not installed.
    """
    if objects is None:
        locate(config.model)  # a wrong name is reported before a framework is imported, which takes seconds
    name = select_engine(config) if objects is None else "torch"
    require_installed(name, purpose=f"--engine {name}")
    if name == "mlx" and config.shard != "none":
        raise ConfigError(f"--shard {config.shard}: only --engine torch divides the model among ranks")
    if name == "mlx":  # each branch imports its framework
        from distrust.engines.mlx.engine import MlxEngine

        return MlxEngine(config, ranks)
    if config.shard == "all":
        from distrust.engines.torch.sharded_all import ShardedEngine

        return ShardedEngine(config, objects, ranks)
    from distrust.engines.torch.engine import TorchEngine

    return TorchEngine(config, objects, ranks)


def join_ranks(config: TrainConfig) -> Ranks:
    """The ranks of a run, if torchrun or mlx.launch started this process as one of several; else SINGLE.

    Raises:
        ConfigError: if the variables that say so contradict each other, or ``config``.
        RankLost: if the other ranks cannot be reached.
    """
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        require_installed("torch", purpose="a run of several ranks")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its errors of lost peers are stack traces
        from distrust.engines.torch.ranks import TorchRanks

        return TorchRanks.from_environment(config)
    if "MLX_RANK" in os.environ:
        from distrust.engines.mlx.ranks import MlxRanks, read_addresses

        rank, addresses = read_addresses()
        if addresses:
            if select_engine(config) != "mlx":
                raise ConfigError("mlx.launch starts ranks that train with mlx: give --engine mlx")
            return MlxRanks(rank, addresses, config.rank_timeout)
    return SINGLE


def select_engine(config: TrainConfig) -> EngineName:
    """The engine that ``config`` names, or that of the run it resumes, or this machine's default."""
    if config.engine != "auto":
        return config.engine
    for folder in (config.run_directory, local_folder(config.out)):  # a branch starts from --out
        files = scan(folder / RUN_SUBDIRECTORY).files
        if files and is_installed(recorded_engine(files[-1])):
            return recorded_engine(files[-1])
    return default_engine()


def recorded_engine(file: CheckpointFile) -> EngineName:
    """The engine that wrote a checkpoint."""
    return "mlx" if RunRecord.from_header(file.header).engine == "mlx" else DEFAULT_RECORDED_ENGINE


def default_engine() -> EngineName:
    """The engine of a new run: mlx on Apple silicon or without torch, if it is installed; else torch."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_installed("mlx") and (apple or not is_installed("torch")) else "torch"


def is_installed(name: EngineName) -> bool:
    """Whether the library of an engine is installed; does not import it."""
    return find_spec(ENGINES[name][0]) is not None


def require_installed(name: EngineName, *, purpose: str) -> None:
    """Raise MissingDependency if the library of an engine is not installed; ``purpose`` is what needs it."""
    if not is_installed(name):
        library, extra = ENGINES[name]
        raise MissingDependency(purpose, library=library, extra=extra)


def first_installed(preferred: EngineName, *, purpose: str) -> EngineName:
    """The preferred engine if it is installed, else any other that is; MissingDependency if none is."""
    name = next(filter(is_installed, (preferred, *ENGINES)), preferred)
    require_installed(name, purpose=purpose)
    return name
