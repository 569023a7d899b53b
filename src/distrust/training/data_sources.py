"""The data that a config names: opened and checked before anything slow is loaded, then tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from distrust.config import EXAMPLES, TrainConfig, as_names
from distrust.contract import DEFAULT_MAX_LENGTH
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
from distrust.errors import ConfigError, warn

#: A warning lists at most this many source classes.
CLASSES_LISTED = 5

#: Called with the task, the completed parts, and their total or 0.
ReportProgress = Callable[[str, int, int], None]
Examples = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Data whose records have all been checked, and their counts and sizes."""

    reader: RecordReader
    stats: DatasetStats
    cache: Cache  # for tokenized data
    report: ReportProgress

    def tokenize(self, tokenizer: Tokenizer, *, tokenizer_digest: str | None, max_length: int) -> Corpus:
        """The tokenized corpus, from the cache if possible: only with a digest of the tokenizer."""
        reader, stats = self.reader, self.stats
        inputs = f"{reader.key} {tokenizer_digest} {max_length}"  # everything that determines the corpus
        key = None if tokenizer_digest is None else blake3(inputs.encode()).hexdigest()

        def tokenize() -> Iterable[Corpus]:
            return tokenize_in_blocks(
                reader.records(),
                tokenizer,
                stats=stats,
                max_length=max_length,
                on_progress=lambda count, total: self.report(f"tokenizing {reader.name}", count, total),
            )

        parts = [(part.name, part.unit) for source in reader.sources for part in source.parts]
        return self.cache.corpus(key, parts, stats.sizes, tokenize)


@dataclass(frozen=True, slots=True)
class Sources:
    """The checked data of a run."""

    training: CheckedData
    evaluation: CheckedData | None


def read_sources(
    config: TrainConfig,
    *,
    examples: Examples | None = None,
    eval_examples: Examples | None = None,
    report: ReportProgress = lambda *_: None,
) -> Sources:
    """Open and check the data of a config, or the examples that a program passes instead; each is read once.

    Raises:
        DataError: records cannot be trained on.
        ConfigError: options do not fit the sources.
    """
    if examples is None and config.data == EXAMPLES:
        raise ConfigError(f"--data {EXAMPLES}: the run was trained on a program's examples; pass them again")
    if config.data == EXAMPLES and config.eval_split and config.eval_data is None and eval_examples is None:
        raise ConfigError(f"--eval-split {config.eval_split}: a program's examples have no splits")
    cache = Cache(cache_folder(config.cache_dir))  # also holds temporary copies of streams
    if examples is None:
        sources = _open(config, as_names(config.data), config.split, cache)
    else:
        sources = _open_examples(config, examples, "examples", cache)
    # Without weighting, records need no provenance.
    training = _reader(config, sources, missing=0.0 if config.weighting == "off" else None)
    checked = _check(training, cache, report)
    evaluation = _evaluation_reader(config, eval_examples, cache)
    if config.early_stopping_patience and evaluation is None and not config.eval_fraction:
        raise ConfigError(
            "--early-stopping-patience: there is nothing to evaluate on; give --eval-data, or --eval-fraction"
        )
    return Sources(checked, None if evaluation is None else _check(evaluation, cache, report))


def read_evaluation(config: TrainConfig, *, report: ReportProgress) -> CheckedData:
    """Open and check the evaluation data of a config: with ``eval_fraction``, the data it is split from.

    Raises:
        DataError: records cannot be evaluated on.
        ConfigError: the config names no evaluation data, or options do not fit it.
    """
    if config.eval_fraction:
        return read_sources(config, report=report).training
    cache = Cache(cache_folder(config.cache_dir))
    evaluation = _evaluation_reader(config, None, cache)
    if evaluation is None:
        raise ConfigError("there is nothing to evaluate on; name it with --data")
    return _check(evaluation, cache, report)


def _evaluation_reader(config: TrainConfig, examples: Examples | None, cache: Cache) -> RecordReader | None:
    if examples is not None:
        sources = _open_examples(config, examples, "eval_examples", cache)
    elif config.eval_data is not None or config.eval_split is not None:
        names = as_names(config.eval_data or config.data)
        sources = _open(config, names, config.eval_split or config.split, cache)
    else:
        return None
    return _reader(config, sources, missing=0.0)  # the plain loss does not need provenance


def _reader(config: TrainConfig, sources: tuple[Source, ...], *, missing: float | None) -> RecordReader:
    """``missing`` replaces provenance that neither a record nor an option gives; None: it is required."""
    defaults = (config.default_authority_weight, config.default_provenance_entropy)
    weight, entropy = (missing if default is None else default for default in defaults)
    return RecordReader(sources, columns_of(config), weight, entropy)


def _open(config: TrainConfig, names: tuple[str, ...], split: str, cache: Cache) -> tuple[Source, ...]:
    return tuple(
        open_source(
            name,
            columns_of(config),
            split=split,
            subset=config.subset,
            revision=config.revision,
            temp_folder=cache.folder,  # for sources that can be read only once
            max_record_bytes=config.max_record_bytes,
        )
        for name in names
    )


def _open_examples(config: TrainConfig, rows: Examples, name: str, cache: Cache) -> tuple[Source, ...]:
    limit = config.max_record_bytes
    columns = columns_of(config)
    return (examples_source(rows, columns, name=name, temp_folder=cache.folder, max_record_bytes=limit),)


def _check(reader: RecordReader, cache: Cache, report: ReportProgress) -> CheckedData:
    stats = cache.stats(reader.checked_key)
    if stats is None:  # not yet checked, or changed since
        task = f"checking {reader.name}"
        stats = check_records(reader, on_progress=lambda count: report(task, count, 0))
        cache.store_stats(reader.checked_key, stats)  # the next run need not check again
    return CheckedData(reader, stats, cache, report)


def warn_of_missing_classes(config: TrainConfig, corpora: Iterable[Corpus]) -> None:
    """Warn if no record has the ``source_column``: its name is probably misspelled."""
    # Classes are numbered; an example without one has the class "".
    if config.source_column and all(set(corpus.classes) == {""} for corpus in corpora):
        warn(
            f"--source-column {config.source_column}: no record has this column, so nothing is shown by "
            "source class"
        )


def warn_of_unmeasured_classes(config: TrainConfig, trained: Corpus, evaluated: Corpus) -> None:
    """Warn of source classes that are trained on, but not evaluated."""
    measured = {evaluated.classes[number] for number in np.unique(evaluated.class_numbers)}
    names = (trained.classes[number] for number in np.unique(trained.class_numbers))
    missing = [name for name in names if name and name not in measured]
    if config.source_column and missing:
        listed = ", ".join(missing[:CLASSES_LISTED]) + (", …" if len(missing) > CLASSES_LISTED else "")
        warn(
            f"--source-column {config.source_column}: the evaluation data has no examples of {listed}, so "
            "these classes get no evaluation"
        )


def max_length_of(config: TrainConfig, context_length: int | None) -> int:
    """Maximum tokens of an example, for a model with this context length, if known."""
    if config.max_length is None:
        return min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
    if context_length is not None and config.max_length > context_length:
        raise ConfigError(
            f"--max-length {config.max_length}: the model's context is {context_length} tokens; "
            f"give {context_length} or less"
        )
    return config.max_length


def pad_token_id_of(tokenizer: Tokenizer) -> int:
    """The token that batches are padded with."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0  # padding is masked, so any token will do
