"""The JSON of an optimizer -> ``{"m": {name: numbers}, "v": {name: numbers}}`` and what else it holds.

No program is known that wrote all of these spellings; each is plain, and none can be taken for another:

- by moment: ``{"exp_avg": {name: T}, "exp_avg_sq": {name: T}, "step": 10}``;
- by parameter: ``{name: {"exp_avg": T, "exp_avg_sq": T, "step": 10}}``;
- either of them under ``"state"``, beside whatever else is there (``param_groups``).

``T``, the numbers of one array, is one of

- ``{"shape": [64, 8], "data": [512 numbers]}``, with ``"dtype": "float32"`` or ``"values"`` for ``"data"``;
- a flat list, of a parameter that the file has a tensor of: it has its shape. Or its shape stands in
  ``"shapes": {name: [64, 8]}`` beside the moments;
- lists in lists, which say their shape themselves.

Moments are float32, unless a dtype is given. ``step`` is a number of the whole optimizer; steps that are
given for each parameter, and are the same, become that. Everything else is refused in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from distrust.checkpoint.format import ITEM_SIZES, TensorInfo, is_valid_shape
from distrust.errors import CorruptCheckpoint, quote_untrusted
from distrust.importers import finite
from distrust.importers.agreement import STEP, M, V

WHAT = "_optimizer"
#: Their names there, and here.
_MOMENTS = {"exp_avg": M, "exp_avg_sq": V}
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}
_STATE, _SHAPES = "state", "shapes"
_SPELLINGS = '{"exp_avg": {name: …}, "exp_avg_sq": {name: …}} or {name: {"exp_avg": …, "exp_avg_sq": …}}'

Shapes = Mapping[str, tuple[int, ...]]


class Numbers(NamedTuple):
    """The numbers of one array.

    Attributes:
        values: flat.
        dtype: the format's name of it.
        shape: its dimensions.
    """

    values: list[float]
    dtype: str
    shape: tuple[int, ...]


def parse(found: dict[str, Any], model: Shapes) -> dict[str, Any]:
    """The optimizer's tree; the leaves of ``m`` and ``v`` are :class:`Numbers`.

    Args:
        found: the JSON object.
        model: the shapes of the model's tensors.

    Raises:
        CorruptCheckpoint: naming the first place that no spelling knows.
    """
    rest = dict(found)
    inner = rest.pop(_STATE, None)
    if type(inner) is dict:
        if both := inner.keys() & rest.keys():
            raise _unknown(f"{quote_untrusted(min(both))} stands in it and in its {_STATE}")
        rest |= inner
    elif inner is not None:
        raise _unknown(f"its {_STATE} is no object")
    shapes = {**model, **_shapes(rest.pop(_SHAPES, {}))}
    if _MOMENTS.keys() & rest.keys():
        moments = {ours: rest.pop(theirs, {}) for theirs, ours in _MOMENTS.items()}
    else:
        moments = _turned(rest)
    if not any(moments.values()) and rest.keys() - {STEP}:
        raise _unknown("it names no moments")
    made: dict[str, Any] = {}
    for ours, arrays in moments.items():
        if type(arrays) is not dict:
            raise _unknown(f"its {ours} is no object")
        if arrays:
            made[ours] = {
                name: _numbers(f"{ours}.{name}", value, shapes.get(name)) for name, value in arrays.items()
            }
    if both := made.keys() & rest.keys():
        raise _unknown(f"it has a value of the name {min(both)}")
    return {**rest, **made}


def described(tree: Mapping[str, Any], section: str) -> list[TensorInfo]:
    """The arrays of such a tree, as a listing shows them."""
    return [
        TensorInfo(
            f"{section}.{moment}.{name}",
            numbers.dtype,
            numbers.shape,
            0,
            prod(numbers.shape) * ITEM_SIZES[numbers.dtype],
            "",
        )
        for moment in _MOMENTS.values()
        for name, numbers in tree.get(moment, {}).items()
    ]


def _turned(rest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is given by parameter, by moment; it is taken out of ``rest``."""
    moments: dict[str, dict[str, Any]] = {ours: {} for ours in _MOMENTS.values()}
    steps = set()
    for name, value in list(rest.items()):
        if type(value) is not dict or not _MOMENTS.keys() & value.keys():
            continue
        del rest[name]
        if more := value.keys() - _MOMENTS.keys() - {STEP}:
            raise _unknown(f"{quote_untrusted(name)} has {quote_untrusted(min(more))} beside its moments")
        for theirs, ours in _MOMENTS.items():
            if theirs in value:
                moments[ours][name] = value[theirs]
        if STEP in value:
            steps.add(_whole(value[STEP], name))
    if len(steps) > 1 or (steps and STEP in rest and [rest[STEP]] != [*steps]):
        raise _unknown(
            f"not every parameter has made the same steps: {', '.join(map(str, sorted(steps)[:5]))}"
        )
    if steps:
        rest[STEP] = steps.pop()
    return moments


def _whole(value: Any, name: str) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise _unknown(f"the {STEP} of {quote_untrusted(name)} is no whole number")
    number: int = value
    return number


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    if type(value) is not dict:
        raise _unknown(f"its {_SHAPES} is no object")
    return {name: _shape(shape, name) for name, shape in value.items()}


def _shape(value: Any, name: str) -> tuple[int, ...]:
    if type(value) is not list or not is_valid_shape(tuple(value)):
        raise _unknown(f"the shape of {quote_untrusted(name)} is none")
    return tuple(value)


def _numbers(name: str, value: Any, known: tuple[int, ...] | None) -> Numbers:
    dtype, shape = "F32", None
    if type(value) is dict:
        rest = dict(value)
        shape = _shape(rest.pop("shape"), name) if "shape" in rest else None
        given = rest.pop("dtype", "float32")
        named = given.rpartition(".")[2] if type(given) is str else ""  # "torch.float32", "mlx.core.float32"
        if named not in _DTYPES:
            raise _unknown(f"{quote_untrusted(name)} has a dtype that is none of {', '.join(_DTYPES)}")
        dtype = _DTYPES[named]
        value = rest.pop("data" if "data" in rest else "values", None)
        if rest:
            raise _unknown(f"{quote_untrusted(name)} has {quote_untrusted(min(rest))} beside its data")
    if type(value) is not list:
        raise _unknown(f"{quote_untrusted(name)} is no list of numbers")
    nested = _nesting(value)
    flat = _flat(value, nested)
    if flat is None:
        raise _unknown(
            f"{quote_untrusted(name)} holds something else than numbers, or rows of several lengths"
        )
    if shape is None:
        shape = nested if len(nested) > 1 or known is None else known
        if len(nested) == 1 and known is None:
            raise _unknown(f"{quote_untrusted(name)} is a flat list, and nothing says its shape")
    if prod(shape) != len(flat) or (len(nested) > 1 and nested != shape):
        raise _unknown(f"{quote_untrusted(name)} has {len(flat):,} numbers, and the shape {[*shape]}")
    try:
        finite.require_in(flat, dtype, never_negative=name.startswith(f"{V}."))
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{WHAT}: {quote_untrusted(name)}: {error.reason}") from None
    return Numbers(flat, dtype, shape)


def _flat(value: list[Any], nested: tuple[int, ...]) -> list[float] | None:
    """The numbers of lists in lists; None if they are not all numbers, or the lists not all as long."""
    for length in nested[1:]:
        if {*map(type, value)} - {list} or {*map(len, value)} - {length}:
            return None
        value = [number for row in value for number in row]
    if {*map(type, value)} - {int, float}:
        return None
    try:
        return [*map(float, value)]
    except OverflowError:
        return None


def _nesting(value: Any) -> tuple[int, ...]:
    """The lengths of the first of each of lists in lists."""
    lengths = []
    while type(value) is list:
        lengths.append(len(value))
        value = value[0] if value else None
    return tuple(lengths)


def _unknown(reason: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{WHAT}: {reason}; what is read is {_SPELLINGS}")
