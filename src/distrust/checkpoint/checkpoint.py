"""The content of a checkpoint, as the caller gives it and gets it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distrust.checkpoint import arrays, tree
from distrust.errors import UnsupportedState

MAX_STEP = 10**18  # file names have at most 18 digits, and int64 holds it


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The whole state of a training run after an optimizer step.

    Every section is a tree of dicts, lists, tuples, scalars (None, bool, int, float, str) and, except in
    ``config`` and ``metadata``, arrays of any supported framework. Dict keys are None, bools, ints, floats
    or strings; their types are kept. A loaded tree is equal to the saved one, and its arrays and floats are
    bit-identical. The order of dict keys is not kept, nor is a subclass of a scalar type (numpy's float64
    becomes a float).
    """

    step: int  # completed optimizer steps, 0 or more
    model: Mapping[Any, Any] = field(default_factory=dict)  # weights by name
    optimizer: Mapping[Any, Any] = field(default_factory=dict)  # such as a torch optimizer's state_dict()
    rng: Mapping[Any, Any] = field(default_factory=dict)  # the state of every random number generator
    history: Mapping[Any, Any] = field(default_factory=dict)  # values that grow with the run, as arrays
    config: Mapping[Any, Any] = field(default_factory=dict)  # the options that change the result
    metadata: Mapping[Any, Any] = field(default_factory=dict)  # anything else; its numbers count as metrics
    #: Shown in listings and used to choose the best checkpoint; not part of ``state_digest``.
    metrics: Mapping[str, float] = field(default_factory=dict)
    #: What the metrics were measured on, such as the digest of an eval set. The best checkpoint is chosen
    #: among those with the same value as the newest.
    measured_on: str = ""
    #: What may differ between equal runs (paths, intervals, versions), as plain JSON values; not part of
    #: ``state_digest``.
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # type(), not isinstance(): True is an int, and must not be step 1.
        if type(self.step) is not int or not 0 <= self.step < MAX_STEP:
            raise UnsupportedState(f"step must be an int in [0, 10**18), not {self.step!r}", label="step")
        for name in (*tree.STATE_SECTIONS, "metrics", "run"):
            if not isinstance(getattr(self, name), Mapping):
                kind = type(getattr(self, name)).__qualname__
                problem = f"{name} must be a dict, such as a state_dict(), not a {kind}"
                raise UnsupportedState(problem, label=name)
        if type(self.measured_on) is not str:
            raise UnsupportedState(
                f"measured_on must be a str, not {self.measured_on!r}", label="measured_on"
            )

    @property
    def nbytes(self) -> int:
        """Total size of all arrays, in bytes."""
        sections = {name: getattr(self, name) for name in tree.ARRAY_SECTIONS}
        _, by_label = tree.flatten(sections, is_array=arrays.is_array)
        return sum(array.nbytes for array in by_label.values())
