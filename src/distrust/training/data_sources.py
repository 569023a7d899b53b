"""The data that a config names: opened and checked before anything slow is loaded, then tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
from blake3 import blake3

from distrust.config import TrainConfig, flag
from distrust.contract import DEFAULT_MAX_LENGTH
from distrust.data import (
    Cache,
    ColumnReport,
    Columns,
    Corpus,
    DatasetStats,
    Limits,
    Record,
    RecordReader,
    SeenColumns,
    Source,
    Tokenizer,
    check_records,
    columns_of,
    examples_source,
    list_names,
    open_source,
    read_some,
    tokenize_in_blocks,
    turn_ends,
)
from distrust.errors import ConfigError, warn
from distrust.option_values import EXAMPLES, as_names
from distrust.paths import cache_folder
from distrust.weighting import Weighting

#: A warning lists at most this many source classes.
CLASSES_LISTED = 5

#: Called with the task, the completed parts, and their total or 0.
ReportProgress = Callable[[str, int, int], None]
#: Fields without which an example cannot be weighed by its provenance.
PROVENANCE = ("authority_weight", "provenance_entropy")
Examples = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Data whose records have all been checked, and their counts and sizes."""

    reader: RecordReader
    stats: DatasetStats
    cache: Cache  # for tokenized data
    report: ReportProgress

    def tokenize(
        self, tokenizer: Tokenizer, *, tokenizer_digest: str | None, limits: Limits, today: date
    ) -> Corpus:
        """The tokenized corpus, from the cache if possible: only with a digest of the tokenizer."""
        reader, stats = self.reader, self.stats
        printed_date = today if "strftime_now" in str(tokenizer.chat_template) else None
        # Everything that determines the corpus.
        inputs = f"{reader.key} {tokenizer_digest} {limits} {printed_date}"
        key = None if tokenizer_digest is None else blake3(inputs.encode()).hexdigest()

        build = partial(
            tokenize_in_blocks,
            reader.records(),
            tokenizer,
            stats=stats,
            limits=limits,
            today=today,
            on_progress=partial(self.report, f"tokenizing {reader.name}"),
        )
        parts = [(part.name, part.unit) for source in reader.sources for part in source.parts]
        corpus = self.cache.corpus(key, parts, build)
        for source, size in zip(reader.sources, corpus.sizes, strict=True):
            corpus.counts.require_examples(size, source.name)
        if corpus.counts.altered:
            warn(
                f"the tokenizer changes {corpus.counts.altered:,} texts: their tokens stand for another text "
                f"({corpus.counts.first_altered})"
            )
        return corpus


@dataclass(frozen=True, slots=True)
class Sources:
    """The checked data of a run."""

    training: CheckedData
    evaluation: CheckedData | None
    weighting: Weighting  # of the config; for "auto", what the data allows

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the training data at the start of a run: a line each."""
        stats, columns = self.training.stats, self.training.reader.columns
        if self.weighting != "off":
            return (str(stats.columns),)
        unread = {*columns.authority_weight, *columns.provenance_entropy}  # nothing to say about these
        report = replace(stats.columns, used=tuple(n for n in stats.columns.used if n not in unread))
        if any(stats.stated.get(name) for name in PROVENANCE):
            return (str(report),)
        return (str(report), "weighting by provenance: off, as no record states its own")


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
    cache = _cache(config, report)  # also holds temporary copies of streams
    if examples is None:
        sources = _open(config, as_names(config.data), config.split, cache)
    else:
        sources = _open_examples(config, examples, "examples", cache)
    checked, weighting = _check_training(config, sources, cache, report)
    _require_columns(config, checked.stats.columns)
    for advice in checked.stats.columns.similar.values():
        warn(advice)
    evaluation = _evaluation_reader(config, eval_examples, cache)
    if config.early_stopping_patience and evaluation is None and not config.eval_fraction:
        raise ConfigError(
            "--early-stopping-patience: there is nothing to evaluate on; give --eval-data, or --eval-fraction"
        )
    return Sources(checked, None if evaluation is None else _check(evaluation, cache, report), weighting)


def _check_training(
    config: TrainConfig, sources: tuple[Source, ...], cache: Cache, report: ReportProgress
) -> tuple[CheckedData, Weighting]:
    """The training data, and ``weighting`` with "auto" replaced by what the data allows."""
    # Without weighting, records need no provenance. For "auto", the first check counts those that have one.
    optional = config.weighting in ("auto", "off")
    checked = _check(_reader(config, sources, missing=0.0 if optional else None), cache, report)
    if config.weighting != "auto":
        return checked, config.weighting
    stated = _count_stated(config, checked.stats.stated, checked.stats.records)
    if not any(stated):
        return checked, "off"
    reader = _reader(config, sources, missing=None)
    if set(stated) == {checked.stats.records}:  # nothing was missing, so a second check would find the same
        return replace(checked, reader=reader), "monotone"
    return _check(reader, cache, report), "monotone"


def _require_columns(config: TrainConfig, columns: ColumnReport) -> None:
    """Refuse names in options that no record has."""
    options = ("text", "prompt", "completion", "messages", "authority_weight", "provenance_entropy", "weight")
    problems = [
        f"{flag(f'{option}_column')} {name}: no record has this column (there is "
        f"{list_names(columns.used + columns.ignored)})"
        for option in options
        for name in as_names(getattr(config, f"{option}_column"))
        if name not in columns.used
    ]
    if problems:
        raise ConfigError(problems)


def _count_stated(config: TrainConfig, stated: Mapping[str, int], records: int) -> list[int]:
    """How many records state each number of their provenance, or have it by default."""
    defaults = {name: getattr(config, f"default_{name}") for name in PROVENANCE}
    return [stated.get(name, 0) if defaults[name] is None else records for name in PROVENANCE]


def read_sample(
    config: TrainConfig, *, first: int, count: int
) -> tuple[list[Record | list[str]], SeenColumns, Weighting]:
    """What ``read_some`` reads of the training data, and ``weighting``: "auto" as these records decide it."""
    sources = _open(config, as_names(config.data), config.split, None)
    optional = config.weighting in ("auto", "off")
    records, columns_seen = read_some(
        _reader(config, sources, missing=0.0 if optional else None), first=first, count=count
    )
    if config.weighting != "auto":
        return records, columns_seen, config.weighting
    if not any(_count_stated(config, columns_seen.stated, len(records))):
        return records, columns_seen, "off"
    return *read_some(_reader(config, sources, missing=None), first=first, count=count), "monotone"


def read_evaluation(config: TrainConfig, *, report: ReportProgress) -> CheckedData:
    """Open and check the evaluation data of a config: with ``eval_fraction``, the data it is split from.

    Raises:
        DataError: records cannot be evaluated on.
        ConfigError: the config names no evaluation data, or options do not fit it.
    """
    if config.eval_fraction:
        return read_sources(config, report=report).training
    cache = _cache(config, report)
    evaluation = _evaluation_reader(config, None, cache)
    if evaluation is None:
        raise ConfigError("there is nothing to evaluate on; name it with --data")
    return _check(evaluation, cache, report)


def _evaluation_reader(config: TrainConfig, examples: Examples | None, cache: Cache) -> RecordReader | None:
    if examples is not None:
        sources = _open_examples(config, examples, "eval_examples", cache)
    elif names := as_names(config.eval_data or (config.data if config.eval_split else None)):
        sources = _open(config, names, config.eval_split or config.split, cache)
    else:
        return None
    return _reader(config, sources, missing=0.0)  # the plain loss does not need provenance


def _reader(config: TrainConfig, sources: tuple[Source, ...], *, missing: float | None) -> RecordReader:
    """``missing`` replaces provenance that neither a record nor an option gives; None: it is required."""
    defaults = (config.default_authority_weight, config.default_provenance_entropy)
    weight, entropy = (missing if default is None else default for default in defaults)
    return RecordReader(sources, columns_of(config), weight, entropy, config.default_weight)


def _open(config: TrainConfig, names: tuple[str, ...], split: str, cache: Cache | None) -> tuple[Source, ...]:
    """Without a cache, the sources have no digests."""
    return tuple(
        open_source(
            name,
            columns_of(config),
            split=split,
            subset=config.subset,
            revision=config.revision,
            temp_folder=cache.folder if cache else None,  # for sources that can be read only once
            max_record_bytes=config.max_record_bytes,
            digests=cache is not None,
        )
        for name in names
    )


def _open_examples(config: TrainConfig, rows: Examples, name: str, cache: Cache) -> tuple[Source, ...]:
    limit = config.max_record_bytes
    columns = columns_of(config)
    return (examples_source(rows, columns, name=name, temp_folder=cache.folder, max_record_bytes=limit),)


def _cache(config: TrainConfig, report: ReportProgress) -> Cache:
    task = "waiting for another process that tokenizes the same data"
    return Cache(cache_folder(config.cache_dir), on_wait=lambda times: report(task, times, 0))


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


def template_notes(stats: DatasetStats, columns: Columns, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A line if prompts are trained without the chat template that the model has."""
    pairs = [
        kind_columns
        for kind_columns in columns.kinds_in(stats.columns.used).values()
        if len(kind_columns) > 1
    ]
    if tokenizer.chat_template is None or stats.conversations or pairs in ([], [columns.messages]):
        return ()
    return ("prompts are trained as they are, without the model's chat template; give messages to use it",)


def warn_of_unended_turns(tokenizer: Tokenizer) -> None:
    """Warn if generation has no token to stop at where an answer ends."""
    if tokenizer.chat_template is not None and not turn_ends(tokenizer).ids:
        warn(
            "generation would not stop at the end of an answer, where the chat template prints no token of "
            "the tokenizer that could end it; give a --chat-template that does, such as {{ eos_token }}"
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


def today_of(config: TrainConfig) -> date:
    """The date that a chat template prints."""
    return date.fromisoformat(config.date) if config.date else date.today()


def limits_of(config: TrainConfig, context_length: int | None) -> Limits:
    """What becomes of long records, for a model with this context length, if known.

    Raises:
        ConfigError: ``max_length`` is more than the model can read.
    """
    length = config.max_length or min(DEFAULT_MAX_LENGTH, context_length or DEFAULT_MAX_LENGTH)
    if context_length is not None and length > context_length:
        raise ConfigError(
            f"--max-length {length}: the model's context is {context_length} tokens; "
            f"give {context_length} or less"
        )
    return Limits(max_length=length, on_long=config.on_long, strict=config.strict)
