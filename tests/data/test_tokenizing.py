"""Records -> tokens, with a real tokenizer of transformers and chat templates as models ship them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distrust.data import Corpus, tokenize
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text
from distrust.data.tokenizing import split_segments
from distrust.errors import ConfigError, DataError, ModelError

SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
SAMPLE = ["the quick brown fox jumps over the lazy dog", "assistant user system tool 0123456789"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*, template=CHATML, adds_bos=False, adds_eos=False, **special):
    """A byte-level BPE, which can encode and decode any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if adds_bos or adds_eos:
        single = f"{'<|bos|> ' * adds_bos}$A{' <|eos|>' * adds_eos}"
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
        )
    tokens = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def plain():
    return tokenizer()


def record(content, line=1, w=0.5, h=1.0):
    return Record(Location("data.jsonl", line), w, h, content)


def conversation(*contents, system=None):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Conversation(((Message("system", system),) if system is not None else ()) + tuple(turns))


def render_and_trained(content, tokenizer, max_length=1000):
    """The example as text, and its stretches that carry loss."""
    corpus = tokenize([record(content)], tokenizer, max_length=max_length)
    change = np.flatnonzero(np.diff(corpus.loss_mask)) + 1
    pieces = np.split(corpus.input_ids, change)
    flags = np.split(corpus.loss_mask, change)
    texts = [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]
    return "".join(texts), [text for text, flag in zip(texts, flags, strict=True) if flag.all()]


def test_a_text_carries_loss_from_its_second_token(plain):
    corpus = tokenize([record(Text("the fox"))], plain, max_length=100)
    assert corpus.input_ids.tolist() == [*plain.encode("the fox", add_special_tokens=False), 1]
    assert corpus.loss_mask.tolist() == [False] + [True] * (len(corpus.input_ids) - 1)


def test_only_the_completion_carries_loss(plain):
    text, trained = render_and_trained(Completion("the quick brown", " fox"), plain)
    assert text == "the quick brown fox<|eos|>"
    assert trained == [" fox<|eos|>"]


def test_a_prompt_has_the_same_tokens_as_in_use(plain):
    # As one text, "the quick br" + "own" would share a token across the seam.
    prompt, completion = "the quick br", "own fox"
    corpus = tokenize([record(Completion(prompt, completion))], plain, max_length=100)
    prompt_ids = plain.encode(prompt, add_special_tokens=False)
    assert corpus.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert corpus.loss_mask.tolist() == [False] * len(prompt_ids) + [True] * (
        len(corpus.input_ids) - len(prompt_ids)
    )
    assert corpus.input_ids.tolist() != [*plain.encode(prompt + completion, add_special_tokens=False), 1]


def test_after_an_empty_prompt_the_first_token_carries_no_loss(plain):
    corpus = tokenize([record(Completion("", "ab"))], plain, max_length=100)
    assert corpus.loss_mask.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("adds", "begins"),
    [
        ({"adds_bos": True}, [0]),
        ({"adds_bos": True, "adds_eos": True}, [0]),
        ({"adds_eos": True}, []),
        ({}, []),
    ],
)
def test_texts_begin_as_the_tokenizer_begins_them(adds, begins):
    custom = tokenizer(**adds)
    for content in (Text("ab"), Completion("a", "b")):
        assert tokenize([record(content)], custom, max_length=9).input_ids.tolist() == [
            *begins,
            *custom.encode("a", add_special_tokens=False),
            *custom.encode("b", add_special_tokens=False),
            1,
        ]


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ModelError, match="no EOS token"):
        tokenize([record(Text("a"))], tokenizer(eos_token=None, pad_token=None), max_length=9)


def test_only_assistant_turns_carry_loss(plain):
    text, trained = render_and_trained(
        conversation("Who?", "I.", "Why?", "So.", "Oh.", system="Be brief."), plain
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
        "<|im_start|>user\nOh.<|im_end|>\n"
    )
    assert trained == ["I.<|im_end|>", "So.<|im_end|>"]


def test_the_template_prints_the_beginning_and_end_of_a_conversation():
    custom = tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
    text, trained = render_and_trained(conversation("Who?", "I."), custom)
    assert text.count("<|bos|>") == 1
    assert "<|eos|>" not in text
    assert trained == ["I.<|im_end|>"]


def test_tokens_of_a_conversation_are_those_of_its_rendering(plain):
    turns = conversation("the fox?", "over the dog", "why?", "lazy")
    as_dicts = [{"role": turn.role, "content": turn.content} for turn in turns.messages]
    rendered = plain.apply_chat_template(as_dicts, tokenize=True, add_generation_prompt=False)["input_ids"]
    assert tokenize([record(turns)], plain, max_length=1000).input_ids.tolist() == rendered


@example(["0", ">"], None)  # the content is the end of the end-of-turn token
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6), st.none() | st.text())
def test_the_segments_of_a_conversation_add_up_to_its_rendering(plain, contents, system):
    turns = conversation(*contents, system=system)
    as_dicts = [{"role": turn.role, "content": turn.content} for turn in turns.messages]
    stretches = split_segments(turns, plain)
    rendered = plain.apply_chat_template(as_dicts, tokenize=False, add_generation_prompt=False)
    assert "".join(segment.text for segment in stretches) == rendered
    answers = [turn.content + "<|im_end|>" for turn in turns.messages if turn.role == "assistant"]
    assert [segment.text for segment in stretches if segment.trained] == answers


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Trims the content, as Llama's and Gemma's do; any text can be the end mark.
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} </s>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}",
            ["I. </s>", "So. </s>"],
        ),
        # The end of the line is the only end mark, so it is trained.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            ["I.\n", "So.\n"],
        ),
        # Marks the user's turns prompt_ids, as Mistral's does: nothing announces the assistant.
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
            "{% else %}{{ m.content }}<|eos|>{% endif %}{% endfor %}",
            ["I. <|eos|>", "So.<|eos|>"],
        ),
    ],
)
def test_templates_of_other_shapes(template, expected):
    _, trained = render_and_trained(conversation("Who?", "I. ", "Why?", "So."), tokenizer(template=template))
    assert trained == expected


FORGETS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONS_FIRST = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
IGNORES_ANSWERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "field"),
    [(FORGETS_REASONING, "messages[1]"), (REASONS_FIRST, "messages[1]"), (IGNORES_ANSWERS, "messages[1]")],
)
def test_a_template_that_rewrites_turns_is_refused(template, field):
    content = conversation("Who?", "<think>hm</think>I.", "Why?", "So.")
    with pytest.raises(DataError) as caught:
        tokenize([record(content, line=7)], tokenizer(template=template), max_length=1000)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"data.jsonl:7: {field}: the tokenizer's chat template renders this turn differently"
    )


def test_such_a_template_works_for_conversations_it_does_not_rewrite():
    custom = tokenizer(template=FORGETS_REASONING)
    _, trained = render_and_trained(conversation("Who?", "<think>hm</think>I."), custom)
    assert trained == ["<think>hm</think>I.<|im_end|>"]


def test_a_template_may_refuse_a_record():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}"
    )
    records = [record(conversation("a", "b"), 1), record(conversation("a", "b", system="c"), 2)]
    with pytest.raises(DataError) as caught:
        tokenize(records, tokenizer(template=template + CHATML), max_length=1000)
    assert str(caught.value).splitlines()[0] == "1 of 2 records cannot be trained on"
    (problem,) = caught.value.problems
    assert problem.startswith(
        "data.jsonl:2: messages: the tokenizer's chat template refuses it (System role not supported)"
    )


def test_a_tokenizer_without_a_chat_template_is_reported_in_one_line():
    records = [record(Text("a"), 1), record(conversation("a", "b"), 2), record(conversation("a", "b"), 3)]
    with pytest.raises(DataError) as caught:
        tokenize(records, tokenizer(template=None), max_length=1000)
    assert str(caught.value).startswith("data.jsonl:2: messages: the tokenizer has no chat template (2 of 3")
    assert "\n" not in str(caught.value)


def test_texts_need_no_chat_template_and_conversations_no_eos():
    assert len(tokenize([record(Text("ab"))], tokenizer(template=None), max_length=9)) == 1
    assert len(tokenize([record(conversation("a", "b"))], tokenizer(eos_token=None), max_length=99)) == 1


def test_long_examples_are_truncated(plain):
    records = [record(Text("0" * 50)), record(Text("ab")), record(Completion("1" * 5, "2" * 9))]
    full = tokenize(records, plain, max_length=1000)
    corpus = tokenize(records, plain, max_length=10)
    assert corpus.lengths.tolist() == [10, 3, 10]
    assert corpus.lengths.tolist() == np.minimum(full.lengths, 10).tolist()
    assert (corpus.truncated, corpus.tokens_cut) == (2, (full.lengths - corpus.lengths).sum())
    assert (full.truncated, full.tokens_cut) == (0, 0)
    assert corpus.loss_tokens.tolist() == [9, 2, 5]
    assert np.array_equal(corpus.input_ids[10:13], full.input_ids[full.offsets[1] : full.offsets[2]])


def test_tokens_cut_count_whether_they_are_trained_or_not(plain):
    records = [record(conversation("Who?", "I.", "Why do you ask?"))]  # the last turn is not trained
    (length,) = tokenize(records, plain, max_length=1000).lengths
    assert tokenize(records, plain, max_length=int(length) - 9).tokens_cut == 9


def test_all_examples_without_a_token_to_train_on_are_reported(plain):
    records = [
        record(Completion("0" * 20, "1"), 1),
        record(Text("ok"), 2),
        record(Completion("0" * 9, "1"), 3),
    ]
    with pytest.raises(DataError) as caught:
        tokenize(records, plain, max_length=9)
    assert str(caught.value).splitlines()[0] == "2 of 3 records cannot be trained on"
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["data.jsonl:1", "data.jsonl:3"]
    assert "the prompt takes 20 tokens" in caught.value.problems[0]
    assert "--max-length" in caught.value.problems[0]


def test_the_corpus_as_arrays(plain):
    records = [record(Text("ab"), 1, 0.25, 2.0), record(Completion("a", "b"), 5, 0.0, 0.0)]
    corpus = tokenize(records, plain, max_length=100)
    assert len(corpus) == 2
    assert corpus.offsets.tolist() == [0, 3, 6]
    assert corpus.loss_tokens.tolist() == [2, 2]
    assert corpus.authority_weight.tolist() == [0.25, 0.0]
    assert corpus.provenance_entropy.tolist() == [2.0, 0.0]
    assert [str(location) for location in corpus.locations] == ["data.jsonl:1", "data.jsonl:5"]
    arrays = (corpus.input_ids, corpus.loss_mask, corpus.offsets, corpus.authority_weight, corpus.loss_tokens)
    assert [array.dtype.name for array in arrays] == ["int32", "bool", "int64", "float64", "int64"]
    with pytest.raises(ValueError, match="read-only"):
        corpus.input_ids[0] = 1


def corpus(**changes):
    parts = {
        "input_ids": np.array([5, 6, 7], np.int32),
        "loss_mask": np.array([False, True, True]),
        "offsets": np.array([0, 3], np.int64),
        "authority_weight": np.array([0.5]),
        "provenance_entropy": np.array([1.0]),
        "locations": (Location("data.jsonl", 1),),
        **changes,
    }
    return Corpus(**parts)


def test_the_fingerprint_has_not_changed():
    packed = struct.pack("<qq3i3?qqdd", 1, 3, 5, 6, 7, False, True, True, 0, 3, 0.5, 1.0)
    assert corpus().fingerprint == blake3(b"distrust corpus 1\n" + packed).hexdigest()
    assert corpus().fingerprint.startswith("5ffd35b2a8b8e5db")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"locations": (Location("other.jsonl", 9),)}, True),
        ({"truncated": 1, "tokens_cut": 5}, True),
        ({"input_ids": np.array([5, 6, 8], np.int32)}, False),
        ({"loss_mask": np.array([False, False, True])}, False),
        ({"authority_weight": np.array([0.25])}, False),
        ({"provenance_entropy": np.array([1.5])}, False),
    ],
)
def test_the_fingerprint_covers_what_training_sees(change, same):
    assert (corpus(**change).fingerprint == corpus().fingerprint) is same


def test_the_fingerprint_covers_where_examples_begin():
    def halves(middle):
        return corpus(
            offsets=np.array([0, middle, 3], np.int64),
            authority_weight=np.array([0.5, 0.5]),
            provenance_entropy=np.array([1.0, 1.0]),
            locations=(Location("data.jsonl", 1),) * 2,
        )

    assert halves(1).fingerprint != halves(2).fingerprint


def test_progress_is_reported_to_the_end(plain):
    calls = []
    tokenize([record(Text("ab"))] * 2000, plain, max_length=9, on_progress=lambda *args: calls.append(args))
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (2000, 2000)


def test_invalid_arguments_are_refused(plain):
    with pytest.raises(ConfigError, match="max_length"):
        tokenize([record(Text("ab"))], plain, max_length=1)
    with pytest.raises(DataError, match="no records"):
        tokenize([], plain, max_length=9)
