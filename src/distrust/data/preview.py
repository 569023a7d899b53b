"""Shows what training makes of some records: the text of their tokens, and what of it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrust.data.column_report import SeenColumns
from distrust.data.corpus import Corpus, common_length
from distrust.data.reading import NO_WEIGHT, DatasetStats, RecordReader
from distrust.data.records import Conversation, Record
from distrust.data.tokenizer import Tokenizer, decode_all
from distrust.data.tokenizing import Limits, tokenize_in_blocks
from distrust.errors import DataError

Spans = tuple[tuple[int, int], ...]  # begin and end of characters in a text, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSequence:
    """A sequence of a record, as it is trained; without tokens if the record is left out."""

    record: int  # its number in the data, from 1
    location: str
    sequence: int = 1  # its number among those of the record, from 1
    sequences: int = 1  # of the record
    text: str = ""  # of the tokens
    trained: Spans = ()
    special: Spans = ()  # tokens that have a meaning of their own, such as the end of a turn
    tokens: int = 0
    trained_tokens: int = 0
    weight: float = 0.0  # mean of the trained tokens, before normalization
    note: str = ""  # what is left out or changed


def read_some(
    reader: RecordReader, *, first: int, count: int
) -> tuple[list[Record | list[str]], SeenColumns]:
    """Some records, or a line for each of their errors, and their columns.

    Other records are not checked, and files are read no further. ``first`` is a number from 1.

    Raises:
        DataError: a source cannot be read, or has no record with the number ``first``.
    """
    rows = chain.from_iterable(map(reader.rows, reader.sources))
    skipped = sum(1 for _ in islice(rows, first - 1))
    some, columns = list(islice(rows, count)), SeenColumns(reader.columns)
    if not some and not skipped:
        raise DataError(f"{reader.name}: contains no records; give at least one")
    if not some:
        raise DataError(f"{reader.name}: there is no record {first}; the last one is {skipped}")
    for _, fields, record in some:
        columns.add(fields, record)
    for part in (part for source in reader.sources for part in source.parts):
        columns.add_names(part.column_names())
    records: list[Record | list[str]] = []
    needs_weight = columns.stated["weight"] and reader.weight is None
    for location, fields, record in some:
        errors = [] if isinstance(record, Record) else record
        if needs_weight and not errors and not any(name in fields for name in reader.columns.weight):
            errors = [NO_WEIGHT]
        lines = [f"{location}: {error}{error.detail}" for error in errors]
        records.append(record if isinstance(record, Record) and not lines else lines)
    return records, columns


def show_record(
    record: Record,
    *,
    number: int,
    tokenizer: Tokenizer,
    limits: Limits,
    today: date,
    weigh: Callable[[Corpus], NDArray[np.float64]],
) -> Iterator[ShownSequence]:
    """Yield the sequences of the record with a number; DataError if it cannot be trained on.

    ``weigh`` gives the weights of a corpus by provenance; the other arguments are those of ``tokenize``.
    """
    stats = DatasetStats((1,), conversations=isinstance(record.content, Conversation))
    (corpus,) = tokenize_in_blocks([record], tokenizer, stats=stats, limits=limits, today=today)
    shown, counts = partial(ShownSequence, record=number, location=str(record.location)), corpus.counts
    if not len(corpus):
        reason = "its weight is 0" if counts.weightless else f"too long for --max-length {limits.max_length}"
        yield shown(note=f"left out of training: {reason}")
        return
    notes = [f"the tokenizer changes it: {counts.first_altered}"] if counts.altered else []
    if counts.truncated:
        notes.append(f"cut: {counts.tokens_cut:,} tokens of it are beyond --max-length {limits.max_length}")
    factor = float(weigh(corpus)[0])
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = [number for number, token in added.items() if token.special]
    for index, (begin, end) in enumerate(pairwise(corpus.bounds.tolist()), 1):
        ids, mask = corpus.input_ids[begin:end].tolist(), corpus.loss_mask[begin:end]
        weights = np.ones(1) if corpus.token_weights is None else corpus.token_weights[begin:end][mask]
        (text,) = _texts(tokenizer, [ids])
        yield shown(
            sequence=index,
            sequences=len(corpus.bounds) - 1,
            text=text,
            trained=_spans(mask, ids, text, tokenizer),
            special=_spans(np.isin(ids, special), ids, text, tokenizer),
            tokens=len(ids),
            trained_tokens=int(mask.sum()),
            weight=factor * float(weights.mean(dtype=np.float64)),
            note="; ".join(notes),
        )


def _texts(tokenizer: Tokenizer, parts: Sequence[list[int]]) -> list[str]:
    """The texts of ids. What follows BOS is decoded by itself: it may lose a space at its beginning."""
    bos = [tokenizer.bos_token_id]
    split = [(ids[:1], ids[1:]) if ids[:1] == bos else ([], ids) for ids in parts]
    decoded = iter(decode_all(tokenizer, [ids for pair in split for ids in pair]))
    return [f"{head}{tail}" for head, tail in zip(decoded, decoded, strict=True)]


def _spans(mask: NDArray[np.bool_], ids: list[int], text: str, tokenizer: Tokenizer) -> Spans:
    """The characters of the tokens in a mask."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    # Where tokens end within a character, their text differs from there on.
    bounds = [common_length(part, text) for part in _texts(tokenizer, [ids[:edge] for edge in edges])]
    return tuple((begin, end) for begin, end in zip(bounds[::2], bounds[1::2], strict=True) if begin < end)
