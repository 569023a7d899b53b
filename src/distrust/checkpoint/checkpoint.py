"""What a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distrust.checkpoint.tree import ARRAY_SECTIONS, STATE_SECTIONS
from distrust.errors import UnsupportedState

__all__ = ["ARRAY_SECTIONS", "MAX_STEP", "STATE_SECTIONS", "Checkpoint"]

#: Steps are written with at most 18 digits.
MAX_STEP = 10**18


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The whole state of a training run after an optimizer step.

    Every section is a tree of dicts, lists, tuples, scalars (None, bool, int, float, str) and, but for
    ``config`` and ``metadata``, arrays of any supported framework. Dict keys are None, bools, ints, floats
    or strings; their types are kept. A tree comes back equal, and bit for bit in its arrays and floats. The
    order of a dict's keys is not kept, nor a subclass of a scalar's type (numpy's float64 is a float).

    Attributes:
        step: optimizer steps made so far, 0 or more.
        model: names to weights.
        optimizer: moments and counters, such as a torch optimizer's ``state_dict()``.
        rng: the state of every generator of random numbers.
        history: what grows with the run, as arrays.
        config: the options that change the result.
        metadata: anything of the caller's; its numbers count as metrics.
        metrics: numbers by which checkpoints are listed and the best one is chosen. They do not enter
            ``state_digest``.
        measured_on: what the metrics were measured on, such as the digest of an eval set, if that matters:
            the best checkpoint is looked for among those that have it in common with the newest.
        run: what may differ between two equal runs (paths, intervals, versions), as plain JSON values. It
            does not enter ``state_digest``.
    """

    step: int
    model: Mapping[Any, Any] = field(default_factory=dict)
    optimizer: Mapping[Any, Any] = field(default_factory=dict)
    rng: Mapping[Any, Any] = field(default_factory=dict)
    history: Mapping[Any, Any] = field(default_factory=dict)
    config: Mapping[Any, Any] = field(default_factory=dict)
    metadata: Mapping[Any, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step < MAX_STEP:
            raise UnsupportedState(f"step must be an int of 0 or more, not {self.step!r}", label="step")
        for name in (*STATE_SECTIONS, "metrics", "run"):
            if not isinstance(getattr(self, name), Mapping):
                kind = type(getattr(self, name)).__qualname__
                raise UnsupportedState(
                    f"{name} must be a dict, such as a state_dict(), not a {kind}", label=name
                )
        if type(self.measured_on) is not str:
            raise UnsupportedState(
                f"measured_on must be a str, not {self.measured_on!r}", label="measured_on"
            )

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays together."""
        from distrust.checkpoint import arrays, tree

        _, found = tree.flatten(
            {name: getattr(self, name) for name in ARRAY_SECTIONS}, is_array=arrays.is_array
        )
        return sum(array.nbytes for array in found.values())
