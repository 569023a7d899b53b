"""Records -> tokens, with a real tokenizer of transformers and chat templates as models ship them."""

from __future__ import annotations

import struct
from datetime import date
from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distrust.data import Corpus, tokenize
from distrust.data.corpus import Counts
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text
from distrust.errors import ConfigError, DataError, DistrustWarning, ModelError

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


def test_a_token_with_characters_of_prompt_and_completion_is_trained(plain):
    prompt, completion = "the quick br", "own fox"
    corpus = tokenize([record(Completion(prompt, completion))], plain, max_length=100)
    assert corpus.input_ids.tolist() == [*plain.encode(prompt + completion, add_special_tokens=False), 1]
    trained = plain.decode(corpus.input_ids[corpus.loss_mask])
    assert trained == " brown fox<|eos|>"[-len(trained) :]
    assert len(trained) > len(completion + "<|eos|>")


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
def test_a_conversation_decodes_to_its_rendering_and_its_answers_are_trained(plain, contents, system):
    turns = conversation(*contents, system=system)
    as_dicts = [{"role": turn.role, "content": turn.content} for turn in turns.messages]
    text, trained = render_and_trained(turns, plain, max_length=10**6)
    assert text == plain.apply_chat_template(as_dicts, tokenize=False, add_generation_prompt=False)
    assert trained == [turn.content + "<|im_end|>" for turn in turns.messages if turn.role == "assistant"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Trims the content, as Llama's and Gemma's do; any text can be the end mark.
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} </s>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}",
            ["I. </s>", "So. </s>"],
        ),
        # Nothing but the end of the line ends a turn: EOS is added, to a sequence for each turn.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            ["I.\n<|eos|>", "So.\n<|eos|>"],
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


def sequences(content, tokenizer, **options):
    """Each sequence of an example as text, with its trained stretches in brackets."""
    corpus = tokenize([record(content)], tokenizer, **{"max_length": 1000, **options})
    offsets = corpus.bounds
    texts = []
    for begin, end in pairwise(offsets.tolist()):
        ids, mask = corpus.input_ids[begin:end], corpus.loss_mask[begin:end]
        pieces = zip(
            np.split(ids, cuts := np.flatnonzero(np.diff(mask)) + 1), np.split(mask, cuts), strict=True
        )
        texts.append("".join(("[%s]" if m[0] else "%s") % tokenizer.decode(piece) for piece, m in pieces))
    return texts


def test_each_turn_is_a_sequence_where_the_template_rewrites_earlier_ones():
    content = conversation("Who?", "<think>hm</think>I.", "Why?", "So.")
    first = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert sequences(content, tokenizer(template=FORGETS_REASONING)) == [
        f"{first}[<think>hm</think>I.<|im_end|>]\n",
        f"{first}I.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[So.<|im_end|>]\n",
    ]
    # The template does not rewrite these: one sequence.
    assert (
        len(sequences(conversation("Who?", "I.", "Why?", "So."), tokenizer(template=FORGETS_REASONING))) == 1
    )


def test_a_turn_begins_where_the_generation_prompt_and_the_rendering_part():
    content = conversation("Who?", "<b>I</b>")  # its first character is also that of <think>
    expected = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[<b>I</b><|im_end|>]\n"
    assert sequences(content, tokenizer(template=REASONS_FIRST)) == [expected]
    # What the prompt has opened is not trained.
    content = conversation("Who?", "<think>\nhm</think>I.")
    (text,) = sequences(content, tokenizer(template=REASONS_FIRST))
    assert text.endswith("assistant\n<think>\n[hm</think>I.<|im_end|>]\n")


def test_the_prompt_of_inference_replaces_turns_that_the_answer_rewrites():
    # Drops earlier answers, once there is a later one, but not while that is generated.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role != 'assistant' or loop.last or messages[-1].role != 'assistant' %}{{ m.content }}"
        "{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert sequences(conversation("a", "b", "c", "d"), tokenizer(template=template)) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n"
    ]


MARKED = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")


@pytest.mark.parametrize("space", ["", " "])
def test_the_templates_own_marks_come_first(space):
    # They leave the end of the turn out, which is trained all the same.
    template = MARKED.replace("<|im_end|>", f"{space}<|im_end|>")
    (text,) = sequences(conversation("Who?", "I."), tokenizer(template=template))
    expected = f"<|im_start|>user\nWho?{space}<|im_end|>\n<|im_start|>assistant\n[I.{space}<|im_end|>]\n"
    assert text == expected


def test_marks_without_an_end_of_turn_are_not_enough():
    template = MARKED.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}")
    assert sequences(conversation("Who?", "I."), tokenizer(template=template)) == [
        "<|im_start|>user\nWho?<|im_start|>assistant\n[I.<|im_start|>]"
    ]


def test_marks_are_those_of_their_turn():
    """What one turn says does not stand for what the marks leave out of another."""
    last = MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    )
    (text,) = sequences(conversation("Who?", "I", "Sure?", "I am"), tokenizer(template=last))
    assert "assistant\n[I<|im_end|>]" in text
    assert "assistant\n[I am<|im_end|>]" in text


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_conversation_may_begin_with_the_assistant(template):
    turns = Conversation((Message("assistant", "Hi."), Message("user", "Who?"), Message("assistant", "I.")))
    (text,) = sequences(turns, tokenizer(template=template))
    assert text == (
        "<|im_start|>assistant\n[Hi.<|im_end|>]\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n[I.<|im_end|>]\n"
    )


def test_every_instruction_is_in_the_text():
    first = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + CHATML.replace(
        "messages %}", "messages if m.role != 'system' %}"
    )
    turns = conversation("a", "b", "c", "d", system="Kindly").messages
    middle = Conversation((*turns[:3], Message("system", "Briefly"), *turns[3:]))
    assert len(sequences(Conversation(turns), tokenizer(template=first))) == 1
    with pytest.raises(DataError, match=r"messages\[3\]\.content: the tokenizer's chat template leaves out"):
        tokenize([record(middle)], tokenizer(template=first), max_length=1000)


def test_a_text_that_ends_with_eos_and_a_line_gets_no_second_one(plain):
    (text,) = sequences(Text("ab<|eos|>\n"), plain)
    assert text == plain.decode(plain.encode("a")) + "[b<|eos|>\n]"


def test_turns_that_cannot_fit_are_not_rendered():
    custom = WithoutOffsets(tokenizer(template=FORGETS_REASONING))
    answer = "<think>hm</think>" + "0" * 500
    corpus = tokenize([record(conversation(*["0" * 500, answer] * 300))], custom, max_length=1200)
    assert corpus.counts.truncated == 1
    assert custom.renderings < 150


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (Conversation((Message("user", "a"), Message("assistant", "b")), tools=({"name": "f"},)), "tools"),
        (
            Conversation(
                (Message("user", "a"), Message("assistant", "b", fields={"reasoning_content": "c"}))
            ),
            "messages[1].reasoning_content (the reasoning)",
        ),
        (
            Conversation(
                (
                    Message("user", "a"),
                    Message("assistant", "", fields={"tool_calls": [{"function": {"name": "f"}}]}),
                )
            ),
            "messages[1].tool_calls",
        ),
        (conversation("a", "b<|im_end|>"), "messages[1].content"),
    ],
)
def test_what_the_template_cannot_print_is_refused(plain, content, field):
    with pytest.raises(DataError) as caught:
        tokenize([record(content)], plain, max_length=1000)
    (problem,) = caught.value.problems
    assert problem.startswith(f"data.jsonl:1: {field}: ")


def test_an_end_of_turn_that_a_user_quotes_is_a_warning(plain):
    with pytest.warns(DistrustWarning, match=r"data.jsonl:1: messages\[0\] contains <\|eos\|>"):
        tokenize([record(conversation("a<|eos|>", "b"))] * 3, plain, max_length=1000)


@pytest.mark.parametrize("call", ["strftime_now(format='%Y')", "strftime_now('%Y' ~ '%d')"])
def test_a_date_that_cannot_be_fixed_is_refused(call):
    custom = tokenizer(template=f"{{{{ {call} }}}}{CHATML}")
    with pytest.raises(DataError, match="prints the date in a form that is not written out"):
        tokenize([record(conversation("a", "b"))], custom, max_length=1000)


def test_an_answer_that_is_not_printed_is_refused():
    with pytest.raises(DataError, match=r"messages\[1\]: the tokenizer's chat template prints nothing of it"):
        tokenize([record(conversation("a", "b"))], tokenizer(template=IGNORES_ANSWERS), max_length=1000)
    drops = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(DataError, match=r"messages\[1\]\.content: the tokenizer's chat template leaves out"):
        tokenize([record(conversation("a", "c</think>b"))], tokenizer(template=drops), max_length=1000)


def test_turns_and_records_have_weights(plain):
    turns = Conversation(
        (
            Message("user", "a"),
            Message("assistant", "b", weight=0),
            Message("user", "c"),
            Message("assistant", "d", weight=0.5),
            Message("user", "e"),
            Message("assistant", "f", weight=2),
        )
    )
    weighted = Record(Location("data.jsonl", 1), 0.5, 1.0, turns, weight=3)
    corpus = tokenize([weighted], plain, max_length=1000)
    assert corpus.token_weights[corpus.loss_mask].tolist() == [1.5, 1.5, 6, 6]
    assert corpus.loss_weights.tolist() == [15]
    assert tokenize([record(conversation("a", "b"))], plain, max_length=100).token_weights is None


def test_records_of_weight_zero_and_those_too_long_are_left_out_and_counted(plain):
    none = Record(Location("data.jsonl", 1), 0.5, 1.0, Text("ab"), weight=0)
    records = [none, record(Completion("0" * 20, "1"), 2), record(Text("ok"), 3), record(Text("0" * 20), 4)]
    corpus = tokenize(records, plain, max_length=9)
    assert [location.line for location in corpus.locations] == [3, 4]
    assert (corpus.counts.weightless, corpus.counts.dropped, corpus.counts.truncated) == (1, 1, 1)
    assert len(tokenize(records, plain, max_length=9, on_long="drop")) == 1
    with pytest.raises(
        DataError, match=r"2 of 4 records .*\n.*:2: takes more tokens than max_length 9.*21 tokens.*also"
    ):
        tokenize(records, plain, max_length=9, on_long="error")
    with pytest.raises(DataError, match=r"no record is left to train on \(1 too long .*, 1 of weight 0\)"):
        tokenize(records[:2], plain, max_length=9)


def test_bos_and_eos_of_a_text_are_not_repeated():
    custom = tokenizer(adds_bos=True)
    with_both = tokenize([record(Text("<|bos|>ab<|eos|>"))], custom, max_length=99)
    without = tokenize([record(Text("ab"))], custom, max_length=99)
    assert with_both.input_ids.tolist() == without.input_ids.tolist()
    assert with_both.loss_mask.tolist() == without.loss_mask.tolist()


def test_the_date_of_a_template_is_fixed():
    custom = tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    (text,) = sequences(conversation("a", "b"), custom, today=date(2031, 2, 3))
    assert text.startswith("03 Feb 2031<|im_start|>")


def test_a_tokenizer_that_changes_the_text_is_noticed():
    custom = tokenizer()
    custom.backend_tokenizer.normalizer = normalizers.Lowercase()
    corpus = tokenize([record(Text("ab")), record(Text("All is Well"), 2)], custom, max_length=99)
    assert corpus.counts.altered == 1
    assert corpus.counts.first_altered == "data.jsonl:2: 'All is Well' became 'all is well'"


class WithoutOffsets:
    """A tokenizer that only encodes and decodes, as those that are not built on the Rust core."""

    def __init__(self, fast):
        self._fast = fast
        self.bos_token_id, self.eos_token_id, self.pad_token_id = fast.bos_token_id, fast.eos_token_id, None
        self.chat_template = fast.chat_template
        self.renderings = 0

    def encode(self, text, *, add_special_tokens):
        return self._fast.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids, **options):
        return self._fast.decode(ids, **options)

    def apply_chat_template(self, *arguments, **options):
        self.renderings += 1
        return self._fast.apply_chat_template(*arguments, **options)


@given(st.text("the quick.é", max_size=12), st.text("the quick.é", min_size=1, max_size=12).filter(str.strip))
def test_a_completion_has_the_same_trained_tokens_without_offsets(plain, prompt, completion):
    content = record(Completion(prompt, completion))
    fast, slow = (tokenize([content], t, max_length=99) for t in (plain, WithoutOffsets(plain)))
    assert fast.input_ids.tolist() == slow.input_ids.tolist()
    assert fast.loss_mask.tolist() == slow.loss_mask.tolist()


@given(st.text("the quick.é", max_size=12), st.text("the quick.é", min_size=1, max_size=12).filter(str.strip))
def test_a_completion_is_encoded_with_its_prompt(plain, prompt, completion):
    corpus = tokenize([record(Completion(prompt, completion))], plain, max_length=99)
    ids = plain.encode(prompt + completion, add_special_tokens=False)
    assert corpus.input_ids.tolist() == [*ids, plain.eos_token_id]
    first = int(np.argmax(corpus.loss_mask))
    assert first == 1 or prompt.startswith(plain.decode(corpus.input_ids[:first]))


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
    assert corpus.counts == Counts(truncated=2, tokens_cut=(full.lengths - corpus.lengths).sum())
    assert full.counts == Counts()
    assert corpus.loss_tokens.tolist() == [9, 2, 5]
    assert np.array_equal(corpus.input_ids[10:13], full.input_ids[full.offsets[1] : full.offsets[2]])


def test_tokens_cut_count_whether_they_are_trained_or_not(plain):
    records = [record(conversation("Who?", "I.", "Why do you ask?"))]  # the last turn is not trained
    (length,) = tokenize(records, plain, max_length=1000).lengths
    assert tokenize(records, plain, max_length=int(length) - 9).counts.tokens_cut == 9


def test_all_examples_without_a_token_to_train_on_are_reported(plain):
    records = [
        record(Completion("0" * 20, "1"), 1),
        record(Text("ok"), 2),
        record(Completion("0" * 9, "x"), 3),
    ]
    with pytest.raises(DataError) as caught:
        tokenize(records, plain, max_length=9, strict=True)
    assert str(caught.value).splitlines()[0] == "2 of 3 records cannot be trained on"
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["data.jsonl:1", "data.jsonl:3"]
    assert "the prompt takes 19 tokens" in caught.value.problems[0]
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
        ({"counts": Counts(truncated=1, tokens_cut=5)}, True),
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
