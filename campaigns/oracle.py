"""Which checkpoints retention must keep: an oracle that shares no code with the product.

The rules are written here once more, as simply as they go, and every campaign compares with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Saved(NamedTuple):
    """A checkpoint, as far as the rules look at it."""

    step: int
    final: bool = False
    metric: float | None = None

    @classmethod
    def of(cls, step: int, kind: str, metrics: Mapping[str, float], rules: Rules) -> Saved:
        """A file of a listing, with the metric that the rules rank by."""
        return cls(step, kind == "final", metrics.get(rules.metric))

    @property
    def name(self) -> str:
        return f"checkpoint-{self.step}{'-final' if self.final else ''}.safetensors"


class Rules(NamedTuple):
    """The rules, with the names of a CheckpointManager's arguments; lower values of ``metric`` are better."""

    keep_last: int | None = None
    keep_best: int = 0
    keep_every: int | None = None
    metric: str = "eval_loss"


def one_per_step(checkpoints: Iterable[Saved]) -> dict[int, Saved]:
    """The checkpoint that counts for each step: the final one, if there is one."""
    return {saved.step: saved for saved in sorted(checkpoints, key=lambda saved: (saved.step, saved.final))}


def must_keep(checkpoints: Iterable[Saved], rules: Rules) -> set[Saved]:
    """The checkpoints that may not be removed while all of these exist; finals always stay."""
    by_step = one_per_step(checkpoints)
    steps = sorted(by_step)
    ranked = sorted((saved.metric, saved.step) for saved in by_step.values() if saved.metric is not None)
    keep = set(steps if rules.keep_last is None else steps[-rules.keep_last :])
    keep |= {step for _, step in ranked[: rules.keep_best]}
    keep |= {step for step in steps if rules.keep_every and step % rules.keep_every == 0}
    return {saved for step, saved in by_step.items() if saved.final or step in keep}
