"""The state of one engine in the form of the other: names, the way round of a matrix, and the moments.

| | engine of torch (peft's names) | engine of mlx (mlx-lm's names) |
|---|---|---|
| weights | ``base_model.model.X.lora_A.weight`` [r, in] | ``X.lora_a`` [in, r] |
| | ``base_model.model.X.lora_B.weight`` [out, r] | ``X.lora_b`` [r, out] |
| | ``base_model.model.X.lora_magnitude_vector.weight`` | ``X.m`` |
| of full fine-tuning | ``X`` | ``X`` |
| moments | ``state[number]["exp_avg"]``, ``["exp_avg_sq"]`` | ``m[name]``, ``v[name]`` |
| steps made | ``state[number]["step"]``, float32 | ``step`` |

Names no framework: the arrays are those of the engine that takes them, which copies them. What has no
counterpart: the generators of random numbers, which each micro-step seeds anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distrust.errors import ResumeRefused
from distrust.training.engine import EngineState

_PEFT = "base_model.model."
#: The ends of a name here and there, and whether the matrix lies the other way round.
_ENDS = (
    ("lora_A.weight", "lora_a", True),
    ("lora_B.weight", "lora_b", True),
    ("lora_magnitude_vector.weight", "m", False),
)
#: For each end: the beginning and end of a name before and after, and whether the matrix is turned.
_TO_MLX = [(_PEFT, f".{there}", "", f".{here}", turned) for there, here, turned in _ENDS]
_TO_TORCH = [("", f".{here}", _PEFT, f".{there}", turned) for there, here, turned in _ENDS]


#: An adapter folder of mlx-lm: its two files, and how the names of its arrays end.
MLX_WEIGHTS, MLX_CONFIG = "adapters.safetensors", "adapter_config.json"
MLX_ENDS = tuple(f".{here}" for _, here, _ in _ENDS)


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """What the adapter's product is multiplied by: α/r, or α/√r for rank-stabilized LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def is_torch(optimizer: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state is in the form of the engine of torch."""
    return "param_groups" in optimizer


def for_mlx(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of torch by mlx-lm's names, the way round that they lie there."""
    return dict(_renamed(name, array, _TO_MLX) for name, array in arrays.items())


def for_torch(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of mlx by peft's names, the way round that they lie there."""
    return dict(_renamed(name, array, _TO_TORCH) for name, array in arrays.items())


def to_mlx(state: EngineState) -> EngineState:
    """A state in the form of the engine of mlx.

    Raises:
        ResumeRefused: if it is in neither.
    """
    optimizer = state.optimizer
    if not optimizer:  # weights alone: everything else begins anew
        model = for_mlx(state.model)
        zeros = {name: array * 0 for name, array in model.items()}
        return EngineState(model, {"step": 0, "m": zeros, "v": zeros}, state.rng)
    if not is_torch(optimizer):
        if not {"step", "m", "v"} <= optimizer.keys():
            raise ResumeRefused("the checkpoint's optimizer is neither torch's nor mlx's")
        return state
    names = {
        number: name
        for group in optimizer["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    moments = {names[number]: values for number, values in optimizer["state"].items()}
    steps = {int(values["step"]) for values in moments.values()}
    if len(steps) > 1:
        raise ResumeRefused("the checkpoint's optimizer has made a number of steps of each parameter")
    model = for_mlx(state.model)
    if moments:
        m, v = (
            for_mlx({name: values[key] for name, values in moments.items()})
            for key in ("exp_avg", "exp_avg_sq")
        )
    else:  # no step was made
        m = v = {name: array * 0 for name, array in model.items()}
    return EngineState(model, {"step": max(steps, default=0), "m": m, "v": v}, state.rng)


def to_torch(state: EngineState, groups: Sequence[Mapping[str, Any]]) -> EngineState:
    """A state in the form of the engine of torch.

    Args:
        state: of either.
        groups: the ``param_groups`` of the engine that takes it.

    Raises:
        ResumeRefused: if it is in neither, or lacks a parameter's moments.
    """
    optimizer = state.optimizer
    if not optimizer:
        return EngineState(for_torch(state.model), {"state": {}, "param_groups": list(groups)}, state.rng)
    if is_torch(optimizer):
        return state
    if not {"step", "m", "v"} <= optimizer.keys():
        raise ResumeRefused("the checkpoint's optimizer is neither torch's nor mlx's")
    model, m, v = for_torch(state.model), for_torch(optimizer["m"]), for_torch(optimizer["v"])
    names = {
        number: name
        for group in groups
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if name in model  # what is not is told when the weights are compared
    }
    missing = [
        f"{name}: its moments are not in the checkpoint"
        for name in names.values()
        if name not in m.keys() & v.keys()
    ]
    if missing:
        raise ResumeRefused("the checkpoint does not fit the model:", missing)
    moments = {
        number: {"step": optimizer["step"], "exp_avg": m[name], "exp_avg_sq": v[name]}
        for number, name in names.items()
    }
    return EngineState(
        model, {"state": moments if optimizer["step"] else {}, "param_groups": list(groups)}, state.rng
    )


def _renamed(name: str, array: Any, rules: Sequence[tuple[str, str, str, str, bool]]) -> tuple[str, Any]:
    for begin, end, new_begin, new_end, turned in rules:
        if name.startswith(begin) and name.endswith(end):
            inner = name.removeprefix(begin).removesuffix(end)
            return f"{new_begin}{inner}{new_end}", array.T if turned else array
    return name, array
