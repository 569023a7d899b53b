"""The optimizers of the older formats: their moments match the weights, their step matches the checkpoint.

Each moment may be valid in itself, with a correct checksum: only the comparison finds one of another model,
or a transposed one. In a tensor file the optimizer is JSON:
``{"param_groups": [{"params": [NAME], "lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 0.0}], "step": 10}``;
the previous form adds ``"exp_avg"`` and ``"exp_avg_sq"``: ``{NAME: [numbers, shape]}``. Each field is
required, and no other is accepted: what a field changes in training must be known before a run resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from math import prod
from typing import Any, NamedTuple

from distrust.checkpoint.format import is_valid_shape
from distrust.errors import CorruptCheckpoint, join_first, quote_untrusted, shorten
from distrust.importers.host_arrays import HostArray, require_finite

#: Keys of an optimizer: AdamW's first and second moments by name, and its number of steps.
M, V, STEP = "m", "v", "step"
#: Names of the moments in a tensor file -> in our optimizer.
MOMENTS = {"exp_avg": M, "exp_avg_sq": V}
_GROUPS = "param_groups"
#: No learning rate or decay is larger; larger integers would not even fit a float.
_MAX_NUMBER = 1e30
PROBLEMS_SHOWN, NAMES_SHOWN = 4, 5  # at most this many in a message

Shapes = Mapping[str, tuple[int, ...]]


def validate_optimizer(
    optimizer: Mapping[str, Any], model: Shapes, step: int, moments_file: str, step_field: str
) -> None:
    """Check an optimizer against its model and the step of the checkpoint.

    Args:
        optimizer: its tree; whatever has a ``shape`` is an array.
        model: the shape of each weight. If empty, the moments need only match each other.
        step: of the checkpoint.
        moments_file: where the moments are, for messages.
        step_field: where the optimizer's step is, for messages.

    Raises:
        CorruptCheckpoint: with all that does not match, in one line.
    """
    m, v = (_shapes(optimizer.get(moment, {}), f"{moments_file}: {moment}") for moment in (M, V))
    if not m and not v:
        return  # without moments there is nothing that a step could count
    if problems := [*_mismatches(m, v, model)]:
        lines = join_first((line for _, line in problems), PROBLEMS_SHOWN, "; ")
        raise CorruptCheckpoint(f"{moments_file}: {lines}", tensor=f"optimizer.{problems[0][0]}")
    if STEP in optimizer:
        value = optimizer[STEP]
        if type(value) is not int or not 0 < value <= step:
            shown = "an array" if hasattr(value, "shape") else shorten(repr(value))
            raise CorruptCheckpoint(
                f"{step_field} is {shown}: with moments it must be an integer from 1 to {step}, the "
                "checkpoint's step"
            )


def _shapes(arrays: Any, what: str) -> Shapes:
    if type(arrays) is not dict or not all(hasattr(array, "shape") for array in arrays.values()):
        raise CorruptCheckpoint(f"{what} contains something other than arrays")
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


class OptimizerConfig(NamedTuple):
    """The parameter groups of an optimizer."""

    step: Any  # steps that it made; unchecked
    groups: list[dict[str, Any]]  # as in the file; every field is valid
    names: list[str]  # of all parameters, each once

    @classmethod
    def parse(cls, fields: dict[str, Any], what: str, *, with_moments: bool) -> OptimizerConfig:
        """Parse the JSON object ``what``; in the previous form it is ``with_moments``.

        Raises:
            CorruptCheckpoint: naming what is invalid.
        """
        expected = {_GROUPS, STEP, *(MOMENTS if with_moments else ())}
        if fields.keys() != expected:
            problem = f"has the fields {_join(fields)}; expected are {_join(expected)}"
            raise CorruptCheckpoint(f"{what}: {problem}")
        groups = fields[_GROUPS]
        if type(groups) is not list or not all(map(_is_group, groups)):
            expected_form = "a list of groups, each with params, lr, betas and weight_decay"
            raise CorruptCheckpoint(f"{what}: {_GROUPS} is not {expected_form}")
        names = [name for group in groups for name in group["params"]]
        if len({*names}) != len(names):  # which group's options would hold is ambiguous
            raise CorruptCheckpoint(f"{what}: a parameter occurs twice in {_GROUPS}")
        return cls(fields[STEP], groups, names)

    def require_parameters(self, model: Set[str], moments: Set[str], what: str) -> None:
        """Check that each parameter is a weight of the model, and after the first step has moments.

        Raises:
            CorruptCheckpoint: naming one that does not.
        """
        if unknown := {*self.names} - model:
            raise CorruptCheckpoint(f"{what}: {_GROUPS} names {_join(unknown)}, of which there is no tensor")
        if not moments and not (type(self.step) is int and self.step == 0):
            shown = quote_untrusted(repr(self.step))
            raise CorruptCheckpoint(f"{what}: it has no moments, but {STEP} is {shown}")
        if mismatched := moments ^ {*(self.names if moments else ())}:
            shown = quote_untrusted(min(mismatched))
            raise CorruptCheckpoint(f"{what}: {shown} has moments or is in {_GROUPS}, but not both")

    def options(self, shapes: Shapes) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Our options that the groups prove, by key, and a line for each thing that no option expresses."""
        options: dict[str, Any] = {}
        dropped = []
        betas = {tuple(map(float, group["betas"])) for group in self.groups}
        decays: dict[bool, set[float]] = {True: set(), False: set()}  # of the matrices, of the vectors
        for group in self.groups:
            for name in group["params"]:
                decays[len(shapes[name]) >= 2].add(float(group["weight_decay"]))
        if len(betas) == 1:  # here one pair of betas holds for all parameters
            options["adam_beta1"], options["adam_beta2"] = betas.pop()
        elif betas:
            dropped.append("the betas, which differ between parameter groups")
        if len(decays[True]) == 1:
            options["weight_decay"] = decays[True].pop()
        elif decays[True]:
            dropped.append("the weight decay, which differs between parameter groups")
        if any(decays[False]):  # biases and norms
            dropped.append("the weight decay of vectors: here only matrices are decayed")
        return options, tuple(dropped)


def parse_moments(fields: Mapping[str, Any], what: str) -> dict[str, dict[str, HostArray]]:
    """The moments of the previous form: float32 arrays by ``m`` and ``v``, then by name.

    Raises:
        CorruptCheckpoint: naming the first invalid one.
    """
    moments: dict[str, dict[str, HostArray]] = {M: {}, V: {}}
    for field, moment in MOMENTS.items():
        if type(fields[field]) is not dict:
            raise CorruptCheckpoint(f"{what}: {field} is not an object")
        for name, value in fields[field].items():
            try:
                moments[moment][name] = _moment(value, nonnegative=moment == V)
            except CorruptCheckpoint as error:
                label = f"{moment}.{name}"
                reason = f"{what}: {quote_untrusted(label)}: {error.reason}"
                raise CorruptCheckpoint(reason, tensor=f"optimizer.{label}") from None
    return moments


def _moment(value: Any, *, nonnegative: bool) -> HostArray:
    import numpy as np  # listing checkpoints works without it

    numbers, shape = value if type(value) is list and len(value) == 2 else (None, None)
    if (
        type(numbers) is not list
        or type(shape) is not list
        or {*map(type, numbers)} - {int, float}
        or not is_valid_shape(tuple(shape))
    ):
        raise CorruptCheckpoint("it is not a pair of a list of numbers and a shape")
    if prod(shape) != len(numbers):
        raise CorruptCheckpoint(f"it has {len(numbers):,} numbers, but the shape {shape}")
    try:
        with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused below
            array = np.array(numbers, np.float64).astype("<f4")
    except OverflowError:  # an integer too large for any float
        raise CorruptCheckpoint("it holds numbers that are not finite") from None
    require_finite(array, nonnegative=nonnegative)
    return HostArray("F32", tuple(shape), array.view(np.uint8))


def _is_group(group: Any) -> bool:
    if type(group) is not dict or group.keys() != {"params", "lr", "betas", "weight_decay"}:
        return False
    names, betas = group["params"], group["betas"]
    return (
        type(names) is list
        and {*map(type, names)} <= {str}
        and all(_is_number(group[name], _MAX_NUMBER) for name in ("lr", "weight_decay"))
        and type(betas) is list
        and len(betas) == 2
        and all(_is_number(beta, 1) for beta in betas)
    )


def _is_number(value: Any, limit: float) -> bool:
    # type(), because True is an int. NaN fails the comparison.
    return type(value) in (int, float) and 0 <= value < limit


def _join(names: Iterable[str]) -> str:
    return join_first(map(quote_untrusted, sorted(names)), NAMES_SHOWN)
