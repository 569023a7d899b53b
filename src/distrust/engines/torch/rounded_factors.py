"""LoRA's matrices in the dtype of the products, rounded once per step instead of in every layer and pass.

That would be six launches per layer and micro-step on a GPU. The copies are made for all layers at once,
take half the memory of the float32 adapter, belong to no module, and are not saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distrust.engines.torch.adapter import ADAPTER_NAME


class RoundedFactors:
    """A and scale · B of each layer in ``dtype``, up to date whenever they are asked for.

    Autograd's version counters tell whether a matrix has changed; writes through ``.data`` stay unseen.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.layers: list[Any] = []  # of peft, each with one adapter
        self._dtype = dtype
        self._copies: dict[Any, tuple[tuple[float, ...], Tensor, Tensor]] = {}

    def of(self, lora: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A [rank, in] and scale · B [out, rank] of a layer; None where they are not kept in this dtype."""
        if not self.layers or dtype != self._dtype or dtype == lora.lora_A[ADAPTER_NAME].weight.dtype:
            return None
        if lora not in self._copies or self._copies[lora][0] != _version(lora):
            self._round()
        return self._copies[lora][1:]

    @torch.inference_mode(False)  # that of a caller would make copies which no later step can save
    @torch.no_grad()
    def _round(self) -> None:
        self._copies = {}  # freed before the new ones are made
        scales = [layer.scaling[ADAPTER_NAME] for layer in self.layers]
        scaled = torch._foreach_mul([layer.lora_B[ADAPTER_NAME].weight for layer in self.layers], scales)
        exact = [*(layer.lora_A[ADAPTER_NAME].weight for layer in self.layers), *scaled]
        rounded = [torch.empty_like(matrix, dtype=self._dtype) for matrix in exact]
        torch._foreach_copy_(rounded, exact)
        low, high = rounded[: len(scales)], rounded[len(scales) :]
        for layer, a, b in zip(self.layers, low, high, strict=True):
            self._copies[layer] = _version(layer), a, b

    def __getstate__(self) -> dict[str, Any]:
        # A copied parameter counts its versions from 0 again, and may reach the number of a stale copy.
        return {**vars(self), "_copies": {}}


def _version(lora: Any) -> tuple[float, ...]:
    factors = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
    return *(factor._version for factor in factors), lora.scaling[ADAPTER_NAME]
