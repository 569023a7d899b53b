"""Which tokens end an assistant's turn, with small templates like those of models, and with models' own."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, files

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distrust.data import turn_ends

#: Turns that the next role's mark ends, as in GLM's templates; with tools.
NEXT_ROLE = (
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.arguments.word }}</call>{% endfor %}{% endfor %}"
)


def turns(end):
    """A template that prints ``end`` behind each turn."""
    return "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"


#: Template -> marks that end a turn, and what is to be appended to an answer.
CASES = {
    turns("<|im_end|>\n"): (["<|im_end|>"], ""),
    turns("{{ eos_token }}"): (["</s>"], ""),
    turns("<|end|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}": (["<|end|>"], ""),
    turns("</answer><|im_end|>"): (["<|im_end|>"], ""),  # not the mark before it
    turns("{{ '<|return|>' if loop.last else '<|end|>' }}"): (["<|return|>"], ""),
    NEXT_ROLE: (["<|user|>", "<|observation|>"], "<|user|>"),
    turns("\n"): (["</s>"], "</s>"),
    turns(""): (["</s>"], "</s>"),
    "{% for m in messages %}{{ bos_token if m.role == 'user' }}{{ m.content }}{% endfor %}": (
        ["</s>"],
        "</s>",
    ),
    turns("### User:"): ([], ""),  # plain text: nothing stops there
    "{{ raise_exception('never') }}": ([], ""),
    "{% for m in messages %}{{ 1 / 0 }}{% endfor %}": ([], ""),
    "{{ messages[0].content }}": ([], ""),  # prints no answer
    # Picky ones: a system turn first; content as parts; alternating roles.
    "{{ raise_exception('no system') if messages[0].role != 'system' }}" + turns("<|end|>"): (
        ["<|end|>"],
        "",
    ),
    "{% for m in messages %}{{ m.content[0].text + '<|end|>' }}{% endfor %}": (["<|end|>"], ""),
}
#: The end of an answer in the templates of families, by the beginning of their files' names.
FAMILIES = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>", "gemma4": "<turn|>", "glm4": "<|user|>", "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llava_next": "</s>",
    "muse_glimmer": "<|eot|>", "nemotron_3": "<|im_end|>", "phi3": "<|end|>", "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip
#: The ends of calls that differ from those of answers. What closes a single call is never among them.
CALLS = {
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
    "glm4": "<|observation|>",
    "gptoss": "<|call|>",
}


def make_tokenizer(template):
    """Bytes, EOS, and everything in the template that looks like a mark as an added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    marks = set(re.findall(r"<[|｜]?/?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]", template)) | {
        "<|user|>",
        "<|observation|>",
    }
    tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted(marks)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", CASES)
def test_small_templates(template):
    tokenizer = make_tokenizer(template)
    ends = turn_ends(tokenizer)
    assert (tokenizer.convert_ids_to_tokens(ends.ids), ends.mark) == CASES[template]
    assert ends.call_mark == ("<|observation|>" if template == NEXT_ROLE else "")


def test_no_template_and_no_eos():
    tokenizer = make_tokenizer(turns(""))
    tokenizer.eos_token = None
    assert turn_ends(tokenizer) == ((), "", "")
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == ((), "", "")


def trl_templates():
    try:
        paths = files("trl") or []
    except PackageNotFoundError:
        return []
    return sorted((path for path in paths if path.match("trl/chat_templates/*.jinja")), key=str)


@pytest.mark.skipif(not trl_templates(), reason="trl is not installed")
def test_templates_of_models():
    for path in trl_templates():
        family = max((name for name in FAMILIES if path.name.startswith(name)), key=len, default=None)
        if family is None:
            continue  # of a later version
        tokenizer = make_tokenizer(path.locate().read_text(encoding="utf-8"))
        end, *call_ends = tokenizer.convert_ids_to_tokens(turn_ends(tokenizer).ids)
        assert end == FAMILIES[family], path.name
        assert set(call_ends) <= {CALLS.get(family)}, path.name
        assert turn_ends(tokenizer).mark == ("<|user|>" if path.name == "glm4moe.jinja" else "")
