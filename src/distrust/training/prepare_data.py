"""Prepares the data of a run before its first step: tokenizes, weighs and orders it."""

from __future__ import annotations

import math
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
    Limits,
    MicroBatch,
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
from distrust.errors import ConfigError, DataError, warn
from distrust.option_values import STEP_METRICS, WEIGHT_METRICS
from distrust.training.data_sources import (
    Sources,
    limits_of,
    today_of,
    warn_of_missing_classes,
    warn_of_unended_turns,
    warn_of_unmeasured_classes,
)
from distrust.training.evaluation import EvaluationSet, evaluation_set, example_weights, is_weighted
from distrust.training.schedule import learning_rate_of, warmup

#: Warn if the effective sample size is below this share of the examples.
LOW_EFFECTIVE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a run, and the options that depend on it."""

    config: TrainConfig  # with all options resolved
    max_steps: int  # optimizer steps of the whole run
    schedule_steps: int  # steps after which the learning rate's schedule has ended
    corpus: Corpus
    weights: np.ndarray[Any, Any]  # float64[examples], normalized; tokens may have a factor of their own
    distribution: Distribution  # of the weights
    batches: Batches  # step -> its micro-batches
    evaluation: EvaluationSet | None

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises to its peak."""
        config = self.config
        return warmup(config.warmup_steps, config.warmup_ratio, schedule_steps=self.schedule_steps)

    def learning_rate(self, step: int) -> float:
        """The learning rate of an optimizer step, counted from 1."""
        return learning_rate_of(self.config, step, schedule_steps=self.schedule_steps)

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """Metrics of a step that are logged."""
        weighted = is_weighted(self.corpus, self.config)
        return tuple(name for name in STEP_METRICS if weighted or name not in WEIGHT_METRICS)

    @property
    def measured_on(self) -> str:
        """Fingerprint of the evaluation data, if the best checkpoint is chosen by it; otherwise empty."""
        if self.evaluation is None or self.config.metric in STEP_METRICS:
            return ""
        return self.evaluation.corpus.fingerprint

    def locations(self, batches: Sequence[MicroBatch]) -> list[str]:
        """File and line of each example of these batches."""
        locations = self.corpus.locations
        return [str(locations[example]) for batch in batches for example in batch.examples]


def prepare_data(
    config: TrainConfig, sources: Sources, tokenizer: Tokenizer, *, context_length: int | None
) -> PreparedData:
    """Tokenize, weigh and order the data; options that depend on it and are None are resolved."""
    limits = limits_of(config, context_length)
    max_length = limits.max_length
    corpus, eval_corpus = _tokenize(config, sources, tokenizer, limits=limits)
    rows = _rows(config, corpus, capacity=max_length)  # by source
    sampler, sample_counts = _sampler(config, rows, corpus)
    weights, mean_weights = _weights(config, corpus, sample_counts)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weighting.distrust_term(
            corpus.authority_weight, corpus.provenance_entropy, alpha=config.alpha
        ),
        sampler=sampler,
        rows=concatenate(rows),
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
    )
    # Rounded up: the last step may begin another epoch.
    max_steps = config.max_steps or math.ceil(config.epochs * batches.epoch_steps)
    schedule_steps = config.schedule_steps or max_steps  # saved: a longer resume does not stretch it
    resolved = replace(config, max_length=max_length, max_steps=max_steps, schedule_steps=schedule_steps)
    evaluation = None if eval_corpus is None else evaluation_set(eval_corpus, resolved)
    prepared = PreparedData(
        config=resolved,
        max_steps=max_steps,
        schedule_steps=schedule_steps,
        corpus=corpus,
        weights=weights,
        distribution=summarize_weights(
            authority_weight=corpus.authority_weight,
            provenance_entropy=corpus.provenance_entropy,
            weights=mean_weights,
            tokens=corpus.loss_tokens,
            classes=corpus.classes,
            class_of=corpus.class_numbers,
            locations=corpus.locations,
            effective_examples=_effective_examples(mean_weights, sample_counts),
        ),
        batches=batches,
        evaluation=evaluation,
    )
    _require_metric(prepared)
    return prepared


def _tokenize(
    config: TrainConfig, sources: Sources, tokenizer: Tokenizer, *, limits: Limits
) -> tuple[Corpus, Corpus | None]:
    """The training corpus, and the evaluation corpus if there is one."""
    digest = digest_tokenizer(tokenizer)  # computed once: it takes a while
    corpora = [
        data.tokenize(tokenizer, tokenizer_digest=digest, limits=limits, today=today_of(config))
        for data in (sources.training, sources.evaluation)
        if data is not None
    ]
    warn_of_missing_classes(config, corpora)
    if sources.training.stats.conversations:
        warn_of_unended_turns(tokenizer)
    corpus, *evaluated = corpora
    eval_corpus = evaluated[0] if evaluated else None
    if config.eval_fraction:
        # By the seed alone, so a resume holds out the same examples.
        corpus, eval_corpus = split_off(corpus, config.eval_fraction, seed=config.seed)
    if eval_corpus is not None:
        warn_of_unmeasured_classes(config, corpus, eval_corpus)
    return corpus, eval_corpus


def _require_metric(data: PreparedData) -> None:
    """The metric of the best checkpoint must be logged; the default one is ignored without an eval set."""
    config, evaluation = data.config, data.evaluation
    logged = data.step_metrics + (() if evaluation is None else evaluation.metric_names)
    if config.metric in logged or (evaluation is None and config.metric == TrainConfig.metric):
        return
    problem = "there is nothing to evaluate on; give --eval-data, or --eval-fraction"
    if evaluation is not None:
        problem = f"this run has no such metric; its metrics are {', '.join(logged)}"
    raise ConfigError(f"--metric {config.metric}: {problem}")


def _sampler(
    config: TrainConfig, rows: Sequence[PackedRows], corpus: Corpus
) -> tuple[EpochSampler | MixtureSampler, np.ndarray[Any, Any] | None]:
    """The sampler, and float64[n]: how often an epoch samples each example on average; None if each once."""
    sizes = [len(part) for part in rows]
    if config.mix is None:
        return EpochSampler(sum(sizes), seed=config.seed), None
    sampler = MixtureSampler(sizes, shares=config.mix, seed=config.seed)
    return sampler, np.repeat(np.divide(sampler.counts, sizes), corpus.sizes)


def _rows(config: TrainConfig, corpus: Corpus, *, capacity: int) -> list[PackedRows]:
    """The rows of each source, because a mixture samples each source separately."""
    ends = np.cumsum(corpus.sizes or (len(corpus),))  # examples are stored source by source
    parts = np.split(np.arange(len(corpus), dtype=np.int64), ends[:-1])
    if not config.packing:
        return [one_per_row(examples) for examples in parts]
    return [
        # An example of several sequences may be longer than a row; it has one of its own.
        pack(examples, np.minimum(corpus.lengths[examples], capacity), capacity=capacity, seed=config.seed)
        for examples in parts
    ]


def _weights(
    config: TrainConfig, corpus: Corpus, sample_counts: np.ndarray[Any, Any] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The factor of each example's token weights, and the mean weight of its tokens: both float64[n]."""
    # The mean weight over all trained tokens is 1, so weighting does not change the effective learning rate.
    times = 1 if sample_counts is None else sample_counts
    weights = weighting.normalize(
        example_weights(corpus, config),
        tokens=corpus.loss_tokens * times,
        token_weights=corpus.loss_weights * times,
        locations=corpus.locations,
    )
    mean_weights = weights * (corpus.loss_weights / corpus.loss_tokens)
    zero_weight = np.flatnonzero(mean_weights.astype(np.float32) == 0)  # tokens carry theirs in float32
    if len(zero_weight):
        raise DataError(
            f"{corpus.locations[zero_weight[0]]}: its weight is zero compared with the heaviest example, as "
            f"for {len(zero_weight)} examples; check for a weight or provenance_entropy that is too large, "
            "or give --max-ratio"
        )
    return weights, mean_weights


def _effective_examples(weights: np.ndarray[Any, Any], sample_counts: np.ndarray[Any, Any] | None) -> float:
    """Effective sample size; an example that is sampled more often counts for more."""
    sampled = weights if sample_counts is None else (weights * sample_counts)[sample_counts > 0]
    effective = weighting.effective_sample_size(sampled)
    if effective < LOW_EFFECTIVE_SHARE * len(weights):
        warn(
            f"the effective sample size of {len(weights)} examples is {effective:.0f}: a few of them "
            "dominate the run. Bound the weights with --max-ratio, or give a less uneven --mix"
        )
    return effective
