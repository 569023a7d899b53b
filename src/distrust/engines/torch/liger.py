"""liger-kernel's RMSNorm, SwiGLU and RoPE for CUDA, an optional library (Hsu et al. 2024, arXiv:2410.10989).

Each replaces a part of one model, where a trial agrees: nothing in transformers is changed.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrust.activity import warn_once

#: Offset of the weight, and what is rounded when: the ways in which models of transformers compute RMSNorm.
NORMS = ((0.0, "llama"), (0.0, "gemma"), (1.0, "gemma"))


class Liger(NamedTuple):
    """The library's functions, by its names for them."""

    suffix: str
    LigerRMSNormFunction: Any
    swiglu_forward: Any
    swiglu_backward: Any
    LigerRopeFunction: Any

    def norms(self) -> list[Any]:
        """Fused forwards of RMSNorm, one for each way to compute it."""
        return [partial(self._norm, offset=offset, rounding=rounding) for offset, rounding in NORMS]

    def _norm(self, module: Any, x: Tensor, *, offset: float, rounding: str) -> Tensor | None:
        if x.dtype != module.weight.dtype:
            return None
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        options = epsilon, offset, rounding, False  # not in place: a residual may need the gradient (Gemma 2)
        return self.LigerRMSNormFunction.apply(x, module.weight, *options)  # type: ignore[no-any-return]

    def product(self, x: Tensor, gate: Tensor) -> Tensor:
        """silu(gate) · x."""
        return self.swiglu_forward(gate.contiguous(), x.contiguous())[2]  # type: ignore[no-any-return]

    def gradients(self, grad_output: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and x, in the memory of these: a second backward pass would be wrong."""
        gradients: tuple[Tensor, Tensor] = self.swiglu_backward(gate, x, grad_output.contiguous())
        return gradients

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE of copies: the library writes over q, k, and their gradients, which others may need."""
        rotated: tuple[Tensor, Tensor] = self.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)
        for tensor in rotated:
            if tensor.requires_grad:
                tensor.register_hook(torch.clone)  # type: ignore[no-untyped-call]
        return rotated


def load() -> Liger | None:
    """The library's functions; None where it is not installed, or does not work, which a warning says."""
    if find_spec("liger_kernel") is None:
        return None
    try:
        from liger_kernel import ops

        functions = [getattr(ops, name) for name in Liger._fields[1:]]
        return Liger(f", liger-kernel {version('liger-kernel')}", *functions)
    except Exception as error:  # another version, or whatever its compiler raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warn_once(f"liger-kernel is not used, because it does not work here: {reason}")
        return None
