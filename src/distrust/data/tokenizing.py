"""Tokenizes records: the same mechanism for texts, completions and conversations.

A record becomes segments; each segment is tokenized by itself, so a prompt has the tokens here that it has
when the model is used. A token is trained if its segment is. Texts and completions begin as the tokenizer
begins a sequence (with BOS, or without) and end with EOS, which is trained so that the model learns to
stop. The chat template prints the beginning and end of a conversation, as it does in use.

Assistant turns are located by rendering the conversation up to where the turn begins (with the generation
prompt) and up to where it ends: the difference is the turn, from its content through the end-of-turn token.
This needs each rendering to extend the previous one exactly. A template that rewrites earlier turns when
later ones come (some drop their reasoning) would train on text the model never sees in use, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrust.activity import current
from distrust.data.corpus import Classes, Corpus
from distrust.data.reading import DatasetStats
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Completion, Conversation, Location, Record, Text
from distrust.data.tokenizer import Tokenizer, encode_all
from distrust.errors import ConfigError, DataError, ModelError

# Records are tokenized in batches: large enough for the tokenizer's threads, small enough for memory.
_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Tokenizes records that are in memory, in order, and truncates each to ``max_length`` tokens.

    Args:
        records: at least one.
        tokenizer: a tokenizer of transformers, or anything that satisfies the protocol.
        max_length: the largest number of tokens of an example, 2 or more.
        on_progress: called after some records with the number done and the total.

    Raises:
        DataError: there are no records, a conversation cannot be rendered, or an example has no token to
            train on; all such records in one error, as in ``check_records``.
        ModelError: the tokenizer has no EOS token.
        ConfigError: ``max_length`` is less than 2.
    """
    if not records:
        raise DataError("there are no records to tokenize")
    conversations = [str(record.location) for record in records if isinstance(record.content, Conversation)]
    stats = DatasetStats((len(records),), len(conversations), next(iter(conversations), None))
    batches = _tokenize_batches(records, tokenizer, stats, max_length, on_progress)
    return _corpus([example for batch in batches for example in batch])


def tokenize_in_blocks(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    stats: DatasetStats,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Corpus]:
    """Tokenizes a stream of records, of which at most one block is in memory.

    ``records`` is iterated once, and ``stats`` are its stats. Other arguments and errors are those of
    ``tokenize``; errors of records are raised after the last one.

    Yields:
        The corpora of consecutive blocks of records.
    """
    return map(_corpus, _tokenize_batches(records, tokenizer, stats, max_length, on_progress))


def _tokenize_batches(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    stats: DatasetStats,
    max_length: int,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[list[_Example]]:
    if max_length < 2:
        raise ConfigError(f"max_length must be 2 or more, not {max_length}: the first token carries no loss")
    frame = _bos_and_eos(stats, tokenizer)
    errors = RecordErrors()
    done_records = 0
    for batch in _batches(records):
        examples = _tokenize_batch(batch, tokenizer, frame=frame, max_length=max_length, errors=errors)
        done_records += len(batch)
        if on_progress is not None:
            on_progress(done_records, stats.records)
        if not errors.records:  # after an error no corpus is used, only further errors are collected
            yield examples
    errors.raise_if_any(f"{errors.records} of {done_records} records cannot be trained on")


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that a text begins with, in training and in use: BOS if the tokenizer adds it, else none."""
    first = tokenizer.encode("", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


_SpecialTokens = tuple[list[int], list[int]]  # the ids before and after a text or a completion


@dataclass(frozen=True, slots=True)
class _Example:
    """One tokenized record."""

    record: Record
    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]  # one per id
    tokens_cut: int  # removed by max_length


def _bos_and_eos(stats: DatasetStats, tokenizer: Tokenizer) -> _SpecialTokens:
    """Checks once that the tokenizer has what the records need."""
    if stats.conversations and tokenizer.chat_template is None:
        raise DataError(
            f"{stats.first_conversation}: messages: the tokenizer has no chat template "
            f"({stats.conversations} of {stats.records} records need one); use a chat model's, or give "
            "prompt + completion"
        )
    if stats.conversations == stats.records:
        return [], []
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no EOS token, so the model could not learn to stop; set eos_token"
        )
    return bos_prefix(tokenizer), [eos]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += _characters(record)
        if len(batch) >= _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(record: Record) -> int:
    match record.content:
        case Text(text):
            return len(text)
        case Completion(prompt, completion):
            return len(prompt) + len(completion)
        case Conversation(messages):
            return sum(len(message.content) for message in messages)


def _tokenize_batch(
    batch: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    frame: _SpecialTokens,
    max_length: int,
    errors: RecordErrors,
) -> list[_Example]:
    """The examples of a batch; records that cannot be trained on are left out and added to ``errors``."""
    prefix, suffix = frame
    parts: list[tuple[Record, list[Segment]]] = []
    for record in batch:
        current.location = record.location
        try:
            parts.append((record, [part for part in split_segments(record.content, tokenizer) if part.text]))
        except RecordError as error:
            errors.add(record.location, [error])
    current.location = _Span(batch[0].location, batch[-1].location)
    encoded = iter(encode_all(tokenizer, [part.text for _, segments in parts for part in segments]))
    current.location = None
    examples: list[_Example] = []
    for record, segments in parts:
        pieces = [(next(encoded), part.trained) for part in segments]
        if not isinstance(record.content, Conversation):  # the template prints its own BOS and EOS
            pieces = [(prefix, False), *pieces, (suffix, True)]
        try:
            examples.append(_example(record, pieces, max_length))
        except RecordError as error:
            errors.add(record.location, [error])
    return examples


class _Span(NamedTuple):
    """The records of a batch, which are tokenized together."""

    first: Location
    last: Location

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"


def _example(record: Record, pieces: Sequence[tuple[list[int], bool]], max_length: int) -> _Example:
    ids = list(chain.from_iterable(tokens for tokens, _ in pieces))
    loss_mask = list(chain.from_iterable([trained] * len(tokens) for tokens, trained in pieces))
    loss_mask[:1] = [False] * bool(loss_mask)  # nothing predicts the first token
    if not any(loss_mask):
        raise RecordError("no token to train on: no trained token follows another one; remove the record")
    if not any(loss_mask[:max_length]):
        raise RecordError(
            f"no token to train on within max_length {max_length}: the prompt takes {loss_mask.index(True)} "
            "tokens; raise --max-length, or shorten the prompt"
        )
    return _Example(
        record,
        np.array(ids[:max_length], np.int32),
        np.array(loss_mask[:max_length], np.bool_),
        tokens_cut=max(0, len(ids) - max_length),
    )


def _corpus(examples: Sequence[_Example]) -> Corpus:
    classes = Classes()
    class_of = classes.number(example.record.source for example in examples)
    return Corpus(
        input_ids=np.concatenate([example.ids for example in examples]),
        loss_mask=np.concatenate([example.loss_mask for example in examples]),
        offsets=np.cumsum([0, *(len(example.ids) for example in examples)], dtype=np.int64),
        authority_weight=np.array([example.record.authority_weight for example in examples], np.float64),
        provenance_entropy=np.array([example.record.provenance_entropy for example in examples], np.float64),
        locations=tuple(example.record.location for example in examples),
        truncated=sum(example.tokens_cut > 0 for example in examples),
        tokens_cut=sum(example.tokens_cut for example in examples),
        classes=classes.names,
        class_of=class_of,
    )


class Segment(NamedTuple):
    """A segment of an example's text."""

    text: str
    trained: bool  # whether its tokens are trained


def split_segments(content: Text | Completion | Conversation, tokenizer: Tokenizer) -> list[Segment]:
    """Splits a record's text; RecordError if the chat template cannot render it turn by turn."""
    match content:
        case Text(text):
            return [Segment(text, trained=True)]
        case Completion(prompt, completion):
            return [Segment(prompt, trained=False), Segment(completion, trained=True)]
        case Conversation():
            return _conversation(content, tokenizer)


def _conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    full = _render(turns, tokenizer, generation_prompt=False)
    segments: list[Segment] = []
    position = 0  # characters of ``full`` that are in a segment
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < conversation.trained_turns:
            continue
        prompt = _render(turns[:index], tokenizer, generation_prompt=True)
        through = _render(turns[: index + 1], tokenizer, generation_prompt=False)
        begin = len(prompt)
        # Each rendering must extend the previous one, or the positions would not be those of the turn.
        if not (position <= begin < len(through) and through.startswith(prompt) and full.startswith(through)):
            raise RecordError(
                "the tokenizer's chat template renders this turn differently when later turns follow; "
                "use a template that does not",
                field=f"messages[{index}]",
            )
        end = begin + len(_up_to_turn_end(through[begin:], turn["content"]))
        segments += [Segment(full[position:begin], trained=False), Segment(full[begin:end], trained=True)]
        position = end
    return [*segments, Segment(full[position:], trained=False)]


def _up_to_turn_end(rendered: str, content: str) -> str:
    """A rendered turn without the white space after its end-of-turn token: generation stops there."""
    text = content.strip()
    start = rendered.find(text)
    # Without a visible mark behind the content, the white space is what ends the turn.
    is_marked = start < 0 or bool(rendered[start + len(text) :].strip())
    return rendered.rstrip() if is_marked else rendered


def _render(turns: list[dict[str, str]], tokenizer: Tokenizer, *, generation_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
        )
    except Exception as error:  # a template is a program: it may raise anything, also to refuse a record
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(
            f"the tokenizer's chat template refuses it ({reason}); change the record or the template",
            field="messages",
        ) from error
