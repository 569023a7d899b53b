"""An adapter folder of mlx-lm: what stands beside the arrays in it. Names no framework."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from distrust.config import TrainConfig
from distrust.engines.lora_config import LoraConfig
from distrust.engines.state_conversion import MLX_SUFFIXES
from distrust.errors import ConfigError
from distrust.importers.detect import ADAPTER_CONFIG

_OF_A_LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.(.+)")


def adapter_config(config: TrainConfig, names: Collection[str], *, base: str) -> dict[str, Any]:
    """What mlx-lm is to be told of an adapter.

    Args:
        config: of the run.
        names: of the arrays, as the engine of mlx has them.
        base: hub name or folder of the base model.

    Raises:
        ConfigError: for an adapter that mlx-lm has no layers for.
    """
    for name in names:
        if not name.endswith(MLX_SUFFIXES):
            raise ConfigError(f"--format mlx: mlx-lm has no such adapter: {name}; give adapter, for peft")
    modules = sorted({name.rpartition(".")[0] for name in names})
    return {
        "fine_tune_type": "dora" if config.dora else "lora",
        "model": base,
        "num_layers": -1,  # all of them; the keys say which modules
        "lora_parameters": {
            "rank": config.lora_rank,
            "scale": LoraConfig.from_options(config).scale,
            "dropout": config.lora_dropout,
            "keys": _keys(modules),
        },
    }


def write_config(folder: Path, described: dict[str, Any]) -> None:
    """Write it where mlx-lm looks for it."""
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _keys(modules: list[str]) -> list[str]:
    """As mlx-lm writes them, within a layer, if all layers have the same; else the whole names."""
    found = [_OF_A_LAYER.fullmatch(module) for module in modules]
    if not all(found):
        return modules
    layers: dict[str, set[str]] = {}
    for match in found:
        assert match is not None  # noqa: S101 - just asked
        layers.setdefault(match[2], set()).add(match[3])
    alike = len({frozenset(inner) for inner in layers.values()}) == 1
    numbers = sorted(map(int, layers))
    whole = alike and numbers == list(range(len(numbers)))
    return sorted(next(iter(layers.values()))) if whole else modules
