"""Random micro-batches for engine tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    weights = np.where(trained, rng.uniform(0.2, 3, real.shape), 0)
    return flat_batch(lengths, ids[real], np.where(trained, ids, IGNORED)[real], weights[real])


def flat_batch(
    lengths: Sequence[int], ids: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> MicroBatch:
    """A batch of examples of these lengths, from their tokens one after the other; weights default to 1."""
    labels = np.asarray(labels)
    weights = labels != IGNORED if weights is None else weights
    return MicroBatch(
        input_ids=np.asarray(ids),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        labels=labels,
        weights=np.asarray(weights, np.float32),
        distrust=np.zeros(len(lengths)),
        examples=np.arange(len(lengths)),
    )


def select_examples(batch: MicroBatch, chosen: Sequence[int]) -> MicroBatch:
    """A batch of the chosen examples, in this order."""
    tokens = np.concatenate([np.flatnonzero(batch.sequences == example) for example in chosen])
    arrays = (batch.input_ids[tokens], batch.labels[tokens], batch.weights[tokens])
    selected = flat_batch(batch.lengths[list(chosen)], *arrays)
    return replace(selected, distrust=batch.distrust[list(chosen)], examples=batch.examples[list(chosen)])


def with_weights(batch: MicroBatch, weights: ArrayLike) -> MicroBatch:
    """The same batch with one weight for each example."""
    of_token = np.asarray(weights, np.float32)[batch.sequences]
    return replace(batch, weights=np.where(batch.labels != IGNORED, of_token, 0).astype(np.float32))


def pad_batch(batch: MicroBatch) -> dict[str, Any]:
    """Tokens, their mask, labels and weights, [b, t] each, as other trainers have them."""
    return {
        "input_ids": batch.pad(batch.input_ids, filler=2),
        "attention_mask": batch.pad(np.ones_like(batch.input_ids), filler=0),
        "labels": batch.pad(batch.labels, filler=IGNORED),
        "weights": batch.pad(batch.weights, filler=0),
    }
