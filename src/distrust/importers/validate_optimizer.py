"""Checks that an optimizer belongs to its model: moments match the weights, its step matches the checkpoint.

Each moment may be valid in itself, with a correct checksum: only the comparison finds one of another model.
A transposed moment even has the right number of elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten

#: Keys of an optimizer: AdamW's first and second moments by name, and its number of steps.
M, V, STEP = "m", "v", "step"
#: A message lists at most this many problems.
PROBLEMS_SHOWN = 4

Shapes = Mapping[str, tuple[int, ...]]


def validate_optimizer(
    optimizer: Mapping[str, Any], model: Shapes, *, step: int, moments_file: str, step_field: str
) -> None:
    """Check an optimizer against its model and the step of the checkpoint.

    Args:
        optimizer: its tree; whatever has a ``shape`` is an array.
        model: the shape of each weight. If empty, the moments need only match each other.
        step: of the checkpoint.
        moments_file: where the moments are, for messages.
        step_field: the field of the optimizer's step, for messages.

    Raises:
        CorruptCheckpoint: with all that does not match, in one line.
    """
    for moment in (M, V):
        if moment in optimizer and _shapes(optimizer[moment]) is None:
            raise CorruptCheckpoint(f"{moments_file}: {moment} contains something other than arrays")
    m, v = _shapes(optimizer.get(M, {})) or {}, _shapes(optimizer.get(V, {})) or {}
    if not m and not v:
        return  # without moments there is nothing that a step could count
    problems = [*_mismatches(m, v, model)]
    if problems:
        suffix = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        lines = "; ".join(line for _, line in problems[:PROBLEMS_SHOWN])
        raise CorruptCheckpoint(f"{moments_file}: {lines}{suffix}", tensor=f"optimizer.{problems[0][0]}")
    if STEP in optimizer:
        _require_step(optimizer[STEP], step, step_field)


def _shapes(arrays: Any) -> Shapes | None:
    if type(arrays) is not dict or not all(hasattr(array, "shape") for array in arrays.values()):
        return None
    return {name: array.shape for name, array in arrays.items()}


def _mismatches(m: Shapes, v: Shapes, model: Shapes) -> Iterator[tuple[str, str]]:
    """The label of each moment that does not match, and the problem."""
    for moment, shapes, partner, partner_shapes in ((M, m, V, v), (V, v, M, m)):
        for name, shape in sorted(shapes.items()):
            label = f"{moment}.{name}"
            shown = quote_untrusted(label)
            if model and name not in model:
                yield label, f"{shown} has no weight of that name in the model"
            elif model and model[name] != shape:
                yield label, f"{shown} has shape {[*shape]}, but its weight has {[*model[name]]}"
            elif name not in partner_shapes:
                yield label, f"{shown} has no matching {partner}"
            elif not model and moment == M and partner_shapes[name] != shape:
                yield label, f"{shown} has shape {[*shape]}, but its {partner} has {[*partner_shapes[name]]}"


def _require_step(value: Any, step: int, field: str) -> None:
    if type(value) is not int or not 0 < value <= step:
        shown = "an array" if hasattr(value, "shape") else shorten(repr(value))
        raise CorruptCheckpoint(
            f"{field} is {shown}: with moments it must be an integer from 1 to {step}, the checkpoint's step"
        )
