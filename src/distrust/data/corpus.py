"""The tokenized examples: flat arrays that every later stage only reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from distrust.data.records import Location


@dataclass(frozen=True)
class Corpus:
    """Examples after tokenization and truncation, one after the other; n of them, with ``total`` tokens.

    The arrays are made read-only, so that what was fingerprinted is what is trained on.

    Attributes:
        input_ids: int32[total], the tokens of all examples.
        learned: bool[total], whether a token carries loss. Never the first of an example: nothing
            predicts it.
        offsets: int64[n + 1], example i is ``input_ids[offsets[i]:offsets[i + 1]]``.
        authority_weight: float64[n], w in [0, 0.99].
        provenance_entropy: float64[n], H in bits.
        locations: where each example comes from.
        truncated: how many examples were cut to fit.
        tokens_cut: how many tokens they lost together.
    """

    input_ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    authority_weight: NDArray[np.float64]
    provenance_entropy: NDArray[np.float64]
    locations: tuple[Location, ...]
    truncated: int = 0
    tokens_cut: int = 0

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64[n], the tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def loss_tokens(self) -> NDArray[np.int64]:
        """int64[n], the learned tokens of each example: what its weight is weighed with."""
        counts = np.concatenate(([0], np.cumsum(self.learned, dtype=np.int64)))
        return np.diff(counts[self.offsets])

    @cached_property
    def fingerprint(self) -> str:
        r"""BLAKE3, in hex, of all that training sees of the data; file names and lines are no part of it.

        Over ``distrust corpus 1\n``, then n and total, then the tokens, learned, offsets, w and H: each
        number little-endian, of the dtype it has here (learned a byte each, n and total 8 bytes each).
        """
        digest = blake3(b"distrust corpus 1\n")
        digest.update(np.array([len(self), len(self.input_ids)], "<i8").tobytes())
        for array in self._arrays():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(np.ascontiguousarray(little).view(np.uint8).data)
        return digest.hexdigest()

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.input_ids,
            self.learned,
            self.offsets,
            self.authority_weight,
            self.provenance_entropy,
        )
