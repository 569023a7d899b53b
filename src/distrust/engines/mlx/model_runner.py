"""Forward and backward passes of a micro-batch, by the cheapest method that the model allows.

- Shared rows: examples share a row, as many as fit into the length of the longest, and attention stays within
  each. Otherwise each has its own row, padded to the longest.
- Chunked loss: the head is applied to a few hundred trained tokens at a time (``loss.py``). Otherwise the
  model computes all logits.

A trial on a few tokens decides whether a method is exact for this model, as in the engine of torch: see
:func:`distrust.engines.runtime.keeps_examples_independent`, and :meth:`ModelRunner._separable_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_causal_mask

from distrust.contract import Losses
from distrust.data import IGNORED, MicroBatch
from distrust.engines.mlx.layers import linear
from distrust.engines.mlx.loss import Head, chunked_losses, token_losses
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

#: Compiled steps pad rows and trained tokens to a multiple of it: each new shape is compiled again.
PADDING_MULTIPLE = 32

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class Rows(MicroBatch):
    """A micro-batch on the host: b sequences in r rows of t tokens, m of them trained, padded to k."""

    row_ids: Array  # int32[r, t]
    segments: Array | None  # int32[r, t], each token's sequence, -1 for padding; None: each has its own row
    predictor_index: Array  # int32[k], index in the flattened rows of the token that predicts a trained one
    targets: Array  # int32[k], the trained tokens
    token_weights: Array  # float32[k], 0 for padding
    trained_sequences: Array  # int64[m], the sequence of each trained token

    @classmethod
    def of(cls, batch: MicroBatch, *, share: bool, multiple: int) -> Self:
        """Place the sequences into rows, several in one if they ``share``; ``multiple`` divides t and k.

        A prepared batch is returned as it is.
        """
        if isinstance(batch, cls):
            return batch
        lengths, sequences = batch.lengths, batch.sequences  # [b], [n]
        row_of, start_of = _first_fit(lengths) if share else (np.arange(len(lengths)), np.zeros_like(lengths))
        shape = int(row_of.max()) + 1, _round_up(int(lengths.max()), multiple)
        row_ids, segments = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        cells = row_of[sequences], start_of[sequences] + batch.positions  # row and column of each token
        row_ids[cells] = batch.input_ids
        segments[cells] = sequences
        trained = batch.labels != IGNORED  # never a sequence's first token: none predicts it
        predictor_index = np.ravel_multi_index(cells, shape)[trained] - 1
        padding = (0, _round_up(len(predictor_index), multiple) - len(predictor_index))
        return batch.extend(
            cls,
            row_ids=row_ids,
            segments=segments if shape[0] < len(lengths) else None,
            predictor_index=np.pad(predictor_index.astype(np.int32), padding),
            targets=np.pad(batch.labels[trained].astype(np.int32), padding),
            token_weights=np.pad(batch.weights[trained], padding),
            trained_sequences=sequences[trained],
        )

    def to_device(self, *, scale: float) -> tuple[mx.array | None, ...]:
        """The arrays that a pass takes, with the token weights scaled."""
        segments = None if self.segments is None else mx.array(self.segments)
        token_weights = mx.array(self.token_weights * np.float32(scale))
        predictor_index, targets = mx.array(self.predictor_index), mx.array(self.targets)
        return mx.array(self.row_ids), segments, predictor_index, targets, token_weights

    def sum_losses(self, losses: mx.array) -> Losses:
        """Sum float32[n] losses for each sequence."""
        trained = len(self.trained_sequences)  # padding is at the end
        return sum_per_sequence(
            np.asarray(losses)[:trained],
            self.token_weights[:trained],
            self.trained_sequences,
            count=len(self.examples),
        )


class _SegmentMask:
    """Takes the place of a key-value cache in mlx-lm's models: caches nothing, and supplies the mask."""

    offset = 0

    def __init__(self, segments: mx.array, windows: set[int | None]) -> None:
        self._windows = windows  # records the sliding windows that the layers request
        self._same_example = segments[:, None, :, None] == segments[:, None, None, :]  # [r, 1, t, t]

    def make_mask(self, length: int, *, window_size: int | None = None, **_: Any) -> mx.array:
        """bool[r, 1, t, t]: earlier tokens of the same example."""
        self._windows.add(window_size)
        return mx.logical_and(self._same_example, create_causal_mask(length, window_size=window_size))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The same keys and values: nothing is cached."""
        return keys, values


class ModelRunner:
    """Runs a language model of mlx-lm, with the adapter in its layers, on micro-batches."""

    def __init__(
        self,
        model: Any,
        *,
        compute_dtype: mx.Dtype | None,
        frozen_head: bool,
        by_columns: bool,
        compiled: bool,
    ) -> None:
        self._model = model
        self._compute_dtype = (
            compute_dtype  # that the trained arrays are cast to in each pass; None: as they are
        )
        self._by_columns = by_columns  # products with frozen weights, see ``layers.py``
        self._vocabulary: int = self._logits(np.zeros(1, np.int32)).shape[-1]
        self._head = self._separable_head() if frozen_head else None
        self.uses_chunked_loss = self._head is not None  # the logits of a batch never exist as a whole
        self.windows: set[int | None] = set()  # sliding windows that the layers have requested, in tokens
        #: Examples share rows.
        self.uses_varlen = keeps_examples_independent(self._run_trial, vocabulary=self._vocabulary)
        self._compiled = compiled
        self._loss_and_gradients = mx.value_and_grad(self._losses)
        self._train, self._evaluate = self._compile(self._train_pass), self._compile(self._evaluation_pass)

    def train(
        self, trained: Arrays, gradients: Arrays | None, batch: MicroBatch, *, tokens: int
    ) -> tuple[Losses, dict[str, mx.array]]:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens`` to ``gradients``.

        ``gradients`` is the sum over the earlier micro-batches of the step, None for the first.
        """
        rows = self.prepare(batch)
        losses, accumulated = self._train(dict(trained), gradients, *rows.to_device(scale=1 / tokens))
        mx.eval(losses, accumulated)
        return rows.sum_losses(losses), accumulated

    def evaluate(self, trained: Arrays, batch: MicroBatch) -> Losses:
        """Forward only."""
        rows = self.prepare(batch)
        losses = self._evaluate(dict(trained), *rows.to_device(scale=1.0))
        mx.eval(losses)
        return rows.sum_losses(losses)

    def set_parameters(self, trained: Arrays) -> None:
        """Put the trained arrays into the model: a traced pass leaves its tracers there."""
        if self._compute_dtype is not None:
            trained = {name: array.astype(self._compute_dtype) for name, array in trained.items()}
        self._model.update(tree_unflatten(list(trained.items())))

    @property
    def prepare(self) -> Callable[[MicroBatch], Rows]:
        """Place a batch into rows; holds no reference to the model."""
        return partial(Rows.of, share=self.uses_varlen, multiple=PADDING_MULTIPLE if self._compiled else 1)

    def require_causal(self, name: str) -> None:
        """Raise ModelError if a later token of an example changes an earlier output."""
        experts = has_experts(self._model.named_modules())
        one_row = lambda ids: self._run_trial(ids, [len(ids)])  # noqa: E731
        require_causal(one_row, vocabulary=self._vocabulary, name=name, experts=experts)

    def _train_pass(
        self, trained: Arrays, gradients: Arrays | None, *batch: Any
    ) -> tuple[mx.array, dict[str, mx.array]]:
        self._model.train()
        (_, losses), accumulated = self._loss_and_gradients(trained, *batch)
        if gradients is not None:
            accumulated = {name: gradient + gradients[name] for name, gradient in accumulated.items()}
        return losses, accumulated

    def _evaluation_pass(self, trained: Arrays, *batch: Any) -> mx.array:
        self._model.eval()
        return self._losses(trained, *batch)[1]

    def _losses(self, trained: Arrays, *batch: Any) -> tuple[mx.array, mx.array]:
        """float32[], the scaled and weighted sum; float32[n], the cross-entropy of each trained token."""
        input_ids, segments, predictor_index, targets, token_weights = batch  # of Rows.to_device
        self.set_parameters(trained)
        if self._head is None:
            logits = self._model(input_ids, self._cache(segments))
            losses = token_losses(_take_rows(logits, predictor_index), targets)
            return (losses * token_weights).sum(), losses
        hidden = self._model.model(input_ids, self._cache(segments))  # [r, t, width]
        inputs = _take_rows(hidden, predictor_index)
        return chunked_losses(self._head, inputs, targets, token_weights, vocabulary=self._vocabulary)

    def _cache(self, segments: mx.array | None) -> list[_SegmentMask] | None:
        if segments is None:
            return None
        return [_SegmentMask(segments, self.windows)] * len(self._model.layers)

    def _compile(self, function: Callable[..., Any]) -> Any:
        # Dropout reads and advances the generator's state, which must not become a constant of the graph.
        state = mx.random.state
        return mx.compile(function, inputs=state, outputs=state) if self._compiled else function

    def _separable_head(self) -> Head | None:
        """The head, if the model is nothing but its body and this head; else None."""
        body = getattr(self._model, "model", None)
        embedding: Any = getattr(body, "embed_tokens", None)
        head = getattr(self._model, "lm_head", None) or getattr(embedding, "as_linear", None)
        if body is None or head is None:
            return None
        ids = mx.array(trial_ids(self._vocabulary))[None]
        try:
            if not mx.array_equal(head(body(ids)), self._model(ids)):
                return None
        except Exception as error:  # a model with other parts computes its own logits
            raise_if_out_of_memory(error)
            return None
        if self._by_columns and type(embedding) is nn.Embedding and not hasattr(self._model, "lm_head"):
            weight: mx.array = embedding.weight  # [vocabulary, width], tied
            return lambda hidden: linear(hidden, weight)
        return head  # type: ignore[no-any-return]

    def _run_trial(self, ids: Array, lengths: list[int]) -> tuple[Array, str]:
        # A single example runs without a mask of ours: it shows what the model computes by itself.
        segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths) if len(lengths) > 1 else None
        logits = self._logits(ids, segments)
        return np.asarray(logits.astype(mx.float32)), dtype_name(logits)

    def _logits(self, ids: Array, segments: Array | None = None) -> mx.array:
        """Logits [n, vocabulary] of one row."""
        cache = None if segments is None else self._cache(mx.array(segments)[None])
        logits: mx.array = self._model(mx.array(ids.astype(np.int32))[None], cache)[0]
        mx.eval(logits)
        return logits


def _take_rows(values: mx.array, index: mx.array) -> mx.array:
    """[r, t, width] -> [n, width]."""
    return mx.take(values.reshape(-1, values.shape[-1]), index, axis=0)


def _first_fit(lengths: Array) -> tuple[Array, Array]:
    """Row and start of each example: the longest first, each in the first row with room for it."""
    free: list[int] = []  # free tokens of each row
    row_of, start_of = np.zeros_like(lengths), np.zeros_like(lengths)
    width = int(lengths.max())
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        row = next((number for number, room in enumerate(free) if room >= length), len(free))
        if row == len(free):
            free.append(width)
        row_of[example], start_of[example] = row, width - free[row]
        free[row] -= length
    return row_of, start_of


def _round_up(count: int, multiple: int) -> int:
    return max(multiple, -(-count // multiple) * multiple)
