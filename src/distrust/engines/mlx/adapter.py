"""LoRA through mlx-lm's own layers: which arrays are trained, their names, and their export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from distrust.config import TrainConfig
from distrust.engines import target_modules
from distrust.engines.state_conversion import adapter_scale, out_of_range
from distrust.engines.target_modules import Adaptable, Selection, layer_of
from distrust.errors import ConfigError
from distrust.option_values import ExportDtype

_QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, SwitchLinear, *_QUANTIZED)


def add_adapter(model: Any, config: TrainConfig) -> Selection:
    """Give the layers of a model the LoRA adapters of a run, in float32, and freeze everything else.

    mlx's generator initializes the adapters: seed it first. Returns which modules are adapted.
    """
    selection = target_modules.select(config, _adaptable(model))
    model.freeze()  # but not the LoRA layers, which are created below
    parameters = {
        "rank": config.lora_rank,
        "scale": adapter_scale(config),
        "dropout": config.lora_dropout,
        "keys": selection.names,
    }
    try:
        linear_to_lora_layers(model, len(model.layers), parameters, use_dora=config.dora)
    except ValueError as error:  # a layer type without a LoRA variant
        targets = " ".join(config.target_modules)
        raise ConfigError(f"--target-modules {targets}: mlx-lm says: {error}") from error
    return selection


def trained_parameters(model: Any) -> dict[str, mx.array]:
    """The trained arrays by mlx-lm's names, such as ``model.layers.0.self_attn.q_proj.lora_a``."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


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


def _adaptable(model: Any) -> Adaptable:
    modules = dict(reversed(model.named_modules()))  # mlx lists the last one first
    shapes = {
        name: _shape(module)
        for name, module in modules.items()
        if isinstance(module, _LINEAR) or hasattr(module, "to_lora")
    }
    in_layers = [name for name in shapes if layer_of(name) is not None]  # as peft does, without the head
    return Adaptable("mlx", shapes, in_layers, modules.keys())


def _shape(module: Any) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    shape = () if weight is None else tuple(weight.shape)
    packed = 32 // module.bits if isinstance(module, _QUANTIZED) else 1  # weights in a number
    return (*shape[:-1], shape[-1] * packed) if shape else shape
