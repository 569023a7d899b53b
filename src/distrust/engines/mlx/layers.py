"""Replacements for layers of mlx: checkpointed layers, and linear layers that compute by columns.

Gradient checkpointing: a layer saves only its inputs, and the backward pass recomputes it. It must drop then
what it dropped the first time, when mlx's generator was in another state. So the keys of all its dropouts are
sampled before the layer runs, and used both times.

Columns: mlx's CPU library (on Linux, a reference BLAS) takes twice as long for x·Wᵀ, which a linear layer
computes, as for W·xᵀ, which reads both matrices along their rows. Transposing x costs almost nothing. The
backward pass, grad·W, is fast as it is.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def checkpoint_layers(model: Any) -> None:
    """Have the backward pass recompute each layer of this model; other models stay as they are."""
    for layer in model.layers:
        for _, module in layer.named_modules():
            if type(module) is nn.Dropout:
                module.__class__ = _KeyedDropout
        layer.__class__ = _checkpointed_class(type(layer))


def _checkpointed_class(layer_class: type) -> type:
    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:  # noqa: N807
        dropouts = [module for _, module in self.named_modules() if _is_active(module)]
        keys = _sample_keys(len(dropouts))

        # The trained arrays are arguments: mx.checkpoint differentiates with respect to those only.
        def forward(trained: Any, *inputs: Any) -> Any:
            self.update(trained)
            for dropout, key in zip(dropouts, keys, strict=True):
                dropout._key = key
            return layer_class.__call__(self, *inputs, **options)

        return mx.checkpoint(forward)(self.trainable_parameters(), *inputs)

    return type(layer_class.__name__, (layer_class,), {"__call__": __call__})


class _KeyedDropout(nn.Dropout):  # type: ignore[misc]
    """Dropout with a given key in place of mlx's generator."""

    def __call__(self, inputs: mx.array) -> mx.array:
        if not _is_active(self):
            return inputs
        mask = mx.random.bernoulli(self._p_1, inputs.shape, key=self._key)  # _p_1: probability of keeping
        return mask * inputs * (1 / self._p_1)  # type: ignore[no-any-return]


def _is_active(module: Any) -> bool:
    return isinstance(module, _KeyedDropout) and module.training and module._p_1 < 1


def _sample_keys(count: int) -> list[mx.array]:
    """Keys uint32[2] from mlx's generator, which advances."""
    if not count:
        return []
    bits: mx.array = mx.view(mx.random.randint(-(2**31), 2**31 - 1, (count, 2), mx.int32), mx.uint32)
    return list(bits)


def use_columns(model: Any) -> None:
    """Have the linear layers of this model compute by columns; other models stay as they are."""
    for _, module in model.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = _ColumnLinear


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """The product x · weightᵀ by columns, [..., in] and [out, in] -> [..., out]; the weight is frozen."""

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        columns = mx.contiguous(x.reshape(-1, x.shape[-1]).T)  # [in, n]
        return mx.contiguous((weight @ columns).T).reshape(*x.shape[:-1], -1)

    @forward.vjp
    def _(_x: mx.array, grad_output: mx.array, _output: mx.array) -> mx.array:
        return grad_output @ weight

    return forward(x)  # type: ignore[return-value]


class _ColumnLinear(nn.Linear):  # type: ignore[misc]
    def __call__(self, inputs: mx.array) -> mx.array:
        outputs = linear(inputs, self["weight"])
        return outputs + self["bias"] if "bias" in self else outputs
