"""LoRA through mlx-lm's own layers: what is trained, and under which names it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from distrust.engines.state_conversion import lora_scale
from distrust.errors import ConfigError

#: Widened exactly, where another program saved such.
NARROWER = (mx.float16, mx.bfloat16)
_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    rslora: bool,
    dora: bool,
) -> None:
    """Give the layers of a model LoRA adapters in float32; everything else is frozen.

    Their first values are drawn from mlx's generator: seed it before.

    Raises:
        ConfigError: if the layers have no module of these names, or one that cannot be adapted so.
    """
    model.freeze()
    names = _matching_modules(model, target_modules)
    parameters = {
        "rank": rank,
        "scale": lora_scale(rank, alpha, rslora=rslora),
        "dropout": dropout,
        "keys": names,
    }
    try:
        linear_to_lora_layers(model, len(model.layers), parameters, use_dora=dora)
    except ValueError as error:
        raise ConfigError(f"--target-modules {' '.join(target_modules)}: mlx-lm says: {error}") from error


def trained_parameters(model: Any) -> dict[str, mx.array]:
    """What is trained, by mlx-lm's names: such as ``model.layers.0.self_attn.q_proj.lora_a``."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def differences(saved: Mapping[str, Any], trained: Mapping[str, mx.array]) -> list[str]:
    """A line for each array that is missing, of another shape or of another dtype."""
    found = [f"{name}: in the model, not in the checkpoint" for name in trained if name not in saved]
    found += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in trained]
    for name, parameter in trained.items():
        was = saved.get(name)
        fits = was is not None and tuple(was.shape) == tuple(parameter.shape)
        if was is not None and not (fits and was.dtype in (parameter.dtype, *NARROWER)):
            found.append(f"{name}: was {_describe_array(was)}, is {_describe_array(parameter)}")
    return found


def _describe_array(array: Any) -> str:
    return f"{str(array.dtype).removeprefix('mlx.core.')}{list(array.shape)}"


def _matching_modules(model: Any, target_modules: Sequence[str]) -> list[str]:
    """The modules that the targets name as peft does: by a name, or the end of one."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) or hasattr(module, "to_lora")
    ]
    if list(target_modules) == ["all-linear"]:
        return [name for name in names if ".layers." in f".{name}"]  # not the head
    every = [name for name, _ in model.named_modules()]
    chosen: set[str] = set()
    for target in target_modules:
        meant = {name for name in every if name == target or name.endswith(f".{target}")}
        if not meant or not meant <= set(names):
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            what = "is no linear module" if meant else "is not in the model"
            raise ConfigError(
                f"--target-modules {' '.join(target_modules)}: {target} {what}; what mlx can adapt "
                f"is: {there}"
            )
        chosen |= meant
    return sorted(chosen)
