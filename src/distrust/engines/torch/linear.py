"""Linear layers in float32 on x86 CPUs, by the faster of two libraries.

torch multiplies float32 matrices with MKL there, whatever the processor; oneDNN, which torch includes, uses
more of the vector units of some. The choice depends on the shapes alone, so equal steps give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Multiplications from which oneDNN pays: below, MKL is as fast, and each new shape costs oneDNN a set-up.
MIN_MULTIPLICATIONS = 2**27


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X · weightᵀ + bias, [m, k] and [n, k] -> [m, n], outside autograd."""
    large = x.shape[0] * weight.numel() >= MIN_MULTIPLICATIONS
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operator of torch
