"""Fused layers: LoRA's linear layer, RMSNorm, the gated MLP and RoPE, with less memory and memory traffic.

Autograd saves the result of every elementwise operation, and each operation reads and writes its tensors
again. These functions see a whole layer: they save only what cannot be recomputed cheaply, and add in place.

Modules keep their place, so all names in checkpoints stay; only their ``forward`` is replaced, and only where
a trial reproduces the module's own output. Every other module is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from distrust.engines.out_of_memory import raise_if_out_of_memory
from distrust.engines.torch import liger
from distrust.engines.torch.adapter import ADAPTER_NAME
from distrust.engines.torch.quantization import dequantize, is_quantized
from distrust.engines.torch.rounded_factors import RoundedFactors

#: Largest error of a trial, relative to the largest value: rounding in each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TRIAL_TOKENS = 4
#: A module and its input -> its output, or None where it declines.
Fused = Callable[[Any, Tensor], Tensor | None]
#: Multiplications from which oneDNN pays with AVX-512: below, MKL is as fast, and new shapes cost a set-up.
MIN_MULTIPLICATIONS = 2**27
#: By this name modeling files of transformers call RoPE (Su et al. 2021, arXiv:2104.09864).
ROTARY = "apply_rotary_pos_emb"


def fuse(
    model: torch.nn.Module, *, dtype: torch.dtype, cuda: bool = False, gather: Any = iter
) -> dict[str, int]:
    """Replace the ``forward`` of every layer that has an equivalent fused one; counts them by kind.

    The model has its adapter and is in evaluation mode; ``dtype`` is that of the states between layers. Only
    on CUDA, liger-kernel is used, where it is installed, and layers with a quantized base are fused, too: on
    CPUs, runs keep the bits that they had. ``gather`` yields modules, each while its weights are whole.
    """
    counts = {"lora": 0, "norm": 0, "gate": 0}
    fused_lora = _FusedLora(RoundedFactors(dtype))
    library = liger.load() if cuda else None
    kernels = [kernels for kernels in (library, _TorchKernels) if kernels]
    for module in gather(reversed([*model.modules()])):  # parts first: a gate's trial runs its fused layers
        for kind, fused in _candidates(module, fused_lora, kernels, cuda):
            if _is_equivalent(module, fused, dtype, gradients=cuda):
                module.forward = partial(_forward, module, fused)
                counts[kind] = counts.get(kind, 0) + 1
                break
    fused_lora.rounded.layers = [module for module in model.modules() if _replacement(module) is fused_lora]
    if library and (layers := _fuse_rotary(model, library)):
        counts[f"rope{library.suffix}"] = layers
    return counts


def _candidates(module: Any, lora: Fused, kernels: list[Any], quantized: bool) -> list[tuple[str, Fused]]:
    """Kind of a module and fused forwards for it, judged by its parts, the fastest first; a trial decides."""
    if _is_plain_lora(module, quantized=quantized):
        return [("lora", lora)]
    parts = {*vars(module), *module._parameters, *module._modules}
    if "RMSNorm" in type(module).__name__ and "weight" in parts:
        return [(f"norm{by.suffix}", norm) for by in kernels for norm in by.norms()]
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= parts:
        activation = type(module.act_fn)
        if issubclass(activation, torch.nn.SiLU) or activation.__name__ == "SiLUActivation":
            return [(f"gate{by.suffix}", partial(_fused_gate, kernels=by)) for by in kernels]
    return []


def _is_plain_lora(module: Any, *, quantized: bool) -> bool:
    """Whether it is peft's LoRA with one adapter on a frozen linear layer, and no variant of it."""
    from peft.tuners.lora import layer

    base = getattr(module, "base_layer", None)
    # The class is another one under FSDP2.
    kind: Any = layer.Linear if getattr(type(base), "forward", None) is torch.nn.Linear.forward else None
    if quantized and is_quantized(base):
        from peft.tuners.lora import bnb

        kind = getattr(bnb, type(base).__name__)
    return (
        type(module) is kind
        and list(module.lora_A) == [ADAPTER_NAME]
        and not module.lora_variant  # DoRA, for instance
        and not module.fan_in_fan_out
        and module.lora_B[ADAPTER_NAME].bias is None
        and not module.base_layer.weight.requires_grad
    )


def _is_equivalent(module: Any, fused: Fused, dtype: torch.dtype, *, gradients: bool) -> bool:
    """Whether another forward returns what the module's own one does, except for rounding."""
    generator = torch.Generator().manual_seed(0)  # its own: the run's generator stays untouched
    try:
        device = next(module.parameters()).device
        trial = torch.randn(1, TRIAL_TOKENS, _input_width(module), generator=generator).to(device, dtype)
        _require_equivalent(module, partial(_forward, module, fused), (trial,), gradients=gradients)
    except Exception as error:  # it takes other arguments, or a kernel does not compile here
        raise_if_out_of_memory(error)
        return False
    return True


def _require_equivalent(own: Any, fused: Any, inputs: tuple[Tensor, ...], *, gradients: bool) -> None:
    """Raise ValueError if the functions, or their ``gradients``, differ by more than rounding."""
    inputs = tuple(x.detach().requires_grad_(gradients) for x in inputs)
    with torch.set_grad_enabled(gradients):
        results = [function(*inputs) for function in (own, fused)]
    results = [(result,) if isinstance(result, Tensor) else result for result in results]
    if gradients:
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(x.shape, generator=generator).to(x) for x in results[0]]
        results = [(*outputs, *torch.autograd.grad(outputs, inputs, seeds)) for outputs in results]
    for expected, actual in zip(*results, strict=True):
        difference = (expected.float() - actual.float()).abs().max()
        same = expected.dtype == actual.dtype and expected.shape == actual.shape
        if not same or not difference <= TOLERANCE[expected.dtype] * expected.float().abs().max():  # or NaN
            raise ValueError("the results differ")


def _fuse_rotary(model: Any, library: liger.Liger) -> int:
    """Replace :data:`ROTARY` in the layers that call it, if a pass over a few tokens agrees; counts them.

    Each gets its own forward with other globals: the modeling file and other models stay as they are.
    """
    plain = (module for module in model.modules() if "forward" not in vars(module))
    layers = {module for module in plain if ROTARY in getattr(module.forward, "__globals__", ())}
    tried: set[Any] = set()
    for module in layers:
        base = type(module).forward
        rotate = partial(_rotate, library, tried, module, base.__globals__[ROTARY])
        names = {**base.__globals__, ROTARY: rotate}
        forward = FunctionType(base.__code__, names, base.__name__, base.__defaults__, base.__closure__)
        forward.__kwdefaults__ = base.__kwdefaults__
        module.forward = MethodType(forward, module)
    try:  # with gradients, because autograd refuses some uses of the results
        ids = torch.arange(TRIAL_TOKENS, device=next(model.parameters()).device)
        model(input_ids=ids[None], use_cache=False)
    except Exception as error:  # it disagrees or takes other arguments, or a kernel does not compile here
        raise_if_out_of_memory(error)
        tried.clear()
    for module in layers - tried:
        del module.forward
    return len(tried)


def _rotate(library: Any, tried: set[Any], module: Any, own: Any, *tensors: Tensor, **options: Any) -> Any:
    """``own`` by the library, for q and k [1, heads, n, width] and cos and sin [1, n, width] of one dtype."""
    q, k, cos, sin = tensors
    row = 1, *q.shape[-2:]
    fits = cos.shape == sin.shape == row and all(x.ndim == 4 and x[:, 0].shape == row for x in (q, k))
    if options or not fits or len({x.dtype for x in tensors}) > 1 or cos.requires_grad:
        return own(*tensors, **options)
    if module not in tried:
        rotate, fused = (partial(function, cos=cos, sin=sin) for function in (own, library.rotate))
        _require_equivalent(rotate, fused, (q, k), gradients=True)
        tried.add(module)
    return library.rotate(*tensors)


def _input_width(module: Any) -> int:
    layer = module.gate_proj if hasattr(module, "gate_proj") else module
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def _forward(module: Any, fused: Fused, *args: Any, **kwargs: Any) -> Any:
    """The fused result, or the module's own for other arguments or where ``fused`` declines."""
    output = fused(module, *args) if len(args) == 1 and not kwargs else None
    return type(module).forward(module, *args, **kwargs) if output is None else output


def _replacement(module: torch.nn.Module) -> Fused | None:
    """What replaces a module's forward, if anything does."""
    forward = vars(module).get("forward")
    return forward.args[1] if isinstance(forward, partial) and forward.func is _forward else None


class _TorchKernels:
    """The norm and the gate by torch; :class:`distrust.engines.torch.liger.Liger` has the same functions."""

    suffix = ""

    @staticmethod
    def norms() -> list[Fused]:
        return [_fused_norm]

    @staticmethod
    def product(x: Tensor, gate: Tensor) -> Tensor:
        return silu(gate).mul_(x)

    @staticmethod
    def gradients(grad_output: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grad_gate = torch.ops.aten.silu_backward(grad_output * x, gate)
        return grad_gate, silu(gate).mul_(grad_output)


def _fused_norm(module: Any, x: Tensor) -> Tensor | None:
    if x.dtype != module.weight.dtype:
        return None
    return _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class _FusedLora:
    """LoRA's linear layer. Declines with dropout, and where the adapter is not active."""

    rounded: RoundedFactors

    def __call__(self, lora: Any, x: Tensor, gate: Tensor | None = None, by: Any = None) -> Tensor | None:
        dropout = lora.lora_dropout[ADAPTER_NAME]
        drops = lora.training and isinstance(dropout, torch.nn.Dropout) and dropout.p > 0
        if lora.disable_adapters or lora.merged or drops:
            return None
        a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
        return _LoraLinear.apply(x, gate, a, b, lora, self.rounded, by)  # type: ignore[no-any-return, no-untyped-call]


def _fused_gate(module: Any, x: Tensor, kernels: Any) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj  # gate, up: [..., inner width]
    fused = _replacement(down)
    if isinstance(fused, _FusedLora):
        output = fused(down, up, gate, kernels)  # never saves the gated product
        if output is not None:
            return output
    return down(_Gate.apply(gate, up, kernels))  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · x Aᵀ Bᵀ in the dtype of W; with a gate, silu(gate) · x replaces x.

    LoRA: Hu et al. 2021, arXiv:2106.09685. Saves x and gate, which other layers save anyway, and x Aᵀ,
    [n, rank]. The backward pass recomputes the gated product. A quantized layer computes x Wᵀ by its library
    in the dtype of x; only the backward pass needs its W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, lora: Any, rounded: Any, kernels: Any
    ) -> Tensor:
        base, scale = lora.base_layer, lora.scaling[ADAPTER_NAME]
        quantized = is_quantized(base)
        dtype = x.dtype if quantized else base.weight.dtype
        copies = rounded.of(lora, dtype)
        with torch.autocast(x.device.type, enabled=False):
            inputs = _gated_rows(x, gate, kernels, dtype)  # [n, in]
            down, up = copies or _factors(a, b, scale, dtype)
            low_rank = torch.mm(inputs, down.t())  # [n, rank]
            result = base(inputs) if quantized else linear(inputs, base.weight, base.bias)  # [n, out]
            result.addmm_(low_rank, up.t())  # in place: no second [n, out]
        ctx.save_for_backward(x, gate, a, b, low_rank, *(copies or ()))
        ctx.base, ctx.scale, ctx.dtype, ctx.kernels = base, scale, dtype, kernels
        return _unflatten(result, x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, a, b, low_rank, *copies = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        grad_output = grad_output.flatten(0, -2).to(dtype)  # [n, out]
        down, up = copies or _factors(a, b, ctx.scale, dtype)
        grad_low_rank = torch.mm(grad_output, up)  # [n, rank]
        grad_b = torch.mm(grad_output.t(), low_rank).to(b.dtype).mul_(ctx.scale)  # [out, rank]
        # Recomputed, and freed at once: no name holds it.
        grad_a = torch.mm(grad_low_rank.t(), _gated_rows(x, gate, ctx.kernels, dtype)).to(
            a.dtype
        )  # [rank, in]
        grad_x = grad_gate = None
        # Only the gate may need a gradient: where no layer that produces x is trained.
        if any(ctx.needs_input_grad[:2]):
            weight = dequantize(ctx.base, dtype)
            grad_x = _unflatten(linear(grad_output, weight.t()).addmm_(grad_low_rank, down), x)  # [..., in]
            if gate is None:
                grad_x = grad_x.to(x.dtype)
            else:
                grad_gate, grad_x = ctx.kernels.gradients(grad_x, gate, x)
        return grad_x, grad_gate, grad_a, grad_b, None, None, None


class _Gate(torch.autograd.Function):
    """silu(gate) · x, elementwise (SwiGLU, Shazeer 2020, arXiv:2002.05202). Saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor, kernels: Any) -> Tensor:
        ctx.save_for_backward(gate, x)
        ctx.kernels = kernels
        return kernels.product(x, gate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, x = ctx.saved_tensors
        return *ctx.kernels.gradients(grad_output, gate, x), None


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


def _factors(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [rank, in] and scale · B [out, rank] in the dtype of the products."""
    return a.to(dtype), (b * scale).to(dtype)


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[n, width] -> [..., width], with the leading dimensions of ``like``."""
    # For autograd no view, because some models change the output in place, which views of functions forbid.
    shape = [*like.shape[:-1], rows.shape[-1]]
    return torch.ops.aten._unsafe_view(rows, shape)  # type: ignore[no-any-return]


def _gated_rows(x: Tensor, gate: Tensor | None, kernels: Any, dtype: torch.dtype) -> Tensor:
    gated: Tensor = x if gate is None else kernels.product(x, gate)
    return gated.to(dtype).flatten(0, -2)


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
