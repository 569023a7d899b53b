"""What has to agree inside a checkpoint: moments with the arrays they are of, their step with its step.

Each of these alone is a whole array or a number: no checksum finds them, and a training would go on from them
without a word. A transposed moment has the right number of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten

M, V, STEP = "m", "v", "step"
#: So many findings are told, where everything is wrong.
_TOLD = 4

Shapes = Mapping[str, tuple[int, ...]]


def require(optimizer: Mapping[str, Any], model: Shapes, *, step: int, of_moments: str, of_step: str) -> None:
    """Check an optimizer against the model that it is of, and against the step of the checkpoint.

    Args:
        optimizer: its tree; whatever has a ``shape`` is an array.
        model: the shapes of the model's arrays. Where there are none, moments need only each other.
        step: of the checkpoint.
        of_moments: for messages: where the moments stand.
        of_step: for messages: the name of the field of the optimizer's step.

    Raises:
        CorruptCheckpoint: with what does not agree, in one line.
    """
    for moment in (M, V):
        if moment in optimizer and _shapes(optimizer[moment]) is None:
            raise CorruptCheckpoint(f"{of_moments}: its {moment} holds something else than arrays")
    m, v = _shapes(optimizer.get(M, {})) or {}, _shapes(optimizer.get(V, {})) or {}
    if not m and not v:
        return
    findings = [*_of_moments(m, v, model)]
    if findings:
        more = f"; and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
        told = "; ".join(line for _, line in findings[:_TOLD])
        raise CorruptCheckpoint(f"{of_moments}: {told}{more}", tensor=f"optimizer.{findings[0][0]}")
    if STEP in optimizer:
        _require_step(optimizer[STEP], step, of_step)


def _shapes(arrays: Any) -> Shapes | None:
    if type(arrays) is not dict or not all(hasattr(array, "shape") for array in arrays.values()):
        return None
    return {name: array.shape for name, array in arrays.items()}


def _of_moments(m: Shapes, v: Shapes, model: Shapes) -> Iterator[tuple[str, str]]:
    """The name of each moment that does not agree, and what is wrong with it."""
    for moment, mine, other, others in ((M, m, V, v), (V, v, M, m)):
        for name, shape in sorted(mine.items()):
            label = f"{moment}.{name}"
            shown = quote_untrusted(label)
            if model and name not in model:
                yield label, f"{shown} is of no array that the model has"
            elif model and model[name] != shape:
                yield label, f"{shown} has the shape {[*shape]}, and its array {[*model[name]]}"
            elif name not in others:
                yield label, f"{shown} is there without its {other}"
            elif not model and moment == M and others[name] != shape:
                yield label, f"{shown} has the shape {[*shape]}, and its {other} {[*others[name]]}"


def _require_step(found: Any, step: int, of_step: str) -> None:
    if type(found) is not int or not 0 < found <= step:
        shown = "an array" if hasattr(found, "shape") else shorten(repr(found))
        raise CorruptCheckpoint(
            f"{of_step} is {shown}: beside moments it is a whole number, above 0 and not above {step}, the "
            "step of the checkpoint"
        )
