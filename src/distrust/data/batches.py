"""Batches: the arrays of one optimizer step, a pure function of the step number.

Weights travel per token, next to the labels: a loss that sees the labels also sees the weights, and no later
stage has to look up which example a token belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.data.corpus import Corpus
from distrust.data.packing import PackedRows, one_per_row
from distrust.data.sampler import EpochSampler, MixtureSampler

IGNORED = -100
"""The label of a token that carries no loss; torch and transformers use the same number."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward and backward pass: b examples, right-padded to the longest, t tokens.

    Labels and weights are at the position of the token that they describe: the loss shifts both by one.
    """

    input_ids: NDArray[np.int64]  # [b, t]
    attention_mask: NDArray[np.int64]  # [b, t], 1 for tokens, 0 for padding
    labels: NDArray[np.int64]  # [b, t], the token where it carries loss, else IGNORED; not shifted
    weights: NDArray[np.float32]  # [b, t], the example's weight where its token carries loss, else 0
    distrust: NDArray[np.float64]  # [b], the published term α·r² of each example; for the log only
    examples: NDArray[np.int64]  # [b], example numbers in the corpus

    @property
    def tokens(self) -> int:
        """The number of trained tokens."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Batches:
    """The batches of a run, by optimizer step.

    Args:
        corpus: the n examples.
        weights: float[n], the normalized weight of each.
        distrust: float[n], the published term of each.
        sampler: the order of the rows.
        rows: which examples share a row; by default one each.
        batch_size: the rows of a micro-batch.
        gradient_accumulation: the micro-batches of a step.
        pad_token_id: fills padding, which is masked and carries no loss.

    Raises:
        ValueError: the parts do not fit each other.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        weights: ArrayLike,
        distrust: ArrayLike,
        sampler: EpochSampler | MixtureSampler,
        rows: PackedRows | None = None,
        batch_size: int,
        gradient_accumulation: int,
        pad_token_id: int,
    ) -> None:
        if batch_size < 1 or gradient_accumulation < 1:
            raise ValueError(f"a step needs at least one row, not {batch_size} × {gradient_accumulation}")
        rows = one_per_row(np.arange(len(corpus))) if rows is None else rows
        if sampler.rows_per_epoch != len(rows):
            raise ValueError(f"the sampler has {sampler.rows_per_epoch} rows, the data {len(rows)}")
        self._corpus = corpus
        self._weights = _per_example(weights, "weights", corpus)  # float64[n]
        self._distrust = _per_example(distrust, "distrust", corpus)  # float64[n]
        self._rows = rows
        self._sampler = sampler
        self._batch_size = batch_size
        self._gradient_accumulation = gradient_accumulation
        self._pad_token_id = pad_token_id

    @property
    def rows_per_step(self) -> int:
        """The rows of a global batch."""
        return self._batch_size * self._gradient_accumulation

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps of one pass over the data."""
        return self._sampler.rows_per_epoch / self.rows_per_step

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (from 1): the rows at positions (step − 1)·G to step·G.

        Returns:
            ``gradient_accumulation`` micro-batches of ``batch_size`` rows.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        per_step = self.rows_per_step
        rows = self._sampler.at((step - 1) * per_step, per_step).reshape(self._gradient_accumulation, -1)
        return [
            _collate(self._corpus, examples, self._weights, self._distrust, self._pad_token_id)
            for examples in map(self._rows.examples, rows)
        ]


def evaluation_batches(corpus: Corpus, *, batch_size: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """Every example once, in corpus order, with weight 1 and a published term of 0.

    Args:
        corpus: the examples.
        batch_size: the examples of a batch; the last may hold fewer.
        pad_token_id: fills padding.

    Raises:
        ValueError: the batch size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one example, not {batch_size}")
    weights, distrust = np.ones(len(corpus)), np.zeros(len(corpus))
    for start in range(0, len(corpus), batch_size):
        examples = np.arange(start, min(start + batch_size, len(corpus)), dtype=np.int64)
        yield _collate(corpus, examples, weights, distrust, pad_token_id)


def _collate(
    corpus: Corpus,
    examples: NDArray[np.int64],  # [b]
    weights: NDArray[np.float64],  # [n], as distrust
    distrust: NDArray[np.float64],
    pad_token_id: int,
) -> MicroBatch:
    """Gather b of n examples and pad them."""
    lengths = corpus.lengths[examples]  # int64[b]
    position = np.arange(lengths.max(), dtype=np.int64)  # [t]
    is_token = position < lengths[:, None]  # bool[b, t]
    # Padding reads the example's first token: any valid index will do, it is masked out below.
    source = corpus.starts[examples][:, None] + np.where(is_token, position, 0)  # int64[b, t]
    tokens = corpus.input_ids[source].astype(np.int64)
    trained = is_token & corpus.loss_mask[source]  # bool[b, t]
    return MicroBatch(
        input_ids=np.where(is_token, tokens, pad_token_id),
        attention_mask=is_token.astype(np.int64),
        labels=np.where(trained, tokens, IGNORED),
        weights=np.where(trained, weights[examples, None], 0).astype(np.float32),
        distrust=distrust[examples],
        examples=examples,
    )


def _per_example(values: ArrayLike, name: str, corpus: Corpus) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.shape != (len(corpus),):
        raise ValueError(
            f"{name} must be one per example: shape {list(array.shape)} for {len(corpus)} examples"
        )
    return array
