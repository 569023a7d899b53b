"""Converts the state of one engine into that of the other: names, orientation of matrices, and moments.

| | engine of torch (peft's names) | engine of mlx (mlx-lm's names) |
|---|---|---|
| weights | ``base_model.model.X.lora_A.weight`` [r, in] | ``X.lora_a`` [in, r] |
| | ``base_model.model.X.lora_B.weight`` [out, r] | ``X.lora_b`` [r, out] |
| | ``base_model.model.X.lora_magnitude_vector.weight`` | ``X.m`` |
| full fine-tuning | ``X`` | ``X`` |
| moments | ``state[number]["exp_avg"]``, ``["exp_avg_sq"]`` | ``m[name]``, ``v[name]`` |
| steps made | ``state[number]["step"]``, float32 | ``step`` |

Imports no framework: arrays keep their type, and the engine that loads a state copies them. Random generators
have no counterpart; every micro-step seeds them anyway.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distrust.config import TrainConfig
from distrust.contract import EngineState
from distrust.errors import ConfigError, ResumeRefused, quote_untrusted
from distrust.option_values import ExportDtype

_PEFT_PREFIX = "base_model.model."
#: End of a name in peft and in mlx-lm, and whether the matrix is transposed.
_SUFFIXES = (
    ("lora_A.weight", "lora_a", True),
    ("lora_B.weight", "lora_b", True),
    ("lora_magnitude_vector.weight", "m", False),
)
#: (prefix, suffix, new prefix, new suffix, transpose)
_Rule = tuple[str, str, str, str, bool]
_TO_MLX: list[_Rule] = [(_PEFT_PREFIX, f".{peft}", "", f".{mlx}", flip) for peft, mlx, flip in _SUFFIXES]
_TO_TORCH: list[_Rule] = [("", f".{mlx}", _PEFT_PREFIX, f".{peft}", flip) for peft, mlx, flip in _SUFFIXES]
#: Ends of the names of mlx-lm's adapter arrays.
MLX_SUFFIXES = tuple(f".{mlx}" for _, mlx, _ in _SUFFIXES)

#: The number of a layer in the name of a module.
LAYER = re.compile(r"\.(\d+)\.")
_UNKNOWN_OPTIMIZER = "the checkpoint's optimizer is neither torch's nor mlx's"
#: Bounds on what a message lists.
LINES_SHOWN = 4
TARGETS_SHOWN = 12
#: Dtypes that float32 holds exactly; adapters of other programs are saved in them.
_NARROWER = ("float16", "bfloat16")


def arrays_to_mlx(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of torch with mlx-lm's names and orientation."""
    return _convert_arrays(arrays, _TO_MLX)


def arrays_to_torch(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of mlx with peft's names and orientation."""
    return _convert_arrays(arrays, _TO_TORCH)


def to_mlx(state: EngineState) -> EngineState:
    """Convert a state of either engine to the form of mlx's; ResumeRefused for an optimizer of neither."""
    optimizer = state.optimizer
    if optimizer and not _is_torch(optimizer):
        return replace(state, optimizer={**optimizer, "step": _mlx_step(optimizer)})
    model = arrays_to_mlx(state.model)
    # None in weights alone, such as an imported adapter; and torch creates them at the first step.
    moments = _moments_by_name(optimizer) if optimizer else {}
    if not moments:
        zeros = {name: array * 0 for name, array in model.items()}
        return EngineState(model, {"step": 0, "m": zeros, "v": zeros}, state.rng)
    steps = {_step_count(values["step"]) for values in moments.values()}
    if len(steps) > 1:
        raise ResumeRefused(
            "the checkpoint's optimizer has made different numbers of steps of its parameters"
        )
    converted = {
        moment: arrays_to_mlx({name: values[key] for name, values in moments.items()})
        for moment, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))
    }
    return EngineState(model, {"step": steps.pop(), **converted}, state.rng)


def to_torch(state: EngineState, groups: Sequence[Mapping[str, Any]]) -> EngineState:
    """Convert a state of either engine to the form of torch's, whose optimizer has these ``param_groups``.

    Raises:
        ResumeRefused: if the optimizer is of neither engine, or lacks a parameter's moments.
    """
    optimizer = state.optimizer
    if _is_torch(optimizer):
        return state
    model = arrays_to_torch(state.model)
    if not optimizer:
        return EngineState(model, {"state": {}, "param_groups": list(groups)}, state.rng)
    step = _mlx_step(optimizer)
    m, v = arrays_to_torch(optimizer["m"]), arrays_to_torch(optimizer["v"])
    # Parameters that the checkpoint lacks are reported when the weights are compared.
    names = {number: name for number, name in _numbered_names(groups) if name in model}
    missing = [name for name in names.values() if name not in m.keys() & v.keys()]
    require_no_differences([f"{name}: its moments are not in the checkpoint" for name in missing], model)
    moments = {
        number: {"step": step, "exp_avg": m[name], "exp_avg_sq": v[name]} for number, name in names.items()
    }
    return EngineState(model, {"state": moments if step else {}, "param_groups": list(groups)}, state.rng)


def steps_made(value: Any) -> int | None:
    """An optimizer's step count, from a number of any type; None if it is not a count."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number >= 0 and number.is_integer() else None


def list_differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each array that is missing, unexpected, or of another shape or dtype.

    Floats narrower than the expected dtype fit, too: widening is exact.
    """
    lines = [f"{name}: in the model, not in the checkpoint" for name in expected if name not in saved]
    lines += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in expected]
    for name, array in expected.items():
        if name not in saved:
            continue
        same_shape = tuple(saved[name].shape) == tuple(array.shape)
        if not (same_shape and dtype_name(saved[name]) in (dtype_name(array), *_NARROWER)):
            lines.append(f"{name}: was {_describe(saved[name])}, is {_describe(array)}")
    return lines


def require_no_differences(
    differences: Sequence[str],
    saved: Iterable[str],
    *,
    summary: str = "the checkpoint does not fit the model",
) -> None:
    """Raise ResumeRefused if there are differences: with the first of them, and what ``saved`` adapts."""
    if not differences:
        return
    lines = [f"{summary}:", *(f"  {quote_untrusted(line)}" for line in differences[:LINES_SHOWN])]
    if (hidden := len(differences) - LINES_SHOWN) > 0:
        lines.append(f"  and {hidden} more")
    if targets := target_modules(saved):
        shown = " ".join(map(quote_untrusted, targets[:TARGETS_SHOWN]))
        hidden = len(targets) - TARGETS_SHOWN
        suffix = f" and {hidden} more, which `distrust convert` prints" if hidden > 0 else ""
        lines.append(f"  what was saved is an adapter of --target-modules {shown}{suffix}")
    raise ResumeRefused(lines, differences)


def adapter_scale(config: TrainConfig) -> float:
    """Factor of an adapter's product: alpha / rank, or alpha / √rank for rsLoRA."""
    return config.lora_alpha / (math.sqrt(config.lora_rank) if config.rslora else config.lora_rank)


def out_of_range(name: str, dtype: ExportDtype) -> ConfigError:
    """The error for a tensor whose values overflow the dtype of an export."""
    return ConfigError(
        f"--dtype {dtype}: {name} holds numbers that are too large for it; "
        "give bfloat16 or float32, which have the same range"
    )


def target_modules(names: Iterable[str]) -> list[str]:
    """The ``--target-modules`` of an adapter, from the names of its arrays; empty for full fine-tuning.

    If every layer, from the first one on, adapts the same modules: their names within the layer. Else the
    full name of each. The names alone do not say whether the model has more layers than these.
    """
    parts = {_convert_name(name, _TO_MLX)[0].rpartition(".") for name in names}
    modules = sorted({module for module, _, suffix in parts if f".{suffix}" in MLX_SUFFIXES})
    stacks: dict[str, dict[str, set[str]]] = {}  # prefix -> layer number -> names within the layer
    for module in modules:
        if (match := LAYER.search(module)) is None:
            return modules
        layers = stacks.setdefault(module[: match.start()], {})
        layers.setdefault(match[1], set()).add(module[match.end() :])
    per_layer = [names for layers in stacks.values() for names in layers.values()]
    contiguous = all(layers.keys() == set(map(str, range(len(layers)))) for layers in stacks.values())
    if per_layer and contiguous and all(names == per_layer[0] for names in per_layer):
        return sorted(per_layer[0])
    return modules


def dtype_name(array: Any) -> str:
    """Name of an array's dtype without its framework, such as ``float32``."""
    return str(array.dtype).rpartition(".")[2]


def _describe(array: Any) -> str:
    return f"{dtype_name(array)}{list(array.shape)}"


def _is_torch(optimizer: Mapping[str, Any]) -> bool:
    return "param_groups" in optimizer


def _numbered_names(groups: Any) -> list[tuple[Any, Any]]:
    """(number, name) of each parameter: torch numbers those of an optimizer."""
    return [pair for group in groups for pair in zip(group["params"], group["param_names"], strict=True)]


def _moments_by_name(optimizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        names = dict(_numbered_names(optimizer["param_groups"]))
        moments = {names[number]: dict(values) for number, values in optimizer["state"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # nothing in a file has to be what it claims
        raise ResumeRefused(_UNKNOWN_OPTIMIZER) from None
    if any(not {"step", "exp_avg", "exp_avg_sq"} <= values.keys() for values in moments.values()):
        raise ResumeRefused(_UNKNOWN_OPTIMIZER)
    return moments


def _mlx_step(optimizer: Mapping[str, Any]) -> int:
    if not {"step", "m", "v"} <= optimizer.keys():
        raise ResumeRefused(_UNKNOWN_OPTIMIZER)
    return _step_count(optimizer["step"])


def _step_count(value: Any) -> int:
    count = steps_made(value)
    if count is None:
        raise ResumeRefused(f"the checkpoint's optimizer records {quote_untrusted(str(value))} steps")
    return count


def _convert_name(name: str, rules: Sequence[_Rule]) -> tuple[str, bool]:
    """The name in the other engine, and whether the matrix is transposed there."""
    for prefix, suffix, new_prefix, new_suffix, transpose in rules:
        if name.startswith(prefix) and name.endswith(suffix):
            return f"{new_prefix}{name.removeprefix(prefix).removesuffix(suffix)}{new_suffix}", transpose
    return name, False


def _convert_arrays(arrays: Mapping[str, Any], rules: Sequence[_Rule]) -> dict[str, Any]:
    converted = {}
    for name, array in arrays.items():
        new_name, transpose = _convert_name(name, rules)
        converted[new_name] = array.T if transpose else array  # a view: the loading engine copies it
    return converted
