"""Matrix products in float32 on x86, by the faster of two libraries.

torch multiplies float32 matrices by MKL there, whatever the processor; oneDNN, which torch brings too, uses
more of the vector units of some. Which one is taken depends on the shapes alone, so the same step always
gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Below so many multiplications MKL is level, and oneDNN's preparation of each new shape would count.
WORTH_IT = 2**27


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x · weightᵀ + bias, [m, k] by [n, k] -> [m, n]; no gradient passes through it."""
    large = x.shape[0] * weight.numel() >= WORTH_IT
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and _onednn():
        done: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return done
    return torch.nn.functional.linear(x, weight, bias)


def _onednn() -> bool:
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
