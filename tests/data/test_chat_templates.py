"""Every chat template of popular models, with conversations of each kind: what is trained is what it prints
for the assistant.

The templates are those in the package trl, read at test time, and six of our own. ``printed`` finds what a
template prints without the product.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from printed import CONVERSATIONS, SPECIAL, Printed, Template, ends_turn, print_turns
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distrust.data import Corpus, bos_prefix, tokenize
from distrust.data.records import Completion, Conversation, Location, Message, Record
from distrust.errors import DataError

#: What looks like a special token in the text of a template.
MARKS = re.compile(r"<[|｜/]?[A-Za-z][\w▁|:]*[|｜]?>|\[/?[A-Z_]{3,}\]")
TOOLS = "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>\n{% endif %}"
BODY = (
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = f"{TOOLS}{{% for m in messages %}}<|{{{{ m.role }}}}|>\n{BODY}<|end|>\n{{% endfor %}}{PROMPT}"
OURS = {
    "plain": PLAIN,
    "drops the reasoning of earlier turns": PLAIN.replace(
        "if m.reasoning_content", "if m.reasoning_content and loop.last"
    ),
    "prints the date": "{{ strftime_now('%d %B %Y') }}\n" + PLAIN,
    "ends a turn with the next one": PLAIN.replace(f"{BODY}<|end|>\n", BODY),
    "marks what is generated": PLAIN.replace(
        f"{BODY}<|end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}"
        f"{BODY}<|end|>{{% endgeneration %}}{{% else %}}{BODY}<|end|>{{% endif %}}{{{{ '\n' }}}}",
    ),
    "reads lists of parts": PLAIN.replace(
        "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"
    ),
}


def templates_of_trl() -> dict[str, str]:
    try:
        files = importlib.metadata.files("trl") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        file.stem: Path(str(file.locate())).read_text(encoding="utf-8")
        for file in sorted(files)
        if file.suffix == ".jinja"
    }


TEMPLATES = OURS | templates_of_trl()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE to which the marks of all templates are tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sample = ["Answer Ask Rule Reason Result Tool Argument Given Meaning Purpose the user assistant system"]
    core.train_from_iterator(
        sample, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    marks = {mark for template in TEMPLATES.values() for mark in MARKS.findall(template)}
    marks |= {f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
    core.add_special_tokens([AddedToken(mark, normalized=False) for mark in sorted(marks)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def records(conversations) -> list[Record]:
    return [
        Record(Location("data", number), 0.5, 1.0, conversation)
        for number, conversation in enumerate(conversations, 1)
    ]


def refused_and_trained(conversations: list[Conversation], tokenizer) -> tuple[set[int], list[list[Printed]]]:
    """The numbers of the conversations that are refused, and the sequences of each other one."""
    everything = records(conversations)
    refused: set[int] = set()
    try:
        corpus = tokenize(everything, tokenizer, max_length=1 << 20)
    except DataError as error:
        refused = {int(problem.split(":")[1]) for problem in error.problems or [str(error)]}
        accepted = [record for record in everything if record.location.line not in refused]
        if not accepted:
            return refused, []
        corpus = tokenize(accepted, tokenizer, max_length=1 << 20)
    return refused, list(examples(corpus, tokenizer))


def examples(corpus: Corpus, tokenizer) -> Iterator[list[Printed]]:
    """For each example, its sequences as text, with the trained stretches."""
    offsets = corpus.bounds
    for first, last in pairwise(corpus.offsets):
        bounds = offsets[(offsets >= first) & (offsets <= last)]
        sequences = []
        for begin, end in pairwise(bounds):
            ids, mask = corpus.input_ids[begin:end], corpus.loss_mask[begin:end]
            pieces = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
            trained = [tokenizer.decode(ids[piece]) for piece in pieces if mask[piece].all()]
            sequences.append(Printed(tokenizer.decode(ids), tuple(trained)))
        yield sequences


def require_the_same(
    actual: list[Printed], expected: list[Printed], template: Template, conversation: Conversation
) -> None:
    """What is trained is what the template prints, and the end of the turn where it prints none."""
    assert len(actual) == len(expected)
    for product, oracle in zip(actual, expected, strict=True):
        assert len(product.trained) == len(oracle.trained)
        appended = product.text.removeprefix(oracle.text)
        assert product.text == oracle.text + appended
        for trained, turn in zip(product.trained, oracle.trained, strict=True):
            end = trained.removeprefix(turn)
            assert trained == turn + end
            assert not end or ends_turn(end, turn, template, conversation), trained
            assert MARKS.fullmatch(trained.rstrip(), trained.rstrip().rindex("<")), trained
        assert product.trained[-1].endswith(appended)


def require_matrix(tokenizer, template: Template) -> None:
    """Each kind of conversation is trained as the template prints it, or the template itself refuses it."""
    expected = {kind: print_turns(template, each) for kind, each in CONVERSATIONS.items()}
    refused, trained = refused_and_trained(list(CONVERSATIONS.values()), tokenizer)
    kinds = list(CONVERSATIONS)
    assert {kinds[number - 1] for number in refused} == {kind for kind in kinds if expected[kind] is None}
    actual = iter(trained)
    for kind, sequences in expected.items():
        if sequences is not None:
            require_the_same(next(actual), sequences, template, CONVERSATIONS[kind])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_prints_for_the_assistant_is_trained(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    require_matrix(tokenizer, Template(TEMPLATES[name]))


def test_the_templates_of_ours_have_the_properties_that_they_are_for():
    """Else a row of the matrix would show nothing."""
    one, two, reasoning = (
        {name: print_turns(Template(OURS[name]), CONVERSATIONS[kind]) for name in OURS}
        for kind in ("one turn", "two turns", "reasoning in two turns")
    )
    assert all(len(sequences) == 1 for sequences in (*one.values(), *two.values()))
    assert {name for name in OURS if len(reasoning[name]) > 1} == {"drops the reasoning of earlier turns"}
    assert f"{date.today():%d %B %Y}\n" in one["prints the date"][0].text
    assert one["ends a turn with the next one"][0].trained == ("Answer1",)
    assert one["plain"][0].trained == ("Answer1<|end|>",)


#: Contents that templates which trim them print as they are, and which are no marks.
contents = st.text(min_size=1).filter(lambda text: text.strip() == text and not MARKS.search(text))
turns = st.lists(st.tuples(contents, contents, st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    st.sampled_from(["plain", "prints the date", "marks what is generated", "reads lists of parts"]),
    turns.filter(lambda turns: any(weight for _, _, weight in turns)),
    st.none() | contents,
)
def test_any_conversation_is_trained_as_it_is_rendered(tokenizer, name, turns, system):
    """With texts of any kind, and turns that are read but not trained."""
    tokenizer.chat_template = OURS[name]
    rendered = f"{date.today():%d %B %Y}\n" if name == "prints the date" else ""
    messages = [] if system is None else [Message("system", system)]
    rendered += "" if system is None else f"<|system|>\n{system}<|end|>\n"
    for question, answer, weight in turns:
        messages += [Message("user", question), Message("assistant", answer, weight)]
        rendered += f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
    corpus = tokenize(records([Conversation(tuple(messages))]), tokenizer, max_length=1 << 20)
    ((sequence,),) = examples(corpus, tokenizer)
    assert sequence.text == rendered
    assert sequence.trained == tuple(f"{answer}<|end|>" for _, answer, weight in turns if weight)
    # Each token has the weight of its turn, and each end of a turn occurs once.
    weights = [weight for _, answer, weight in turns if weight for _ in tokenizer.encode(f"{answer}<|end|>")]
    factors = np.ones(len(corpus.loss_mask)) if corpus.token_weights is None else corpus.token_weights
    assert factors[corpus.loss_mask].tolist() == weights
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert np.count_nonzero(corpus.input_ids == end) == len(messages)


@settings(max_examples=30)
@given(st.lists(st.tuples(contents, contents, contents), min_size=1, max_size=3))
def test_a_turn_that_is_rewritten_later_is_trained_as_it_is_in_use(tokenizer, turns):
    """Each turn in a sequence of its own, in which earlier turns have lost their reasoning."""
    tokenizer.chat_template = OURS["drops the reasoning of earlier turns"]
    history, expected, messages = "", [], []
    for question, reasoning, answer in turns:
        prompt = f"{history}<|user|>\n{question}<|end|>\n<|assistant|>\n"
        generated = f"<think>{reasoning}</think>{answer}<|end|>"
        expected.append(Printed(f"{prompt}{generated}\n", (generated,)))
        history = f"{prompt}{answer}<|end|>\n"
        fields = {"reasoning_content": reasoning}
        messages += [Message("user", question), Message("assistant", answer, fields=fields)]
    corpus = tokenize(records([Conversation(tuple(messages))]), tokenizer, max_length=1 << 20)
    assert len(corpus) == 1  # for weighting and the plan of the data
    assert next(examples(corpus, tokenizer)) == expected


def real_tokenizers() -> list[Path]:
    """What scripts/real_tokenizers.py has installed."""
    folder = os.environ.get("DISTRUST_TOKENIZERS") or Path(__file__).parents[2] / "runs/tokenizers"
    return sorted(path.parent for path in Path(folder).glob("*/tokenizer_config.json"))


@pytest.fixture(scope="module", params=real_tokenizers(), ids=lambda folder: folder.name)
def real(request):
    return AutoTokenizer.from_pretrained(request.param)


def test_the_template_of_a_real_tokenizer(real):
    if real.chat_template is None:
        pytest.skip("it has none")
    require_matrix(real, Template(real.chat_template, tuple(real.special_tokens_map.items())))


@settings(max_examples=200)
@given(st.text(min_size=1), st.text(min_size=1))
def test_a_real_tokenizer_reproduces_any_text(real, prompt, completion):
    """But for what its normalizer, or its sign for a space, changes by design."""
    text = prompt + completion
    if real.backend_tokenizer.normalizer is not None:
        text = real.backend_tokenizer.normalizer.normalize_str(text)
    text = text.replace("▁", " ")
    corpus = tokenize(records([Completion(prompt, completion)]), real, max_length=1 << 20)
    ids = corpus.input_ids.tolist()
    assert ids[-1] == real.eos_token_id
    ids = ids[:-1][len(bos_prefix(real)) :]
    assert real.decode(ids) == text
    assert corpus.loss_mask[-1]
