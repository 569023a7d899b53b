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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrust.contract import Losses
from distrust.data import IGNORED, MicroBatch
from distrust.engines.runtime import (
    Array,
    has_experts,
    keeps_examples_independent,
    require_causal,
    sum_per_example,
    trial_ids,
)
from distrust.engines.state_conversion import dtype_name
from distrust.engines.torch import attention, quantization
from distrust.engines.torch.loss import chunked_losses, token_losses


@dataclass(frozen=True, slots=True)
class _Row:
    """A micro-batch as one row on the host: n tokens of b examples, m of them trained."""

    input_ids: Array  # int64[n]
    positions: Array  # int64[n], each token's position in its example
    lengths: list[int]  # tokens of each example
    predictor_index: Array  # int64[m], index of the token before each trained one, which predicts it
    targets: Array  # int64[m], the trained tokens
    token_weights: Array  # float32[m]
    examples: Array  # int64[m], the example of each trained token, 0 to b - 1

    @classmethod
    def of(cls, batch: MicroBatch) -> _Row:
        """Remove the padding of a micro-batch."""
        real = batch.attention_mask.astype(bool)  # [b, t]
        lengths = real.sum(axis=1)
        labels, token_weights = batch.labels[real], batch.weights[real]  # [n]
        trained = np.flatnonzero(labels != IGNORED)  # never an example's first token: none predicts it
        return cls(
            input_ids=batch.input_ids[real],
            positions=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            lengths=lengths.tolist(),
            predictor_index=trained - 1,
            targets=labels[trained],
            token_weights=token_weights[trained],
            examples=np.repeat(np.arange(len(lengths)), lengths)[trained],
        )


class ModelRunner:
    """Runs a causal language model of transformers, with the adapter in its layers, on micro-batches."""

    def __init__(self, model: Any, *, compute_dtype: torch.dtype, compiled: bool = False) -> None:
        self._model = model  # in evaluation mode
        self._compiled = compiled  # whether its layers will be
        self._compute_dtype = compute_dtype  # dtype of the products; autocast applies any but float32
        self._device: torch.device = model.device
        self._head: Any = model.get_output_embeddings()
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.uses_chunked_loss = self._head_makes_logits()  # the logits of a batch never exist as a whole
        self.uses_varlen = self._enable_varlen()  # examples share one row without padding

    def train(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        return self._run_batch(batch, scale=1 / tokens, backward=True)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only."""
        return self._run_batch(batch, scale=1.0, backward=False)

    def require_causal(self, name: str) -> None:
        """Raise ModelError if a later token of an example changes an earlier output.

        Records gradients, so that it also shows what autograd refuses.
        """
        with quantization.without_outliers(self._model):
            experts = has_experts(self._model.named_modules())
            require_causal(self._run_trial, vocabulary=self._vocabulary, name=name, experts=experts)

    def _run_batch(self, batch: MicroBatch, *, scale: float, backward: bool) -> Losses:
        row = _Row.of(batch)
        # Also around the backward pass: a checkpointed layer computes its attention again there.
        with attention.packed_examples(row.lengths if self.uses_varlen else []):
            total, losses = self._losses(batch, row, scale=scale)
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
        host = losses.detach().cpu().numpy()
        return sum_per_example(host, row.token_weights, row.examples, count=len(row.lengths))

    def _losses(self, batch: MicroBatch, row: _Row, *, scale: float) -> tuple[Tensor, Tensor]:
        """float32[], the scaled and weighted sum; float32[m], the cross-entropy of each trained token."""
        predictor_index, targets = self._to_device(row.predictor_index), self._to_device(row.targets)
        token_weights = self._to_device(row.token_weights) * scale
        with self._autocast():
            output = self._outputs(batch, row).index_select(0, predictor_index)  # [m, ...]
        if self.uses_chunked_loss:
            return chunked_losses(output.to(self._compute_dtype), self._head, targets, token_weights)
        losses = token_losses(output, targets)
        return (losses * token_weights).sum(), losses.detach()

    def _outputs(self, batch: MicroBatch, row: _Row) -> Tensor:
        """Last hidden states [n, width], or logits [n, vocabulary], of all real tokens."""
        if self.uses_varlen:
            return self._run_row(row.input_ids, row.positions)
        mask = self._to_device(batch.attention_mask)
        return self._run(input_ids=self._to_device(batch.input_ids), attention_mask=mask)[mask.bool()]

    def _run_row(self, ids: Array, positions: Array) -> Tensor:
        ids_on_device, positions_on_device = self._to_device(ids)[None], self._to_device(positions)[None]
        return self._run(input_ids=ids_on_device, position_ids=positions_on_device)[0]  # [1, n] -> [n, ...]

    def _run(self, **inputs: Tensor) -> Tensor:
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
        if type(self._head) is not torch.nn.Linear or self._model.base_model is self._model:
            return False
        recorded: list[Tensor] = []  # input and output of the head
        hook = self._head.register_forward_hook(lambda _, inputs, output: recorded.extend([*inputs, output]))
        ids = self._to_device(trial_ids(self._vocabulary))[None]
        try:
            with self._autocast():
                logits = self._model(input_ids=ids, use_cache=False).logits
                hidden = self._model.base_model(input_ids=ids, use_cache=False)[0]
        except Exception:  # a model with other parts computes its own logits
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
            with quantization.without_outliers(self._model):
                exact = keeps_examples_independent(self._run_trial, vocabulary=self._vocabulary)
        except Exception:  # a model's code may raise anything when its attention is replaced
            exact = False
        if not exact:
            self._model.set_attn_implementation(previous)
        return exact

    def _run_trial(self, ids: Array, lengths: list[int] | None = None) -> tuple[Array, str]:
        """Outputs of a row of packed examples; without ``lengths`` of one example, as training runs it."""
        packed = lengths or ([len(ids)] if self.uses_varlen else [])
        with attention.packed_examples(packed), self._autocast():
            if packed:
                output = self._run_row(ids, np.concatenate([np.arange(length) for length in packed]))
            else:
                output = self._run(input_ids=self._to_device(ids)[None])[0]
        return output.detach().float().cpu().numpy(), dtype_name(output)
