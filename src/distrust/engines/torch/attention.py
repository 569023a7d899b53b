"""Attention within each of several examples that stand one after the other in one row, without padding.

Every other layer of a transformer treats tokens one by one; only attention looks from one to another, and
only here it matters where an example ends. Each example attends to itself, by the same fused kernel as a
batch would, so nothing is spent on padding or on a mask of the whole row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "distrust_packed"

#: Of the row that is being computed: the tokens of each example. A process trains one row at a time, and the
#: backward pass of a checkpointed layer must find it too, which no argument of a forward pass would reach.
_lengths: list[int] = []


class UnknownAttention(Exception):
    """The model asks for something of attention that is not known here."""


@contextlib.contextmanager
def examples_of(lengths: list[int]) -> Iterator[None]:
    """While this lasts, a row consists of examples of these lengths; none: batches are as usual."""
    global _lengths
    before, _lengths = _lengths, lengths
    try:
        yield
    finally:
        _lengths = before


def register(*, outside_graphs: bool = False) -> None:
    """Make it known to transformers, under :data:`NAME`; elsewhere than in a packed row it is ``sdpa``.

    Args:
        outside_graphs: whether layers are compiled: it is not, since it is another one for each batch.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    disable: Any = torch.compiler.disable
    function = disable(_attention) if outside_graphs else _attention
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, _mask_of_row)


def _mask_of_row(*arguments: Any, local_size: int | None = None, **options: Any) -> Any:
    """In a packed row no mask, but how far back it would have let tokens see, for the layers to compare."""
    from transformers.masking_utils import sdpa_mask

    if not _lengths:
        return sdpa_mask(*arguments, local_size=local_size, **options)
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def _attention(module: torch.nn.Module, *tensors: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return (packed_attention if _lengths else sdpa_attention_forward)(module, *tensors, **options)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer.
        query: [1, heads, n, width].
        key: [1, key heads, n, width].
        value: the same.
        attention_mask: None, or int64[1, 1, 1, 1]: how far back a mask would have let tokens see.
        scaling: of the products.
        dropout: of the attention weights.
        sliding_window: how far back a token sees.
        is_causal: whether a token sees only those before it.
        more: what changes nothing of the computation, or is refused.

    Returns:
        [1, n, heads, width], and no weights.

    Raises:
        UnknownAttention: for what this cannot compute.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if unknown or query.shape[0] != 1 or not causal:
        raise UnknownAttention(", ".join(unknown) or "not causal attention on one row")
    if attention_mask is not None and (attention_mask.numel() != 1 or int(attention_mask) != sliding_window):
        # Some models hide by the mask alone, in chunks for instance, what their layers know nothing of.
        raise UnknownAttention("a mask that the layer says nothing of")
    if sum(_lengths) != query.shape[2]:
        raise UnknownAttention(f"a row of {query.shape[2]} tokens for examples of {sum(_lengths)}")
    grouped = query.shape[1] != key.shape[1]
    parts = zip(*(torch.split(tensor, _lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = []
    for of_query, of_key, of_value in parts:
        mask = _mask(of_query, sliding_window)
        attended.append(
            scaled_dot_product_attention(
                of_query,
                of_key,
                of_value,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Where an example is longer than the window, the band that its tokens see: bool[t, t]; else None."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=query.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)
