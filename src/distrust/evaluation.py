"""Evaluates a trained model on other data, with the metrics of a run's evaluation set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distrust.config import TrainConfig
from distrust.data import MicroBatch, digest_tokenizer, split_off
from distrust.errors import DataError
from distrust.training.data_sources import (
    ReportProgress,
    max_length_of,
    pad_token_id_of,
    read_evaluation,
    read_sources,
    tokenize_cached,
    warn_of_missing_classes,
)
from distrust.training.evaluation_set import evaluation_set

if TYPE_CHECKING:
    import numpy as np

    from distrust.contract import Engine
    from distrust.training.data_sources import Sources


def read(config: TrainConfig, *, report: ReportProgress) -> Sources:
    """Open and check the evaluation data of a config, before a model is loaded.

    Args:
        config: names ``eval_data`` or ``eval_split``; with ``eval_fraction``, the ``data`` to split it from.
        report: called from time to time with the task, the completed parts, and 0.

    Raises:
        DataError: records cannot be evaluated on.
        ConfigError: options do not fit the data.
    """
    if config.eval_fraction:
        return read_sources(config, report=report)
    return read_evaluation(config, report=report)


def evaluate(
    engine: Engine, sources: Sources, config: TrainConfig, *, trained_on: str, report: ReportProgress
) -> dict[str, float]:
    """The metrics of a model on data: those of ``Evaluated.metrics``, and the size of the data.

    Args:
        engine: holds the model.
        sources: returned by :func:`read`.
        config: of the run; uses ``max_length``, ``batch_size``, the weighting and ``eval_fraction``.
        trained_on: fingerprint of the run's training data; checked if ``eval_fraction`` is used.
        report: called with the task, the completed parts and their total.

    Returns:
        ``examples`` and trained ``tokens``; ``eval_loss`` and ``eval_weighted_loss`` in nats per token,
        perplexities, and the same for each source class.

    Raises:
        DataError: records cannot be evaluated on, or are not those that ``eval_fraction`` was split from.
    """
    corpus = tokenize_cached(
        sources.training,
        engine.tokenizer,
        tokenizer_digest=digest_tokenizer(engine.tokenizer),
        cache=sources.cache,
        max_length=max_length_of(config, engine.context_length),
        report=report,
    )
    if config.eval_fraction:
        training, corpus = split_off(corpus, config.eval_fraction, seed=config.seed)
        if training.fingerprint != trained_on:
            raise DataError(
                f"{sources.training.reader.name}: not the data that the run was trained on, so the examples "
                "that it held out are not known; name the evaluation data with --data"
            )
    warn_of_missing_classes(config, [corpus])
    evaluated = 0

    def cross_entropy(batch: MicroBatch) -> np.ndarray[Any, Any]:
        nonlocal evaluated
        losses = engine.evaluate(batch).cross_entropy
        evaluated += len(losses)
        report("evaluating", evaluated, len(corpus))
        return losses

    metrics = evaluation_set(corpus, config).measure(
        cross_entropy, batch_size=config.batch_size, pad_token_id=pad_token_id_of(engine.tokenizer)
    )
    return {"examples": len(corpus), "tokens": int(corpus.loss_tokens.sum()), **metrics}
