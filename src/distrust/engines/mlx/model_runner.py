"""The passes through a model: forward, and backward, of the examples of a micro-batch.

They take the shortest way that this model allows:

- examples share a row, as many as fit beside the longest one, and attention stays within each; else each
  has a row of its own, padded to the longest;
- the head is applied to some hundred tokens at a time, and to learned ones alone (``loss.py``); else the
  model makes all logits.

Whether a way gives what the model means is tried once, on a few tokens, as in the engine of torch: no token
may move by one bit when another example of its row changes; what comes out of the head must be the model's
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_causal_mask

from distrust.contract import Losses
from distrust.data import IGNORED, MicroBatch
from distrust.engines.mlx import linear_by_columns
from distrust.engines.mlx.loss import Head, chunked_losses, token_losses

#: Rows are padded to a multiple of it, and so are the learned tokens: each shape is compiled anew.
MULTIPLE = 32
#: The tokens of the two examples of a trial.
TRIAL = (5, 7)
#: How far an example may be from the same alone, beside its largest value.
ROUNDING = {mx.float32: 1e-3, mx.bfloat16: 1e-1}

Trained = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A micro-batch on the host: b examples in r rows of t tokens, m of them learned, padded to n.

    Attributes:
        input_ids: int32[r, t].
        segments: int32[r, t], which example of its row a token is of; None where each has a row of its own.
        places: int32[n], where in the flattened rows a learned token's predecessor stands.
        targets: int32[n], the learned token.
        weights: float32[n], its weight; 0 for padding.
        examples: int64[m], its example, 0 to b - 1.
    """

    input_ids: np.ndarray[Any, Any]
    segments: np.ndarray[Any, Any] | None
    places: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    examples: np.ndarray[Any, Any]


class _SharedRows:
    """What mlx-lm's models take for a cache of keys: it holds none, and says which tokens see which.

    Args:
        segments: int32[r, t].
        windows: where the windows that are asked for are noted.
    """

    offset = 0

    def __init__(self, segments: mx.array, windows: set[int | None]) -> None:
        self._windows = windows
        self._same = segments[:, None, :, None] == segments[:, None, None, :]

    def make_mask(
        self,
        length: int,
        *,
        window_size: int | None = None,
        return_array: bool = True,  # noqa: ARG002
    ) -> mx.array:
        """bool[r, 1, t, t]: what came before, of the same example."""
        self._windows.add(window_size)
        return mx.logical_and(self._same, create_causal_mask(length, window_size=window_size))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """There are no others."""
        return keys, values


class ModelRunner:
    """Runs a model.

    Args:
        model: a language model of mlx-lm; its adapter sits in its layers.
        arithmetic: dtype of what is trained in the products, where that is all of the model; None: as it is.
        frozen_head: whether nothing of the head is trained.
        by_columns: whether products with frozen weights are made so (``columns.py``).
        compiled: whether the passes are compiled.
    """

    def __init__(
        self,
        model: Any,
        *,
        arithmetic: mx.Dtype | None,
        frozen_head: bool,
        by_columns: bool,
        compiled: bool,
    ) -> None:
        self._model = model
        self._arithmetic = arithmetic
        self._columns = by_columns
        self._vocabulary: int = self._trial(_trial_ids(0)).shape[-1]
        self._head = self._found_head() if frozen_head else None
        self.chunks = self._head is not None
        #: The sliding windows that its layers ask for, in tokens.
        self.windows: set[int | None] = set()
        self.packs = self._can_pack()
        self._compiled = compiled
        self._gradients = mx.value_and_grad(self._losses)
        self._train = self._compile(self._train_pass)
        self._evaluate = self._compile(self._evaluation_pass)

    def train(
        self, trained: Trained, gradients: Trained | None, batch: MicroBatch, *, tokens: int
    ) -> tuple[Losses, dict[str, mx.array]]:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``.

        Args:
            trained: the weights.
            gradients: of the micro-batches before; None if this is the first.
            batch: the examples.
            tokens: learned tokens of the whole optimizer step.
        """
        rows = self._rows(batch)
        losses, found = self._train(dict(trained), gradients, *_to_device(rows, scale=1 / tokens))
        mx.eval(losses, found)
        return _per_example(rows, losses, len(batch.examples)), found

    def evaluate(self, trained: Trained, batch: MicroBatch) -> Losses:
        """Forward only."""
        rows = self._rows(batch)
        losses = self._evaluate(dict(trained), *_to_device(rows, scale=1.0))
        mx.eval(losses)
        return _per_example(rows, losses, len(batch.examples))

    def _train_pass(
        self, trained: Trained, gradients: Trained | None, *batch: Any
    ) -> tuple[mx.array, dict[str, mx.array]]:
        self._model.train()
        (_, losses), found = self._gradients(trained, *batch)
        if gradients is not None:
            found = {name: gradient + gradients[name] for name, gradient in found.items()}
        return losses, found

    def _evaluation_pass(self, trained: Trained, *batch: Any) -> mx.array:
        self._model.eval()
        return self._losses(trained, *batch)[1]

    def _losses(
        self,
        trained: Trained,
        input_ids: mx.array,
        segments: mx.array | None,
        places: mx.array,
        targets: mx.array,
        scales: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """The scaled and weighted sum, and the cross-entropy of each learned token: float32[], float32[n]."""
        self.put(trained)
        if self._head is None:
            logits = self._model(input_ids, self._cache(segments))
            losses = token_losses(_at(logits, places), targets)
            return (losses * scales).sum(), losses
        hidden = self._model.model(input_ids, self._cache(segments))
        return chunked_losses(self._head, _at(hidden, places), targets, scales, vocabulary=self._vocabulary)

    def put(self, trained: Trained) -> None:
        """Have the model itself hold these: a pass leaves in it what it was traced with."""
        if self._arithmetic is not None:
            trained = {name: array.astype(self._arithmetic) for name, array in trained.items()}
        self._model.update(tree_unflatten(list(trained.items())))

    def _cache(self, segments: mx.array | None) -> list[_SharedRows] | None:
        if segments is None:
            return None
        shared = _SharedRows(segments, self.windows)
        return [shared] * len(self._model.layers)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self._compiled:
            return function
        compiled: Callable[..., Any] = mx.compile(function, inputs=mx.random.state, outputs=mx.random.state)
        return compiled

    def _rows(self, batch: MicroBatch) -> _Rows:
        return _rows(batch, share=self.packs, multiple=MULTIPLE if self._compiled else 1)

    def _found_head(self) -> Head | None:
        """What makes logits of the last hidden state, if that and the body are all that the model is."""
        body = getattr(self._model, "model", None)
        embedding: Any = getattr(body, "embed_tokens", None)
        head = getattr(self._model, "lm_head", None) or getattr(embedding, "as_linear", None)
        if body is None or head is None:
            return None
        ids = mx.array(_trial_ids(0))[None]
        try:
            good = bool(mx.array_equal(head(body(ids)), self._model(ids)))
        except Exception:  # a model whose parts are called otherwise makes its logits itself
            return None
        if not good:
            return None
        if self._columns and type(embedding) is nn.Embedding and not hasattr(self._model, "lm_head"):
            table: mx.array = embedding.weight
            return lambda hidden: linear_by_columns.product(table, hidden)
        return head  # type: ignore[no-any-return]

    def _can_pack(self) -> bool:
        """Whether examples in one row stay among themselves, each as it is alone."""
        segments = np.repeat(np.arange(2, dtype=np.int32), TRIAL)
        try:
            first, second = mx.split(self._trial(_trial_ids(0), segments), [TRIAL[0]])
            other_first, _ = mx.split(self._trial(_trial_ids(1), segments), [TRIAL[0]])
            _, other_second = mx.split(self._trial(_trial_ids(2), segments), [TRIAL[0]])
            alone = self._trial(_trial_ids(0)[TRIAL[0] :])
            apart = mx.abs(second - alone).max()
            rounding = ROUNDING.get(second.dtype, 0.0) * mx.abs(alone).max()
            good = mx.array_equal(first, other_first) & mx.array_equal(second, other_second)
            return bool(good & (apart <= rounding))
        except Exception:  # a model's code may raise anything where it is run in a way it was not made for
            return False

    def _trial(self, ids: np.ndarray[Any, Any], segments: np.ndarray[Any, Any] | None = None) -> mx.array:
        cache = None if segments is None else self._cache(mx.array(segments)[None])
        logits: mx.array = self._model(mx.array(ids)[None], cache)[0]
        mx.eval(logits)
        return logits


def _trial_ids(number: int) -> np.ndarray[Any, Any]:
    """Two examples' tokens; that with number 1 has another second one, that with number 2 another first."""
    ids = np.arange(1, sum(TRIAL) + 1, dtype=np.int32)
    if number == 1:
        ids[TRIAL[0] :] += 1
    elif number == 2:
        ids[: TRIAL[0]] += 1
    return ids


def _at(rows: mx.array, places: mx.array) -> mx.array:
    found: mx.array = mx.take(rows.reshape(-1, rows.shape[-1]), places, axis=0)
    return found


def _to_device(rows: _Rows, *, scale: float) -> tuple[mx.array | None, ...]:
    segments = None if rows.segments is None else mx.array(rows.segments)
    scales = mx.array(rows.weights * np.float32(scale))
    return mx.array(rows.input_ids), segments, mx.array(rows.places), mx.array(rows.targets), scales


def _rows(batch: MicroBatch, *, share: bool, multiple: int) -> _Rows:
    lengths = batch.attention_mask.sum(axis=1)
    row_of, start_of = (
        _place_examples(lengths) if share else (np.arange(len(lengths)), np.zeros_like(lengths))
    )
    shape = int(row_of.max()) + 1, _up(int(lengths.max()), multiple)
    input_ids = np.zeros(shape, np.int32)
    segments = np.full(shape, -1, np.int32)
    for example, length in enumerate(lengths):
        there = row_of[example], slice(start_of[example], start_of[example] + length)
        input_ids[there] = batch.input_ids[example, :length]
        segments[there] = example
    learned = batch.labels != IGNORED  # never an example's first token: nothing crosses a boundary
    examples, linear_by_columns = np.nonzero(learned)
    places = row_of[examples] * shape[1] + start_of[examples] + linear_by_columns - 1
    padding = (0, _up(len(examples), multiple) - len(examples))
    return _Rows(
        input_ids=input_ids,
        segments=segments if shape[0] < len(lengths) else None,
        places=np.pad(places.astype(np.int32), padding),
        targets=np.pad(batch.labels[learned].astype(np.int32), padding),
        weights=np.pad(batch.weights[learned], padding),
        examples=examples,
    )


def _place_examples(lengths: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row and start of each example: the longest first, each in the first row that has room for it."""
    room: list[int] = []
    row_of, start_of = np.zeros_like(lengths), np.zeros_like(lengths)
    widest = int(lengths.max())
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        row = next((number for number, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(widest)
        row_of[example], start_of[example] = row, widest - room[row]
        room[row] -= length
    return row_of, start_of


def _up(count: int, multiple: int) -> int:
    return max(multiple, -(-count // multiple) * multiple)


def _per_example(rows: _Rows, losses: mx.array, count: int) -> Losses:
    learned = len(rows.examples)
    plain = np.asarray(losses).astype(np.float64)[:learned]
    return Losses(
        np.bincount(rows.examples, plain, minlength=count),
        np.bincount(rows.examples, plain * rows.weights[:learned], minlength=count),
    )
