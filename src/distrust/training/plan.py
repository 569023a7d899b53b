"""What a run works on: the data read, weighed and put in order, before the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from blake3 import blake3

from distrust import weighting
from distrust.config import EXAMPLES, TrainConfig, several
from distrust.data import (
    Batches,
    Cache,
    Census,
    Corpus,
    Distribution,
    MixedOrder,
    Order,
    Reading,
    Sequences,
    Source,
    Tokenizer,
    cache_folder,
    check,
    columns_of,
    concatenated,
    digest_of,
    distribution,
    examples_source,
    open_source,
    packed,
    single,
    split_off,
    tokenize_in_blocks,
)
from distrust.errors import ConfigError, DataError, DistrustWarning
from distrust.training.evaluation_set import EvaluationSet, evaluation_set

DEFAULT_MAX_LENGTH = 1024
#: Below this share of the examples, few of them decide everything.
LOW_EFFECTIVE_SHARE = 0.1

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
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


@dataclass(frozen=True, slots=True)
class Checked:
    """Data of which every record is known to be right.

    Attributes:
        reading: gives the records.
        census: what there is of them.
    """

    reading: Reading
    census: Census


@dataclass(frozen=True, slots=True)
class Sources:
    """The data of a run, checked before anything slow is loaded.

    Attributes:
        training: to train on.
        evaluation: to evaluate on, or None.
        cache: where it is found again once it is tokenized.
    """

    training: Checked
    evaluation: Checked | None
    cache: Cache


Examples = Iterable[Mapping[str, Any]]


def read_sources(
    config: TrainConfig,
    *,
    examples: Examples | None = None,
    eval_examples: Examples | None = None,
    report: Progress | None = None,
) -> Sources:
    """Open and check what a config names, or what a program hands over instead.

    Args:
        config: names the sources.
        examples: to train on, instead of ``data``; read once.
        eval_examples: to evaluate on, instead of ``eval_data``; read once.
        report: called now and then with what is done, how far it is, and 0.

    Raises:
        DataError: for records that cannot be trained on.
        ConfigError: for options that do not fit the sources.
    """
    if examples is None and config.data == EXAMPLES:
        raise ConfigError(f"--data {EXAMPLES}: the run's examples were a program's; it must hand them over")
    if config.data == EXAMPLES and config.eval_split and config.eval_data is None and eval_examples is None:
        raise ConfigError(f"--eval-split {config.eval_split}: a program's examples have no splits")
    cache = Cache(cache_folder(config.cache_dir))
    # Without weighting nothing asks for provenance; an eval set never does: it has a plain loss besides.
    missing = 0.0 if config.weighting == "off" else None
    training = Reading(
        _opened(config, several(config.data), config.split, cache)
        if examples is None
        else _given(config, examples, "examples", cache),
        columns_of(config),
        missing if config.default_authority_weight is None else config.default_authority_weight,
        missing if config.default_provenance_entropy is None else config.default_provenance_entropy,
    )
    checked = _checked(training, cache, report)
    evaluated: tuple[Source, ...] = ()
    if eval_examples is not None:
        evaluated = _given(config, eval_examples, "eval_examples", cache)
    elif config.eval_data is not None or config.eval_split is not None:
        names = several(config.eval_data or config.data)
        evaluated = _opened(config, names, config.eval_split or config.split, cache)
    evaluation = Reading(
        evaluated,
        columns_of(config),
        config.default_authority_weight or 0.0,
        config.default_provenance_entropy or 0.0,
    )
    return Sources(checked, _checked(evaluation, cache, report) if evaluated else None, cache)


def _opened(config: TrainConfig, names: tuple[str, ...], split: str, cache: Cache) -> tuple[Source, ...]:
    return tuple(
        open_source(
            name,
            columns_of(config),
            split=split,
            subset=config.subset,
            revision=config.revision,
            spool=cache.folder,
        )
        for name in names
    )


def _given(config: TrainConfig, rows: Examples, name: str, cache: Cache) -> tuple[Source, ...]:
    return (examples_source(rows, columns_of(config), name=name, spool=cache.folder),)


def _checked(reading: Reading, cache: Cache, report: Progress | None) -> Checked:
    census = cache.census(reading.key)
    if census is None:
        census = check(
            reading,
            on_progress=lambda done: report(f"checking {reading.name}", done, 0) if report else None,
        )
        cache.remember(reading.key, census)
    return Checked(reading, census)


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
        sources: the data, checked.
        tokenizer: of the base model.
        context_length: the model's, if it says.
        report: called with what is done, how far it is, and how far it goes.

    Raises:
        DataError: for records that cannot be trained on.
        ConfigError: for options that do not fit the model.
    """
    max_length = _max_length(config, context_length)
    tokenizer_digest = digest_of(tokenizer)

    def tokenized(data: Checked) -> Corpus:
        decides = f"{data.reading.key} {tokenizer_digest} {max_length}"
        key = None if tokenizer_digest is None else blake3(decides.encode()).hexdigest()
        return _tokenized(data, tokenizer, key, cache=sources.cache, max_length=max_length, report=report)

    corpus = tokenized(sources.training)
    evaluation = None if sources.evaluation is None else tokenized(sources.evaluation)
    if config.eval_fraction:
        corpus, evaluation = split_off(corpus, config.eval_fraction, seed=config.seed)
    rows = _rows(config, corpus, capacity=max_length)
    order = _order(config, [len(part) for part in rows])
    drawn = _drawn_per_epoch(order, rows, corpus)
    weights = _weights(config, corpus, drawn)
    pad_token_id = _pad_token_id(tokenizer)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weighting.distrust_term(
            corpus.authority_weight, corpus.provenance_entropy, alpha=config.alpha
        ),
        order=order,
        sequences=concatenated(rows),
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        pad_token_id=pad_token_id,
    )
    max_steps = config.max_steps or math.ceil(config.epochs * batches.epoch_steps)
    schedule_steps = config.schedule_steps or max_steps
    settled = replace(config, max_length=max_length, max_steps=max_steps, schedule_steps=schedule_steps)
    return Plan(
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


def _tokenized(
    data: Checked, tokenizer: Tokenizer, key: str | None, *, cache: Cache, max_length: int, report: Progress
) -> Corpus:
    """The corpus, from the cache where it has been made before under this key."""
    reading, census = data.reading, data.census

    def make() -> Iterable[Corpus]:
        return tokenize_in_blocks(
            reading.records(),
            tokenizer,
            census=census,
            max_length=max_length,
            on_progress=lambda done, total: report(f"tokenizing {reading.name}", done, total),
        )

    parts = [(part.name, part.unit) for source in reading.sources for part in source.parts]
    return cache.corpus(key, parts, census.sizes, make)


def _order(config: TrainConfig, sizes: Sequence[int]) -> Order | MixedOrder:
    """The order of the sequences, of which each source has so many."""
    if config.mix is None:
        return Order(sum(sizes), seed=config.seed)
    return MixedOrder(sizes, shares=config.mix, seed=config.seed)


def _drawn_per_epoch(
    order: Order | MixedOrder, rows: Sequence[Sequences], corpus: Corpus
) -> np.ndarray[Any, Any] | None:
    """float64[n], how often each example is drawn in an epoch, on average; None where each is once."""
    if isinstance(order, Order):
        return None
    return np.repeat(np.divide(order.counts, [len(part) for part in rows]), corpus.sizes)


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


def _rows(config: TrainConfig, corpus: Corpus, *, capacity: int) -> list[Sequences]:
    """The rows of each source: with mixing weights, each is drawn from by itself."""
    ends = np.cumsum(corpus.sizes or (len(corpus),))
    parts = np.split(np.arange(len(corpus), dtype=np.int64), ends[:-1])
    if not config.packing:
        return [single(examples) for examples in parts]
    return [
        packed(examples, corpus.lengths[examples], capacity=capacity, seed=config.seed) for examples in parts
    ]


def _weights(config: TrainConfig, corpus: Corpus, drawn: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    raw = weighting.example_weights(
        corpus.authority_weight,
        corpus.provenance_entropy,
        weighting=config.weighting,
        alpha=config.alpha,
        lambda_=config.lambda_,
        max_ratio=config.max_ratio,
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
    return distribution(
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
            f"{len(weights)} examples weigh as much as {effective:.0f} equal ones: a few of them decide "
            "the run; --max-ratio, or a --mix that is less uneven, bounds how much one can outweigh another",
            DistrustWarning,
            stacklevel=2,
        )
    return effective
