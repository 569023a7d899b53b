"""Evaluation data and its metrics: plain and weighted cross-entropy and perplexity, also for each class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from distrust import weighting
from distrust.config import TrainConfig
from distrust.contract import Engine, Losses
from distrust.data import NO_CLASS, Corpus, MicroBatch, digest_tokenizer, evaluation_batches, split_off
from distrust.errors import DataError
from distrust.ranks import SINGLE, Ranks
from distrust.training.data_sources import (
    CheckedData,
    limits_of,
    today_of,
    warn_of_missing_classes,
)

#: This many source classes get metrics of their own: those with the most trained tokens.
CLASSES_MEASURED = 20


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Examples that are evaluated, and not trained on."""

    corpus: Corpus
    weights: np.ndarray[Any, Any]  # float64[n], by provenance, with mean 1 over the trained tokens
    weighted: bool = True  # whether there are weighted metrics

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that :meth:`measure` returns."""
        zeros = np.zeros(len(self.corpus))
        return tuple(self._metrics(zeros, zeros))

    def measure(
        self, evaluate: Callable[[MicroBatch], Losses], batch_size: int, *, ranks: Ranks = SINGLE
    ) -> dict[str, float]:
        """Evaluate every example once.

        Args:
            evaluate: the losses of a batch.
            batch_size: examples per batch.
            ranks: the processes that share the work; each returns the same numbers as one process.

        Returns:
            ``eval_loss`` in nats per token and ``eval_perplexity``; if examples are weighted, also
            ``eval_weighted_loss`` and ``eval_weighted_perplexity``; if there are several source classes, also
            ``eval_loss/CLASS`` and ``eval_perplexity/CLASS`` of the largest ones.
        """
        batches = iter(evaluation_batches(self.corpus, batch_size=batch_size))
        cross_entropy, weighted = np.zeros(len(self.corpus)), np.zeros(len(self.corpus))
        while turn := list(islice(batches, ranks.count)):  # a batch for each rank
            # A sharded model needs passes on all ranks: the last batch may be repeated.
            losses = evaluate(turn[min(ranks.index, len(turn) - 1)])
            rows = np.zeros((2, max(len(batch.examples) for batch in turn)))
            rows[:, : len(losses.weighted)] = losses.cross_entropy, losses.weighted
            for batch, sums in zip(turn, ranks.gather(rows), strict=False):
                # An example may be several sequences.
                np.add.at(cross_entropy, batch.examples, sums[0, : len(batch.examples)])
                np.add.at(weighted, batch.examples, sums[1, : len(batch.examples)])
        return self._metrics(cross_entropy, weighted)

    def _metrics(
        self, cross_entropy: np.ndarray[Any, Any], weighted: np.ndarray[Any, Any]
    ) -> dict[str, float]:
        """The metrics from float64[n], the losses of each example; ``weighted`` only by its token weights."""
        tokens = self.corpus.loss_tokens
        losses = {"eval_loss": cross_entropy.sum() / tokens.sum()}
        if self.weighted:
            losses["eval_weighted_loss"] = (self.weights * weighted).sum() / tokens.sum()
        for name, number in self._measured_classes():
            of_class = self.corpus.class_numbers == number
            # Per token, not per example: the losses of all classes average to eval_loss.
            losses[f"eval_loss/{name}"] = cross_entropy[of_class].sum() / tokens[of_class].sum()
        metrics = {name: float(loss) for name, loss in losses.items()}
        return metrics | {name.replace("loss", "perplexity", 1): _exp(loss) for name, loss in metrics.items()}

    def _measured_classes(self) -> list[tuple[str, int]]:
        """Name and number of the classes with metrics of their own; empty if there is only one class."""
        corpus = self.corpus
        tokens = np.bincount(corpus.class_numbers, corpus.loss_tokens, minlength=len(corpus.classes))
        largest = [number for number in np.argsort(-tokens, kind="stable") if tokens[number] > 0]
        if len(largest) < 2:  # it would equal the overall loss
            return []
        return [(corpus.classes[number] or NO_CLASS, int(number)) for number in largest[:CLASSES_MEASURED]]


def evaluation_set(corpus: Corpus, config: TrainConfig) -> EvaluationSet:
    """The evaluation set of a corpus, weighted by the options of the run."""
    weights = weighting.normalize(
        example_weights(corpus, config),
        tokens=corpus.loss_tokens,
        token_weights=corpus.loss_weights,
        locations=corpus.locations,
    )
    return EvaluationSet(corpus, weights, is_weighted(corpus, config))


def is_weighted(corpus: Corpus, config: TrainConfig) -> bool:
    """Whether weights are worth showing: without weighting all are 1, unless tokens have their own."""
    return config.weighting != "off" or corpus.token_weights is not None


def example_weights(corpus: Corpus, config: TrainConfig) -> np.ndarray[Any, Any]:
    """float64[n]: the weight of each example by its provenance, not normalized."""
    return weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        # Evaluation data need not state provenance: without it, all of these give equal weights.
        weighting="monotone" if config.weighting == "auto" else config.weighting,
        alpha=config.alpha,
        lambda_=config.lambda_,
        max_ratio=config.max_ratio,
        locations=corpus.locations,
    )


def evaluate(engine: Engine, data: CheckedData, config: TrainConfig, *, trained_on: str) -> dict[str, float]:
    """The metrics of a model on data: those of ``Evaluated.metrics``, and the size of the data.

    Args:
        engine: holds the model.
        data: returned by :func:`read_evaluation`.
        config: of the run; uses ``max_length``, ``batch_size``, the weighting and ``eval_fraction``.
        trained_on: fingerprint of the run's training data; checked if ``eval_fraction`` is used.

    Returns:
        ``examples`` and trained ``tokens``, and those of :meth:`EvaluationSet.measure`.

    Raises:
        DataError: records cannot be evaluated on, or are not those that ``eval_fraction`` was split from.
    """
    corpus = data.tokenize(
        engine.tokenizer,
        tokenizer_digest=digest_tokenizer(engine.tokenizer),
        limits=limits_of(config, engine.context_length),
        today=today_of(config),
    )
    if config.eval_fraction:
        training, corpus = split_off(corpus, config.eval_fraction, seed=config.seed)
        if training.fingerprint != trained_on:
            raise DataError(
                f"{data.reader.name}: not the data that the run was trained on, so the examples "
                "that it held out are not known; name the evaluation data with --data"
            )
    warn_of_missing_classes(config, [corpus])
    evaluated = 0

    def losses(batch: MicroBatch) -> Losses:
        nonlocal evaluated
        evaluated += len(np.unique(batch.examples))
        data.report("evaluating", evaluated, len(corpus))
        return engine.evaluate(batch)

    metrics = evaluation_set(corpus, config).measure(losses, batch_size=config.batch_size)
    return {"examples": len(corpus), "tokens": int(corpus.loss_tokens.sum()), **metrics}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # above a loss of about 709
        return math.inf
