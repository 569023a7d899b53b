"""Shows what training makes of records: which characters of their rendered text are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

from distrust.config import TrainConfig
from distrust.data import Conversation, DatasetStats, Record, ShownSequence, columns_of, show_record
from distrust.engines.loading import load_context_length, load_tokenizer, locate
from distrust.errors import ConfigError, DataError
from distrust.option_values import as_names
from distrust.reporting.preview import Preview
from distrust.training.data_sources import limits_of, read_sample, template_notes, today_of
from distrust.training.evaluation import example_weights


def preview(
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    n: int | None = None,
    record: int | None = None,
    **options: Any,
) -> Preview:
    """Show how records are rendered, and what of them is trained, in a run with these options.

    Loads the tokenizer and the config of the model, not its weights, and reads no more records than it shows.

    Args:
        data: as for ``TrainConfig``.
        n: how many records. Default: 3, or 1 if ``record`` is given.
        record: number of the first one, from 1. Default: 1.
        options: ``model`` and others of ``TrainConfig``.

    Returns:
        What a notebook displays in colour; ``sequences`` and ``errors`` have its parts.

    Raises:
        DataError: the data cannot be read. Wrong records are shown, not raised.
        ModelError: the tokenizer cannot be loaded.
        ConfigError: an option is invalid.
    """
    config = TrainConfig(data=data, **options)  # type: ignore[arg-type] # it takes paths, too
    for name, value in (("-n", n), ("--record", record)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: give 1 or more")
    locate(config.model)  # a wrong name fails before anything is read
    first = record or 1
    records, columns, weighting = read_sample(config, first=first, count=n or (3 if record is None else 1))
    weighed = replace(config, weighting=weighting, max_ratio=None)  # a ratio needs the weights of all
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    show = partial(
        show_record,
        tokenizer=tokenizer,
        limits=limits_of(config, load_context_length(config.model)),
        today=today_of(config),
        weigh=partial(example_weights, config=weighed),
    )
    entries: list[ShownSequence | str] = []
    for number, entry in enumerate(records, first):
        try:
            entries += show(entry, number=number) if isinstance(entry, Record) else entry
        except DataError as error:
            entries += error.problems or [str(error)]
    is_chat = sum(isinstance(each, Record) and isinstance(each.content, Conversation) for each in records)
    stats = DatasetStats((len(records),), is_chat, columns.report())
    notes = [str(stats.columns), columns.hint(), *template_notes(stats, columns_of(config), tokenizer)]
    if any(part.weight != 1 for part in entries if isinstance(part, ShownSequence) and part.trained_tokens):
        factors = "the record's times the turn's"
        if weighting != "off":
            factors += f" times that of the provenance ({weighting})"
        notes.append(f"weight: {factors}; training divides it by the mean over all data")
    title = f"model {config.model}, data {', '.join(as_names(config.data))}"
    return Preview(title, tuple(entries), tuple(notes))
