"""Order -> batches: the arrays of a step, a pure function of its number.

Weights travel per token, beside the labels: a loss that sees the labels sees the weights, and no later
stage has to look up to which example a token belongs.
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
"""The label of a token that carries no loss: transformers and torch know it by this number."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass sees: b examples, padded on the right to the longest of them, t.

    Labels and weights stand at the token that they are about: who computes a loss shifts both by one.

    Attributes:
        input_ids: int64[b, t].
        attention_mask: int64[b, t], 1 for tokens and 0 for padding.
        labels: int64[b, t], the token where it is learned, else −100. Not shifted.
        weights: float32[b, t], the example's weight where its token is learned, else 0. Not shifted.
        distrust: float64[b], the published term α·r² of each example; for the log only.
        examples: int64[b], the examples' numbers in the corpus.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    distrust: NDArray[np.float64]
    examples: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """The number of learned tokens."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Batches:
    """The batches of a run, by optimizer step.

    Args:
        corpus: the examples.
        weights: float[n], the normalized weight of each.
        distrust: float[n], the published term of each.
        order: the order of the rows.
        sequences: which examples share a row; by default each has one of its own.
        batch_size: the rows of a micro-batch.
        gradient_accumulation: the micro-batches of a step.
        pad_token_id: what padding is filled with; it is masked and never learned.

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
            raise ValueError(f"a step needs a row: {batch_size} × {gradient_accumulation}")
        rows = one_per_row(np.arange(len(corpus))) if rows is None else rows
        if sampler.rows_per_epoch != len(rows):
            raise ValueError(f"an order of {sampler.rows_per_epoch} sequences for {len(rows)} rows")
        self._corpus = corpus
        self._weights = _per_example(weights, "weights", corpus)
        self._distrust = _per_example(distrust, "distrust", corpus)
        self._sequences = rows
        self._order = sampler
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
        return self._order.rows_per_epoch / self.rows_per_step

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step: the rows at the positions from (step − 1)·G to step·G.

        Args:
            step: counted from 1.

        Returns:
            ``gradient_accumulation`` micro-batches of ``batch_size`` rows.

        Raises:
            ValueError: the step is less than 1.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        per_step = self.rows_per_step
        chosen = self._order.at((step - 1) * per_step, per_step).reshape(self._gradient_accumulation, -1)
        return [
            _collate(
                self._corpus,
                examples,
                weights=self._weights[examples],
                distrust=self._distrust[examples],
                pad_token_id=self._pad_token_id,
            )
            for examples in map(self._sequences.examples, chosen)
        ]


def evaluation_batches(corpus: Corpus, *, batch_size: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """Every example once, in the corpus' order; each weighs 1, and its published term is given as 0.

    Args:
        corpus: the examples.
        batch_size: the examples of a batch; the last may hold fewer.
        pad_token_id: what padding is filled with.

    Yields:
        The batches.

    Raises:
        ValueError: the batch size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs an example, not {batch_size}")
    for start in range(0, len(corpus), batch_size):
        examples = np.arange(start, min(start + batch_size, len(corpus)), dtype=np.int64)
        yield _collate(
            corpus,
            examples,
            weights=np.ones(len(examples)),
            distrust=np.zeros(len(examples)),
            pad_token_id=pad_token_id,
        )


def _collate(
    corpus: Corpus,
    examples: NDArray[np.int64],
    *,
    weights: NDArray[np.float64],
    distrust: NDArray[np.float64],
    pad_token_id: int,
) -> MicroBatch:
    """Pads the examples to the longest of them; weights and distrust are those of these examples, [b]."""
    lengths = corpus.lengths[examples]
    place = np.arange(lengths.max(), dtype=np.int64)
    real = place < lengths[:, None]
    # Padding reads the example's first token: any valid place does, it is masked out below.
    source = corpus.starts[examples][:, None] + np.where(real, place, 0)
    tokens = corpus.input_ids[source].astype(np.int64)
    learned = real & corpus.loss_mask[source]
    return MicroBatch(
        input_ids=np.where(real, tokens, pad_token_id),
        attention_mask=real.astype(np.int64),
        labels=np.where(learned, tokens, IGNORED),
        weights=np.where(learned, weights[:, None], 0).astype(np.float32),
        distrust=distrust,
        examples=examples,
    )


def _per_example(values: ArrayLike, name: str, corpus: Corpus) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.shape != (len(corpus),):
        raise ValueError(
            f"{name} must be one per example: shape {list(array.shape)} for {len(corpus)} examples"
        )
    return array
