"""Records -> tokens: one mechanism for texts, completions and conversations.

A record becomes segments, its ids are the ids of the segments one after the other, and a token is learned
if its segment is. Texts and completions begin as the tokenizer begins a sequence (with its BOS token, or
with none) and end with the EOS token, learned, so that the model learns to stop. What a conversation
begins and ends with is printed by the chat template, here as in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from distrust.data.corpus import Classes, Corpus
from distrust.data.reading import DatasetStats, dataset_stats
from distrust.data.record_errors import RecordError, RecordErrors
from distrust.data.records import Completion, Conversation, Record, Text
from distrust.data.tokenizer import Tokenizer, encode_all
from distrust.errors import ConfigError, DataError, ModelError

#: What is tokenized together: so many records, or so many characters of them.
_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Tokenizes records that are in memory, and cuts each at ``max_length`` tokens.

    Args:
        records: at least one.
        tokenizer: a tokenizer of transformers, or anything that does what the protocol says.
        max_length: the most tokens of an example, 2 or more.
        on_progress: called after some records with the number done and the number of all.

    Returns:
        The corpus, in the order of the records.

    Raises:
        DataError: there are no records, a conversation cannot be rendered, or an example has no token
            left to learn from; all such records at once, as ``check`` tells them.
        ModelError: the tokenizer has no EOS token.
        ConfigError: ``max_length`` is less than 2.
    """
    if not records:
        raise DataError("there are no records to tokenize")
    blocks = tokenize_in_blocks(
        records, tokenizer, stats=dataset_stats(records), max_length=max_length, on_progress=on_progress
    )
    return _concatenate(list(blocks))


def tokenize_in_blocks(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    stats: DatasetStats,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Corpus]:
    """The same for records of which no more than a block is held in memory.

    Args:
        records: each is taken once.
        tokenizer: as for ``tokenize``.
        stats: what there is of them.
        max_length: as for ``tokenize``.
        on_progress: as for ``tokenize``.

    Yields:
        The corpora of blocks of records, which make up the corpus one after the other.

    Raises:
        DataError, ModelError, ConfigError: as ``tokenize`` does, once all records have been seen.
    """
    if max_length < 2:
        raise ConfigError(f"max_length must be 2 or more, not {max_length}: the first token is never learned")
    frame = _frame(stats, tokenizer)
    problems = RecordErrors()
    done = 0
    for batch in _batches(records):
        block = _block(batch, tokenizer, frame=frame, max_length=max_length, problems=problems)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, stats.records)
        if not problems.records:
            yield block
    if problems.records:
        raise problems.to_data_error(f"{problems.records} of {done} records cannot be trained on")


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
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
    """One tokenized record: its ids, whether each is learned, and how many tokens were cut off."""

    record: Record
    ids: list[int]
    loss_mask: list[bool]
    cut: int


def _frame(census: DatasetStats, tokenizer: Tokenizer) -> _Frame:
    """Asks the tokenizer once for what the records need of it, so that one message tells what it lacks."""
    if census.conversations and tokenizer.chat_template is None:
        raise DataError(
            f"{census.first_conversation}: messages: the tokenizer has no chat template "
            f"({census.conversations} of {census.records} records need one); use a chat model's, or give "
            "prompt + completion"
        )
    if census.conversations == census.records:
        return _Frame([], [])
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no EOS token, so the model could not learn to stop; set eos_token"
        )
    return _Frame(bos_prefix(tokenizer), [eos])


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


def _block(
    batch: Sequence[Record], tokenizer: Tokenizer, *, frame: _Frame, max_length: int, problems: RecordErrors
) -> Corpus:
    """The corpus of a batch; records that cannot be trained on are left out of it, and told."""
    parts: list[tuple[Record, list[Segment]]] = []
    for record in batch:
        try:
            parts.append((record, [part for part in segments(record.content, tokenizer) if part.text]))
        except RecordError as problem:
            problems.add(record.location, [problem])
    encoded = iter(encode_all(tokenizer, [part.text for _, stretches in parts for part in stretches]))
    examples: list[_Example] = []
    for record, stretches in parts:
        pieces = [(next(encoded), part.trained) for part in stretches]
        if not isinstance(record.content, Conversation):
            pieces = [(frame.begin, False), *pieces, (frame.end, True)]
        try:
            examples.append(_example(record, pieces, max_length))
        except RecordError as problem:
            problems.add(record.location, [problem])
    return _corpus(examples)


def _example(record: Record, pieces: Sequence[tuple[list[int], bool]], max_length: int) -> _Example:
    ids = list(chain.from_iterable(tokens for tokens, _ in pieces))
    learned = list(chain.from_iterable([learn] * len(tokens) for tokens, learn in pieces))
    learned[:1] = [False] * bool(learned)  # nothing predicts the first token
    kept = learned[:max_length]
    if not any(kept):
        raise RecordError(_no_trained_tokens(learned, max_length))
    return _Example(record, ids[:max_length], kept, cut=len(ids) - len(kept))


def _no_trained_tokens(learned: list[bool], max_length: int) -> str:
    if not any(learned):
        return "no token to learn: none that is learned comes after another; remove the record"
    return (
        f"no token to learn within max_length {max_length}: what is only read takes {learned.index(True)} "
        "tokens; raise --max-length, or shorten the prompt"
    )


def _corpus(examples: Sequence[_Example]) -> Corpus:
    lengths = [len(example.ids) for example in examples]
    classes = Classes()
    class_of = classes.number(example.record.source for example in examples)
    return Corpus(
        input_ids=np.array(list(chain.from_iterable(example.ids for example in examples)), np.int32),
        loss_mask=np.array(list(chain.from_iterable(example.loss_mask for example in examples)), np.bool_),
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        authority_weight=np.array([example.record.authority_weight for example in examples], np.float64),
        provenance_entropy=np.array([example.record.provenance_entropy for example in examples], np.float64),
        locations=tuple(example.record.location for example in examples),
        truncated=sum(example.cut > 0 for example in examples),
        tokens_cut=sum(example.cut for example in examples),
        classes=classes.names,
        class_of=class_of,
    )


def _concatenate(parts: Sequence[Corpus]) -> Corpus:
    begins = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + begin for part, begin in zip(parts, begins[:-1], strict=True)]
    classes = Classes()
    class_of = [classes.number(part.classes[number] for number in part.class_numbers) for part in parts]
    return Corpus(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        authority_weight=np.concatenate([part.authority_weight for part in parts]),
        provenance_entropy=np.concatenate([part.provenance_entropy for part in parts]),
        locations=tuple(chain.from_iterable(part.locations for part in parts)),
        truncated=sum(part.truncated for part in parts),
        tokens_cut=sum(part.tokens_cut for part in parts),
        classes=classes.names,
        class_of=np.concatenate(class_of),
    )


class Segment(NamedTuple):
    """A stretch of an example's text.

    Attributes:
        text: the stretch.
        learn: whether its tokens carry loss.
    """

    text: str
    trained: bool


def segments(content: Text | Completion | Conversation, tokenizer: Tokenizer) -> list[Segment]:
    """The stretches of a record's text, in order.

    Raises:
        RecordError: the tokenizer's chat template cannot render the conversation turn by turn.
    """
    match content:
        case Text(text):
            return [Segment(text, trained=True)]
        case Completion(prompt, completion):
            return [Segment(prompt, trained=False), Segment(completion, trained=True)]
        case Conversation():
            return _conversation(content, tokenizer)


def _conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    whole = _render(turns, tokenizer, answer_next=False)
    found: list[Segment] = []
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < conversation.trained_turns:
            continue
        before = _render(turns[:index], tokenizer, answer_next=True)
        through = _render(turns[: index + 1], tokenizer, answer_next=False)
        begin = len(before)
        if not (done <= begin < len(through) and through.startswith(before) and whole.startswith(through)):
            raise RecordError(
                "the tokenizer's chat template does not print this turn the same wherever it stands; "
                "use a template that does",
                field=f"messages[{index}]",
            )
        end = begin + len(_through_end_mark(through[begin:], turn["content"]))
        found += [Segment(whole[done:begin], trained=False), Segment(whole[begin:end], trained=True)]
        done = end
    return [*found, Segment(whole[done:], trained=False)]


def _through_end_mark(printed: str, content: str) -> str:
    """A turn as printed, without the white space after its end mark: nothing is generated after that."""
    stripped = printed.rstrip()
    # Without any other mark the white space is what ends the turn.
    return printed if stripped.endswith(content.rstrip()) else stripped


def _render(turns: list[dict[str, str]], tokenizer: Tokenizer, *, answer_next: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
    except Exception as error:  # a template is a program: it may raise anything, its own refusals too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(
            f"the tokenizer's chat template refuses it ({reason}); change the record or the template",
            field="messages",
        ) from error
