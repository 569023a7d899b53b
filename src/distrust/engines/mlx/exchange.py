"""Sums the gradients of a step whose micro-batches several ranks compute, in the order of the micro-batches.

No collective adds: the bits are those of one process. ``--reduction fast`` adds each rank's sum instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np

from distrust.ranks import Ranks

Flat = np.ndarray[Any, np.dtype[np.float32]]
_PART = 1 << 24  # numbers that travel at a time: each rank receives all ranks' of them


def add_round(ranks: Ranks, flat: Flat, total: Flat | None, *, owners: Sequence[int]) -> Flat:
    """Add what the ranks ``owners`` computed, in this order, to the earlier rounds' sum; into ``flat``."""
    for begin in range(0, flat.size, _PART):
        part = slice(begin, begin + _PART)
        rows = ranks.gather(flat[part])
        earlier = [] if total is None else [total[part]]  # no zero: 0.0 + x is not always x
        flat[part] = reduce(np.add, [*earlier, *(rows[rank] for rank in owners)])
    return flat


def flatten(arrays: Mapping[str, mx.array]) -> Flat:
    """All float32 numbers in the order of the names, and of each array in that of its memory."""
    views = map(np.asarray, arrays.values())
    return np.concatenate([view.transpose(_axes(view)).ravel() for view in views])


def unflatten(flat: Flat, like: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of :func:`flatten`. The layouts matter: the last bits of a norm follow the memory."""
    arrays, end = dict[str, mx.array](), 0
    for name, array in like.items():
        view, begin, end = np.asarray(array), end, end + array.size
        axes = _axes(view)
        placed = mx.array(flat[begin:end].reshape(view.transpose(axes).shape))
        arrays[name] = placed.transpose(np.argsort(axes).tolist())
    return arrays


def _axes(view: Flat) -> list[int]:
    """The axes in the order of memory."""
    return sorted(range(view.ndim), key=lambda axis: -view.strides[axis])
