"""Hostile model and adapter folders: sizes, adapters in base folders, patterns, code, templates, index files.

Templates and tokenizers that compute for long are not among them: a hostile model folder can waste time and
memory, as docs/security.md says. Everything else must end in bounded time and memory, and none may run code.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from campaigns.fuzz import corruptions, families
from campaigns.fuzz.workplace import CODE, Workplace

MODELS = "model and adapter folders"  # label of the counts
RANDOM_MODELS = 6  # in a case
_SIZES = (10**4, 10**6, 10**9, 2**31, 2**40, 10**18, -1, 0, 1.5, "9", True, None, [10**6], {"a": 10**9})
_SIZE_NAMES = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth",
    "hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim", "vocab_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "n_positions", "num_experts",
    "num_local_experts", "rope_scaling", "sliding_window", "layer_types", "text_config", "vision_config",
)  # fmt: skip
_TYPES = (
    "gpt2",
    "opt",
    "bart",
    "t5",
    "mamba",
    "mixtral",
    "qwen2",
    "gemma3",
    "whisper",
    "clip",
    "llava",
    "x",
    1,
    None,
)
#: Regular expressions whose search takes longer than the universe lasts, if it goes back and forth.
_PATTERNS = (
    r"(.*a){30}b",
    r"((a|_|\.|[a-z])*)*$x",
    r"(.+)+\.(.+)+\.(.+)+!",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    "(" * 200,
    "*",
    "",
)
_PATTERN_FIELDS = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}", "{% include '/etc/passwd' %}",
    "{% for m in messages %}", "{{ 1 / 0 }}", "{{ raise_exception('\x1b[2J no') }}", "{{ undefined.a.b }}",
    "\x1b[2J", "{{ '\\x1b[2J' }}", "", "{{ 'a' * 1000000 }}",
    "{{ messages[0]['content'][99] }}", "{% import 'os' as os %}",
    "{{ strftime_now('%Y') }}", "{{ namespace(a=1).a }}", "{{ (1, 2) | tojson }}", 5, None, ["a"],
    [{"name": "default", "template": "x"}],
)  # fmt: skip
_PATHS = (
    "../../outside/secret",
    "/etc/passwd",
    "../outside.safetensors",
    "/dev/zero",
    "a/../../outside/secret",
    "\x1b[2J",
    "model.safetensors",
)


class Victim(NamedTuple):
    """The folders of a workplace, to be changed."""

    inside: Path
    outside: Path
    rng: Random

    @property
    def model(self) -> Path:
        return self.inside / "model"

    def any_adapter(self) -> Path:
        return self.inside / self.rng.choice(("adapter", "trainer"))

    def edit(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))


Family = Callable[[Victim], None]


def _sizes(victim: Victim) -> None:
    """Sizes in config.json that no file can hold, under any name."""
    rng = victim.rng

    def change(fields: dict[str, Any]) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            numbers = [name for name, value in fields.items() if type(value) is int]
            fields[rng.choice((*numbers, *_SIZE_NAMES))] = rng.choice(_SIZES)
        if rng.random() < 0.3:
            fields["model_type"] = rng.choice(_TYPES)

    victim.edit(victim.model / "config.json", change)


def _fields(victim: Victim) -> None:
    """Any other value in any JSON file of a model or an adapter."""
    folder = victim.rng.choice((victim.model, victim.model, victim.any_adapter()))
    file = victim.rng.choice(sorted(folder.glob("*.json")))
    victim.edit(file, lambda fields: families.replace_one(fields, victim.rng, families.any_value))


def _adapter_in_base(victim: Victim) -> None:
    """An adapter in the folder of the base model, which a library would apply without a word."""
    names = victim.rng.choice(
        (("adapter_config.json",), ("adapter_config.json", "adapter_model.safetensors"))
    )
    for name in names:
        shutil.copyfile(victim.inside / "adapter" / name, victim.model / name)
    if victim.rng.random() < 0.7:
        _set_pattern(victim.model / "adapter_config.json", victim)


def _pattern(victim: Victim) -> None:
    """Regular expressions in the settings of an adapter."""
    _set_pattern(victim.any_adapter() / "adapter_config.json", victim)


def _set_pattern(file: Path, victim: Victim) -> None:
    rng = victim.rng
    pattern = rng.choice(_PATTERNS)
    values = (pattern, pattern, [pattern], {pattern: rng.choice((4, 10**9))}, [pattern] * 10_000)
    victim.edit(file, lambda fields: fields.update({rng.choice(_PATTERN_FIELDS): rng.choice(values)}))


def _code(victim: Victim) -> None:
    """Modules and pickles that show whether they were run."""
    rng, model = victim.rng, victim.model
    (model / "modeling_evil.py").write_text(f"{CODE}\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    references = {
        name: rng.choice(("modeling_evil.Evil", "other/repository--modeling_evil.Evil")) for name in classes
    }
    kind = rng.randrange(4)
    if kind <= 1:
        file = model / ("config.json" if kind == 0 else "tokenizer_config.json")
        victim.edit(
            file, lambda fields: fields.update(auto_map=references, model_type=rng.choice(("llama", "evil")))
        )
    elif kind == 2:
        for name in ("model.safetensors", "adapter_model.safetensors"):
            (model / name).unlink(missing_ok=True)
        raw = pickle.dumps(corruptions.Calls(eval, CODE))
        (
            model / rng.choice(("pytorch_model.bin", "model.bin", "pytorch_model.pt", "tf_model.h5"))
        ).write_bytes(raw)
    else:
        victim.edit(
            model / "tokenizer_config.json",
            lambda fields: fields.update(tokenizer_class="modeling_evil.Evil"),
        )


def _template(victim: Victim) -> None:
    """Templates of conversations that fail, or reach for more than they are given."""
    template = victim.rng.choice(_TEMPLATES)
    victim.edit(victim.model / "tokenizer_config.json", lambda fields: fields.update(chat_template=template))
    if victim.rng.random() < 0.3:
        (victim.model / "chat_template.jinja").write_text(str(template))


def _index(victim: Victim) -> None:
    """An index of weights whose files are elsewhere."""
    rng, model = victim.rng, victim.model
    weights = model / "model.safetensors"
    shutil.copyfile(weights, victim.inside / "outside.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "x")
    table = {name: rng.choice(_PATHS) for name in names}
    index: Any = rng.choice(
        ({"metadata": {}, "weight_map": table}, {"weight_map": table}, {"weight_map": []}, table, [])
    )
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if rng.random() < 0.7:
        weights.unlink()


def _header(victim: Victim) -> None:
    """Weights whose header describes others."""
    rng = victim.rng
    file = rng.choice(
        (victim.model / "model.safetensors", victim.inside / "adapter" / "adapter_model.safetensors")
    )
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:end])
    families.replace_one(fields, rng, lambda _: rng.choice((families.any_value(rng), *families.DTYPES)))
    text = json.dumps(fields).encode()
    length = rng.choice((len(text), len(text), len(text), 1 << 40, (1 << 64) - 1, 0))
    file.write_bytes(length.to_bytes(8, "little") + text + raw[end:])


def _links(victim: Victim) -> None:
    """Files of a model that are links to nothing right."""
    file = victim.rng.choice(sorted(victim.model.iterdir()))
    corruptions.clear(file)
    os.symlink(victim.rng.choice(("/dev/zero", "nowhere", file.name, str(victim.outside / "secret"))), file)


def _corrupt(change: corruptions.Corruption, victim: Victim) -> None:
    folder = victim.rng.choice((victim.model, victim.model, victim.any_adapter()))
    change(victim.rng.choice(sorted(folder.iterdir())), victim.rng)


FAMILIES: dict[str, Family] = {
    "models: sizes": _sizes,
    "models: fields": _fields,
    "models: adapters in the base": _adapter_in_base,
    "models: patterns": _pattern,
    "models: code": _code,
    "models: templates": _template,
    "models: index files": _index,
    "models: headers": _header,
    "models: links": _links,
    **{f"models: {name}": partial(_corrupt, change) for name, change in corruptions.BY_NAME.items()},
}
#: What shows the fault soonest; the other commands load the same.
_COMMANDS = {
    "models: patterns": ("convert an adapter", "convert a trainer's folder"),
    "models: templates": ("train on turns",),
}
REPETITIONS = 12  # of a family


def try_family(workplace: Workplace, family: str, rng: Random, *, times: int = REPETITIONS) -> Counter[str]:
    """One family, a few times, each with a command at random."""
    counts: Counter[str] = Counter()
    for _ in range(times):
        workplace.renew()
        name = rng.choice(_COMMANDS.get(family, [*workplace.commands]))
        try:
            FAMILIES[family](Victim(workplace.inside, workplace.outside, rng))
        except (*families.NOTHING_TO_CHANGE, OSError):
            continue
        answers = workplace.try_out(name, family.removeprefix("models: "))
        counts += Counter({f"{MODELS}: {answer}": n for answer, n in answers.items()})
    return counts


def try_at_random(workplace: Workplace, rng: Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(RANDOM_MODELS):
        counts += try_family(workplace, rng.choice([*FAMILIES]), rng, times=1)
    return counts
