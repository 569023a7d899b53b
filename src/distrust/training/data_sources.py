"""The data that a config names: opened, checked before anything slow is loaded, and tokenized."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from distrust.config import EXAMPLES, TrainConfig, as_names
from distrust.data import (
    Cache,
    Corpus,
    DatasetStats,
    RecordReader,
    Source,
    Tokenizer,
    cache_folder,
    check_records,
    columns_of,
    examples_source,
    open_source,
    tokenize_in_blocks,
)
from distrust.errors import ConfigError, DistrustWarning

DEFAULT_MAX_LENGTH = 1024

CLASSES_NAMED = 5
"""So many source classes a warning names."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Data of which every record is known to be right.

    Attributes:
        reading: gives the records.
        census: what there is of them.
    """

    reading: RecordReader
    census: DatasetStats


@dataclass(frozen=True, slots=True)
class Sources:
    """The data of a run, checked before anything slow is loaded.

    Attributes:
        training: to train on.
        evaluation: to evaluate on, or None.
        cache: where it is found again once it is tokenized.
    """

    training: CheckedData
    evaluation: CheckedData | None
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
    # Without weighting nothing asks for provenance.
    missing = 0.0 if config.weighting == "off" else None
    training = RecordReader(
        _open(config, as_names(config.data), config.split, cache)
        if examples is None
        else _open_examples(config, examples, "examples", cache),
        columns_of(config),
        missing if config.default_authority_weight is None else config.default_authority_weight,
        missing if config.default_provenance_entropy is None else config.default_provenance_entropy,
    )
    checked = _check(training, cache, report)
    evaluation = _evaluation(config, eval_examples, cache)
    return Sources(checked, None if evaluation is None else _check(evaluation, cache, report), cache)


def read_evaluation(config: TrainConfig, *, report: Progress | None = None) -> Sources:
    """Open and check what a config names to evaluate on, as if it were trained on.

    Raises:
        DataError: for records that cannot be evaluated on.
        ConfigError: it names nothing to evaluate on, or options do not fit the sources.
    """
    cache = Cache(cache_folder(config.cache_dir))
    evaluation = _evaluation(config, None, cache)
    if evaluation is None:
        raise ConfigError("there is nothing to evaluate on; name it with --data")
    return Sources(_check(evaluation, cache, report), None, cache)


def _evaluation(config: TrainConfig, examples: Examples | None, cache: Cache) -> RecordReader | None:
    """What is evaluated on. Provenance is no duty there: it has a plain loss besides."""
    if examples is not None:
        evaluated = _open_examples(config, examples, "eval_examples", cache)
    elif config.eval_data is not None or config.eval_split is not None:
        names = as_names(config.eval_data or config.data)
        evaluated = _open(config, names, config.eval_split or config.split, cache)
    else:
        return None
    return RecordReader(
        evaluated,
        columns_of(config),
        config.default_authority_weight or 0.0,
        config.default_provenance_entropy or 0.0,
    )


def _open(config: TrainConfig, names: tuple[str, ...], split: str, cache: Cache) -> tuple[Source, ...]:
    return tuple(
        open_source(
            name,
            columns_of(config),
            split=split,
            subset=config.subset,
            revision=config.revision,
            temp_folder=cache.folder,
        )
        for name in names
    )


def _open_examples(config: TrainConfig, rows: Examples, name: str, cache: Cache) -> tuple[Source, ...]:
    return (examples_source(rows, columns_of(config), name=name, temp_folder=cache.folder),)


def _check(reading: RecordReader, cache: Cache, report: Progress | None) -> CheckedData:
    census = cache.stats(reading.key)
    if census is None:
        census = check_records(
            reading,
            on_progress=lambda done: report(f"checking {reading.name}", done, 0) if report else None,
        )
        cache.store_stats(reading.key, census)
    return CheckedData(reading, census)


def tokenize_cached(
    data: CheckedData,
    tokenizer: Tokenizer,
    *,
    tokenizer_digest: str | None,
    cache: Cache,
    max_length: int,
    report: Progress,
) -> Corpus:
    """The corpus, from the cache where it has been made before of the same.

    Args:
        data: checked.
        tokenizer: of the base model.
        tokenizer_digest: its ``digest_of``.
        cache: where it may be.
        max_length: the most tokens of an example.
        report: called with what is done, how far it is, and how far it goes.

    Raises:
        DataError: for records that cannot be trained on.
    """
    reading, census = data.reading, data.census
    decides = f"{reading.key} {tokenizer_digest} {max_length}"
    key = None if tokenizer_digest is None else blake3(decides.encode()).hexdigest()

    def make() -> Iterable[Corpus]:
        return tokenize_in_blocks(
            reading.records(),
            tokenizer,
            stats=census,
            max_length=max_length,
            on_progress=lambda done, total: report(f"tokenizing {reading.name}", done, total),
        )

    parts = [(part.name, part.unit) for source in reading.sources for part in source.parts]
    return cache.corpus(key, parts, census.sizes, make)


def warn_where_no_class(config: TrainConfig, corpora: Iterable[Corpus]) -> None:
    """A column that was named, and that no record has, is a slip of the pen."""
    if config.source_column and all(set(corpus.classes) == {""} for corpus in corpora):
        warnings.warn(
            f"--source-column {config.source_column}: no record has it, so nothing is shown by source class",
            DistrustWarning,
            stacklevel=2,
        )


def warn_of_unmeasured_classes(config: TrainConfig, trained: Corpus, evaluated: Corpus) -> None:
    """A class that nothing is kept out of has no loss of its own, though its column was asked for."""
    measured = {evaluated.classes[number] for number in np.unique(evaluated.class_numbers)}
    found = (trained.classes[number] for number in np.unique(trained.class_numbers))
    missing = [name for name in found if name and name not in measured]
    if config.source_column and missing:
        names = ", ".join(missing[:CLASSES_NAMED]) + (", …" if len(missing) > CLASSES_NAMED else "")
        warnings.warn(
            f"--source-column {config.source_column}: nothing that is evaluated on is of {names}, so no "
            "evaluation is shown of them",
            DistrustWarning,
            stacklevel=2,
        )


def max_length_of(config: TrainConfig, context_length: int | None) -> int:
    """The most tokens of an example, for a model that sees so many at once, if it says.

    Raises:
        ConfigError: the config asks for more than that.
    """
    if config.max_length is None:
        return min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
    if context_length is not None and config.max_length > context_length:
        raise ConfigError(
            f"--max-length {config.max_length}: the model sees {context_length} tokens at once; "
            f"give {context_length} or less"
        )
    return config.max_length


def pad_token_id_of(tokenizer: Tokenizer) -> int:
    """What batches are padded with."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0  # padding is masked: any token serves
