"""AdamW of mlx over named arrays: weight decay for matrices, none for vectors.

Decoupled weight decay: Loshchilov and Hutter 2017, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers

from distrust.config import TrainConfig

Arrays = Mapping[str, mx.array]


class AdamW:
    """The moments of the trained arrays, and the rule of a step, which may be compiled."""

    def __init__(self, trained: Arrays, config: TrainConfig, *, compiled: bool) -> None:
        self.step = 0  # steps made
        self.m = {name: mx.zeros_like(array) for name, array in trained.items()}
        self.v = {name: mx.zeros_like(array) for name, array in trained.items()}
        betas, epsilon = [config.adam_beta1, config.adam_beta2], config.adam_epsilon
        # mlx's AdamW has one decay for all arrays, so there is one instance for each decay.
        self._rules = {
            decay: mlx.optimizers.AdamW(0.0, betas, epsilon, weight_decay=decay, bias_correction=True)
            for decay in {config.weight_decay, 0.0}
        }
        self._decay = config.weight_decay
        self._step: Any = mx.compile(self._apply) if compiled else self._apply

    def update(self, trained: Arrays, gradients: Arrays, *, learning_rate: float) -> dict[str, mx.array]:
        """Take a step: returns the new arrays, and updates the moments."""
        self.step += 1
        # Arrays, not numbers: a compiled function would treat numbers as constants.
        rate, step = mx.array(learning_rate, mx.float32), mx.array(self.step, mx.uint64)
        updated, self.m, self.v = self._step(dict(trained), dict(gradients), self.m, self.v, rate, step)
        mx.eval(updated, self.m, self.v)
        return updated  # type: ignore[no-any-return]

    def _apply(
        self, trained: Arrays, gradients: Arrays, m: Arrays, v: Arrays, rate: mx.array, step: mx.array
    ) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, mx.array]]:
        updated, new_m, new_v = {}, {}, {}
        for rule in self._rules.values():
            rule.state.update(learning_rate=rate, step=step)
        for name, array in trained.items():
            rule = self._rules[self._decay if array.ndim >= 2 else 0.0]
            moments = {"m": m[name], "v": v[name]}
            updated[name] = rule.apply_single(gradients[name], array, moments)  # replaces the moments
            new_m[name], new_v[name] = moments["m"], moments["v"]
        return updated, new_m, new_v
