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
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distrust.contract import EngineState
from distrust.errors import ResumeRefused, quote_untrusted

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


#: Where a layer's number stands in a module's name.
_LAYER = re.compile(r"\.(\d+)\.")
_OF_NEITHER = "the checkpoint's optimizer is neither torch's nor mlx's"
#: How many differences a message shows.
LINES_SHOWN = 4
TARGETS_SHOWN = 12

#: How the names of mlx-lm's arrays end.
MLX_ENDS = tuple(f".{here}" for _, here, _ in _ENDS)


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """What the adapter's product is multiplied by: α/r, or α/√r for rank-stabilized LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def is_torch(optimizer: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state is in the form of the engine of torch."""
    return "param_groups" in optimizer


def arrays_to_mlx(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of torch by mlx-lm's names, the way round that they lie there."""
    return _rename_all(arrays, _TO_MLX)


def arrays_to_torch(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the engine of mlx by peft's names, the way round that they lie there."""
    return _rename_all(arrays, _TO_TORCH)


def to_mlx(state: EngineState) -> EngineState:
    """A state in the form of the engine of mlx.

    Raises:
        ResumeRefused: if it is in neither.
    """
    optimizer = state.optimizer
    if not optimizer:  # weights alone: everything else begins anew
        model = arrays_to_mlx(state.model)
        zeros = {name: array * 0 for name, array in model.items()}
        return EngineState(model, {"step": 0, "m": zeros, "v": zeros}, state.rng)
    if not is_torch(optimizer):
        return replace(state, optimizer={**optimizer, "step": _steps_of_mlx(optimizer)})
    moments = _named_moments(optimizer)
    steps = {_steps(values["step"]) for values in moments.values()}
    if len(steps) > 1:
        raise ResumeRefused("the checkpoint's optimizer has made a number of steps of each parameter")
    model = arrays_to_mlx(state.model)
    if moments:
        m, v = (
            arrays_to_mlx({name: values[key] for name, values in moments.items()})
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
        return EngineState(
            arrays_to_torch(state.model), {"state": {}, "param_groups": list(groups)}, state.rng
        )
    if is_torch(optimizer):
        return state
    step = _steps_of_mlx(optimizer)
    model, m, v = (
        arrays_to_torch(state.model),
        arrays_to_torch(optimizer["m"]),
        arrays_to_torch(optimizer["v"]),
    )
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
        raise state_mismatch("the checkpoint does not fit the model", missing, model)
    moments = {
        number: {"step": step, "exp_avg": m[name], "exp_avg_sq": v[name]} for number, name in names.items()
    }
    return EngineState(model, {"state": moments if step else {}, "param_groups": list(groups)}, state.rng)


def steps_made(value: Any) -> int | None:
    """An optimizer's number of steps, a number in any form; None for what is none."""
    try:
        made = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(made) if made >= 0 and made.is_integer() else None


def state_mismatch(what: str, differences: Sequence[str], saved: Iterable[str]) -> ResumeRefused:
    """The error for a state that is another model's, or another adapter's.

    Args:
        what: what does not fit what.
        differences: a line each; the message has the first ones.
        saved: the names of the saved arrays: what they adapt is told.
    """
    lines = list(map(quote_untrusted, differences[:LINES_SHOWN]))
    if len(differences) > LINES_SHOWN:
        lines.append(f"and {len(differences) - LINES_SHOWN} more")
    if targets := target_modules(saved):
        shown = " ".join(map(quote_untrusted, targets[:TARGETS_SHOWN]))
        more = len(targets) - TARGETS_SHOWN
        lines.append(
            f"what was saved is an adapter of --target-modules {shown}"
            + (f" and {more} more, which `distrust convert` prints" if more > 0 else "")
        )
    return ResumeRefused("\n  ".join([f"{what}:", *lines]), differences)


def target_modules(names: Iterable[str]) -> list[str]:
    """What an adapter's arrays adapt, as ``--target-modules`` takes it; of all weights nothing.

    The modules by what stands behind the number of their layer, if each layer from the first one on has the
    same; else each by its whole name. Names alone do not tell whether the model has more layers than these.

    Args:
        names: of the arrays, in the form of either engine.
    """
    ends = {_rename(name, _TO_MLX)[0].rpartition(".") for name in names}
    modules = sorted({module for module, _, end in ends if f".{end}" in MLX_ENDS})
    stacks: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        if (found := _LAYER.search(module)) is None:
            return modules
        layers = stacks.setdefault(module[: found.start()], {})
        layers.setdefault(found[1], set()).add(module[found.end() :])
    inside = [names for layers in stacks.values() for names in layers.values()]
    whole = all(layers.keys() == set(map(str, range(len(layers)))) for layers in stacks.values())
    return sorted(inside[0]) if whole and inside and all(names == inside[0] for names in inside) else modules


def _named_moments(optimizer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of torch's state: what is kept of each parameter, by its name."""
    try:
        names = {
            number: name
            for group in optimizer["param_groups"]
            for number, name in zip(group["params"], group["param_names"], strict=True)
        }
        moments: dict[str, Mapping[str, Any]] = {
            names[number]: dict(values) for number, values in optimizer["state"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ResumeRefused(_OF_NEITHER) from None
    if any(not {"step", "exp_avg", "exp_avg_sq"} <= values.keys() for values in moments.values()):
        raise ResumeRefused(_OF_NEITHER)
    return moments


def _steps_of_mlx(optimizer: Mapping[str, Any]) -> int:
    if not {"step", "m", "v"} <= optimizer.keys():
        raise ResumeRefused(_OF_NEITHER)
    return _steps(optimizer["step"])


def _steps(value: Any) -> int:
    made = steps_made(value)
    if made is None:
        raise ResumeRefused(
            f"the checkpoint's optimizer says that it made {quote_untrusted(str(value))} steps"
        )
    return made


def _rename(name: str, rules: Sequence[tuple[str, str, str, str, bool]]) -> tuple[str, bool]:
    """The name by the other's rules, and whether the matrix is turned."""
    for begin, end, new_begin, new_end, turned in rules:
        if name.startswith(begin) and name.endswith(end):
            return f"{new_begin}{name.removeprefix(begin).removesuffix(end)}{new_end}", turned
    return name, False


def _rename_all(
    arrays: Mapping[str, Any], rules: Sequence[tuple[str, str, str, str, bool]]
) -> dict[str, Any]:
    mapped = {}
    for name, array in arrays.items():
        new, turned = _rename(name, rules)
        mapped[new] = array.T if turned else array
    return mapped
