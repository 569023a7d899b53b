"""The frozen base, divided among the ranks: equal bits, less memory, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrust.config import TrainConfig
from distrust.errors import ConfigError
from distrust.testing.models import make_model

CASES: dict[str, dict[str, Any]] = {
    "untied, dropout, packing, evaluation": {"lora_dropout": 0.2, "packing": True, "max_length": 40},
    "tied, bfloat16, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Of two families, one with an output layer that is the embedding, as in the bundled model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = make_model(tmp_path_factory.mktemp("tied"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 264, "max_position_embeddings": 128}
    of_family = AutoConfig.for_model("qwen2", tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(of_family).save_pretrained(tied)
    return {"untied": tiny_model, "tied": tied}


@pytest.fixture
def runs(models, tiny_config, eval_data, tmp_path):
    def runs(name, **options):
        return [
            {
                **vars(tiny_config(tmp_path / f"{name}-{number}")),
                "model": str(models[case.split(",")[0]]),
                "gradient_accumulation": 3,
                "max_steps": 2,
                "save_every": 1,
                "eval_data": str(eval_data),
                "eval_every": 2,
                **of_case,
                **options,
            }
            for number, (case, of_case) in enumerate(CASES.items())
        ]

    return runs


TRAIN = "tests.ranks.shard_scenarios:train"


def test_a_run_goes_on_with_any_number_of_ranks_with_and_without_shards(world, runs):
    undisturbed = world.values(TRAIN, count=1, runs=runs("undisturbed", schedule_steps=2))[0]
    for count, options in [(1, {"max_steps": 1}), (3, {"shard": "base"})]:  # slices of unequal sizes
        results = world.values(TRAIN, count=count, runs=runs("parts", schedule_steps=2, **options))
        assert [warned for _, warned in results[0]] == [[], []], "nothing says that bits differ"
    assert results[0] == undisturbed


def test_each_rank_holds_its_share_and_a_failed_pass_leaves_no_trace(world, models):
    for model in map(str, models.values()):
        scenario = {"scenario": "tests.ranks.shard_scenarios:engine_steps", "model": model, "lora_rank": 2}
        alone = world.values(count=1, **scenario)[0]
        shares = world.values(count=2, shard="base", fails=True, **scenario)
        numbers = alone["parameters"][1] - alone["parameters"][0]
        for share in shares:
            assert share.pop("share") <= numbers / 2 * 1.1
            assert share.pop("share after") == 0
            assert share == {name: alone[name] for name in share}


def test_loads_and_passes_keep_no_memory_descriptors_or_threads(world, tmp_path):
    """glibc keeps what gathers free in its heap, and does not find it again when it aligns the next one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
    (make_model(tmp_path) / "model.safetensors").unlink()
    of_family = AutoConfig.for_model("llama", vocab_size=264, max_position_embeddings=64, **sizes)
    AutoModelForCausalLM.from_config(of_family).save_pretrained(tmp_path, max_shard_size="4MB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    scenario = {"scenario": "tests.ranks.shard_scenarios:growth", "shard": "base", "lora_rank": 1}
    for result in world.values(count=2, model=str(tmp_path), **scenario):
        assert result["MiB"] < 30, (
            "of a model of 11 MiB, each rank gathers a layer at a time; kept, they take 50 MiB"
        )
        assert result["descriptors"] <= 0
        assert result["threads"] <= 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_rank": 0}, "--shard is 'base': give a --lora-rank"),
        ({"dora": True}, "--dora is True: leave it out with --shard base"),
        ({"compile": True}, "--compile is True: leave it out with --shard base"),
        ({"quantization": "4bit"}, "--quantization is '4bit': leave it out with --shard base"),
    ],
)
def test_options_that_it_cannot_be_combined_with(options, reason):
    with pytest.raises(ConfigError) as refused:
        TrainConfig(shard="base", **options)
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)


def test_it_needs_ranks_that_make_equally_many_passes(world, models):
    scenario = {"scenario": "tests.ranks.shard_scenarios:refusal", "shard": "base"}
    alone = world.values(count=1, model=str(models["tied"]), **scenario)[0]
    assert alone.startswith("--shard base: there is only one process; start several with --nproc")
    uneven = world.values(count=2, gradient_accumulation=3, model=str(models["tied"]), **scenario)
    assert all("give a multiple of 2 to --gradient-accumulation" in text for text in uneven), uneven


def test_each_refusal_is_one_line_that_comes_before_loading(world):
    refusals = world.values("tests.ranks.shard_scenarios:refusals", count=2)[0]
    for text, reason in zip(
        refusals,
        [
            "a program passes the model; give TrainConfig(model=...)",
            "only --engine torch divides the model among ranks",
            "requires torch 2.13 or later; this is",
            "that --device auto selects, not cuda:0",
            "the base is frozen, but model.layers.0",
        ],
        strict=True,
    ):
        assert text.startswith("--shard base: ")
        assert reason in text
        assert "\n" not in text
