"""What liger-kernel 0.8.5 computes, in plain torch, with the signatures and side effects of its functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from distrust.engines.torch.liger import Liger

SUFFIX = ", liger-kernel 0.8.5"


class LigerRMSNormFunction(torch.autograd.Function):
    """Of liger_kernel.ops: y = (offset + weight) · x / rms(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool
    ) -> Tensor:
        wide = x.float()
        inverse_rms = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.offset, ctx.in_place = offset, in_place
        normed = wide * inverse_rms
        if casting_mode == "llama":
            return normed.to(x.dtype) * (offset + weight)
        assert casting_mode == "gemma"
        return (normed * (offset + weight.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad_output * (ctx.offset + weight)).float()
        grad_x = (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * inverse_rms
        # In place, the library writes over the incoming gradient, whoever else may need it.
        grad_x = grad_output.copy_(grad_x) if ctx.in_place else grad_x.to(x.dtype)
        return grad_x, grad_weight, None, None, None, None


def swiglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a) · b, of contiguous tensors only."""
    rows = a.view(-1, a.shape[-1]), b.view(-1, b.shape[-1])
    return *rows, (silu(rows[0].float()).to(b.dtype) * rows[1]).view(a.shape)


def swiglu_backward(a: Tensor, b: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b, written over them."""
    wide, grad = a.float(), dc.view(a.shape).float()
    sigmoid = wide.sigmoid()
    grad_a = grad * (wide * sigmoid * (1 - sigmoid) + sigmoid) * b
    grad_b = grad * wide * sigmoid
    return a.data.copy_(grad_a), b.data.copy_(grad_b)


class LigerRopeFunction(torch.autograd.Function):
    """Of liger_kernel.ops: q and k, [b, heads, n, width], rotated by cos and sin, [1, n, width].

    In place of q and k, and of their gradients, where [b, n, heads, width] is contiguous in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None = None,
        unsqueeze_dim: int = 1,
        rotary_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = x.transpose(1, 2).contiguous()  # [b, n, heads, width], a view of x in the layout of models
    half = rows.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]  # the other halves are never read
    first, second = rows[..., :half], rows[..., half:]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    rows.data.copy_(rotated)  # as a kernel does, unseen by autograd
    return rows.transpose(1, 2)


def functions(**replaced: Any) -> Liger:
    """As :func:`distrust.engines.torch.liger.load` returns them where the library is installed."""
    kernels = LigerRMSNormFunction, swiglu_forward, swiglu_backward, LigerRopeFunction
    return Liger(SUFFIX, *kernels)._replace(**replaced)
