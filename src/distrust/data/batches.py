"""Batches: the arrays of one optimizer step, a pure function of the step number.

A micro-batch is flat: its sequences follow each other, without padding. Whether rows are packed only decides
how many examples it has.

Weights travel per token, next to the labels: a loss that sees the labels also sees the weights, and no later
stage has to look up which example a token belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.data.corpus import Corpus
from distrust.data.packing import PackedRows
from distrust.data.sampler import EpochSampler

Extended = TypeVar("Extended", bound="MicroBatch")
IGNORED = -100  # the label of a token that carries no loss; torch and transformers use the same number


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward and backward pass: b sequences of n tokens in all, one after the other.

    An example is one sequence, or several that follow each other.

    Labels and weights are at the position of the token that they describe: the loss shifts both by one.
    """

    input_ids: NDArray[np.int64]  # [n]
    positions: NDArray[np.int64]  # [n], each token's position in its sequence, from 0
    cu_seqlens: NDArray[np.int32]  # [b + 1], where each sequence begins, and n (cumulative lengths)
    labels: NDArray[np.int64]  # [n], the token where it is trained, else IGNORED; not shifted
    weights: NDArray[np.float32]  # [n], the weight of a trained token, else 0
    distrust: NDArray[np.float64]  # [b], the published term α·r² of its example; for the log only
    examples: NDArray[np.int64]  # [b], the number of its example in the corpus

    @property
    def tokens(self) -> int:
        """The number of trained tokens."""
        return int(np.count_nonzero(self.labels != IGNORED))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[b], the tokens of each sequence."""
        return np.diff(self.cu_seqlens).astype(np.int64)

    @property
    def sequences(self) -> NDArray[np.int64]:
        """int64[n], the sequence of each token, 0 to b - 1."""
        return np.repeat(np.arange(len(self.examples)), self.lengths)

    @property
    def trained_tokens(self) -> NDArray[np.int64]:
        """int64[b], the number of trained tokens of each sequence."""
        trained = self.sequences[self.labels != IGNORED]
        return np.bincount(trained, minlength=len(self.examples))

    def extend(self, kind: type[Extended], **additions: Any) -> Extended:
        """This batch as one of a subclass, with what an engine adds to it; arrays are not copied."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(MicroBatch)}, **additions)

    def pad(self, values: NDArray[Any], *, filler: Any) -> NDArray[Any]:
        """Values [n] as [b, t]: a row for each sequence, padded on the right to the longest."""
        lengths = self.lengths
        padded = np.full((len(lengths), lengths.max()), filler, values.dtype)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = values
        return padded


@dataclass(eq=False, slots=True, kw_only=True)
class Batches:
    """The batches of a run, by optimizer step.

    Raises:
        ValueError: the parts do not fit each other.
    """

    corpus: Corpus = field(kw_only=False)  # the n examples
    weights: NDArray[np.float64]  # [n], the normalized weight of each
    distrust: NDArray[np.float64]  # [n], the published term of each
    sampler: EpochSampler  # the order of the rows
    rows: PackedRows  # which examples share a row
    batch_size: int  # the rows of a micro-batch
    gradient_accumulation: int  # the micro-batches of a step

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.gradient_accumulation < 1:
            size = f"{self.batch_size} × {self.gradient_accumulation}"
            raise ValueError(f"a step needs at least one row, not {size}")
        if self.sampler.rows_per_epoch != len(self.rows):
            raise ValueError(f"the sampler has {self.sampler.rows_per_epoch} rows, the data {len(self.rows)}")
        self.weights = _per_example(self.weights, "weights", self.corpus)
        self.distrust = _per_example(self.distrust, "distrust", self.corpus)

    @property
    def rows_per_step(self) -> int:
        """The rows of a global batch."""
        return self.batch_size * self.gradient_accumulation

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps of one pass over the data."""
        return self.sampler.rows_per_epoch / self.rows_per_step

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (from 1): the rows at positions (step − 1)·G to step·G.

        Returns:
            ``gradient_accumulation`` micro-batches of ``batch_size`` rows; more, where examples are several
            sequences.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        per_step = self.rows_per_step
        rows = self.sampler.at((step - 1) * per_step, per_step).reshape(self.gradient_accumulation, -1)
        return [
            batch
            for examples in map(self.rows.examples, rows)
            for batch in _collate(self.corpus, examples, self.weights, self.distrust)
        ]


def evaluation_batches(corpus: Corpus, *, batch_size: int) -> Iterator[MicroBatch]:
    """Every example once, in corpus order, with weight 1 and a published term of 0.

    The last batch may have fewer than ``batch_size`` examples; ValueError if that is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one example, not {batch_size}")
    weights, distrust = np.ones(len(corpus)), np.zeros(len(corpus))
    for start in range(0, len(corpus), batch_size):
        examples = np.arange(start, min(start + batch_size, len(corpus)), dtype=np.int64)
        yield from _collate(corpus, examples, weights, distrust)


def _collate(
    corpus: Corpus,
    examples: NDArray[np.int64],  # [b]
    weights: NDArray[np.float64],  # [n], as distrust
    distrust: NDArray[np.float64],
) -> Iterator[MicroBatch]:
    """Yield the sequences of b of n examples, no more than b at once, so that memory is bounded."""
    sequences = np.stack(_sequences(corpus, examples))  # int64[3, s]
    for first in range(0, sequences.shape[1], len(examples)):
        yield _gather(corpus, sequences[:, first : first + len(examples)], weights, distrust)


def _gather(
    corpus: Corpus,
    sequences: NDArray[np.int64],  # [3, b], the start, the length and the example of each
    weights: NDArray[np.float64],  # [n], as distrust
    distrust: NDArray[np.float64],
) -> MicroBatch:
    """Gather b sequences."""
    starts, lengths, examples = sequences
    edges = np.concatenate([[0], np.cumsum(lengths)])  # int64[b + 1]
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)  # int64[n]
    source = np.repeat(starts, lengths) + positions  # int64[n], index in the corpus
    tokens = corpus.input_ids[source].astype(np.int64)
    trained = corpus.loss_mask[source]  # bool[n]
    factors = 1 if corpus.token_weights is None else corpus.token_weights[source]
    return MicroBatch(
        input_ids=tokens,
        positions=positions,
        cu_seqlens=edges.astype(np.int32),
        labels=np.where(trained, tokens, IGNORED),
        weights=np.where(trained, np.repeat(weights[examples], lengths) * factors, 0).astype(np.float32),
        distrust=distrust[examples],
        examples=examples,
    )


def _sequences(
    corpus: Corpus, examples: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of the sequences of some examples, in order: where each begins, its tokens, and its example."""
    starts, lengths = corpus.starts[examples], corpus.lengths[examples]
    offsets = corpus.sequence_offsets
    if offsets is None:
        return starts, lengths, examples
    first, last = np.searchsorted(offsets, starts), np.searchsorted(offsets, starts + lengths)
    numbers = np.concatenate([np.arange(*pair) for pair in zip(first, last, strict=True)])
    return offsets[numbers], offsets[numbers + 1] - offsets[numbers], np.repeat(examples, last - first)


def _per_example(values: ArrayLike, name: str, corpus: Corpus) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.shape != (len(corpus),):
        shape = list(array.shape)
        raise ValueError(f"{name} must be one per example: shape {shape} for {len(corpus)} examples")
    return array
