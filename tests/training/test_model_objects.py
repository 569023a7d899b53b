"""A model and a tokenizer that a program has loaded, instead of a name."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrust import ConfigError, DistrustTrainer, ModelError, ResumeRefused, TrainConfig
from distrust.cli import main
from distrust.engines import open_checkpoint
from distrust.engines.torch.adapter import add_adapter
from distrust.option_values import MODEL_OBJECT
from distrust.run_record import RunRecord
from distrust.testing.models import make_model
from distrust.testing.toy_engine import ToyEngine


@pytest.fixture
def objects(tiny_model):
    return {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 0}, {"dtype": "bfloat16"}, {"reload_every": 3, "save_every": 2, "max_steps": 4}],
)
def test_objects_train_like_their_folder_and_stay_as_they_are(train, objects, tiny_config, tmp_path, options):
    model, options = objects["model"], {"max_steps": 2, **options}
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    expected, _ = train(tmp_path / "by-name", **options)
    trainer = DistrustTrainer(tiny_config(tmp_path / "run", **options), observers=(), **objects)
    assert trainer.train().state_digest == expected.state_digest
    final = model.state_dict()
    assert list(final) == list(initial)
    assert all(torch.equal(final[name], value) for name, value in initial.items())
    assert [type(module) for module in model.modules()] == kinds
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert model.config.use_cache


def test_a_stopped_run_resumes_with_the_same_objects(train, objects, tiny_config, tmp_path):
    expected, _ = train(tmp_path / "alone", max_steps=3)

    def stop(event):
        if trainer.state.step == 1:
            trainer.stop()

    config = tiny_config(tmp_path / "run", max_steps=3)
    trainer = DistrustTrainer(config, observers=[stop], **objects)
    assert trainer.train().step == 1
    ended = asyncio.run(DistrustTrainer(config, observers=(), **objects).train_async())
    assert ended.state_digest == expected.state_digest


def test_other_weights_are_refused(objects, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=1)
    DistrustTrainer(config, observers=(), **objects).train()
    with torch.no_grad():
        objects["model"].get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(ResumeRefused, match=f"--model {MODEL_OBJECT}: its content is not that of the run"):
        DistrustTrainer(tiny_config(tmp_path / "run", max_steps=2), observers=(), **objects).train()


def test_a_model_that_would_train_to_other_bits_than_its_folder_is_refused(objects, tiny_config, tmp_path):
    """The rotary frequencies of a cast model are rounded, and stay so."""
    cast = objects | {"model": objects["model"].to(torch.bfloat16)}
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match=rf"inv_freq is bfloat16.*dtype=torch\.{dtype}\)"):
            DistrustTrainer(tiny_config(tmp_path / "run", dtype=dtype), observers=(), **cast).train()


def test_a_model_that_cannot_be_copied_gives_one_line(objects, tiny_config, tmp_path):
    objects["model"].lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"^the model cannot be copied: .*lock.*; give TrainConfig"):
        DistrustTrainer(tiny_config(tmp_path / "run"), observers=(), **objects).train()


def test_commands_ask_where_the_model_is(objects, tiny_model, tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / MODEL_OBJECT)  # never looked up
    capsys.readouterr()
    ended = DistrustTrainer(tiny_config("run", max_steps=1), observers=(), **objects).train()
    for arguments in (["generate", "run", "--prompt", "ore"], ["export", "run", "--to", "adapter"]):
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert (
            f"{ended.path.name}: was trained on the model {MODEL_OBJECT}, which cannot be loaded" in message
        )
        assert "give its folder or hub name with --model" in message
        assert message.count("\n") == 1
        assert main([*arguments, "--model", str(tiny_model)]) == 0
    with pytest.raises(ModelError, match="a program passed the model"):
        DistrustTrainer(tiny_config("run", model=MODEL_OBJECT, max_steps=2), observers=()).train()
    _, file = open_checkpoint(tmp_path / "run", model=str(tiny_model))
    assert RunRecord.from_header(file.header).settings["model"] == MODEL_OBJECT


def test_what_cannot_be_trained_is_one_line(objects, tiny_config, tmp_path):
    model, tokenizer = objects["model"], objects["tokenizer"]
    config = tiny_config(tmp_path / "run")
    named = tiny_config(tmp_path / "run", model="a-model")
    refused = [
        (config, {"model": model}, "give model and tokenizer together"),
        (config, {"tokenizer": tokenizer}, "give model and tokenizer together"),
        (config, {**objects, "engine": ToyEngine()}, "neither an engine"),
        (named, objects, "nor config.model"),
        (TrainConfig(), objects, f"--model {MODEL_OBJECT}: give the examples"),
    ]
    for chosen, arguments, message in refused:
        with pytest.raises(ConfigError, match=message) as caught:
            DistrustTrainer(chosen, **arguments)
        assert "\n" not in str(caught.value)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    adapted = add_adapter(AutoModelForCausalLM.from_config(model.config), config)[0]
    refused = [
        (
            {},
            {"model": torch.nn.Linear(2, 2)},
            "Linear and .* are not a model",
        ),
        ({}, {"tokenizer": "a-model"}, "LlamaForCausalLM and str are not"),
        ({}, {"model": adapted}, "PeftModel.* are not a model"),
        ({}, {"model": adapted.base_model.model}, "an adapter"),
        ({}, {"model": empty}, "not in memory"),
        ({"engine": "mlx"}, {}, "load the model themselves"),
        ({"quantization": "8bit"}, {}, "load the model themselves"),
    ]
    for options, changed, message in refused:
        trainer = DistrustTrainer(
            tiny_config(tmp_path / "run", **options), observers=(), **{**objects, **changed}
        )
        with pytest.raises(ConfigError, match=message) as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
