"""Which modules get an adapter, on both engines, and the checks of the adapted model."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import SIZES
from test_conformance import ENGINES

from distrust import TrainConfig
from distrust.engines import create_engine, generate, open_checkpoint, target_modules
from distrust.engines.runtime import require_causal
from distrust.engines.target_modules import Adaptable, as_trained, select, shortest
from distrust.errors import ConfigError, ModelError, ResumeRefused
from distrust.export import export
from distrust.testing.models import make_model

either = pytest.mark.parametrize("engine", ENGINES[1:])

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    "mamba": {"state_size": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 40},
    "bloom": {"n_layer": 2, "n_head": 4, "max_position_embeddings": None},
    # The first layer has experts, the second none.
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4},
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": False},
}
LAYER = "self_attn.q_proj self_attn.o_proj mlp.gate mlp.experts.up mlp.shared.gate_proj act.gate"
LINEAR = [f"model.layers.{number}.{name}" for number in range(12) for name in LAYER.split()]
OTHERS = ["model", "model.norm", *(f"model.layers.{number}.mlp.experts" for number in range(12))]
FAKE = Adaptable(
    engine="a framework",
    shapes=dict.fromkeys([*LINEAR, "lm_head", "embed"], (4, 4)),
    linear=LINEAR,
    modules=[*OTHERS, *LINEAR, "lm_head", "embed"],
)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Folders of small models by family."""
    tokenizer = make_model(tmp_path_factory.mktemp("tokenizer"))
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        if family not in folders:
            folders[family] = Path(shutil.copytree(tokenizer, tmp_path_factory.mktemp("models") / family))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = AutoConfig.for_model(family, **{**SIZES, "vocab_size": 259, **FAMILIES[family]})
                AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return make


def create(engine: str, model: Path, **options: Any) -> Any:
    return create_engine(TrainConfig(engine=engine, model=str(model), lora_rank=2, threads=1, **options))


def names_of(*targets: str, **options: Any) -> list[str]:
    return select(TrainConfig(target_modules=targets or ("all-linear",), **options), FAKE).names


def test_the_forms_of_an_entry():
    assert names_of("q_proj") == names_of("*.q_proj") == names_of("q_*") == names_of("re:.*\\.q_proj")
    assert len(names_of("q_proj")) == 12
    assert names_of("layers.3.self_attn.*") == [f"model.layers.3.self_attn.{name}_proj" for name in "qo"]
    assert names_of("lm_head", "q_proj", layers=None) == [*names_of("q_proj"), "lm_head"]
    assert names_of("*_proj", exclude_modules=("o_proj", "mlp.*")) == names_of("q_proj")
    assert names_of(exclude_modules=("lm_head", "mlp.gate", "embed")) == names_of()  # not adapted anyway
    assert names_of("q_proj", layers="1,8-10,3") == [
        f"model.layers.{number}.self_attn.q_proj" for number in (1, 3, 8, 9, 10)
    ]


def test_all_linear_includes_experts_and_leaves_out_routers():
    left_out = [name for name in LINEAR if name.endswith("mlp.gate")]
    assert names_of() == [name for name in LINEAR if name not in left_out]  # and not another "gate"
    assert names_of("mlp.gate") == left_out
    assert set(names_of("all-linear", "mlp.gate", "lm_head")) == {*LINEAR, "lm_head"}
    lines = select(TrainConfig(lora_rank=3, layers="0-1"), FAKE).lines
    assert lines[0].startswith("adapted: 2 q_proj, 2 o_proj, 2 up, 2 gate_proj")
    assert lines[0].endswith("(4 x 4), rank 3")
    assert lines[1] == "not adapted: 12 mlp.gate (routers)"


REFUSED = {
    "--target-modules q_proj vproj gate_up: vproj, gate_up are not in the model": {
        "target_modules": ("q_proj", "vproj", "gate_up")
    },
    "--target-modules *.nothing: .*adapt are: .*q_proj": {"target_modules": ("*.nothing",)},
    "--target-modules norm: norm is no linear module": {"target_modules": ("norm",)},
    "--target-modules re:(: is no valid pattern: ": {"target_modules": ("re:(",)},
    "--target-modules lm_head: lm_head selects nothing in --layers 3": {
        "target_modules": ("lm_head",),
        "layers": "3",
    },
    "--layers 3-12: the model's layers are 0 to 11": {"layers": "3-12"},
    "--exclude-modules none: none is not in the model": {"exclude_modules": ("none",)},
    "--exclude-modules *: excludes all modules": {"exclude_modules": ("*",)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_entry_that_selects_nothing_is_refused(message):
    pattern = re.escape(message).replace("\\.\\*", ".*")
    with pytest.raises(ConfigError, match=pattern) as refusal:
        select(TrainConfig(**REFUSED[message]), FAKE)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("layers", ["", "a", "3-", "-1", "5-3", "1;2", "1,,2", "9" * 5000])
def test_layers_are_numbers_and_ranges(layers):
    with pytest.raises(ConfigError, match=r"--layers is .*give numbers and ranges, such as 0,4,8-15"):
        TrainConfig(layers=layers)


@given(st.sets(st.sampled_from(sorted(FAKE.modules)), min_size=1))
def test_the_shortest_names_select_the_same_modules(names):
    short = shortest(names, FAKE.modules)
    assert {m for m in FAKE.modules if any(m == s or m.endswith(f".{s}") for s in short)} == names


def test_a_recorded_pattern_is_never_matched():
    endless = TrainConfig(target_modules=("re:(([a-z_0-9.])+)+!",), layers="3")
    for names in (None, ["re:(a+)+b"], [3], []):
        with pytest.raises(ConfigError, match="a file: does not record which modules"):
            as_trained(endless, names, ["model.norm.weight"], where="a file")
    opened = as_trained(endless, ["a.q_proj"], [], where="a file")
    assert (opened.target_modules, opened.layers) == (("a.q_proj",), None)
    tensors = [
        "base_model.model.a.b.lora_A.weight",
        "a.c.lora_b",
        "base_model.model.e.lora_embedding_A.default",
    ]
    assert as_trained(endless, None, tensors, where="a file").target_modules == ("a.b", "a.c", "e")
    with pytest.raises(ConfigError, match="a file: does not record which modules"):
        as_trained(endless, None, ["re:(a+)+b.lora_a"], where="a file")


@either
def test_both_engines_adapt_the_same(engine, tiny_model):
    built = create(engine, tiny_model, target_modules=("*_proj",), exclude_modules=("mlp.*",), layers="1")
    assert built.adapted == ("adapted: 1 q_proj, 1 k_proj, 1 v_proj, 1 o_proj (32 x 32), rank 2",)
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in built.state().model}
    assert names == {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    with pytest.raises(ConfigError, match=r"modules q_proj vproj: vproj is not in the model; .*k_proj"):
        create(engine, tiny_model, target_modules=("q_proj", "vproj"))


@either
def test_a_run_with_patterns_is_opened_by_names(engine, train, tmp_path):
    options = {"engine": engine, "target_modules": ("re:.*q_proj",), "exclude_modules": ("layers.0.*",)}
    train(tmp_path, **options, lora_rank=2, stop_after=1)
    opened, file = open_checkpoint(tmp_path)
    assert list(file.header.config["target_modules"]) == ["re:.*q_proj"]
    assert len(opened.state().model) == 2
    with pytest.raises(ResumeRefused, match="--exclude-modules was layers"):
        train(tmp_path, **{**options, "exclude_modules": ()}, lora_rank=2)


@either
def test_a_weight_that_is_not_finite_is_named(engine, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model: its weight model\.layers\.1\.mlp\.up_proj\.weight holds"):
        create(engine, folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_that_is_not_causal_is_refused(family, dtype, model_of):
    with pytest.raises(ModelError, match="is not causal: a later token changes the outputs before it"):
        create("torch", model_of(family), dtype=dtype)


def test_outputs_that_are_not_numbers_are_refused(model_of, tmp_path):
    folder = Path(shutil.copytree(model_of("gpt2"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] *= 1e30  # their variance overflows
    weights["transformer.ln_f.weight"] *= 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="model: its outputs for a few tokens are not numbers"):
        create("torch", folder)


def test_errors_of_a_forward_pass_are_one_line():
    def fail(ids):
        raise TypeError("forward() got an unexpected keyword argument 'memory'")

    with pytest.raises(ModelError, match=r"--model m: its forward pass fails .*argument 'memory'"):
        require_causal(fail, vocabulary=9, name="m")


@pytest.mark.parametrize(
    ("family", "targets", "number"),
    [("falcon", ("all-linear",), 8), ("gemma3_text", ("embed_tokens", "q_proj"), 3)],
)
def test_variants_of_plain_layers_are_adapted(family, targets, number, train, tmp_path, model_of):
    options = {"model": str(model_of(family)), "lora_rank": 2, "target_modules": targets, "max_steps": 3}
    train(tmp_path / "run", stop_after=1, **options)
    ended, _ = train(tmp_path / "run", **options)
    assert ended.state_digest == train(tmp_path / "alone", **options)[0].state_digest
    assert len(open_checkpoint(tmp_path / "run")[0].state().model) == 2 * number
    export(tmp_path / "run", tmp_path / "adapter", format="adapter")


def test_what_an_earlier_version_adapted_is_read_from_its_tensors(train, tmp_path, model_of, monkeypatch):
    model = str(model_of("qwen2_moe"))

    def of_modules_only(config, choices):  # and no record of them
        return replace(select(replace(config, exclude_modules=("experts.*",)), choices), recorded={})

    with monkeypatch.context() as patch:
        patch.setattr(target_modules, "select", of_modules_only)
        train(tmp_path / "run", model=model, lora_rank=2, max_steps=1)
    opened, file = open_checkpoint(tmp_path / "run")
    assert file.header.config["target_modules"] == ("all-linear",)
    assert not any(".experts." in name for name in opened.state().model)
    assert generate(opened, "hi", max_new_tokens=2, temperature=0, seed=0) is not None
    export(tmp_path / "run", tmp_path / "adapter", format="adapter")


@pytest.mark.parametrize(
    "settings",
    [{"stop_strings": ["x"]}, {"return_dict_in_generate": True}, {"num_beams": 3, "num_return_sequences": 2}],
)
def test_generation_settings_of_a_model_that_ask_for_more_than_a_text(settings, model_of):
    engine = create("torch", model_of("gpt2"))
    vars(engine.model.generation_config).update(settings)
    assert isinstance(generate(engine, "hi", max_new_tokens=2, temperature=0, seed=0), str)


def test_an_error_in_generating_is_one_line(model_of):
    engine = create("torch", model_of("gpt2"))
    engine.model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ModelError, match="the model cannot generate, with its generation config: ValueError"):
        generate(engine, "hi", max_new_tokens=2, temperature=0, seed=0)


def test_the_advice_names_the_modules_of_the_model(model_of):
    with pytest.raises(ConfigError, match=r"adapt are: dt_proj, embeddings, in_proj, lm_head, x_proj$"):
        create("torch", model_of("mamba"))


@pytest.mark.parametrize(
    ("family", "length"), [("mpt", 24), ("gpt2", 40), ("bloom", None), ("llama4_text", 64)]
)
def test_the_context_length_under_any_name(family, length, model_of):
    assert create("torch", model_of(family)).context_length == length


@pytest.mark.parametrize("family", ["llama4_text", "qwen2_moe"])
def test_a_mixture_of_experts_resumes_exactly(family, train, tmp_path, model_of):
    options = {"model": str(model_of(family)), "lora_rank": 2, "lora_dropout": 0.0, "max_steps": 3}
    train(tmp_path / "run", stop_after=1, **options)
    ended, _ = train(tmp_path / "run", **options)
    assert ended.state_digest == train(tmp_path / "alone", **options)[0].state_digest


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls transformers by an old name
def test_plain_peft_loads_adapted_experts(train, tmp_path, model_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = model_of("qwen2_moe")
    train(tmp_path / "run", model=str(model), lora_rank=2, lora_dropout=0.0, max_steps=3)
    engine, _ = open_checkpoint(tmp_path / "run")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = engine.model(input_ids=ids).logits
        for form in ("adapter", "merged"):
            export(tmp_path / "run", tmp_path / form, format=form)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert {name.split(".")[-3] for name in engine.state().model} >= {"experts", "base_layer", "gate_proj"}


def test_shared_experts_alone_are_not_taken_for_the_experts(model_of):
    adapted = create("torch", model_of("qwen2_moe"), target_modules=("shared_expert.*",), layers="0").adapted
    assert adapted == (
        "adapted: 1 gate_proj, 1 up_proj (16 x 32), rank 2",
        "adapted: 1 down_proj (32 x 16), rank 2",
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"dora": True}])
def test_what_peft_cannot_do_with_experts_is_refused(options, model_of):
    with pytest.raises(ConfigError, match="peft cannot combine it with an adapter of ") as error:
        create("torch", model_of("mixtral"), **options)
    assert str(error.value).startswith(f"--{next(iter(options)).replace('_', '-')}: ")
    excluded = str(error.value).split("--exclude-modules ")[1].split()
    assert create("torch", model_of("mixtral"), **options, exclude_modules=tuple(excluded)).adapted


def test_experts_on_mlx_resume_exactly(train, tmp_path, model_of):
    pytest.importorskip("mlx_lm")
    options = {"engine": "mlx", "model": str(model_of("mixtral")), "lora_rank": 2, "max_steps": 3}
    train(tmp_path / "run", stop_after=1, **options)
    ended, _ = train(tmp_path / "run", **options)
    assert ended.state_digest == train(tmp_path / "alone", **options)[0].state_digest
    opened, _ = open_checkpoint(tmp_path / "run")
    assert len(opened.state().model) == 2 * 2 * 7
    assert create("mlx", model_of("mixtral")).adapted[-1] == "not adapted: 2 block_sparse_moe.gate (routers)"
