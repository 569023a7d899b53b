"""Gradient checkpointing: a layer keeps its inputs only, and is computed again on the way back.

What dropout draws is drawn before: computed again, the layer must drop what it dropped the first time, and
mlx's own generator has gone on by then.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def checkpoint_layers(model: Any) -> None:
    """Have each layer computed again on the way back; other models of its kind stay as they are."""
    for layer in model.layers:
        for _, module in layer.named_modules():
            if type(module) is nn.Dropout:
                module.__class__ = _Dropout
        layer.__class__ = _checkpointing_class(type(layer))


def _checkpointing_class(kind: type) -> type:
    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:  # noqa: N807
        dropouts = [module for _, module in self.named_modules() if _draws(module)]
        keys = _drawn_keys(len(dropouts))

        def of_parameters(trained: Any, *inputs: Any) -> Any:
            self.update(trained)
            for dropout, key in zip(dropouts, keys, strict=True):
                dropout._key = key
            return kind.__call__(self, *inputs, **options)

        return mx.checkpoint(of_parameters)(self.trainable_parameters(), *inputs)

    return type(kind.__name__, (kind,), {"__call__": __call__})


class _Dropout(nn.Dropout):  # type: ignore[misc]
    """Draws with the key that it was given."""

    def __call__(self, inputs: mx.array) -> mx.array:
        if not _draws(self):
            return inputs
        kept = mx.random.bernoulli(self._p_1, inputs.shape, key=self._key)
        dropped: mx.array = kept * inputs * (1 / self._p_1)
        return dropped


def _draws(module: Any) -> bool:
    return isinstance(module, _Dropout) and module.training and module._p_1 < 1


def _drawn_keys(count: int) -> list[mx.array]:
    """Keys by mlx's own generator, which goes on."""
    if not count:
        return []
    bits: mx.array = mx.view(mx.random.randint(-(2**31), 2**31 - 1, (count, 2), mx.int32), mx.uint32)
    return list(bits)
