"""The same layers with less memory and less traffic: LoRA's linear, RMSNorm, and the gate of an MLP.

Autograd keeps the results of elementary operations, and each of those reads and writes its tensors anew.
These functions know the whole of a layer: they keep only what cannot be had again cheaply, and add in place.
Modules stay what and where they are, and so does every name in a checkpoint; their ``forward`` alone is
replaced, and only where a trial gives the module's own result. A module that a trial or its kind rules out
keeps its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from distrust.engines.torch.adapter import ADAPTER_NAME
from distrust.engines.torch.linear_onednn import linear

#: How far a trial may be off, beside its largest value: some rounding in each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TRIAL_TOKENS = 4


def fuse(model: torch.nn.Module, *, dtype: torch.dtype) -> dict[str, int]:
    """Have the layers of a model computed by the functions below, wherever that is the same.

    Args:
        model: with its adapter, in evaluation mode.
        dtype: of what goes from layer to layer.

    Returns:
        How many modules of each kind were taken.
    """
    taken = {"lora": 0, "norm": 0, "gate": 0}
    for module in model.modules():
        kind, forward = _way(module)
        if forward is not None and _same(module, forward, dtype):
            module.forward = forward.__get__(module)
            taken[kind] += 1
    return taken


def _way(module: torch.nn.Module) -> tuple[str, Callable[..., Tensor] | None]:
    if _is_plain_lora(module):
        return "lora", _lora_forward
    if "RMSNorm" in type(module).__name__ and {"weight", "variance_epsilon"} <= vars_of(module):
        return "norm", _norm_forward
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= vars_of(module) and _is_silu(module.act_fn):
        return "gate", _gate_forward
    return "", None


def vars_of(module: torch.nn.Module) -> set[str]:
    """The names of a module's own attributes: parameters and modules too."""
    return {*vars(module), *module._parameters, *module._modules}


def _is_silu(function: Any) -> bool:
    return isinstance(function, torch.nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _is_plain_lora(module: Any) -> bool:
    """Whether it is peft's LoRA of one adapter on a frozen linear layer, with nothing more to it."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    return (
        list(module.lora_A) == [ADAPTER_NAME]
        and not module.lora_variant
        and not module.fan_in_fan_out
        and module.lora_B[ADAPTER_NAME].bias is None
        and not module.base_layer.weight.requires_grad
    )


@torch.no_grad()
def _same(module: Any, forward: Callable[..., Tensor], dtype: torch.dtype) -> bool:
    """Whether another forward gives what the module's own one gives, but for rounding."""
    weight = next(module.parameters())
    width = _width(module)
    generator = torch.Generator().manual_seed(0)  # the run's own is not touched
    trial = torch.randn(1, TRIAL_TOKENS, width, generator=generator).to(weight.device, dtype)
    try:
        own, other = module(trial), forward(module, trial)
    except (TypeError, RuntimeError, AttributeError):  # it wants more than this, or something else
        return False
    if own.dtype != other.dtype or own.shape != other.shape or own.dtype not in TOLERANCE:
        return False
    apart = (own.float() - other.float()).abs().max()
    return bool(apart <= TOLERANCE[own.dtype] * own.float().abs().max())


def _width(module: Any) -> int:
    layer = module.gate_proj if hasattr(module, "gate_proj") else module
    width: int = layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0]
    return width


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _applies(self):
        own: Tensor = type(self).forward(self, x, *args, **kwargs)
        return own
    return _lora(self, x, None)


def _applies(lora: Any) -> bool:
    """Whether the adapter is on, as it was trained, and nothing is drawn."""
    dropout = lora.lora_dropout[ADAPTER_NAME]
    drawn = lora.training and isinstance(dropout, torch.nn.Dropout) and dropout.p > 0
    return not (lora.disable_adapters or lora.merged or drawn)


def _lora(lora: Any, x: Tensor, gate: Tensor | None) -> Tensor:
    base = lora.base_layer
    a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
    result: Tensor = _LoraLinear.apply(x, gate, base.weight, base.bias, a, b, lora.scaling[ADAPTER_NAME])  # type: ignore[no-untyped-call]
    return result


def _gate_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        own: Tensor = type(self).forward(self, x, *args, **kwargs)
        return own
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if _is_plain_lora(down) and _applies(down):
        return _lora(down, up, gate)
    result: Tensor = down(_Gate.apply(gate, up))  # type: ignore[no-untyped-call]
    return result


def _norm_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or hidden_states.dtype != self.weight.dtype:
        own: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return own
    result: Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return result


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ, in the dtype of W; with a gate, of silu(gate) · x.

    Kept for the way back: x and gate, which others keep anyway, and x Aᵀ, which is [n, rank]. The gated
    product is computed again.
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
            inputs = _silu_gate(x, gate).to(weight.dtype).flatten(0, -2)
            low = torch.mm(inputs, a.to(weight.dtype).t())
            result = linear(inputs, weight, bias)
            result.addmm_(low, (b * scale).to(weight.dtype).t())
        ctx.save_for_backward(x, gate, weight, a, b, low)
        ctx.scale = scale
        return _rows(result, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, a, b, low = ctx.saved_tensors
        slope = slope.flatten(0, -2).to(weight.dtype)
        of_low = torch.mm(slope, (b * ctx.scale).to(weight.dtype))
        of_b = torch.mm(slope.t(), low).to(b.dtype).mul_(ctx.scale)
        of_a = torch.mm(of_low.t(), _silu_gate(x, gate).to(weight.dtype).flatten(0, -2)).to(a.dtype)
        of_x = of_gate = None
        if any(ctx.needs_input_grad[:2]):  # the gate's alone, where nothing before `x` is trained
            of_inputs = linear(slope, weight.t()).addmm_(of_low, a.to(weight.dtype))
            of_gate, of_x = _silu_gate_gradients(_rows(of_inputs, x), gate, x)
        return of_x, of_gate, None, None, of_a, of_b, None


class _Gate(torch.autograd.Function):
    """silu(gate) · x; kept for the way back are its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return _silu_gate(x, gate)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor]:
        gate, x = ctx.saved_tensors
        return _silu_gate_gradients(slope, gate, x)


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    return flat.view(*like.shape[:-1], flat.shape[-1])


def _silu_gate(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else silu(gate).mul_(x)


def _silu_gate_gradients(slope: Tensor, gate: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradients of gate and x."""
    if gate is None:
        return None, slope.to(x.dtype)
    of_gate = torch.ops.aten.silu_backward(slope * x, gate)
    return of_gate, silu(gate).mul_(slope)


class _Norm(torch.autograd.Function):
    """weight · x / rms(x), with the mean of squares in float32; kept are x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        factor = (length.square() / x.shape[-1] + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, factor)
        normed: Tensor = (wide * factor).to(x.dtype)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        normed = x.float() * factor
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (slope * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        of_normed = (slope * weight).float()
        along = torch.linalg.vecdot(of_normed, normed).unsqueeze(-1)
        of_x = of_normed.addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(factor)
        return of_x.to(x.dtype), of_weight, None
