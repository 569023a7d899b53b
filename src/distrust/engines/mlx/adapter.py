"""LoRA through mlx-lm's own layers: which arrays are trained, and their names in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from distrust.engines.lora_config import LoraConfig
from distrust.errors import ConfigError

_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def add_adapter(model: Any, lora: LoraConfig) -> None:
    """Give the layers of a model LoRA adapters in float32, and freeze everything else.

    mlx's generator initializes the adapters: seed it first.
    """
    model.freeze()  # but not the LoRA layers, which are created below
    parameters = {
        "rank": lora.rank,
        "scale": lora.scale,
        "dropout": lora.dropout,
        "keys": _matching_modules(model, lora),  # full names
    }
    try:
        linear_to_lora_layers(model, len(model.layers), parameters, use_dora=lora.dora)
    except ValueError as error:  # a layer type without a LoRA variant
        raise ConfigError(f"{lora.targets_flag}: mlx-lm says: {error}") from error


def trained_parameters(model: Any) -> dict[str, mx.array]:
    """The trained arrays by mlx-lm's names, such as ``model.layers.0.self_attn.q_proj.lora_a``."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def in_layers(names: Sequence[str]) -> list[str]:
    """The names that are in a layer: not the embedding, the last norm or the head."""
    return [name for name in names if ".layers." in f".{name}"]


def _matching_modules(model: Any, lora: LoraConfig) -> list[str]:
    """The modules that the targets select, by peft's rule: a name, or the end of one."""
    modules = dict(model.named_modules())
    adaptable = [
        name for name, module in modules.items() if isinstance(module, _LINEAR) or hasattr(module, "to_lora")
    ]
    if lora.target_modules == ("all-linear",):
        return in_layers(adaptable)  # as peft does, without the head
    selected: set[str] = set()
    for target in lora.target_modules:
        matches = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not matches or not matches <= set(adaptable):  # never skip a target silently
            choices = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adaptable}))
            problem = "is no linear module" if matches else "is not in the model"
            raise ConfigError(
                f"{lora.targets_flag}: {target} {problem}; the modules that mlx can adapt are: {choices}"
            )
        selected |= matches
    return sorted(selected)
