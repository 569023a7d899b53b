"""What is trained is the text of the record, whatever the tokenizer does at the beginning of a text.

Tokenizers of the SentencePiece kind (Llama-2, Mistral, Phi-3) put a space before what they are given: texts
that are encoded in parts are not the record's any more. Others begin and end a text by special tokens, which
the record may have itself.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distrust.data import tokenize
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text

INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "### Response:\n{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


MARKS = ("<s>", "</s>")


def finish(core, *, adds_bos=True, adds_eos=False):
    """A tokenizer of transformers that begins texts with ``<s>``, and perhaps ends them with ``</s>``."""
    core.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    single = f"{'<s> ' * adds_bos}$A{' </s>' * adds_eos}"
    special = [(mark, core.token_to_id(mark)) for mark in MARKS]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = INSTRUCTIONS
    return fast


def with_spaces(scheme: str, **special):
    """Tokens are characters and some pairs; a space is put before the text, or before each part of it."""
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    pairs = [("▁", "t"), ("▁t", "h"), ("▁", "4"), ("▁4", "2"), ("4", "2"), ("▁", "▁")]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, *map("".join, pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finish(core, **special)


def of_bytes(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "Ġt"])}
    core = Tokenizer(models.BPE(vocabulary, [("Ġ", "t")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return finish(core, **special)


TOKENIZERS = {
    "bytes": of_bytes(),
    "bytes, without BOS": of_bytes(adds_bos=False),
    "bytes, with EOS": of_bytes(adds_eos=True),
    "a space before the text": with_spaces("first"),
    "a space before each part": with_spaces("always"),
}


def tokens(content, tokenizer):
    """The ids, and the indices of those that are trained."""
    record = Record(Location("data", 1), 0.0, 0.0, content)
    corpus = tokenize([record], tokenizer, max_length=1 << 20)
    return corpus.input_ids.tolist(), np.flatnonzero(corpus.loss_mask).tolist()


@pytest.fixture(params=["first", "always"])
def space_prefix(request):
    return with_spaces(request.param)


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [("The answer is ", "42", "42</s>"), ("### Response:\n", "def f(x): return x", "def f(x): return x</s>")],
)
def test_no_space_is_put_between_prompt_and_completion(space_prefix, prompt, completion, trained):
    ids, learned = tokens(Completion(prompt, completion), space_prefix)
    assert space_prefix.decode(ids) in (f"<s>{prompt}{completion}</s>", f"<s> {prompt}{completion}</s>")
    assert ids == [
        *space_prefix.encode(prompt + completion),
        space_prefix.eos_token_id,
    ]  # the tokens of one text
    assert learned == list(range(learned[0], len(ids)))
    # The first trained token may begin with the space that the prompt ends with.
    assert space_prefix.decode(ids[learned[0] :]).lstrip() == trained


def test_no_space_is_put_between_the_turns_of_a_conversation():
    """By a tokenizer that puts one only before the text: elsewhere, also a special token begins a part."""
    tokenizer = with_spaces("first")
    turns = ("user", "Hello"), ("assistant", "fine"), ("user", "What is gold?"), ("assistant", "a metal")
    conversation = Conversation(tuple(Message(*turn) for turn in turns))
    ids, learned = tokens(conversation, tokenizer)
    question = "### Instruction:\n{}\n\n### Response:\n"
    text = f"<s>{question.format('Hello')}fine</s>{question.format('What is gold?')}a metal</s>"
    assert tokenizer.decode(ids).replace("<s> #", "<s>#") == text
    pieces = np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1)
    assert [tokenizer.decode([ids[i] for i in piece]) for piece in pieces] == ["fine</s>", "a metal</s>"]


def has_no_mark(text: str) -> bool:
    """What a record may have itself, and is not added again; hypothesis draws such strings from this file."""
    return not any(mark in text for mark in MARKS)


texts = st.text(min_size=1).filter(lambda text: "▁" not in text and has_no_mark(text))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, texts)
@example("a ", "the")  # a token begins before the completion, and ends in it
@example("é", "\u200d")
@example(" ", "0")
def test_the_tokens_of_a_completion_are_those_of_its_text(name, prompt, completion):
    tokenizer = TOKENIZERS[name]
    text = prompt + completion
    assume(has_no_mark(text))
    ids, learned = tokens(Completion(prompt, completion), tokenizer)
    prefix = [tokenizer.bos_token_id] if "without" not in name else []
    assert ids == [*prefix, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    # A space that the text begins with, and one that is put there, are the same tokens.
    assert tokenizer.decode(ids[len(prefix) : -1]) in (text, text.removeprefix(" "))
    # Trained is the end of the text that has the completion, and no token before it.
    assert learned == list(range(learned[0], len(ids)))
    untrained = tokenizer.decode(ids[len(prefix) : learned[0]])
    assert any((read + "�").startswith(untrained) for read in (prompt, prompt.removeprefix(" ")))
    assert tokens(Text(text), tokenizer)[0] == ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, st.booleans(), st.booleans())
def test_a_text_begins_and_ends_once(name, text, has_bos, has_eos):
    """Texts may have their BOS and EOS themselves."""
    tokenizer = TOKENIZERS[name]
    ids, learned = tokens(Text("<s>" * has_bos + text + "</s>" * has_eos), tokenizer)
    begins = has_bos or "without" not in name
    assert ids.count(tokenizer.bos_token_id) == begins
    assert ids.count(tokenizer.eos_token_id) == 1
    assert (ids[0] == tokenizer.bos_token_id, ids[-1]) == (begins, tokenizer.eos_token_id)
    assert learned == list(range(1, len(ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("completion", [" fine</s>", "</s>"])
def test_a_completion_begins_and_ends_once(name, completion):
    tokenizer = TOKENIZERS[name]
    ids, learned = tokens(Completion("<s>[INST] Hello [/INST]", completion), tokenizer)
    assert tokenizer.decode(ids).replace("<s> ", "<s>") == f"<s>[INST] Hello [/INST]{completion}"
    assert tokenizer.decode(ids[learned[0] :]).lstrip() == completion.lstrip()


def test_what_mlx_lm_trains_of_a_prompt_and_a_completion():
    """It renders them by the chat template; here, a conversation does that: docs/coming-from.md."""
    datasets = pytest.importorskip("mlx_lm.tuner.datasets")
    tokenizer = of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|eot|>"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
    )
    record = {"prompt": "What is gold?", "completion": "A metal."}
    mlx_ids, offset = datasets.CompletionsDataset([record], tokenizer, "prompt", "completion", True).process(
        record
    )
    turns = Message("user", record["prompt"]), Message("assistant", record["completion"])
    assert tokens(Conversation(turns), tokenizer) == (mlx_ids, list(range(offset, len(mlx_ids))))
    ids, _ = tokens(Completion(**record), tokenizer)
    assert tokenizer.decode(ids) == "<s>What is gold?A metal.</s>"
