"""Tokenizes records: the same mechanism for texts, completions and conversations.

A record becomes one or several sequences. Each is rendered as text, with the characters that are trained, and
encoded as a whole: a token is trained if any of its characters is. Encoding parts by themselves would give
other tokens than the model sees in use. Texts and completions begin as the tokenizer begins a sequence (with
BOS, or without) and end with EOS, which is trained so that the model learns to stop. They get neither twice.
The chat template prints the beginning and end of a conversation (``trained_turns``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrust.activity import current
from distrust.data.chat_template import ChatTemplate
from distrust.data.corpus import Classes, Corpus, Counts
from distrust.data.reading import DatasetStats
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Completion, Conversation, Record, Text
from distrust.data.tokenizer import Encoded, Tokenizer, decode_all, encode_all
from distrust.data.trained_turns import Rendered, Span, render_conversation
from distrust.errors import ConfigError, DataError, ModelError
from distrust.option_values import OnLong

# Records are tokenized in batches: large enough for the tokenizer's threads, small enough for memory.
_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What becomes of records that are too long."""

    max_length: int  # the largest number of tokens of a sequence, 2 or more
    on_long: OnLong = "truncate"  # cut them, leave their records out, or make them errors
    strict: bool = False  # whether a record of which nothing can be trained is an error, instead of left out


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_long: OnLong = "truncate",
    strict: bool = False,
    today: date | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Tokenizes records that are in memory, in order.

    Args:
        records: at least one.
        tokenizer: a tokenizer of transformers, or anything that satisfies the protocol.
        max_length: the largest number of tokens of a sequence, 2 or more.
        on_long: whether longer sequences are truncated, their records left out, or errors.
        strict: whether a record of which nothing can be trained is an error, instead of left out.
        today: the date that a chat template prints. Default: the current day.
        on_progress: called after some records with the number done and the total.

    Raises:
        DataError: there are no records, a conversation cannot be rendered, or nothing is left to train on;
            all such records in one error, as in ``check_records``.
        ModelError: the tokenizer has no EOS token.
        ConfigError: ``max_length`` is less than 2.
    """
    if not records:
        raise DataError("there are no records to tokenize")
    conversations = sum(isinstance(record.content, Conversation) for record in records)
    stats = DatasetStats((len(records),), conversations)
    limits = Limits(max_length=max_length, on_long=on_long, strict=strict)
    tokenizing = _Tokenizing(tokenizer, stats, limits, today or date.today())
    batches = list(tokenizing.batches(records, on_progress))
    examples = [example for batch, _ in batches for example in batch]
    counts = sum((counts for _, counts in batches), Counts())
    counts.require_examples(len(examples), "the records")
    return _corpus(examples, counts, sources=1)


def tokenize_in_blocks(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    stats: DatasetStats,
    limits: Limits,
    today: date,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Corpus]:
    """Tokenizes a stream of records, of which at most one block is in memory.

    ``records`` is iterated once, and ``stats`` are its stats. Other arguments and errors are those of
    ``tokenize``; errors of records are raised after the last one.

    Yields:
        The corpora of consecutive blocks of records, which may have no examples. Their ``sizes`` are the
        examples of each source.
    """
    for examples, counts in _Tokenizing(tokenizer, stats, limits, today).batches(records, on_progress):
        yield _corpus(examples, counts, sources=len(stats.sizes))


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that a text begins with, in training and in use: BOS if the tokenizer adds it, else none."""
    first = tokenizer.encode("", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


class _Sequence(NamedTuple):
    """A tokenized sequence."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]  # one per id, as the weights
    weights: NDArray[np.float32]  # factor of the loss of each trained token, 1 elsewhere

    def cut(self, length: int) -> _Sequence:
        """Its first tokens."""
        return _Sequence(self.ids[:length], self.loss_mask[:length], self.weights[:length])


@dataclass(frozen=True, slots=True)
class _Example:
    """A tokenized record."""

    record: Record
    source: int  # its number
    sequences: Sequence[_Sequence]  # at least one


class _Tokenizing:
    """Tokenizes batches of records, and collects the errors of all."""

    def __init__(self, tokenizer: Tokenizer, stats: DatasetStats, limits: Limits, today: date) -> None:
        if limits.max_length < 2:
            raise ConfigError(
                f"max_length must be 2 or more, not {limits.max_length}: the first token carries no loss"
            )
        self._tokenizer, self._stats, self._limits, self._today = tokenizer, stats, limits, today
        self._source_ends = list(accumulate(stats.sizes))
        self._errors = RecordErrors()

    def batches(
        self, records: Iterable[Record], on_progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[list[_Example], Counts]]:
        """Yield the examples of each batch of records; raises DataError at the end if records have errors."""
        count = 0
        for batch in self._batches(records):
            tokenized = self._tokenize(batch, first=count)
            count += len(batch)
            if on_progress is not None:
                on_progress(count, self._stats.records)
            if not self._errors.records:  # else no corpus is used: only further errors are collected
                yield tokenized
        self._errors.raise_if_any(f"{self._errors.records} of {count} records cannot be trained on")

    def _batches(self, records: Iterable[Record]) -> Iterator[list[tuple[Record, list[Rendered]]]]:
        """Yield some records and their sequences as text."""
        batch: list[tuple[Record, list[Rendered]]] = []
        characters = 0
        for record in records:
            batch.append((record, self._render(record)))
            characters += sum(len(sequence.text) for sequence in batch[-1][1])
            if len(batch) >= _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _tokenize(
        self, batch: Sequence[tuple[Record, list[Rendered]]], *, first: int
    ) -> tuple[list[_Example], Counts]:
        """The examples of a batch, whose first record has the number ``first`` among all records."""
        current.location = f"{batch[0][0].location} to {batch[-1][0].location}"  # tokenized together
        encoded = encode_all(self._tokenizer, [each.text for _, sequences in batch for each in sequences])
        decoded = decode_all(self._tokenizer, [each.ids for each in encoded])
        current.location = None
        results = iter(zip(encoded, decoded, strict=True))
        examples, counts = [], Counts()
        for number, (record, sequences) in enumerate(batch, first):
            if not sequences:  # it has an error
                continue
            pairs = [(sequence, *next(results)) for sequence in sequences]
            for sequence, _, text in pairs:
                if text is not None:
                    counts.compare(sequence.text, text, record.location)
            if not record.weight:
                counts.weightless += 1
                continue
            try:
                tokenized = [self._sequence(sequence, tokens, record.weight) for sequence, tokens, _ in pairs]
                trainable = self._within_limits(tokenized, counts)
            except RecordError as error:
                self._errors.add(record.location, [error])
                continue
            counts.dropped += not trainable
            if trainable:
                examples.append(_Example(record, bisect_right(self._source_ends, number), trainable))
        return examples, counts

    def _render(self, record: Record) -> list[Rendered]:
        """The sequences of a record as text; none if it has an error."""
        current.location = record.location
        match record.content:
            case Text(text):
                return [Rendered(text, (Span(0, len(text)),))]
            case Completion(prompt, completion):
                text = prompt + completion
                return [Rendered(text, (Span(len(prompt), len(text)),))]
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{record.location}: messages: the tokenizer has no chat template "
                f"({self._stats.conversations} of {self._stats.records} records need one); give one with "
                "--chat-template, use a chat model's, or give prompt + completion"
            )
        try:
            # No tokenizer has so many characters in each token.
            max_characters = 32 * self._limits.max_length
            return render_conversation(record.content, self._template, max_characters=max_characters)
        except RecordError as error:
            self._errors.add(record.location, [error])
            return []

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, today=self._today)

    @cached_property
    def _bos_and_eos(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text or completion."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                "the tokenizer has no EOS token, so the model could not learn to stop; set eos_token"
            )
        return bos_prefix(self._tokenizer), [eos]

    def _sequence(self, rendered: Rendered, encoded: Encoded, weight: float) -> _Sequence:
        """The tokens of a rendered sequence; ``weight`` is that of its record."""
        prefix, suffix = ([], []) if rendered.is_chat else self._bos_and_eos
        # A text may begin and end with the special tokens itself.
        prefix = prefix if encoded.ids[:1] != prefix else []
        eos = str(getattr(self._tokenizer, "eos_token", None))
        suffix = suffix if encoded.ids[-1:] != suffix and not rendered.text.rstrip().endswith(eos) else []
        ids = np.array([*prefix, *encoded.ids, *suffix], np.int32)
        loss_mask, weights = np.zeros(len(ids), np.bool_), np.ones(len(ids), np.float32)
        for begin, end, factor in rendered.spans:
            first, last = encoded.token_at(begin), encoded.end_at(end)
            trained = slice(len(prefix) + first, len(prefix) + last)
            loss_mask[trained], weights[trained] = True, factor * weight
        if suffix:
            loss_mask[-1], weights[-1] = True, weight
        loss_mask[:1] = False  # nothing predicts the first token
        if not ((weights[loss_mask] > 0) & (weights[loss_mask] < np.inf)).all():
            raise RecordError(
                "is too small or too large to train on; give 0, or another number", field="weight"
            )
        return _Sequence(ids, loss_mask, weights)

    def _within_limits(self, sequences: list[_Sequence], counts: Counts) -> list[_Sequence]:
        """The sequences of a record that can be trained on, cut to the largest length."""
        limits, limit = self._limits, self._limits.max_length
        if not all(sequence.loss_mask.any() for sequence in sequences):
            raise RecordError("no token to train on: no trained token follows another one; remove the record")
        longest = max(len(sequence.ids) for sequence in sequences)
        if longest <= limit:
            return sequences
        if limits.on_long == "error":
            raise RecordError(
                f"takes more tokens than max_length {limit}; raise --max-length, or give another --on-long",
                detail=f" ({longest:,} tokens)",
            )
        if limits.on_long == "drop":
            return []
        trainable = [part for part in (sequence.cut(limit) for sequence in sequences) if part.loss_mask.any()]
        if limits.strict and len(trainable) < len(sequences):
            prompt = max(int(sequence.loss_mask.argmax()) for sequence in sequences)
            raise RecordError(
                f"no token to train on within max_length {limit}: the prompt takes {prompt} tokens; raise "
                "--max-length, or shorten the prompt"
            )
        if trainable:
            counts.truncated += 1
            tokens = sum(len(part.ids) for part in sequences)
            counts.tokens_cut += tokens - sum(len(part.ids) for part in trainable)
        return trainable


def _corpus(examples: Sequence[_Example], counts: Counts, *, sources: int) -> Corpus:
    classes = Classes()
    class_of = classes.number(example.record.source for example in examples)
    source_of = [example.source for example in examples]
    sequences = [sequence for example in examples for sequence in example.sequences]
    sequence_offsets = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)], dtype=np.int64)
    firsts = np.cumsum([0, *(len(example.sequences) for example in examples)])  # int64[n + 1]
    empty = _Sequence(np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.float32))
    ids, loss_mask, weights = map(np.concatenate, zip(empty, *sequences, strict=True))
    return Corpus(
        input_ids=ids,
        loss_mask=loss_mask,
        offsets=sequence_offsets[firsts],
        authority_weight=np.array([example.record.authority_weight for example in examples], np.float64),
        provenance_entropy=np.array([example.record.provenance_entropy for example in examples], np.float64),
        locations=tuple(example.record.location for example in examples),
        counts=counts,
        sizes=tuple(np.bincount(np.array(source_of, np.int64), minlength=sources).tolist()),
        classes=classes.names,
        class_of=class_of,
        sequence_offsets=sequence_offsets if len(sequences) > len(examples) else None,
        token_weights=weights if (weights != 1).any() else None,
    )
