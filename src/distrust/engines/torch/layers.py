"""Fused layers: LoRA's linear layer, RMSNorm, and the gated MLP, with less memory and less memory traffic.

Autograd saves the result of every elementwise operation, and each operation reads and writes its tensors
again. These functions see a whole layer: they save only what cannot be recomputed cheaply, and add in place.

Modules keep their place, so all names in checkpoints stay; only their ``forward`` is replaced, and only where
a trial reproduces the module's own output. Every other module is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from distrust.engines.torch.adapter import ADAPTER_NAME

#: Largest error of a trial, relative to the largest output: rounding in each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TRIAL_TOKENS = 4
#: A module and its input -> its output, or None where it declines.
Fused = Callable[[Any, Tensor], Tensor | None]
#: Multiplications from which oneDNN pays: below, MKL is as fast, and each new shape costs oneDNN a set-up.
MIN_MULTIPLICATIONS = 2**27


def fuse(model: torch.nn.Module, *, dtype: torch.dtype) -> dict[str, int]:
    """Replace the ``forward`` of every layer that has an equivalent fused one; counts them by kind.

    The model has its adapter and is in evaluation mode; ``dtype`` is that of the states between layers.
    """
    counts = {"lora": 0, "norm": 0, "gate": 0}
    for module in model.modules():
        kind, fused = _fused_forward(module)
        if fused is not None and _is_equivalent(module, fused, dtype):
            module.forward = partial(_forward, module, fused)
            counts[kind] += 1
    return counts


def _fused_forward(module: torch.nn.Module) -> tuple[str, Fused | None]:
    """Kind of a module and its fused forward, judged by its parts; the trial decides."""
    if _is_plain_lora(module):
        return "lora", _fused_lora
    parts = {*vars(module), *module._parameters, *module._modules}
    if "RMSNorm" in type(module).__name__ and {"weight", "variance_epsilon"} <= parts:
        return "norm", _fused_norm
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= parts:
        activation = type(module.act_fn)
        if issubclass(activation, torch.nn.SiLU) or activation.__name__ == "SiLUActivation":
            return "gate", _fused_gate
    return "", None


def _is_plain_lora(module: Any) -> bool:
    """Whether it is peft's LoRA with one adapter on a frozen linear layer, and no variant of it."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    return (
        list(module.lora_A) == [ADAPTER_NAME]
        and not module.lora_variant  # DoRA, for instance
        and not module.fan_in_fan_out
        and module.lora_B[ADAPTER_NAME].bias is None
        and not module.base_layer.weight.requires_grad
    )


@torch.no_grad()
def _is_equivalent(module: Any, fused: Fused, dtype: torch.dtype) -> bool:
    """Whether another forward returns what the module's own one does, except for rounding."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)  # its own: the run's generator stays untouched
    trial = torch.randn(1, TRIAL_TOKENS, _input_width(module), generator=generator).to(weight.device, dtype)
    try:
        expected, actual = module(trial), _forward(module, fused, trial)
    except (TypeError, RuntimeError, AttributeError):  # the module takes other arguments
        return False
    if expected.dtype != actual.dtype or expected.shape != actual.shape or expected.dtype not in TOLERANCE:
        return False
    difference = (expected.float() - actual.float()).abs().max()
    return bool(difference <= TOLERANCE[expected.dtype] * expected.float().abs().max())


def _input_width(module: Any) -> int:
    layer = module.gate_proj if hasattr(module, "gate_proj") else module
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def _forward(module: Any, fused: Fused, *args: Any, **kwargs: Any) -> Any:
    """The fused result, or the module's own for other arguments or where ``fused`` declines."""
    output = fused(module, *args) if len(args) == 1 and not kwargs else None
    return type(module).forward(module, *args, **kwargs) if output is None else output


def _fused_lora(lora: Any, x: Tensor, gate: Tensor | None = None) -> Tensor | None:
    """Declines with dropout, and where the adapter is not active."""
    dropout = lora.lora_dropout[ADAPTER_NAME]
    drops = lora.training and isinstance(dropout, torch.nn.Dropout) and dropout.p > 0
    if lora.disable_adapters or lora.merged or drops:
        return None
    base = lora.base_layer
    a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
    scale = lora.scaling[ADAPTER_NAME]
    return _LoraLinear.apply(x, gate, base.weight, base.bias, a, b, scale)  # type: ignore[no-any-return, no-untyped-call]


def _fused_gate(module: Any, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj  # gate, up: [..., inner width]
    output = _fused_lora(down, up, gate) if _is_plain_lora(down) else None  # never saves the gated product
    if output is not None:
        return output
    return down(_Gate.apply(gate, up))  # type: ignore[no-any-return, no-untyped-call]


def _fused_norm(module: Any, x: Tensor) -> Tensor | None:
    if x.dtype != module.weight.dtype:
        return None
    return _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · x Aᵀ Bᵀ in the dtype of W; with a gate, silu(gate) · x replaces x.

    LoRA: Hu et al. 2021, arXiv:2106.09685. Saves x and gate, which other layers save anyway, and x Aᵀ,
    [n, rank]. The backward pass recomputes the gated product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            inputs = _gated_rows(x, gate, weight.dtype)  # [n, in]
            low_rank = torch.mm(inputs, a.to(weight.dtype).t())  # [n, rank]
            result = linear(inputs, weight, bias)  # [n, out]
            result.addmm_(low_rank, (b * scale).to(weight.dtype).t())  # in place: no second [n, out]
        ctx.save_for_backward(x, gate, weight, a, b, low_rank)
        ctx.scale = scale
        return _unflatten(result, x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, a, b, low_rank = ctx.saved_tensors
        grad_output = grad_output.flatten(0, -2).to(weight.dtype)  # [n, out]
        grad_low_rank = torch.mm(grad_output, (b * ctx.scale).to(weight.dtype))  # [n, rank]
        grad_b = torch.mm(grad_output.t(), low_rank).to(b.dtype).mul_(ctx.scale)  # [out, rank]
        # Recomputed, and freed at once: no name holds it.
        grad_a = torch.mm(grad_low_rank.t(), _gated_rows(x, gate, weight.dtype)).to(a.dtype)  # [rank, in]
        grad_x = grad_gate = None
        # Only the gate may need a gradient: where no layer that produces x is trained.
        if any(ctx.needs_input_grad[:2]):
            grad_inputs = linear(grad_output, weight.t()).addmm_(grad_low_rank, a.to(weight.dtype))  # [n, in]
            grad_gate, grad_x = _silu_gate_backward(_unflatten(grad_inputs, x), gate, x)
        return grad_x, grad_gate, None, None, grad_a, grad_b, None


class _Gate(torch.autograd.Function):
    """silu(gate) · x, elementwise (SwiGLU, Shazeer 2020, arXiv:2002.05202). Saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return _silu_gate(x, gate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor]:
        gate, x = ctx.saved_tensors
        return _silu_gate_backward(grad_output, gate, x)


class _Norm(torch.autograd.Function):
    """RMSNorm, weight · x / rms(x), with the mean of squares in float32 (Zhang and Sennrich 2019).

    arXiv:1910.07467. Saves x and one number per token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        inverse_rms = (norm.square() / x.shape[-1] + epsilon).rsqrt()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        normed: Tensor = (wide * inverse_rms).to(x.dtype)  # rounded before the product, as transformers does
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)  # [width]
        grad_normed = (grad_output * weight).float()
        projection = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1)  # [..., 1]
        # d x = (d normed − normed · ⟨d normed, normed⟩ / width) / rms
        grad_x = grad_normed.addcmul_(normed, projection, value=-1 / x.shape[-1]).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[n, width] -> [..., width], with the leading dimensions of ``like``."""
    # For autograd no view, because some models change the output in place, which views of functions forbid.
    shape = [*like.shape[:-1], rows.shape[-1]]
    return torch.ops.aten._unsafe_view(rows, shape)  # type: ignore[no-any-return]


def _gated_rows(x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _silu_gate(x, gate).to(dtype).flatten(0, -2)


def _silu_gate(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else silu(gate).mul_(x)


def _silu_gate_backward(grad_output: Tensor, gate: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradients of gate and x."""
    if gate is None:
        return None, grad_output.to(x.dtype)
    grad_gate = torch.ops.aten.silu_backward(grad_output * x, gate)
    return grad_gate, silu(gate).mul_(grad_output)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x · weightᵀ + bias, [m, k] and [n, k] -> [m, n], by the faster of two libraries.

    torch multiplies float32 matrices with MKL on x86, whatever the processor; oneDNN, which torch includes,
    uses more of the vector units of some. The shapes alone decide, so equal steps give equal bits.
    """
    large = x.shape[0] * weight.numel() >= MIN_MULTIPLICATIONS
    if large and x.dtype == torch.float32 and x.device.type == "cpu":
        onednn = torch.ops.mkldnn  # _linear_pointwise is a private operator of torch
        if torch.backends.mkldnn.is_available() and hasattr(onednn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
            return onednn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch.nn.functional.linear(x, weight, bias)
