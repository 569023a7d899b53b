"""Adapter folders of peft and mlx-lm: exported by either engine, loaded by their programs, imported again."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from distrust import CheckpointManager
from distrust.cli import main
from distrust.cli.train import parse
from distrust.engines import open_checkpoint
from distrust.engines.state_conversion import target_modules
from distrust.errors import CheckpointUnreadable, ConfigError, ResumeRefused
from distrust.export import export
from distrust.importers.convert import convert
from distrust.importers.safe_load import safe_errors
from distrust.testing.models import make_model, train_a_little, write_records

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore::DeprecationWarning"
)

IDS = [0, 70, 81, 72, 3, 99, 100, 101]
KINDS = {
    "lora": {"lora_rank": 4, "lora_alpha": 24.0},
    "dora of some": {"lora_rank": 2, "dora": True, "rslora": True, "target_modules": ("q_proj", "down_proj")},
}
ENGINES = ("torch", "mlx")


@pytest.fixture(autouse=True)
def _beside_the_model(folder_of_model, monkeypatch):
    """The current folder is where exported adapters name their base model: they contain no absolute paths."""
    monkeypatch.chdir(folder_of_model)


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory) -> Path:
    folder_of_model = tmp_path_factory.mktemp("adapters")
    make_model(folder_of_model / "model")
    write_records(folder_of_model / "records.jsonl")
    return folder_of_model


def train(folder_of_model, out, *, steps=3, **options):
    return train_a_little(folder_of_model, out, max_steps=steps, **options)


@pytest.fixture(scope="module")
def runs(folder_of_model):
    return {
        (engine, kind): train(folder_of_model, folder_of_model / f"{engine} {kind}", engine=engine, **options)
        for engine in ENGINES
        for kind, options in KINDS.items()
    }


@torch.no_grad()
def by_torch(model):
    return model.eval()(input_ids=torch.tensor([IDS])).logits.float().numpy()


def by_mlx(model):
    model.eval()
    return np.asarray(model(mx.array([IDS])))


def own_logits(run):
    engine = open_checkpoint(run)[0]
    return by_torch(engine.model) if engine.framework == "torch" else by_mlx(engine.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_its_program_loads_it_and_computes_the_same(folder_of_model, runs, tmp_path, engine, kind):
    run = runs[engine, kind]
    expected = own_logits(run)
    export(run, tmp_path / "mlx", format="mlx")
    loaded, _ = mlx_lm.load(str(folder_of_model / "model"), adapter_path=str(tmp_path / "mlx"))
    assert np.abs(by_mlx(loaded) - expected).max() < 1e-5
    export(run, tmp_path / "peft", format="adapter")
    base = AutoModelForCausalLM.from_pretrained(folder_of_model / "model", dtype=torch.float32)
    untrained = by_torch(base)
    assert np.abs(by_torch(PeftModel.from_pretrained(base, tmp_path / "peft")) - expected).max() < 1e-5
    export(run, tmp_path / "merged", format="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert np.abs(by_torch(merged) - expected).max() < 1e-4
    assert np.abs(untrained - expected).max() > 0.01


def test_each_engine_has_its_own_default(runs, tmp_path):
    forms = {engine: export(runs[engine, "lora"], tmp_path / engine).format for engine in ENGINES}
    assert forms == {"torch": "adapter", "mlx": "mlx"}
    described = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert described["lora_parameters"]["scale"] == 6.0
    assert "self_attn.q_proj" in described["lora_parameters"]["keys"]
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "adapter_path=" in card


@pytest.mark.parametrize("form", ["mlx", "adapter"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_imported_adapter_starts_a_run_with_the_same_weights(
    folder_of_model, runs, tmp_path, engine, form
):
    """Export from one engine, import, and resume with the other."""
    run = runs[engine, "lora"]
    export(run, tmp_path / "folder", format=form)
    (result,) = convert(tmp_path / "folder", tmp_path / "run")
    assert (result.step, result.outcome) == (0, "converted")
    second_engine = "mlx" if engine == "torch" else "torch"
    with pytest.warns(match="is imported"):
        train(
            folder_of_model,
            tmp_path / "run",
            steps=1,
            learning_rate=0.0,
            engine=second_engine,
            **KINDS["lora"],
        )
    assert np.abs(own_logits(tmp_path / "run") - own_logits(run)).max() < 1e-5


@pytest.mark.parametrize("layers", [1, 2])
def test_the_printed_command_resumes_training(folder_of_model, runs, tmp_path, capsys, layers):
    """An adapter of the last layer only, as mlx-lm makes for large models, and one of all layers."""
    folder = export(runs["mlx", "lora"], tmp_path / "folder").path
    weights = load_file(folder / "adapters.safetensors")
    last = {name: array for name, array in weights.items() if layers == 2 or ".layers.1." in name}
    assert 0 < len(last) <= len(weights)
    save_file(last, folder / "adapters.safetensors")
    assert main(["convert", str(folder), "--to", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].partition("distrust ")[2]
    command = printed.replace("MODEL", str(folder_of_model / "model")).replace(
        "DATA", str(folder_of_model / "records.jsonl")
    )
    assert "STEPS" not in command
    assert ("layers.1." in command) == (layers == 1)
    words = [*shlex.split(command), "--max-steps", "1", "--batch-size", "2", "--device", "cpu"]
    assert main(words) == 0
    assert "is imported (mlx-lm adapter)" in capsys.readouterr().err
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [0, 1]


def test_the_printed_command_has_all_non_default_options(runs, tmp_path, capsys):
    folder = export(runs["mlx", "dora of some"], tmp_path / "folder").path
    assert main(["convert", str(folder), "--to", str(tmp_path / "run")]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("distrust train")[2])
    config = parse(words)
    assert (config.dora, config.lora_rank) == (True, 2)
    assert config.target_modules == ("mlp.down_proj", "self_attn.q_proj")


NAMED = {
    "model.layers.0.self_attn.q_proj model.layers.1.self_attn.q_proj": "self_attn.q_proj",
    "transformer.h.0.attn.c_proj transformer.h.1.attn.c_proj": "attn.c_proj",
    "model.layers.0.mlp.experts.0.w1 model.layers.0.mlp.experts.2.w1": "mlp.experts.0.w1 mlp.experts.2.w1",
    "model.layers.1.q model.layers.2.q": "model.layers.1.q model.layers.2.q",
    "model.layers.0.q model.layers.1.k": "model.layers.0.q model.layers.1.k",
    "enc.layers.0.q enc.layers.1.q dec.layers.0.q": "q",
    "enc.layers.0.q dec.layers.0.k": "dec.layers.0.k enc.layers.0.q",
    "head model.layers.0.q": "head model.layers.0.q",
    "": "",
}


@pytest.mark.parametrize("modules", NAMED)
@pytest.mark.parametrize("form", ["{}.lora_a", "base_model.model.{}.lora_B.weight"])
def test_target_modules_follow_from_the_names(modules, form):
    assert target_modules(form.format(module) for module in modules.split()) == NAMED[modules].split()
    assert target_modules(f"{module}.weight" for module in modules.split()) == []


def test_an_adapter_of_other_modules_names_them(folder_of_model, runs, tmp_path):
    folder = export(runs["mlx", "lora"], tmp_path / "folder").path
    weights = load_file(folder / "adapters.safetensors")
    some = {name: array for name, array in weights.items() if "q_proj" in name}
    save_file(some, folder / "adapters.safetensors")
    convert(folder, tmp_path / "run")
    with pytest.raises(
        ResumeRefused, match=r"not in the checkpoint\n(.*\n)*.*--target-modules self_attn.q_proj$"
    ):
        train(folder_of_model, tmp_path / "run", steps=1, engine="mlx", **KINDS["lora"])


def test_export_and_import_preserve_every_bit(runs, tmp_path):
    run = runs["mlx", "lora"]
    export(run, tmp_path / "peft", format="adapter")
    convert(tmp_path / "peft", tmp_path / "run")
    back = export_state(tmp_path / "run", run)
    trained = CheckpointManager(run / "checkpoints").load_latest().model
    assert back.keys() == trained.keys()
    assert all(np.array_equal(back[name], trained[name]) for name in trained)


def export_state(run, like):
    """The weights of the converted checkpoint, by mlx-lm's names."""
    from distrust.engines.state_conversion import arrays_to_mlx

    return arrays_to_mlx(CheckpointManager(run / "checkpoints").load(0).model)


def test_invalid_adapters_are_refused(folder_of_model, runs, tmp_path, capsys):
    valid = export(runs["mlx", "lora"], tmp_path / "good").path
    config = json.loads((valid / "adapter_config.json").read_text())
    tensors = load_file(valid / "adapters.safetensors")
    name = next(iter(tensors))
    broken = {
        "fine_tune_type": (config | {"fine_tune_type": "full"}, None),
        "lora_parameters": ({"model": "x"}, None),
        "the rank of its weights": (
            config | {"lora_parameters": config["lora_parameters"] | {"rank": 5}},
            None,
        ),
        "scale is not a number": (config | {"lora_parameters": {"rank": 4, "scale": "x"}}, None),
        "not part of a plain LoRA": (config, {**tensors, "strange": tensors[name]}),
        "not a valid file": (config, b"no tensors"),
        "not a JSON object": ([], None),
    }
    for number, (reason, (described, weights)) in enumerate(broken.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(described))
        if isinstance(weights, bytes):
            (folder / "adapters.safetensors").write_bytes(weights)
        else:
            save_file(weights or tensors, folder / "adapters.safetensors")
        assert main(["convert", str(folder), "--to", str(tmp_path / f"run{number}")]) == 1
        output = capsys.readouterr()
        assert reason in output.out + output.err
        assert "Traceback" not in output.err


def test_all_weights_are_no_adapter(folder_of_model, tmp_path):
    run = train(folder_of_model, tmp_path / "run", engine="mlx", lora_rank=0, steps=1)
    with pytest.raises(ConfigError, match="--format mlx"):
        export(run, tmp_path / "out", format="mlx")
    assert export(run, tmp_path / "merged").format == "merged"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert np.abs(by_torch(merged) - own_logits(run)).max() < 1e-5


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), OSError("own words")])
def test_a_read_error_is_no_verdict_on_the_file(error, tmp_path):
    with pytest.raises(CheckpointUnreadable, match=error.strerror or "own words"), safe_errors(tmp_path):
        raise error
