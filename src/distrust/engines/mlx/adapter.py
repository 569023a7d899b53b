"""LoRA through mlx-lm's own layers: which arrays are trained, their names, and their export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from distrust.config import ExportDtype, TrainConfig
from distrust.engines.state_conversion import adapter_scale, out_of_range
from distrust.errors import ConfigError

_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def add_adapter(model: Any, config: TrainConfig) -> None:
    """Give the layers of a model the LoRA adapters of a run, in float32, and freeze everything else.

    mlx's generator initializes the adapters: seed it first.
    """
    model.freeze()  # but not the LoRA layers, which are created below
    parameters = {
        "rank": config.lora_rank,
        "scale": adapter_scale(config),
        "dropout": config.lora_dropout,
        "keys": _matching_modules(model, config.target_modules),  # full names
    }
    try:
        linear_to_lora_layers(model, len(model.layers), parameters, use_dora=config.dora)
    except ValueError as error:  # a layer type without a LoRA variant
        targets = " ".join(config.target_modules)
        raise ConfigError(f"--target-modules {targets}: mlx-lm says: {error}") from error


def trained_parameters(model: Any) -> dict[str, mx.array]:
    """The trained arrays by mlx-lm's names, such as ``model.layers.0.self_attn.q_proj.lora_a``."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def in_layers(names: Sequence[str]) -> list[str]:
    """The names that are in a layer: not the embedding, the last norm or the head."""
    return [name for name in names if ".layers." in f".{name}"]


def prepare_state(
    arrays: Mapping[str, mx.array], *, file_name: str, dtype: ExportDtype, about: Mapping[str, str]
) -> Callable[[Path], None]:
    """Prepare one safetensors file of trained arrays, without torch; see ``torch/export.py``."""
    weights = {name: mx.contiguous(array.astype(getattr(mx, dtype))) for name, array in arrays.items()}
    for name, array in weights.items():
        if not bool(mx.isfinite(array).all()):
            raise out_of_range(name, dtype)

    def write(folder: Path) -> None:
        try:
            mx.save_safetensors(str(folder / file_name), weights, dict(about))
        except RuntimeError as error:  # mlx raises it for a failed write
            raise OSError(" ".join(str(error).split())) from error

    return write


def _matching_modules(model: Any, targets: Sequence[str]) -> list[str]:
    """The modules that the targets select, by peft's rule: a name, or the end of one."""
    modules = dict(model.named_modules())
    adaptable = [
        name for name, module in modules.items() if isinstance(module, _LINEAR) or hasattr(module, "to_lora")
    ]
    if list(targets) == ["all-linear"]:
        return in_layers(adaptable)  # as peft does, without the head
    selected: set[str] = set()
    for target in targets:
        matches = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not matches or not matches <= set(adaptable):  # never skip a target silently
            choices = ", ".join(sorted({name.rpartition(".")[2] for name in adaptable}))
            problem = "is no linear module" if matches else "is not in the model"
            raise ConfigError(
                f"--target-modules {' '.join(targets)}: {target} {problem}; the modules that mlx can adapt "
                f"are: {choices}"
            )
        selected |= matches
    return sorted(selected)
