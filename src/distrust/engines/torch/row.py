"""A micro-batch as the torch engine takes it: one row of tokens, and what the loss needs of it.

Built ahead of the step, in another thread. For CUDA its arrays lie in one page-locked block, which the device
copies at once and without the host's help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from distrust.activity import warn_once
from distrust.data import IGNORED, MicroBatch
from distrust.engines.runtime import Array


class DeviceRow(NamedTuple):
    """The arrays of a row on the device: n tokens of b sequences, m of them trained."""

    input_ids: Tensor  # int64[n]
    positions: Tensor  # int64[n], each token's position in its sequence
    predictor_index: Tensor  # int64[m], index of the token before each trained one, which predicts it
    targets: Tensor  # int64[m], the trained tokens
    token_weights: Tensor  # float32[m]
    cu_seqlens: Tensor  # int32[b + 1], where each sequence begins, and n


@dataclass(frozen=True, slots=True)
class Row(MicroBatch):
    """A micro-batch with its trained tokens, and the host's memory that its device copies from."""

    trained_sequences: Array  # int64[m], the sequence of each trained token
    trained_weights: Array  # float32[m]
    host: DeviceRow
    block: Tensor | None  # uint8, the page-locked bytes of ``host``, if the device is to copy them at once

    @classmethod
    def of(cls, batch: MicroBatch, *, page_locked: bool = False) -> Self:
        """Prepare a batch; a prepared one is returned as it is."""
        if isinstance(batch, cls):
            return batch
        trained = np.flatnonzero(batch.labels != IGNORED)  # never a sequence's first token: none predicts it
        weights = batch.weights[trained]
        arrays = (
            batch.input_ids,
            batch.positions,
            trained - 1,
            batch.labels[trained],
            weights,
            batch.cu_seqlens,
        )
        host = DeviceRow(*map(torch.from_numpy, arrays))
        block = _page_locked_bytes(sum(tensor.nbytes for tensor in host)) if page_locked else None
        if block is not None:
            # numpy's empty arrays, where no token is trained, have no stride to view.
            torch.cat([tensor.view(torch.uint8) for tensor in host if len(tensor)], out=block)
        return batch.extend(
            cls,
            trained_sequences=batch.sequences[trained],
            trained_weights=weights,
            host=host,
            block=block,
        )

    def to(self, device: torch.device) -> DeviceRow:
        """The arrays on the device. Its copy may go on: keep the row until the host has waited for it."""
        if self.block is None:
            return DeviceRow(*(tensor.to(device) for tensor in self.host))
        block = self.block.to(device, non_blocking=True)
        # 8-byte numbers come first, so that every part is aligned.
        parts = block.split([tensor.nbytes for tensor in self.host])  # type: ignore[no-untyped-call]
        return DeviceRow(*(part.view(tensor.dtype) for part, tensor in zip(parts, self.host, strict=True)))


def _page_locked_bytes(count: int) -> Tensor | None:
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the system limits it
        warn_once("memory cannot be page-locked (see ulimit -l): copies of batches to the GPU are slower")
        return None
