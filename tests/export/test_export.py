"""Exports, loaded by the programs that they are for."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distrust import Checkpoint, CheckpointManager, DistrustWarning, TrainConfig
from distrust.atomic import atomic_directory
from distrust.checkpoint.disk import Disk
from distrust.engines import open_checkpoint
from distrust.engines.loading import reference
from distrust.errors import (
    ConfigError,
    CorruptCheckpoint,
    ExportFailed,
    ModelError,
    NoIntactCheckpoint,
    ResumeRefused,
)
from distrust.export import export
from distrust.export.card import Facts, model_card, yaml_text
from distrust.testing.models import make_model, train_a_little, write_records

# peft asks transformers by a name that transformers has begun to change.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[0, 70, 81, 72, 3, 99, 100, 101]])
TRAINED = {
    "lora": {"lora_rank": 4, "lora_alpha": 24.0},
    "lora in bfloat16": {"lora_rank": 4, "dtype": "bfloat16"},
    "all weights": {"lora_rank": 0},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Of the model ``model``, the data ``records.jsonl`` and the runs."""
    directory = tmp_path_factory.mktemp("export")
    make_model(directory / "model")
    write_records(directory / "records.jsonl")
    return directory


def train(directory: Path, out: Path, **options) -> Path:
    return train_a_little(directory, out, **{"engine": "torch", "max_steps": 4, "save_every": 2, **options})


@pytest.fixture(scope="module")
def runs(directory) -> dict[str, Path]:
    return {kind: train(directory, directory / kind, **options) for kind, options in TRAINED.items()}


@pytest.fixture(scope="module")
def run(runs) -> Path:
    return runs["lora"]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def trained_logits(target: Path, **which) -> torch.Tensor:
    return logits(open_checkpoint(target, **which)[0].model)


def base_of(directory: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory / "model", dtype=dtype)


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_an_adapter_is_bit_for_bit_what_was_trained(directory, run, tmp_path, monkeypatch):
    result = export(run, tmp_path / "adapter")
    assert (result.format, result.dtype, result.step) == ("adapter", "float32", 4)
    trained = CheckpointManager(run / "checkpoints").load(4, framework="torch")
    written = load_file(result.path / "adapter_model.safetensors")
    assert written.keys() == trained.model.keys()
    assert all(torch.equal(written[name], trained.model[name]) for name in written)

    # The same adapter made by peft alone, without this package.
    targets = sorted({name.split(".")[-3] for name in written})
    reference = get_peft_model(
        base_of(directory), LoraConfig(r=4, lora_alpha=24, target_modules=targets, task_type="CAUSAL_LM")
    )
    set_peft_model_state_dict(reference, dict(trained.model))
    expected = logits(reference)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(directory), result.path)), expected)
    monkeypatch.chdir(directory)  # where the base model is by the name in the adapter's config
    automatic = AutoPeftModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    assert torch.equal(logits(automatic), expected)
    torch.testing.assert_close(trained_logits(run), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base_of(directory)), expected, atol=0.1)


def test_the_adapter_config_is_complete(directory, run, tmp_path):
    folder = export(run, tmp_path / "adapter").path
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (4, 24, int)
    assert config["base_model_name_or_path"] == "./model"
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    linear = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert {name.split(".")[-1] for name in config["target_modules"]} == set(linear.split())
    text = "ore melts <eos>"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(directory / "model")(
        text
    )
    assert "local" not in (folder / "tokenizer_config.json").read_text()  # nothing of this machine
    again = export(run, tmp_path / "again").path
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        if name != "README.md":  # which has the folder's name for its title
            assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_training_continues_from_an_exported_adapter(directory, run, tmp_path):
    folder = export(run, tmp_path / "adapter").path
    model = PeftModel.from_pretrained(base_of(directory), folder, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    first_loss = model(input_ids=IDS, labels=IDS).loss
    first_loss.backward()
    optimizer.step()
    assert model(input_ids=IDS, labels=IDS).loss < first_loss


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("lora", "float16"), ("lora", None)),
        *(("lora in bfloat16", "float32"), ("lora in bfloat16", None)),
        *(("all weights", "bfloat16"), ("all weights", None)),
    ],
)
def test_a_merged_model_is_the_trained_one_to_rounding(directory, runs, tmp_path, kind, dtype):
    result = export(runs[kind], tmp_path / "merged", format="merged", dtype=dtype)
    if dtype is None:
        dtype = "bfloat16" if kind == "lora in bfloat16" else "float32"
    assert result.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(result.path)  # in the dtype of its config
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.use_cache is True
    # As far as the coarsest rounding of the two goes; logits here are some 1 to 5.
    close = 1e-4 if dtype == "float32" and "bfloat16" not in kind else 0.08
    torch.testing.assert_close(logits(model), trained_logits(runs[kind]), rtol=0, atol=close)
    assert not torch.allclose(logits(base_of(directory)), logits(model), atol=0.2)
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert tokenizer("salt", add_special_tokens=False).input_ids == (
        AutoTokenizer.from_pretrained(directory / "model")("salt", add_special_tokens=False).input_ids
    )
    assert "/" not in json.loads((result.path / "config.json").read_text()).get("_name_or_path", "")


def test_a_merged_weight_is_summed_in_float32_and_rounded_once(directory, runs, tmp_path):
    out = runs["lora in bfloat16"]
    written = load_file(export(out, tmp_path / "merged", format="merged").path / "model.safetensors")
    trained = CheckpointManager(out / "checkpoints").load(4, framework="torch").model
    adapted = set()
    for name, weight in base_of(directory, torch.bfloat16).named_parameters():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.detach().float()
        if f"{layer}.lora_A.weight" in trained:
            adapted.add(name)
            scale = TrainConfig.lora_alpha / 4
            expected += trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"] * scale
        assert torch.equal(written[name], expected.bfloat16()), name
    assert len(adapted) == 14


def test_a_quantized_run_is_merged_into_the_unquantized_model(directory, tmp_path):
    options = {"quantization": "4bit", "target_modules": ("q_proj",), "lora_rank": 2, "max_steps": 1}
    out = train(directory, tmp_path / "run", **options)
    written = load_file(export(out, tmp_path / "merged", format="merged").path / "model.safetensors")
    base = dict(base_of(directory).named_parameters())
    assert written.keys() == base.keys()
    changed = {name for name, weight in base.items() if not torch.equal(written[name], weight)}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_the_state_format(runs, tmp_path):
    for kind, out in runs.items():
        result = export(out, tmp_path / kind / "weights.safetensors", format="state", step=2)
        trained = CheckpointManager(out / "checkpoints").load(2, framework="torch")
        written = load_file(result.path)
        assert written.keys() == trained.model.keys()
        assert all(torch.equal(written[name], trained.model[name]) for name in written)
        assert os.listdir(result.path.parent) == ["weights.safetensors"]
        with safe_open(result.path, "pt") as file:
            metadata = file.metadata()
        assert (metadata["format"], metadata["step"], metadata["base_model"]) == ("pt", "2", "model")
        assert metadata["state_digest"] == result.state_digest
    half = export(runs["lora"], tmp_path / "half.safetensors", format="state", dtype="float16")
    assert {tensor.dtype for tensor in load_file(half.path).values()} == {torch.float16}


def test_a_full_finetune_is_not_an_adapter(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"--format adapter: .*all weights were trained.*give merged"):
        export(runs["all weights"], tmp_path / "a", format="adapter")
    assert os.listdir(tmp_path) == []
    assert export(runs["all weights"], tmp_path / "b").format == "merged"


def test_an_adapter_of_layers_that_share_their_weights(directory, tmp_path):
    """An adapted output layer must not change the embedding; an adapted embedding has names of its own."""
    shutil.copytree(directory / "model", tmp_path / "model")
    shape = json.loads((tmp_path / "model" / "config.json").read_text())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": True})).save_pretrained(
        tmp_path / "model"
    )
    shutil.copy(directory / "records.jsonl", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns of exactly this
        out = train(tmp_path, tmp_path / "run", lora_rank=4, target_modules=("lm_head", "embed_tokens"))
        expected = trained_logits(out)
        adapter = export(out, tmp_path / "adapter").path
        merged = export(out, tmp_path / "merged", format="merged").path
        loaded = PeftModel.from_pretrained(base_of(tmp_path), adapter)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=0, atol=1e-4
    )


def test_an_adapter_needs_no_weights_of_the_base_model(directory, run, tmp_path):
    shutil.copytree(directory / "model", tmp_path / "model")
    moved = str(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    result = export(run, tmp_path / "adapter", model=moved)
    assert (
        json.loads((result.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "./model"
    )
    with pytest.raises(ModelError, match=f"--model {re.escape(moved)}: "):
        export(run, tmp_path / "merged", format="merged", model=moved)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "model"]


def test_another_base_model_is_refused(directory, run, tmp_path):
    other_model = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ResumeRefused, match="was not trained on the weights of --model"):
        export(run, tmp_path / "merged", format="merged", model=str(other_model))
    config = json.loads((other_model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ResumeRefused, match="the adapter does not fit --model") as refused:
        export(run, tmp_path / "adapter", model=str(other_model))
    assert any("up_proj" in difference for difference in refused.value.differences)
    assert os.listdir(tmp_path) == ["other"]


def test_a_rank_that_no_memory_holds(run, tmp_path):
    """It is compared with the weights before anything is allocated."""
    saved = CheckpointManager(run / "checkpoints").load_latest()
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(replace(saved, config={**saved.config, "lora_rank": 10**9}))
    with pytest.raises(ResumeRefused, match="the adapter does not fit --model"):
        export(tmp_path / "checkpoints", tmp_path / "adapter")


def test_a_base_model_that_was_moved(directory, tmp_path):
    shutil.copytree(directory / "model", tmp_path / "model")
    shutil.copy(directory / "records.jsonl", tmp_path)
    out = train(tmp_path, tmp_path / "run", lora_rank=2, max_steps=1)
    shutil.rmtree(tmp_path / "model")
    for form in ("adapter", "merged"):
        with pytest.raises(ModelError, match="give its folder or hub name with --model"):
            export(out, tmp_path / form, format=form)
    export(out, tmp_path / "state.safetensors", format="state")  # needs none


def test_numbers_that_overflow_a_dtype_are_refused(directory, run, tmp_path):
    shutil.copytree(directory / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(directory / "records.jsonl", tmp_path)
    out = train(tmp_path, tmp_path / "run", lora_rank=2, max_steps=1, learning_rate=1e-9)
    with pytest.raises(ConfigError, match=r"--dtype float16: model\.norm\.weight holds numbers that are too"):
        export(out, tmp_path / "merged", format="merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("wrong", "flag"), [({"format": "gguf"}, "--format"), ({"dtype": "int8"}, "--dtype"), ({}, "--to a.bin")]
)
def test_an_unknown_format_or_dtype_is_refused(run, tmp_path, wrong, flag):
    with pytest.raises(ConfigError, match=flag):
        export(run, tmp_path / "a.bin", **{"format": "state", **wrong})


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_nothing_damaged_is_exported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    newest = copy / "checkpoints" / "checkpoint-4-final.safetensors"
    damage(newest)
    with pytest.warns(DistrustWarning, match=f"skipped a damaged checkpoint: {re.escape(str(newest))}"):
        assert export(copy, tmp_path / "adapter").step == 2
    for named in ({"target": newest}, {"target": copy, "step": 4}):
        with pytest.raises(CorruptCheckpoint, match="is damaged"):
            export(to=tmp_path / "none", **named)
    damage(copy / "checkpoints" / "checkpoint-2.safetensors")
    with pytest.raises(NoIntactCheckpoint):
        export(copy, tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "run"]


def test_a_checkpoint_of_something_else(tmp_path):
    with CheckpointManager(tmp_path / "own") as manager:
        path = manager.save(Checkpoint(step=1, model={"w": torch.ones(3)}))
    for form in ("adapter", "merged", "state"):
        with pytest.raises(ResumeRefused, match="was not made by `distrust train`"):
            export(path, tmp_path / "out.safetensors", format=form)


def test_the_best_is_that_of_the_run(directory, tmp_path):
    options = {"lora_rank": 2, "metric": "loss", "metric_mode": "max", "max_steps": 6}
    out = train(directory, tmp_path / "run", **options)
    files = CheckpointManager(out / "checkpoints").scan().files
    worst = max(files, key=lambda file: file.metrics["loss"])
    assert export(out, tmp_path / "best", best=True).step == worst.step
    with pytest.raises(ConfigError, match="give one of them"):
        export(out, tmp_path / "both", best=True, step=2)
    with pytest.raises(ConfigError, match="--best goes with a run"):
        export(worst.path, tmp_path / "file", best=True)


def test_nothing_is_overwritten(run, tmp_path):
    for name in ("folder", "link"):
        (tmp_path / "folder" / "kept").mkdir(parents=True, exist_ok=True)
        if name == "link":
            (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(ExportFailed, match=f"{name}: exists already, and is not overwritten"):
            export(run, tmp_path / name)
    (tmp_path / "file.safetensors").write_text("mine")
    with pytest.raises(ExportFailed, match="exists already"):
        export(run, tmp_path / "file.safetensors", format="state")
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export(run, tmp_path / "empty").path.joinpath("README.md").is_file()


def test_a_disk_that_refuses(run, tmp_path):
    """For real: no file may be larger than some tensors are. Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        for to, form in ((tmp_path / "adapter", "adapter"), (tmp_path / "merged", "merged")):
            with pytest.raises(ExportFailed, match=r"not written: .*Nothing was created"):
                export(run, to, format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


class FailingDisk(Disk):
    """Fails at one of the calls that an export makes, or ends the process there."""

    def __init__(self, at: int | None = None, end=None) -> None:
        self.calls, self._at = 0, at
        self._end = end

    def _call(self, method, *arguments) -> None:
        self.calls += 1
        if self.calls == self._at:
            if self._end is not None:
                self._end()
            raise OSError(5, "Input/output error")
        method(*arguments)

    def make_directory(self, path):
        self._call(super().make_directory, path)

    def sync(self, descriptor):
        self._call(super().sync, descriptor)

    def sync_directory(self, path):
        self._call(super().sync_directory, path)

    def rename(self, source, target):
        self._call(super().rename, source, target)


def write_some(target: Path, disk: Disk) -> None:
    with atomic_directory(target, disk=disk) as folder:
        (folder / "inner").mkdir()
        for name in ("a", "b", "inner/c"):
            (folder / name).write_text(name * 1000)


def is_whole(target: Path) -> bool:
    return {path.name: path.read_text() for path in target.rglob("*") if path.is_file()} == {
        name[-1]: name * 1000 for name in ("a", "b", "inner/c")
    }


def test_a_failure_at_any_call_leaves_nothing_unfinished(tmp_path):
    counted = FailingDisk()
    write_some(tmp_path / "counted", counted)
    assert counted.calls == 8  # the folder, three files, two folders, its name, and its parent
    for at in range(1, counted.calls + 1):
        target = tmp_path / str(at) / "target"
        target.parent.mkdir()
        with pytest.raises(ExportFailed, match=f"{at}/target: "):
            write_some(target, FailingDisk(at))
        assert left_behind(target.parent) == []
        if at < counted.calls:
            assert not target.exists()
        else:  # only whether its name is durable is not known
            assert is_whole(target)


# Later versions of Python warn of every fork of a process with threads, such as those of torch.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_call_leaves_nothing_unfinished(tmp_path):
    for at in range(1, 9):
        target = tmp_path / str(at) / "target"
        target.parent.mkdir()
        child = os.fork()
        if child == 0:
            write_some(target, FailingDisk(at, end=lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert target.exists() == (at == 8)
        if target.exists():
            assert is_whole(target)
            continue
        assert len(left_behind(target.parent)) == (at > 1)
        write_some(target, Disk())  # the same again sweeps, and succeeds
        assert is_whole(target)
        assert left_behind(target.parent) == []


def write_while_another_does(target: Path) -> None:
    with atomic_directory(target) as slow:
        with atomic_directory(target) as quick:
            (quick / "of the quick one").touch()
        (slow / "not swept by it").touch()


def test_of_two_writers_at_once_the_first_to_end_wins(tmp_path):
    with pytest.raises(ExportFailed, match="exists already"):
        write_while_another_does(tmp_path / "target")
    assert os.listdir(tmp_path / "target") == ["of the quick one"]
    assert left_behind(tmp_path) == []


def export_interrupted(target: Path) -> None:
    with atomic_directory(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        export_interrupted(tmp_path / "target")
    assert os.listdir(tmp_path) == []


def test_permissions_follow_the_umask(run, tmp_path):
    first_loss = os.umask(0o027)
    try:
        result = export(run, tmp_path / "adapter")
    finally:
        os.umask(first_loss)
    assert {stat.S_IMODE(path.stat().st_mode) for path in result.path.iterdir()} == {0o640}
    assert stat.S_IMODE(result.path.stat().st_mode) == 0o750


@pytest.mark.parametrize("form", ["adapter", "mlx", "merged", "state"])
def test_an_export_has_no_path_of_this_machine(directory, run, tmp_path, form):
    if form == "mlx":
        pytest.importorskip("mlx_lm")
    written = export(run, tmp_path / "written.safetensors", format=form).path
    for path in written.rglob("*") if written.is_dir() else [written]:
        assert str(directory).encode() not in path.read_bytes(), path.name


def test_an_adapter_names_its_base_model_as_the_user_did(directory, monkeypatch):
    folder = directory / "elsewhere"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    absolute = str(directory / "model")
    names = {absolute: "./model", "../model": "../model", "../model/": "../model", "bundled": "bundled"}
    assert {name: reference(name) for name in names} == names
    monkeypatch.chdir(directory)
    assert reference("model") == reference("./model") == "./model"  # never what could be a name on a hub
    assert reference("owner/name") == "owner/name"


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_records_its_origin(directory, run, tmp_path):
    result = export(run, tmp_path / "adapter")
    card = (result.path / "README.md").read_text()
    front = front_matter(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation")
    assert "base_model" not in front  # a folder of this machine is no name of a hub
    file = CheckpointManager(run / "checkpoints").inspect(4)
    fingerprints = file.header.config["fingerprints"]
    for line in (
        "- `state digest`: `" + file.state_digest,
        "- `fingerprint (BLAKE3)`: `" + fingerprints["data"],
        "- `fingerprint of its weights (BLAKE3)`: `" + fingerprints["model"],
        "- `step`: `4`",
        "- `name`: `records.jsonl`",
        "- `name`: `model`",
        "- `examples`: `11`",
        f"- `tokens seen in training`: `{file.metadata['tokens_seen']}`",
        "- `weighting`: `monotone`",
        "- `alpha`: `2.7`",
        "- `lambda`: `0.6`",
        "- `lora_rank`: `4`",
        f"- `loss`: `{file.metrics['loss']}`",
        "distrust train --model model ",
        " --data records.jsonl ",
        " --lora-rank 4 ",
    ):
        assert line in card, line
    assert str(directory) not in card
    merged = export(run, tmp_path / "merged", format="merged").path / "README.md"
    assert front_matter(merged.read_text())["library_name"] == "transformers"


def card_of(text: str) -> str:
    return model_card(
        Facts(
            title=text,
            library="peft",
            base=text,
            hub_name=text,
            tags=[text],
            summary="A summary.",
            load="load()",
            command=f"distrust train --data {text}",
            notes=[],
            sections={"Section": {text: text}},
        )
    )


HOSTILE = ["a\nb: c", "```\n# x", "`", "``a``", " ", "", "---", "'\"\\", "{a: b}", "\x1b[2J", "\ud800", "é😀‮"]


@given(st.text() | st.sampled_from(HOSTILE))
def test_no_name_breaks_a_card(text):
    card = card_of(text)
    safe = re.sub("[\ud800-\udfff]", "\ufffd", text)
    front = front_matter(card)
    assert (front["base_model"], front["tags"]) == (safe, [safe])
    assert yaml.safe_load(yaml_text(text)) == safe
    # As many lines, and the same headings, as with a name of a letter.
    plain = card_of("a")
    assert len(card.split("\n")) == len(plain.split("\n"))
    assert [line for line in card.split("\n") if line.startswith("## ")] == ["## Section"]
    assert all(letter == "\n" or letter.isprintable() for letter in card)
    card.encode()
    # A code span ends at as many backticks as it began with, and at no fewer and no more.
    (row,) = [line for line in card.split("\n") if line.startswith("- `")]
    fences = re.findall("`+", row)
    assert len(set(map(len, (fences[0], fences[-1])))) == 1
    assert fences.count(fences[0]) == 4


def test_a_base_model_of_a_hub_goes_by_its_name(directory, run, tmp_path, monkeypatch):
    """What works on another machine: the name, in the adapter's config and where hubs read it."""
    cached = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(directory / "model", cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for form, relation in (("adapter", "adapter"), ("merged", "finetune")):
        folder = export(run, tmp_path / form, format=form, model="owner/tiny").path
        front = front_matter((folder / "README.md").read_text())
        assert (front["base_model"], front["base_model_relation"]) == ("owner/tiny", relation)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"
