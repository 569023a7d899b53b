"""The optimizer of a tensor file, which is JSON: its parameter groups, and in the previous form its moments.

``{"param_groups": [{"params": [NAME], "lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 0.0}], "step": 10}``;
the previous form adds ``"exp_avg"`` and ``"exp_avg_sq"``: ``{NAME: [numbers, shape]}``. Each field is
required, and no other is accepted: what a field changes in training must be known before a run resumes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from math import prod
from typing import Any, NamedTuple

import numpy as np

from distrust.checkpoint.format import is_valid_shape
from distrust.errors import CorruptCheckpoint, quote_untrusted
from distrust.importers.host_arrays import HostArray, require_finite
from distrust.importers.validate_optimizer import STEP, M, Shapes, V

#: Names of the moments in the file -> in our optimizer.
MOMENTS = {"exp_avg": M, "exp_avg_sq": V}
_GROUPS = "param_groups"
_GROUP_FIELDS = {"params", "lr", "betas", "weight_decay"}
#: No learning rate or decay is larger; larger integers would not even fit a float.
_MAX_NUMBER = 1e30
NAMES_SHOWN = 5


class OptimizerConfig(NamedTuple):
    """The parameter groups of an optimizer."""

    step: Any  # steps that it made; unchecked
    groups: list[dict[str, Any]]  # as in the file; every field is valid
    names: list[str]  # of all parameters, each once

    def options(self, shapes: Shapes) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Our options that the groups prove, by key, and a line for each thing that no option expresses."""
        options: dict[str, Any] = {}
        dropped = []
        betas = {tuple(map(float, group["betas"])) for group in self.groups}
        matrix_decays, vector_decays = (
            {
                float(group["weight_decay"])
                for group in self.groups
                for name in group["params"]
                if (len(shapes[name]) >= 2) == is_matrix
            }
            for is_matrix in (True, False)
        )
        if len(betas) == 1:  # here one pair of betas holds for all parameters
            options["adam_beta1"], options["adam_beta2"] = betas.pop()
        elif betas:
            dropped.append("the betas, which differ between parameter groups")
        if len(matrix_decays) == 1:
            options["weight_decay"] = matrix_decays.pop()
        elif matrix_decays:
            dropped.append("the weight decay, which differs between parameter groups")
        if any(vector_decays):  # biases and norms
            dropped.append("the weight decay of vectors: here only matrices are decayed")
        return options, tuple(dropped)


def parse_config(fields: dict[str, Any], what: str, *, with_moments: bool) -> OptimizerConfig:
    """Parse the parameter groups.

    Args:
        fields: the JSON object.
        what: its name, for messages.
        with_moments: whether it is the previous form.

    Raises:
        CorruptCheckpoint: naming what is invalid.
    """
    expected = {_GROUPS, STEP, *(MOMENTS if with_moments else ())}
    if fields.keys() != expected:
        raise CorruptCheckpoint(f"{what}: has the fields {_join(fields)}; expected are {_join(expected)}")
    groups = fields[_GROUPS]
    if type(groups) is not list or not all(map(_is_group, groups)):
        raise CorruptCheckpoint(
            f"{what}: {_GROUPS} is not a list of groups, each with params, lr, betas and weight_decay"
        )
    names = [name for group in groups for name in group["params"]]
    if len({*names}) != len(names):  # which group's options would hold is ambiguous
        raise CorruptCheckpoint(f"{what}: a parameter occurs twice in {_GROUPS}")
    return OptimizerConfig(fields[STEP], groups, names)


def require_parameters(config: OptimizerConfig, model: Set[str], moments: Set[str], what: str) -> None:
    """Check that each parameter is a weight of the model, and after the first step has moments.

    Raises:
        CorruptCheckpoint: naming one that does not.
    """
    if unknown := {*config.names} - model:
        raise CorruptCheckpoint(f"{what}: {_GROUPS} names {_join(unknown)}, of which there is no tensor")
    if not moments and not (type(config.step) is int and config.step == 0):
        raise CorruptCheckpoint(
            f"{what}: it has no moments, but {STEP} is {quote_untrusted(repr(config.step))}"
        )
    if mismatched := moments ^ {*(config.names if moments else ())}:
        raise CorruptCheckpoint(
            f"{what}: {quote_untrusted(min(mismatched))} has moments or is in {_GROUPS}, but not both"
        )


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
                raise CorruptCheckpoint(
                    f"{what}: {quote_untrusted(label)}: {error.reason}", tensor=f"optimizer.{label}"
                ) from None
    return moments


def _moment(value: Any, *, nonnegative: bool) -> HostArray:
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
    return (
        type(group) is dict
        and group.keys() == _GROUP_FIELDS
        and type(group["params"]) is list
        and {*map(type, group["params"])} <= {str}
        and _is_number(group["lr"], _MAX_NUMBER)
        and _is_number(group["weight_decay"], _MAX_NUMBER)
        and type(group["betas"]) is list
        and len(group["betas"]) == 2
        and all(_is_number(beta, 1) for beta in group["betas"])
    )


def _is_number(value: Any, limit: float) -> bool:
    # type(), because True is an int. NaN fails the comparison.
    return type(value) in (int, float) and 0 <= value < limit


def _join(names: Collection[str]) -> str:
    suffix = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(quote_untrusted, sorted(names)[:NAMES_SHOWN])) + suffix
