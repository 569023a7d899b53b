"""What a run works on: the data read, weighed and put in order, before the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distrust import weighting
from distrust.bundled import CORPUS
from distrust.config import BUNDLED, TrainConfig
from distrust.data import (
    Batches,
    Corpus,
    Order,
    Record,
    Sequences,
    Tokenizer,
    packed,
    read_records,
    single,
    tokenize,
)
from distrust.errors import ConfigError, DataError, DistrustWarning

DEFAULT_MAX_LENGTH = 1024
#: Below this share of the examples, few of them decide everything.
LOW_EFFECTIVE_SHARE = 0.1

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """The data of a run.

    Attributes:
        config: with nothing left open.
        max_steps: optimizer steps of the whole run.
        schedule_steps: after which the learning rate's schedule has ended.
        corpus: the tokenized examples.
        weights: float64[examples]: normalized.
        batches: the batches of each step.
        evaluation: the tokenized eval set, or None.
        pad_token_id: what batches are padded with.
    """

    config: TrainConfig
    max_steps: int
    schedule_steps: int
    corpus: Corpus
    weights: np.ndarray[Any, Any]
    batches: Batches
    evaluation: Corpus | None
    pad_token_id: int


@dataclass(frozen=True, slots=True)
class Sources:
    """The records of a run, read and checked before anything slow is loaded.

    Attributes:
        training: to train on.
        evaluation: to evaluate on, or None.
    """

    training: list[Record]
    evaluation: list[Record] | None


def read_sources(config: TrainConfig) -> Sources:
    """Read what a config names.

    Raises:
        DataError: for records that cannot be trained on.
    """
    training = read_records(
        _path(config.data),
        default_authority_weight=config.default_authority_weight,
        default_provenance_entropy=config.default_provenance_entropy,
    )
    if config.eval_data is None:
        return Sources(training, None)
    # Plain cross-entropy asks for no provenance: an eval set may go without.
    evaluation = read_records(
        _path(config.eval_data), default_authority_weight=0.0, default_provenance_entropy=0.0
    )
    return Sources(training, evaluation)


def make_plan(
    config: TrainConfig,
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    context_length: int | None,
    report: Progress,
) -> Plan:
    """Tokenize, weigh and order the data.

    Args:
        config: options left open (None) are settled here.
        sources: the records.
        tokenizer: of the base model.
        context_length: the model's, if it says.
        report: called with what is done, how far it is, and how far it goes.

    Raises:
        DataError: for records that cannot be trained on.
        ConfigError: for options that do not fit the model.
    """
    max_length = _max_length(config, context_length)

    def tokenized(records: list[Record], name: str) -> Corpus:
        return tokenize(
            records,
            tokenizer,
            max_length=max_length,
            on_progress=lambda done, total: report(f"tokenizing {name}", done, total),
        )

    corpus = tokenized(sources.training, config.data)
    weights = _weights(config, corpus)
    sequences = _sequences(config, corpus, capacity=max_length)
    pad_token_id = _pad_token_id(tokenizer)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weighting.distrust_term(
            corpus.authority_weight, corpus.provenance_entropy, alpha=config.alpha
        ),
        order=Order(len(sequences), seed=config.seed),
        sequences=sequences,
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        pad_token_id=pad_token_id,
    )
    max_steps = config.max_steps or math.ceil(config.epochs * batches.epoch_steps)
    evaluation = None
    if sources.evaluation is not None:
        evaluation = tokenized(sources.evaluation, str(config.eval_data))
    schedule_steps = config.schedule_steps or max_steps
    settled = replace(config, max_length=max_length, max_steps=max_steps, schedule_steps=schedule_steps)
    return Plan(settled, max_steps, schedule_steps, corpus, weights, batches, evaluation, pad_token_id)


def _max_length(config: TrainConfig, context_length: int | None) -> int:
    if config.max_length is None:
        return min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
    if context_length is not None and config.max_length > context_length:
        raise ConfigError(
            f"--max-length {config.max_length}: the model sees {context_length} tokens at once; "
            f"give {context_length} or less"
        )
    return config.max_length


def _pad_token_id(tokenizer: Tokenizer) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0  # padding is masked: any token serves


def _sequences(config: TrainConfig, corpus: Corpus, *, capacity: int) -> Sequences:
    examples = np.arange(len(corpus), dtype=np.int64)
    if not config.packing:
        return single(examples)
    return packed(examples, corpus.lengths, capacity=capacity, seed=config.seed)


def _path(source: str) -> Path:
    return CORPUS if source == BUNDLED else Path(source)


def _weights(config: TrainConfig, corpus: Corpus) -> np.ndarray[Any, Any]:
    raw = weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        weighting=config.weighting,
        alpha=config.alpha,
        lambda_=config.lambda_,
        max_ratio=config.max_ratio,
    )
    effective = weighting.effective_sample_size(raw)
    if effective < LOW_EFFECTIVE_SHARE * len(corpus):
        warnings.warn(
            f"{len(corpus)} examples weigh as much as {effective:.0f} equal ones: a few of them decide "
            "the run; --max-ratio bounds how much one can outweigh another",
            DistrustWarning,
            stacklevel=2,
        )
    weights = weighting.normalize(raw, tokens=corpus.loss_tokens)
    vanished = np.flatnonzero(weights.astype(np.float32) == 0)
    if len(vanished):  # tokens carry their weight in float32
        raise DataError(
            f"{corpus.locations[vanished[0]]}: weighs nothing beside the heaviest example, one of "
            f"{len(vanished)} that do; look for a provenance_entropy that is too large, or give --max-ratio"
        )
    return weights
