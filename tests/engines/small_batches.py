"""Random micro-batches for engine tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from distrust.data import IGNORED, MicroBatch

VOCABULARY = 61
LENGTHS = (9, 3, 12, 6)


def make_batch(
    *, seed: int = 0, lengths: tuple[int, ...] = LENGTHS, vocabulary: int = VOCABULARY
) -> MicroBatch:
    """Examples of different lengths; some tokens are not trained, and each has its own weight."""
    rng = np.random.default_rng(seed)
    position = np.arange(max(lengths))
    real = position < np.array(lengths)[:, None]
    ids = np.where(real, rng.integers(3, vocabulary, real.shape), 2)
    trained = real & (rng.random(real.shape) < 0.7) & (position > 0)
    trained[:, 1] = True
    return MicroBatch(
        input_ids=ids,
        attention_mask=real.astype(np.int64),
        labels=np.where(trained, ids, IGNORED),
        weights=np.where(trained, rng.uniform(0.2, 3, real.shape), 0).astype(np.float32),
        distrust=np.zeros(len(lengths)),
        examples=np.arange(len(lengths)),
    )


def select_examples(batch: MicroBatch, rows: Sequence[int], *, filler: int = 2) -> MicroBatch:
    """A batch of the given rows, in this order, padded to the longest with ``filler``."""
    chosen = list(rows)
    width = int(batch.attention_mask[chosen].sum(axis=1).max())
    mask = batch.attention_mask[chosen, :width]
    return MicroBatch(
        input_ids=np.where(mask, batch.input_ids[chosen, :width], filler),
        attention_mask=mask,
        labels=batch.labels[chosen, :width],
        weights=batch.weights[chosen, :width],
        distrust=batch.distrust[chosen],
        examples=batch.examples[chosen],
    )


def with_weights(batch: MicroBatch, weights: ArrayLike) -> MicroBatch:
    """The same batch with one weight for each example."""
    column = np.asarray(weights, np.float32)[:, None]
    return replace(batch, weights=np.where(batch.labels != IGNORED, column, 0).astype(np.float32))
