"""Products with frozen weights on a CPU, by columns.

mlx's CPU library (on Linux, a reference BLAS) takes twice as long for x·Wᵀ, which a linear layer computes, as
for W·xᵀ, which reads both matrices along their rows. Transposing x costs almost nothing. The backward pass,
grad·W, is fast as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def columns_are_faster(device: mx.Device) -> bool:
    """Whether products by columns pay: not with Apple's own library, and not on a GPU."""
    return device.type == mx.DeviceType.cpu and sys.platform != "darwin"


def use_columns(model: Any) -> None:
    """Have the linear layers of this model compute by columns; other models stay as they are."""
    for _, module in model.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = _ColumnLinear


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """X · weightᵀ by columns, with a gradient for x alone.

    Args:
        x: [..., in].
        weight: [out, in], frozen.

    Returns:
        [..., out], in the dtype of x.
    """

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        columns = mx.contiguous(x.reshape(-1, x.shape[-1]).T)  # [in, n]
        return mx.contiguous((weight @ columns).T).reshape(*x.shape[:-1], -1)

    @forward.vjp
    def _(_x: mx.array, grad_output: mx.array, _output: mx.array) -> mx.array:
        return grad_output @ weight

    output: Any = forward(x)
    return output  # type: ignore[no-any-return]


class _ColumnLinear(nn.Linear):  # type: ignore[misc]
    def __call__(self, inputs: mx.array) -> mx.array:
        outputs = linear(inputs, self["weight"])
        return outputs + self["bias"] if "bias" in self else outputs
