"""What a run works on: its data weighed and put in order, before the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distrust import weighting
from distrust.config import TrainConfig
from distrust.data import (
    Batches,
    Corpus,
    Distribution,
    EpochSampler,
    MixtureSampler,
    PackedRows,
    Tokenizer,
    concatenate,
    digest_tokenizer,
    one_per_row,
    pack,
    split_off,
    summarize_weights,
)
from distrust.errors import DataError, DistrustWarning
from distrust.training.data_sources import (
    CheckedData,
    Progress,
    Sources,
    max_length_of,
    pad_token_id_of,
    tokenize_cached,
    warn_of_unmeasured_classes,
    warn_where_no_class,
)
from distrust.training.evaluation_set import EvaluationSet, evaluation_set

#: Below this share of the examples, few of them decide everything.
LOW_EFFECTIVE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a run.

    Attributes:
        config: with nothing left open.
        max_steps: optimizer steps of the whole run.
        schedule_steps: after which the learning rate's schedule has ended.
        corpus: the tokenized examples.
        weights: float64[examples]: normalized.
        distribution: of these weights.
        batches: the batches of each step.
        evaluation: what is evaluated on, or None.
        pad_token_id: what batches are padded with.
    """

    config: TrainConfig
    max_steps: int
    schedule_steps: int
    corpus: Corpus
    weights: np.ndarray[Any, Any]
    distribution: Distribution
    batches: Batches
    evaluation: EvaluationSet | None
    pad_token_id: int


def prepare_data(
    config: TrainConfig,
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    context_length: int | None,
    report: Progress,
) -> PreparedData:
    """Tokenize, weigh and order the data.

    Args:
        config: options left open (None) are settled here.
        sources: the data, checked.
        tokenizer: of the base model.
        context_length: the model's, if it says.
        report: called with what is done, how far it is, and how far it goes.

    Raises:
        DataError: for records that cannot be trained on.
        ConfigError: for options that do not fit the model.
    """
    max_length = max_length_of(config, context_length)
    tokenizer_digest = digest_tokenizer(tokenizer)  # once: it takes a while

    def made(data: CheckedData) -> Corpus:
        return tokenize_cached(
            data,
            tokenizer,
            tokenizer_digest=tokenizer_digest,
            cache=sources.cache,
            max_length=max_length,
            report=report,
        )

    corpus = made(sources.training)
    evaluation = None if sources.evaluation is None else made(sources.evaluation)
    warn_where_no_class(config, [corpus] if evaluation is None else [corpus, evaluation])
    if config.eval_fraction:
        corpus, evaluation = split_off(corpus, config.eval_fraction, seed=config.seed)
    if evaluation is not None:
        warn_of_unmeasured_classes(config, corpus, evaluation)
    rows = _rows(config, corpus, capacity=max_length)
    order = _sampler(config, [len(part) for part in rows])
    drawn = _sample_counts(order, rows, corpus)
    weights = _weights(config, corpus, drawn)
    pad_token_id = pad_token_id_of(tokenizer)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weighting.distrust_term(
            corpus.authority_weight, corpus.provenance_entropy, alpha=config.alpha
        ),
        sampler=order,
        rows=concatenate(rows),
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        pad_token_id=pad_token_id,
    )
    max_steps = config.max_steps or math.ceil(config.epochs * batches.epoch_steps)
    schedule_steps = config.schedule_steps or max_steps
    settled = replace(config, max_length=max_length, max_steps=max_steps, schedule_steps=schedule_steps)
    return PreparedData(
        config=settled,
        max_steps=max_steps,
        schedule_steps=schedule_steps,
        corpus=corpus,
        weights=weights,
        distribution=_distribution(corpus, weights, drawn),
        batches=batches,
        evaluation=None if evaluation is None else evaluation_set(evaluation, settled),
        pad_token_id=pad_token_id,
    )


def _sampler(config: TrainConfig, sizes: Sequence[int]) -> EpochSampler | MixtureSampler:
    """The order of the sequences, of which each source has so many."""
    if config.mix is None:
        return EpochSampler(sum(sizes), seed=config.seed)
    return MixtureSampler(sizes, shares=config.mix, seed=config.seed)


def _sample_counts(
    order: EpochSampler | MixtureSampler, rows: Sequence[PackedRows], corpus: Corpus
) -> np.ndarray[Any, Any] | None:
    """float64[n], how often each example is drawn in an epoch, on average; None where each is once."""
    if isinstance(order, EpochSampler):
        return None
    return np.repeat(np.divide(order.counts, [len(part) for part in rows]), corpus.sizes)


def _rows(config: TrainConfig, corpus: Corpus, *, capacity: int) -> list[PackedRows]:
    """The rows of each source: with mixing weights, each is drawn from by itself."""
    ends = np.cumsum(corpus.sizes or (len(corpus),))
    parts = np.split(np.arange(len(corpus), dtype=np.int64), ends[:-1])
    if not config.packing:
        return [one_per_row(examples) for examples in parts]
    return [
        pack(examples, corpus.lengths[examples], capacity=capacity, seed=config.seed) for examples in parts
    ]


def _weights(config: TrainConfig, corpus: Corpus, drawn: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    raw = weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        weighting=config.weighting,
        alpha=config.alpha,
        lambda_=config.lambda_,
        max_ratio=config.max_ratio,
        locations=corpus.locations,
    )
    tokens = corpus.loss_tokens if drawn is None else corpus.loss_tokens * drawn
    weights = weighting.normalize(raw, tokens=tokens)
    vanished = np.flatnonzero(weights.astype(np.float32) == 0)
    if len(vanished):  # tokens carry their weight in float32
        raise DataError(
            f"{corpus.locations[vanished[0]]}: weighs nothing beside the heaviest example, one of "
            f"{len(vanished)} that do; look for a provenance_entropy that is too large, or give --max-ratio"
        )
    return weights


def _distribution(
    corpus: Corpus, weights: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any] | None
) -> Distribution:
    return summarize_weights(
        authority_weight=corpus.authority_weight,
        provenance_entropy=corpus.provenance_entropy,
        weights=weights,
        tokens=corpus.loss_tokens,
        classes=corpus.classes,
        class_of=corpus.class_numbers,
        locations=corpus.locations,
        effective_examples=_effective_examples(weights, drawn),
    )


def _effective_examples(weights: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any] | None) -> float:
    """How many equal examples these are worth; one that is drawn more often counts for more."""
    taken = weights if drawn is None else (weights * drawn)[drawn > 0]
    effective = weighting.effective_sample_size(taken)
    if effective < LOW_EFFECTIVE_SHARE * len(weights):
        warnings.warn(
            f"{len(weights)} examples weigh as much as {effective:.0f} equal "
            f"{'one' if round(effective) == 1 else 'ones'}: a few of them decide "
            "the run; --max-ratio, or a --mix that is less uneven, bounds how much one can outweigh another",
            DistrustWarning,
            stacklevel=2,
        )
    return effective
