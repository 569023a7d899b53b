"""What a trained model makes of other data: its losses there, measured as those of a run's eval set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distrust.config import TrainConfig
from distrust.data import MicroBatch, digest_of
from distrust.training.evaluation_set import evaluation_set
from distrust.training.sources import (
    Progress,
    max_length_of,
    pad_token_id_of,
    read_evaluation,
    tokenized,
    warn_where_no_class,
)

if TYPE_CHECKING:
    import numpy as np

    from distrust.training.engine import Engine
    from distrust.training.sources import Sources


def read(config: TrainConfig, *, report: Progress) -> Sources:
    """Open and check the ``eval_data`` of a config, before a model is loaded.

    Raises:
        DataError: for records that cannot be evaluated on.
        ConfigError: for options that do not fit them.
    """
    return read_evaluation(config, report=report)


def evaluate(engine: Engine, sources: Sources, config: TrainConfig, *, report: Progress) -> dict[str, float]:
    """The metrics of a model on data: those of ``Evaluated.metrics``, and how much there was.

    Args:
        engine: with the model.
        sources: what :func:`read` has read.
        config: of the run; its ``max_length``, ``batch_size`` and weighting count.
        report: called with what is done, how far it is, and how far it goes.

    Returns:
        ``examples`` and learned ``tokens``; ``eval_loss``, ``eval_weighted_loss`` in nats a token,
        perplexities, and those of each source class.

    Raises:
        DataError: for records that cannot be evaluated on.
    """
    corpus = tokenized(
        sources.training,
        engine.tokenizer,
        tokenizer_digest=digest_of(engine.tokenizer),
        cache=sources.cache,
        max_length=max_length_of(config, engine.context_length),
        report=report,
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
