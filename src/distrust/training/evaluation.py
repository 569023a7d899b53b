"""Evaluation data and its metrics: plain and weighted cross-entropy and perplexity, also for each class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrust import weighting
from distrust.config import TrainConfig
from distrust.contract import Engine
from distrust.data import NO_CLASS, Corpus, MicroBatch, digest_tokenizer, evaluation_batches, split_off
from distrust.errors import DataError
from distrust.training.data_sources import (
    CheckedData,
    max_length_of,
    pad_token_id_of,
    warn_of_missing_classes,
)

#: This many source classes get metrics of their own: those with the most trained tokens.
CLASSES_MEASURED = 20


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Examples that are evaluated, and not trained on."""

    corpus: Corpus
    weights: np.ndarray[Any, Any]  # float64[n], by provenance, with mean 1 over the trained tokens

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that :meth:`measure` returns."""
        return tuple(self._metrics(np.zeros(len(self.corpus))))

    def measure(
        self, evaluate: Callable[[MicroBatch], Any], *, batch_size: int, pad_token_id: int
    ) -> dict[str, float]:
        """Evaluate every example once.

        Args:
            evaluate: returns float64[batch]: for each example, the sum of its tokens' cross-entropy in nats.
            batch_size: examples per batch.
            pad_token_id: token that batches are padded with.

        Returns:
            ``eval_loss`` and ``eval_weighted_loss`` in nats per token, ``eval_perplexity`` and
            ``eval_weighted_perplexity``; if there are several source classes, also ``eval_loss/CLASS`` and
            ``eval_perplexity/CLASS`` of the largest ones.
        """
        batches = evaluation_batches(self.corpus, batch_size=batch_size, pad_token_id=pad_token_id)
        return self._metrics(np.concatenate([evaluate(batch) for batch in batches]))

    def _metrics(self, cross_entropy: np.ndarray[Any, Any]) -> dict[str, float]:
        tokens = self.corpus.loss_tokens
        losses = {
            "eval_loss": cross_entropy.sum() / tokens.sum(),
            "eval_weighted_loss": (self.weights * cross_entropy).sum() / tokens.sum(),
        }
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
    weights = weighting.normalize(example_weights(corpus, config), tokens=corpus.loss_tokens)
    return EvaluationSet(corpus, weights)


def example_weights(corpus: Corpus, config: TrainConfig) -> np.ndarray[Any, Any]:
    """float64[n]: the weight of each example by its provenance, not normalized."""
    return weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        weighting=config.weighting,
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
        ``examples`` and trained ``tokens``; ``eval_loss`` and ``eval_weighted_loss`` in nats per token,
        perplexities, and the same for each source class.

    Raises:
        DataError: records cannot be evaluated on, or are not those that ``eval_fraction`` was split from.
    """
    corpus = data.tokenize(
        engine.tokenizer,
        tokenizer_digest=digest_tokenizer(engine.tokenizer),
        max_length=max_length_of(config, engine.context_length),
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

    def cross_entropy(batch: MicroBatch) -> np.ndarray[Any, Any]:
        nonlocal evaluated
        losses = engine.evaluate(batch).cross_entropy
        evaluated += len(losses)
        data.report("evaluating", evaluated, len(corpus))
        return losses

    metrics = evaluation_set(corpus, config).measure(
        cross_entropy, batch_size=config.batch_size, pad_token_id=pad_token_id_of(engine.tokenizer)
    )
    return {"examples": len(corpus), "tokens": int(corpus.loss_tokens.sum()), **metrics}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # above a loss of about 709
        return math.inf
