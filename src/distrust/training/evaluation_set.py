"""What a run is evaluated on, and what an evaluation comes to: by plain and by weighted cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrust import weighting
from distrust.config import TrainConfig
from distrust.data import NO_CLASS, Corpus, MicroBatch, evaluation_batches

#: Source classes that have metrics of their own: those with the most learned tokens.
CLASSES_MEASURED = 20


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Examples that are not trained on.

    Attributes:
        corpus: the examples, tokenized.
        weights: float64[n], the weight of each by its provenance, of mean 1 over the learned tokens; 1 where
            the data says nothing of it.
    """

    corpus: Corpus
    weights: np.ndarray[Any, Any]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What :meth:`measure` gives."""
        return tuple(self._metrics(np.zeros(len(self.corpus))))

    def measure(
        self, evaluate: Callable[[MicroBatch], Any], *, batch_size: int, pad_token_id: int
    ) -> dict[str, float]:
        """Evaluate every example once.

        Args:
            evaluate: gives float64[batch], of each example the sum of its tokens' cross-entropy in nats.
            batch_size: examples of a batch.
            pad_token_id: what batches are padded with.

        Returns:
            ``eval_loss`` and ``eval_weighted_loss`` in nats a token, ``eval_perplexity`` and
            ``eval_weighted_perplexity``; where there are several source classes, ``eval_loss/CLASS`` and
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
        for name, number in self._classes_measured():
            of_class = self.corpus.class_numbers == number
            losses[f"eval_loss/{name}"] = cross_entropy[of_class].sum() / tokens[of_class].sum()
        metrics = {name: float(loss) for name, loss in losses.items()}
        return metrics | {name.replace("loss", "perplexity", 1): _exp(loss) for name, loss in metrics.items()}

    def _classes_measured(self) -> list[tuple[str, int]]:
        """Name and number of the classes that have metrics of their own; none, where all are of one."""
        corpus = self.corpus
        tokens = np.bincount(corpus.class_numbers, corpus.loss_tokens, minlength=len(corpus.classes))
        largest = [number for number in np.argsort(-tokens, kind="stable") if tokens[number] > 0]
        if len(largest) < 2:
            return []
        return [(corpus.classes[number] or NO_CLASS, int(number)) for number in largest[:CLASSES_MEASURED]]


def evaluation_set(corpus: Corpus, config: TrainConfig) -> EvaluationSet:
    """The examples with their weights by the options of a run."""
    raw = weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        weighting=config.weighting,
        alpha=config.alpha,
        lambda_=config.lambda_,
        max_ratio=config.max_ratio,
        locations=corpus.locations,
    )
    return EvaluationSet(corpus, weighting.normalize(raw, tokens=corpus.loss_tokens))


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
