"""AdamW of mlx, over named arrays: matrices with weight decay, vectors without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers

from distrust.config import TrainConfig

Arrays = Mapping[str, mx.array]


class AdamW:
    """What is trained, its moments, and how they change in a step.

    Args:
        trained: float32 arrays, by name.
        config: decay, betas and epsilon.
        compile: what compiles a function, or gives it back.
    """

    def __init__(
        self,
        trained: Arrays,
        config: TrainConfig,
        *,
        compile: Callable[[Any], Any],  # noqa: A002
    ) -> None:
        self.step = 0
        self.m = {name: mx.zeros_like(array) for name, array in trained.items()}
        self.v = {name: mx.zeros_like(array) for name, array in trained.items()}
        self._rules = {
            decay: mlx.optimizers.AdamW(
                0.0,
                betas=[config.adam_beta1, config.adam_beta2],
                eps=config.adam_epsilon,
                weight_decay=decay,
                bias_correction=True,
            )
            for decay in {config.weight_decay, 0.0}
        }
        self._decay = config.weight_decay
        self._changed = compile(self._change)

    def update(self, trained: Arrays, gradients: Arrays, *, learning_rate: float) -> dict[str, mx.array]:
        """The arrays after a step; the moments are changed, too."""
        self.step += 1
        rate, step = mx.array(learning_rate, mx.float32), mx.array(self.step, mx.uint64)
        new: dict[str, mx.array]
        new, self.m, self.v = self._changed(dict(trained), dict(gradients), self.m, self.v, rate, step)
        mx.eval(new, self.m, self.v)
        return new

    def _change(
        self, trained: Arrays, gradients: Arrays, m: Arrays, v: Arrays, rate: mx.array, step: mx.array
    ) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, mx.array]]:
        new, new_m, new_v = {}, {}, {}
        for rule in self._rules.values():
            rule.state.update(learning_rate=rate, step=step)
        for name, array in trained.items():
            rule = self._rules[self._decay if array.ndim >= 2 else 0.0]
            moments = {"m": m[name], "v": v[name]}
            new[name] = rule.apply_single(gradients[name], array, moments)
            new_m[name], new_v[name] = moments["m"], moments["v"]
        return new, new_m, new_v
