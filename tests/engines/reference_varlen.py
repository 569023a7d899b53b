"""``torch.nn.attention.varlen.varlen_attn`` in plain torch, for CPUs, with the checks of the real kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The signature of torch 2.12 and 2.13. [n, heads, width] of query [n, heads, width], key and value."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert cu_seq_k is not None
    return _attend(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of torch 2.11, which does not ask about groups of heads."""
    return _attend(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    for tensor in (query, key, value):  # as the kernel requires
        assert tensor.dim() == 3
        assert tensor.stride(-1) == 1
        assert tensor.dtype == query.dtype
        assert tensor.shape[-1] == query.shape[-1]
    assert query.dtype == torch.bfloat16 or not torch.is_autocast_enabled("cpu")
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    for cu_seqlens, maximum in zip(edges, longest, strict=True):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == len(query)
        assert maximum == cu_seqlens.diff().max()
    left, right = window_size
    example = torch.repeat_interleave(torch.arange(len(edges[0]) - 1), edges[0].diff())
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None, :]  # to the left
    visible = example[:, None] == example[None, :]
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhw,khw->hqk", query, key).mul(scale)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hqk,khw->qhw", scores.softmax(dim=-1), value)
