"""Products with frozen weights on a CPU, where mlx has two speeds.

Its library there (on Linux, a reference BLAS) takes twice as long for x·Wᵀ, which is what a linear layer
computes, as for W·xᵀ, where no matrix is read against the way it lies. Transposing x costs next to nothing.
The way back, y·W, is quick as it stands.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def is_faster(device: mx.Device) -> bool:
    """Whether it helps: Apple's own library knows no such difference, and no GPU does."""
    return device.type == mx.DeviceType.cpu and sys.platform != "darwin"


def use_columns(model: Any) -> None:
    """Have the linear layers of this model compute by columns; other models are untouched."""
    for _, module in model.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


def product(table: mx.array, inputs: mx.array) -> mx.array:
    """Inputs · tableᵀ, by columns; the gradient is of the inputs alone.

    Args:
        table: [out, in], frozen.
        inputs: [..., in].

    Returns:
        [..., out], of the inputs' dtype.
    """

    @mx.custom_function
    def forward(inputs: mx.array) -> mx.array:
        columns = mx.contiguous(inputs.reshape(-1, inputs.shape[-1]).T)
        return mx.contiguous((table @ columns).T).reshape(*inputs.shape[:-1], -1)

    @forward.vjp
    def _(_inputs: mx.array, slope: mx.array, _output: mx.array) -> mx.array:
        return slope @ table

    found: Any = forward(inputs)
    return found  # type: ignore[no-any-return]


class _Linear(nn.Linear):  # type: ignore[misc]
    def __call__(self, inputs: mx.array) -> mx.array:
        outputs = product(self["weight"], inputs)
        return outputs + self["bias"] if "bias" in self else outputs
