"""The config of an adapter folder of mlx-lm. Imports no framework."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from distrust.config import TrainConfig
from distrust.engines.state_conversion import MLX_SUFFIXES, adapter_scale
from distrust.errors import ConfigError

#: The file names that mlx-lm loads.
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_LAYER_MODULE = re.compile(r"(.*\.)?layers\.(\d+)\.(.+)")


def adapter_config(config: TrainConfig, names: Collection[str], *, base: str) -> str:
    """The text of mlx-lm's ``adapter_config.json``.

    Args:
        config: of the run.
        names: of the arrays, as the mlx engine names them.
        base: hub name or folder of the base model.

    Raises:
        ConfigError: mlx-lm does not support the adapter.
    """
    for name in names:
        if not name.endswith(MLX_SUFFIXES):
            raise ConfigError(
                f"--format mlx: mlx-lm does not support this adapter: {name}; give adapter, for peft"
            )
    values = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "model": base,
        "num_layers": -1,  # all layers; the keys select the modules
        "lora_parameters": {
            "rank": config.lora_rank,
            "scale": adapter_scale(config),
            "dropout": config.lora_dropout,
            "keys": _keys(sorted({name.rpartition(".")[0] for name in names})),
        },
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _keys(modules: list[str]) -> list[str]:
    """Names within a layer, as mlx-lm writes them, if all layers have the same ones; else full names."""
    layers: dict[int, set[str]] = {}
    for module in modules:
        match = _LAYER_MODULE.fullmatch(module)
        if match is None:
            return modules
        layers.setdefault(int(match[2]), set()).add(match[3])
    is_uniform = len({frozenset(inner) for inner in layers.values()}) == 1
    if is_uniform and sorted(layers) == list(range(len(layers))):
        return sorted(layers[0])
    return modules
