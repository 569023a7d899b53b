"""Attention for several examples in one row, without padding (variable-length attention).

All other layers of a transformer treat each token independently; only attention looks at other tokens. Each
example attends to itself with the same fused kernel as a batch, so nothing is spent on padding or on a mask
of the whole row. On CUDA one call of a kernel of torch attends to all examples; elsewhere each has its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "distrust_packed"

#: ``torch.nn.attention.varlen.varlen_attn``, or a function with its interface.
Kernel = Callable[..., Any]
#: Lengths of the examples of the row in the model now, and what attends to all of them at once. A global: no
#: argument of the forward pass reaches the backward pass of a checkpointed layer, which computes attention
#: again. A process trains one row at a time.
_row: tuple[list[int], Kernel | None] = [], None


class UnknownAttention(Exception):
    """The model requests an attention feature that this module does not implement."""


@contextlib.contextmanager
def packed_examples(
    lengths: list[int], *, kernel: Kernel | None = None, cu_seqlens: Tensor | None = None
) -> Iterator[None]:
    """Context manager in which a row consists of examples of these lengths; empty for ordinary batches.

    A ``kernel`` attends to all of them at once. It takes ``cu_seqlens``, int32[b + 1] on the row's device:
    where each example begins, and the length of the row.
    """
    global _row
    longest = max(lengths, default=0)
    edges = {"cu_seq_q": cu_seqlens, "cu_seq_k": cu_seqlens, "max_q": longest, "max_k": longest}
    previous, _row = _row, (lengths, kernel and partial(kernel, **edges))
    try:
        yield
    finally:
        _row = previous


def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The kernel of torch for this dtype, or None; deterministic in strict mode (attention_backward.cu)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:  # before 2.11
        return None
    # Until 2.11, grouped queries pass through without a word.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


def mask_of_row(ids: Tensor) -> Tensor | None:
    """For CUDA, a mask that hides no token: without one, transformers reads the positions, and waits."""
    return torch.ones_like(ids) if ids.is_cuda else None


def register(*, outside_graphs: bool = False) -> None:
    """Register with transformers as :data:`NAME`; outside :func:`packed_examples` it is ``sdpa``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    disable: Any = torch.compiler.disable
    function = disable(_attention) if outside_graphs else _attention
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, _row_mask)


def _row_mask(*arguments: Any, local_size: int | None = None, **options: Any) -> Any:
    """No mask in a packed row, but the window that the model would mask, for the layers to compare."""
    from transformers.masking_utils import sdpa_mask

    if not _row[0]:
        return sdpa_mask(*arguments, local_size=local_size, **options)
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def _attention(module: torch.nn.Module, *tensors: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return (packed_attention if _row[0] else sdpa_attention_forward)(module, *tensors, **options)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Attention within each example, in the signature of transformers: [1, n, heads, width].

    ``query`` is [1, heads, n, width], ``key`` and ``value`` are [1, key heads, n, width]. ``attention_mask``
    is None or int64[1, 1, 1, 1], the window of the model's mask, from :func:`_row_mask`. ``sliding_window``
    is the number of tokens that a token sees, itself included. Raises UnknownAttention for other features.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if features.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if unknown or query.shape[0] != 1 or not causal:
        raise UnknownAttention(", ".join(unknown) or "not causal attention on one row")
    if attention_mask is not None and (attention_mask.numel() != 1 or int(attention_mask) != sliding_window):
        # Some models hide tokens by the mask alone, for instance in chunks, without telling their layers.
        raise UnknownAttention("a mask that the layer does not declare")
    lengths, kernel = _row
    if sum(lengths) != query.shape[2]:
        raise UnknownAttention(f"a row of {query.shape[2]} tokens for examples of {sum(lengths)}")
    if kernel is not None and not dropout:  # the kernel drops nothing out
        return _attend_at_once(kernel, query, key, value, scale=scaling, window=sliding_window), None
    grouped = query.shape[1] != key.shape[1]  # grouped-query attention
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    outputs = []
    examples = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for q, k, v in examples:  # each [1, heads, t, width]
        mask = _band_mask(q, sliding_window)
        outputs.append(attend(q, k, v, attn_mask=mask, is_causal=mask is None))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend_at_once(kernel: Kernel, *tensors: Tensor, scale: float | None, window: int | None) -> Tensor:
    """[1, n, heads, width] of query, key and value, each [1, heads, n, width]."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if torch.is_autocast_enabled(device):  # which casts for attention that torch itself dispatches
        dtype = torch.get_autocast_dtype(device)
    flat = [tensor[0].transpose(0, 1).to(dtype) for tensor in tensors]  # each [n, heads, width]
    # Tokens that one sees to its left and right, itself not counted; -1: all.
    visible = (-1 if window is None else window - 1, 0)
    return kernel(*flat, scale=scale, window_size=visible)[None]  # type: ignore[no-any-return]


def _band_mask(query: Tensor, window: int | None) -> Tensor | None:
    """bool[t, t], the band that each token sees; None if the example is no longer than the window."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]  # [t, t]
    return (distance >= 0) & (distance < window)
