"""Forward and backward passes of a micro-batch, by the cheapest method that the model allows.

- Variable-length attention: the examples form one row without padding, and attention stays within each
  (``attention.py``). Otherwise they are padded to the longest.
- Chunked loss: the head is applied to a few hundred trained tokens at a time (``loss.py``). Otherwise the
  model computes all logits.

A trial on a few tokens decides whether a method is exact for this model, not its name: see
:func:`distrust.engines.runtime.keeps_examples_independent`, and :meth:`ModelRunner._head_makes_logits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrust.contract import LossSums
from distrust.data import MicroBatch
from distrust.engines.out_of_memory import raise_if_out_of_memory
from distrust.engines.runtime import (
    Array,
    has_experts,
    keeps_examples_independent,
    require_causal,
    sum_per_sequence,
    trial_ids,
)
from distrust.engines.state_conversion import dtype_name
from distrust.engines.torch import attention, quantization
from distrust.engines.torch.loss import chunked_losses, token_losses
from distrust.engines.torch.row import DeviceRow, Row


class DeviceLosses:
    """:class:`distrust.contract.Losses` of a row, on the device until they are fetched or first read."""

    def __init__(self, row: Row, losses: Tensor) -> None:
        #: The row, whose page-locked memory must stay until the device has copied it, and float32[m], the
        #: cross-entropy of each trained token on the device. None once they are fetched.
        self.pending: tuple[Row, Tensor] | None = (row, losses)
        self._sums: LossSums

    @property
    def cross_entropy(self) -> Array:
        """float64[b], in nats."""
        fetch([self])
        return self._sums.cross_entropy

    @property
    def weighted(self) -> Array:
        """float64[b], weight times cross-entropy."""
        fetch([self])
        return self._sums.weighted

    def set_host(self, row: Row, losses: Array) -> None:
        """Sum float32[m] losses that have arrived on the host."""
        sequences, count = row.trained_sequences, len(row.examples)
        self._sums = sum_per_sequence(losses, row.trained_weights, sequences, count=count)
        self.pending = None


def fetch(losses: Sequence[DeviceLosses], *scalars: Tensor) -> list[float]:
    """Copy losses to the host, and float32[] scalars beside them, in one transfer; returns the scalars."""
    pending = [(each, *each.pending) for each in losses if each.pending is not None]
    tensors = [*(scalar.reshape(1) for scalar in scalars), *(tensor for *_, tensor in pending)]
    if not tensors:
        return []
    host = torch.cat(tensors).cpu().numpy()
    parts = iter(np.split(host, np.cumsum([len(tensor) for tensor in tensors])[:-1]))
    values = [float(next(parts)[0]) for _ in scalars]
    for (each, row, _), part in zip(pending, parts, strict=True):
        each.set_host(row, part)
    return values


class ModelRunner:
    """Runs a causal language model of transformers, with the adapter in its layers, on micro-batches."""

    def __init__(
        self, model: Any, *, compute_dtype: torch.dtype, compiled: bool = False, pad_token_id: int = 0
    ) -> None:
        self._model = model  # in evaluation mode
        self._pad_token_id = pad_token_id  # for models whose examples cannot share a row
        self._compiled = compiled  # whether its layers will be
        self._compute_dtype = compute_dtype  # dtype of the products; autocast applies any but float32
        self._device: torch.device = model.device
        self._head: Any = model.get_output_embeddings()
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.uses_chunked_loss = self._head_makes_logits()  # the logits of a batch never exist as a whole
        self._kernel: attention.Kernel | None = None  # attends to all examples of a row at once
        self.uses_varlen = self._enable_varlen()  # examples share one row without padding
        kernel = "" if self._kernel is None else ", variable-length kernel"
        self.packing = f"packed{kernel}" if self.uses_varlen else "padded"  # for the recorded environment

    def train(self, batch: MicroBatch, *, tokens: int) -> DeviceLosses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        return self._run_batch(Row.of(batch), scale=1 / tokens, backward=True)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> DeviceLosses:
        """Forward only."""
        return self._run_batch(Row.of(batch), scale=1.0, backward=False)

    def require_causal(self, name: str) -> None:
        """Raise ModelError if a later token of an example changes an earlier output.

        Records gradients, so that it also shows what autograd refuses.
        """
        with quantization.without_outliers(self._model):
            experts = has_experts(self._model.named_modules())
            require_causal(self._run_trial, vocabulary=self.vocabulary, name=name, experts=experts)

    def _run_batch(self, row: Row, *, scale: float, backward: bool) -> DeviceLosses:
        arrays = row.to(self._device)
        lengths = row.lengths.tolist() if self.uses_varlen else []
        # Also around the backward pass: a checkpointed layer computes its attention again there.
        with attention.packed_examples(lengths, kernel=self._kernel, cu_seqlens=arrays.cu_seqlens):
            total, losses = self._losses(row, arrays, scale=scale)
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
        return DeviceLosses(row, losses.detach())

    def _losses(self, row: Row, arrays: DeviceRow, *, scale: float) -> tuple[Tensor, Tensor]:
        """float32[], the scaled and weighted sum; float32[m], the cross-entropy of each trained token."""
        token_weights = arrays.token_weights * scale
        with self._autocast():
            output = self._outputs(row, arrays).index_select(0, arrays.predictor_index)  # [m, ...]
        if self.uses_chunked_loss:
            return self._head_losses(output.to(self._compute_dtype), arrays.targets, token_weights)
        losses = token_losses(output, arrays.targets)
        return (losses * token_weights).sum(), losses.detach()

    def _head_losses(self, hidden: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_losses(hidden, self._head, *arrays)

    def _outputs(self, row: Row, arrays: DeviceRow) -> Tensor:
        """Last hidden states [n, width], or logits [n, vocabulary], of all tokens."""
        if self.uses_varlen:
            return self._run_row(arrays.input_ids, arrays.positions)
        mask = self._to_device(row.pad(np.ones_like(row.input_ids), filler=0))
        ids = self._to_device(row.pad(row.input_ids, filler=self._pad_token_id))
        return self._run(input_ids=ids, attention_mask=mask)[mask.bool()]

    def _run_row(self, ids: Tensor, positions: Tensor) -> Tensor:
        ids, positions = ids[None], positions[None]  # [1, n]
        mask = attention.mask_of_row(ids)
        return self._run(input_ids=ids, position_ids=positions, attention_mask=mask)[0]  # [n, ...]

    def _run(self, **inputs: Tensor | None) -> Tensor:
        if self.uses_chunked_loss:
            return self._model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        return self._model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._compute_dtype)

    def _to_device(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.no_grad()
    def _head_makes_logits(self) -> bool:
        """Whether the head maps the last hidden state to the logits, with nothing before or after it."""
        if type(self._head).forward is not torch.nn.Linear.forward or self._model.base_model is self._model:
            return False
        recorded: list[Tensor] = []  # input and output of the head
        hook = self._head.register_forward_hook(lambda _, inputs, output: recorded.extend([*inputs, output]))
        ids = self._to_device(trial_ids(self.vocabulary))[None]
        try:
            with self._autocast():
                logits = self._model(input_ids=ids, use_cache=False).logits
                hidden = self._model.base_model(input_ids=ids, use_cache=False)[0]
        except Exception as error:  # a model with other parts computes its own logits
            raise_if_out_of_memory(error)
            return False
        finally:
            hook.remove()
        if len(recorded) != 2:
            return False
        return torch.equal(recorded[0], hidden) and torch.equal(recorded[1].to(logits.dtype), logits)

    @torch.no_grad()
    def _enable_varlen(self) -> bool:
        """Select variable-length attention if the model keeps packed examples independent."""
        previous = self._model.config._attn_implementation
        if previous != "sdpa":
            return False  # the model or its user chose another one for a reason
        attention.register(outside_graphs=self._compiled)
        try:
            self._model.set_attn_implementation(attention.NAME)
            for kernel in dict.fromkeys((attention.varlen_kernel(self._device, self._compute_dtype), None)):
                self._kernel = kernel
                with quantization.without_outliers(self._model):
                    if keeps_examples_independent(self._run_trial, vocabulary=self.vocabulary):
                        return True
        except Exception as error:  # a model's code may raise anything when its attention is replaced
            raise_if_out_of_memory(error)
        self._model.set_attn_implementation(previous)
        return False

    def _run_trial(self, ids: Array, lengths: list[int] | None = None) -> tuple[Array, str]:
        """Outputs of a row of packed examples; without ``lengths`` of one example, as training runs it."""
        packed = lengths or ([len(ids)] if self.uses_varlen else [])
        # One example in the trial of packing is what the kernel must reproduce.
        kernel = None if lengths is not None and len(lengths) == 1 else self._kernel
        edges = self._to_device(np.cumsum([0, *packed], dtype=np.int32))
        with attention.packed_examples(packed, kernel=kernel, cu_seqlens=edges), self._autocast():
            if packed:
                positions = np.concatenate([np.arange(length) for length in packed])
                output = self._run_row(self._to_device(ids), self._to_device(positions))
            else:
                output = self._run(input_ids=self._to_device(ids)[None])[0]
        # The kernel computes in bfloat16 where a last norm returns float32.
        dtype = dtype_name(output) if kernel is None else str(self._compute_dtype).removeprefix("torch.")
        return output.detach().float().cpu().numpy(), dtype
