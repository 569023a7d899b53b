"""What a trained model makes of other data: its losses there, measured as those of a run's eval set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distrust.config import TrainConfig
from distrust.data import MicroBatch, digest_tokenizer, split_off
from distrust.errors import DataError
from distrust.training.data_sources import (
    Progress,
    max_length_of,
    pad_token_id_of,
    read_evaluation,
    read_sources,
    tokenize_cached,
    warn_where_no_class,
)
from distrust.training.evaluation_set import evaluation_set

if TYPE_CHECKING:
    import numpy as np

    from distrust.contract import Engine
    from distrust.training.data_sources import Sources


def read(config: TrainConfig, *, report: Progress) -> Sources:
    """Open and check what a config evaluates on, before a model is loaded.

    Args:
        config: names ``eval_data`` or ``eval_split``; with an ``eval_fraction``, ``data`` to split it off.
        report: called with what is done, how far it is, and 0.

    Raises:
        DataError: for records that cannot be evaluated on.
        ConfigError: for options that do not fit them.
    """
    return (
        read_sources(config, report=report)
        if config.eval_fraction
        else read_evaluation(config, report=report)
    )


def evaluate(
    engine: Engine, sources: Sources, config: TrainConfig, *, trained_on: str, report: Progress
) -> dict[str, float]:
    """The metrics of a model on data: those of ``Evaluated.metrics``, and how much there was.

    Args:
        engine: with the model.
        sources: what :func:`read` has read.
        config: of the run; its ``max_length``, ``batch_size``, weighting and ``eval_fraction`` count.
        trained_on: the fingerprint of the run's training data: what it kept out is known from the same only.
        report: called with what is done, how far it is, and how far it goes.

    Returns:
        ``examples`` and learned ``tokens``; ``eval_loss``, ``eval_weighted_loss`` in nats a token,
        perplexities, and those of each source class.

    Raises:
        DataError: for records that cannot be evaluated on, or that are not what ``eval_fraction`` is of.
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
                f"{sources.training.reading.name}: not the data that the run was trained on, so what it kept "
                "out is not known; name what to evaluate on with --data"
            )
    warn_where_no_class(config, [corpus])
    done = 0

    def losses(batch: MicroBatch) -> np.ndarray[Any, Any]:
        nonlocal done
        found = engine.evaluate(batch).cross_entropy
        done += len(found)
        report("evaluating", done, len(corpus))
        return found

    metrics = evaluation_set(corpus, config).measure(
        losses, batch_size=config.batch_size, pad_token_id=pad_token_id_of(engine.tokenizer)
    )
    return {"examples": len(corpus), "tokens": int(corpus.loss_tokens.sum()), **metrics}
