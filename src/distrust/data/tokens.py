"""Records -> tokens: one mechanism for texts, completions and conversations.

A record becomes segments, its ids are the ids of the segments one after the other, and a token is learned
if its segment is. Texts and completions begin as the tokenizer begins a sequence (with its BOS token, or
with none) and end with the EOS token, learned, so that the model learns to stop. What a conversation
begins and ends with is printed by the chat template, here as in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrust.data.corpus import Corpus
from distrust.data.problems import RecordError, collected
from distrust.data.records import Conversation, Record
from distrust.data.segments import segments
from distrust.data.tokenizer import Tokenizer
from distrust.errors import ConfigError, DataError, ModelError


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Tokenizes the records, and cuts each at ``max_length`` tokens.

    Args:
        records: at least one.
        tokenizer: a tokenizer of transformers, or anything that does what the protocol says.
        max_length: the most tokens of an example, 2 or more.
        on_progress: called after each record with the number done and the number of all.

    Returns:
        The corpus, in the order of the records.

    Raises:
        DataError: there are no records, a conversation cannot be rendered, or an example has no token
            left to learn from; all such records at once, as ``read_records`` tells them.
        ModelError: the tokenizer has no EOS token.
        ConfigError: ``max_length`` is less than 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length must be 2 or more, not {max_length}: the first token is never learned")
    if not records:
        raise DataError("there are no records to tokenize")
    frame = _frame(records, tokenizer)
    examples: list[_Example] = []
    problems: list[str] = []
    for done, record in enumerate(records, 1):
        try:
            examples.append(_example(record, tokenizer, frame=frame, max_length=max_length))
        except RecordError as problem:
            problems.append(f"{record.location}: {problem}")
        if on_progress is not None:
            on_progress(done, len(records))
    if problems:
        raise collected(f"{len(problems)} of {len(records)} records cannot be trained on", problems)
    return _corpus(records, examples)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with, in training and in use: BOS, if the tokenizer itself puts it there."""
    begins_with = tokenizer.encode("", add_special_tokens=True)[:1]
    return begins_with if begins_with == [tokenizer.bos_token_id] else []


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands before and after a text or a completion."""

    begin: list[int]
    end: list[int]


@dataclass(frozen=True, slots=True)
class _Example:
    """One tokenized record: ids int32[t], learned bool[t], and how many tokens were cut off."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    cut: int


def _frame(records: Sequence[Record], tokenizer: Tokenizer) -> _Frame:
    """Asks the tokenizer once for what the records need of it, so that one message tells what it lacks."""
    chats = [record for record in records if isinstance(record.content, Conversation)]
    if chats and tokenizer.chat_template is None:
        raise DataError(
            f"{chats[0].location}: messages: the tokenizer has no chat template ({len(chats)} of "
            f"{len(records)} records need one); use a chat model's, or give prompt + completion"
        )
    if len(chats) == len(records):
        return _Frame([], [])
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no EOS token, so the model could not learn to stop; set eos_token"
        )
    return _Frame(beginning(tokenizer), [eos])


def _example(record: Record, tokenizer: Tokenizer, *, frame: _Frame, max_length: int) -> _Example:
    pieces = [
        (tokenizer.encode(segment.text, add_special_tokens=False), segment.learn)
        for segment in segments(record.content, tokenizer)
        if segment.text
    ]
    if not isinstance(record.content, Conversation):
        pieces = [(frame.begin, False), *pieces, (frame.end, True)]
    ids = np.array([token for tokens, _ in pieces for token in tokens], np.int32)
    learned = np.repeat([learn for _, learn in pieces], [len(tokens) for tokens, _ in pieces])
    learned[:1] = False  # nothing predicts the first token
    kept = learned[:max_length]
    if not kept.any():
        raise RecordError(_nothing_to_learn(learned, max_length))
    return _Example(ids[:max_length], kept, cut=len(ids) - len(kept))


def _nothing_to_learn(learned: NDArray[np.bool_], max_length: int) -> str:
    if not learned.any():
        return "no token to learn: none that is learned comes after another; remove the record"
    return (
        f"no token to learn within max_length {max_length}: what is only read takes {int(learned.argmax())} "
        "tokens; raise --max-length, or shorten the prompt"
    )


def _corpus(records: Sequence[Record], examples: Sequence[_Example]) -> Corpus:
    lengths = [len(example.ids) for example in examples]
    return Corpus(
        input_ids=np.concatenate([example.ids for example in examples]),
        learned=np.concatenate([example.learned for example in examples]),
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        authority_weight=np.array([record.authority_weight for record in records], np.float64),
        provenance_entropy=np.array([record.provenance_entropy for record in records], np.float64),
        locations=tuple(record.location for record in records),
        truncated=sum(example.cut > 0 for example in examples),
        tokens_cut=sum(example.cut for example in examples),
    )
