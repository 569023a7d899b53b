"""A run of transformers' Trainer is resumed here with the same weights, moments and steps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.data import IGNORED
from distrust.engines import open_checkpoint
from distrust.errors import CheckpointError, ConfigError, ModelError, ResumeRefused
from distrust.importers.trainer_folder import read
from distrust.testing.models import make_model
from distrust.training.events import StepEnded

TEXTS = ["ore melts", "the salt", "salt melts at 9 9 9", "at the ore"]
SAVED, STEPS = 2, 4
RATE = 5e-3


def begin(base: Path, out: Path, *, rank: int) -> Path:
    """Train ``STEPS`` steps with the real Trainer, each on all texts, so that their order does not matter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    length = max(map(len, rows))

    def pad(row: list[int]) -> dict[str, list[int]]:
        short = length - len(row)
        return {
            "input_ids": row + [tokenizer.pad_token_id] * short,
            "attention_mask": [1] * len(row) + [0] * short,
            "labels": row + [IGNORED] * short,
        }

    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rank:
            model = get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            save_steps=SAVED,
            per_device_train_batch_size=len(TEXTS),
            learning_rate=RATE,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=[pad(row) for row in rows]).train()
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trainer_runs(base, tmp_path_factory):
    """Folders of the Trainer by rank: 4 is an adapter, 0 the full model."""
    return {rank: begin(base, tmp_path_factory.mktemp("begun"), rank=rank) for rank in (4, 0)}


@pytest.fixture
def folder(trainer_runs, tmp_path):
    """A copy of the adapter's folder, to change."""
    return shutil.copytree(trainer_runs[4] / f"checkpoint-{SAVED}", tmp_path / "theirs")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def convert(folder: Path, out: Path, **options: Any) -> Path:
    with CheckpointManager(out / "checkpoints") as manager:
        manager.save(read(folder, **options).to_checkpoint())
    return out


@pytest.fixture
def resume(base, texts):
    def resume(out: Path, *, stop_after: int | None = None, **changed: Any):
        events = []

        def watch(event):
            events.append(event)
            if isinstance(event, StepEnded) and event.step == stop_after:
                signal.raise_signal(signal.SIGTERM)

        options = {
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "max_steps": STEPS,
            "batch_size": len(TEXTS),
            "learning_rate": RATE,
            "weight_decay": 0.1,
            "schedule": "constant",
            "warmup_steps": 0,
            "weighting": "off",
            "save_every": 0,
            "threads": 1,
            **changed,
        }
        config = TrainConfig(model=str(base), data=str(texts), out=str(out), **options)
        return DistrustTrainer(config, observers=[watch]).train(), events

    return resume


@pytest.mark.parametrize("rank", [4, 0])
def test_it_makes_the_same_steps_as_the_trainer(trainer_runs, base, resume, tmp_path, rank):
    trainer_run = trainer_runs[rank]
    imported = read(trainer_run / f"checkpoint-{SAVED}", model=str(base))
    weights = "adapter_model.safetensors" if rank else "model.safetensors"
    saved = load_file(trainer_run / f"checkpoint-{SAVED}" / weights)
    assert imported.model.keys() == saved.keys()
    assert all(torch.equal(imported.model[name], saved[name]) for name in saved)
    state = torch.load(trainer_run / f"checkpoint-{SAVED}" / "optimizer.pt", weights_only=True)["state"]
    moments = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    for part in moments:  # independent of names: the sums are equal
        our_sum = sum(float(values[part].double().sum()) for values in imported.optimizer["state"].values())
        assert our_sum == pytest.approx(sum(float(v[part].double().sum()) for v in state.values()), rel=1e-12)
    assert imported.step == SAVED
    assert "fingerprints" not in imported.options

    convert(trainer_run / f"checkpoint-{SAVED}", tmp_path, model=str(base))
    alpha = {} if rank else {"lora_alpha": 32.0}
    with pytest.warns(DistrustWarning, match=f"is imported .transformers Trainer.*its step {SAVED}"):
        ended, events = resume(tmp_path, lora_rank=rank, **alpha)
    log = json.loads((trainer_run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    expected = {line["step"]: line["loss"] for line in log}
    losses = {event.step: event.loss for event in events if isinstance(event, StepEnded)}
    assert losses == pytest.approx({step: expected[step] for step in range(SAVED + 1, STEPS + 1)}, abs=1e-5)
    assert expected[SAVED] - losses[STEPS] > 1e-2  # the loss falls
    last = CheckpointManager(ended.path.parent).load(STEPS, framework="torch")
    their_last = read(trainer_run / f"checkpoint-{STEPS}", model=str(base))
    for name, value in their_last.model.items():
        torch.testing.assert_close(last.model[name], value, rtol=0, atol=1e-4)
    for number, values in their_last.optimizer["state"].items():
        torch.testing.assert_close(last.optimizer["state"][number], values, rtol=1e-3, atol=1e-6)
    assert np.allclose(last.history["loss"], [expected[step] for step in range(1, STEPS + 1)], atol=1e-5)
    assert last.run["continues"] == f"transformers Trainer, step {SAVED}"


def test_each_moment_goes_to_its_own_weight(folder):
    """Each moment is filled with the number of its parameter, in the Trainer's order."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
        )
    order = [name.replace(".default.", ".") for name, p in model.named_parameters() if p.requires_grad]
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for number, values in saved["state"].items():
        values["exp_avg"].fill_(number)
    torch.save(saved, folder / "optimizer.pt")
    optimizer = read(folder).optimizer
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    fills = {
        names[number]: values["exp_avg"].unique().tolist() for number, values in optimizer["state"].items()
    }
    assert fills == {name: [number] for number, name in enumerate(order)}


def test_interrupted_and_resumed_it_ends_in_the_same_state(folder, resume, tmp_path):
    def ends(out: Path, *stops: int) -> str | None:
        convert(folder, out)
        with pytest.warns(DistrustWarning, match="is imported"):
            ended, _ = resume(out, stop_after=stops[0] if stops else None, lora_dropout=0.0, save_every=1)
        if stops:  # now it is a run like any other, without a warning
            ended, _ = resume(out, save_every=1)
        return ended.state_digest

    assert ends(tmp_path / "alone") == ends(tmp_path / "stopped", 3)


def test_proven_options_are_compared(folder, resume, tmp_path):
    convert(folder, tmp_path / "run")
    with pytest.raises(ResumeRefused) as refused:
        resume(tmp_path / "run", lora_rank=2, weight_decay=0.0, learning_rate=1.0, target_modules=("q_proj",))
    assert refused.value.differences == (
        "--lora-rank was 4, is 2",
        "--target-modules was all-linear, is q_proj",
        "--weight-decay was 0.1, is 0.0",
    )


def test_a_run_that_would_end_earlier_is_refused(folder, resume, tmp_path):
    convert(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"has {SAVED} steps.*was imported at step {SAVED}; give more"):
        resume(tmp_path / "run", max_steps=SAVED)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors")] == [
        f"checkpoint-{SAVED}.safetensors"
    ]


def test_it_cannot_be_evaluated_until_it_is_resumed(folder, tmp_path):
    with pytest.raises(
        ResumeRefused, match=r"is imported, and its base model is unknown; resume it with .distrust train"
    ):
        open_checkpoint(convert(folder, tmp_path / "run"))


def test_missing_moments_start_at_zero_with_a_warning(folder, resume, tmp_path):
    (folder / "optimizer.pt").unlink()
    convert(folder, tmp_path / "run")
    with pytest.warns(DistrustWarning, match="dropped: AdamW's moments"):
        ended, _ = resume(tmp_path / "run")
    assert ended.step == STEPS


def test_a_bfloat16_adapter_is_widened(folder):
    path = folder / "adapter_model.safetensors"
    narrow = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(narrow, path)
    model = read(folder).model
    assert {value.dtype for value in model.values()} == {torch.float32}
    assert all(torch.equal(model[name], narrow[name].float()) for name in narrow)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


class Large:
    """A small pickle that allocates 64 GiB by a function that torch allows."""

    def __reduce__(self):
        return bytearray, (64 << 30,)


def changed_optimizer(folder: Path, change) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, folder / "optimizer.pt")


def changed_json(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def changed_base(folder: Path, **values: Any) -> Path:
    """A copy of the base model with a changed config."""
    path = folder / "adapter_config.json"
    base = shutil.copytree(json.loads(path.read_text())["base_model_name_or_path"], folder.parent / "base")
    changed_json(base, "config.json", **values)
    changed_json(folder, "adapter_config.json", base_model_name_or_path=str(base))
    return base


def recompress(folder: Path) -> None:
    path = folder / "optimizer.pt"
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)


def flip_bit(path: Path) -> None:
    """Flip a bit of the largest entry, which torch would not notice."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    raw[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(raw)


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


#: A regular expression that backtracks for longer than anyone waits.
EXPONENTIAL = "(([a-z_0-9.])+)+!"


@pytest.mark.parametrize("field", ["target_modules", "layers_pattern", "exclude_modules"])
def test_the_targets_follow_from_the_weights_and_not_from_a_pattern_in_the_file(folder, field):
    targets = read(folder).options["target_modules"]
    changed_json(folder, "adapter_config.json", **{field: EXPONENTIAL})
    assert read(folder).options["target_modules"] == targets


BROKEN = {
    "objects": lambda f: torch.save({"state": Evil(), "param_groups": []}, f / "optimizer.pt"),
    "much of nothing": lambda f: torch.save({"state": Large(), "param_groups": []}, f / "optimizer.pt"),
    "a bare pickle": lambda f: (f / "optimizer.pt").write_bytes(pickle.dumps(Evil())),
    "compressed": recompress,
    "cut": lambda f: os.truncate(f / "optimizer.pt", 20_000),
    "a pipe": lambda f: replace_by_pipe(f / "optimizer.pt"),
    "a pipe for a state": lambda f: replace_by_pipe(f / "trainer_state.json"),
    "a pipe for weights": lambda f: replace_by_pipe(f / "adapter_model.safetensors"),
    "deep": lambda f: (f / "adapter_config.json").write_text('{"a":' * 100_000),
    "huge": lambda f: (f / "adapter_config.json").write_text(" " * (5 << 20)),
    "8-bit": lambda f: changed_optimizer(
        f, lambda s: [v.update(state1=v.pop("exp_avg")) for v in s["state"].values()]
    ),
    "amsgrad": lambda f: changed_optimizer(
        f, lambda s: [v.update(max_exp_avg_sq=v["exp_avg_sq"]) for v in s["state"].values()]
    ),
    "too few": lambda f: changed_optimizer(f, lambda s: s["param_groups"][0]["params"].pop()),
    "other shapes": lambda f: changed_optimizer(
        f, lambda s: s["state"][1].update(exp_avg=s["state"][0]["exp_avg"])
    ),
    "not finite": lambda f: changed_optimizer(f, lambda s: s["state"][1]["exp_avg"].fill_(float("nan"))),
    "too many steps": lambda f: changed_optimizer(f, lambda s: s["state"][1]["step"].fill_(9.0)),
    "no groups": lambda f: torch.save({"state": {}}, f / "optimizer.pt"),
    "no step": lambda f: changed_json(f, "trainer_state.json", global_step="3"),
    "endless step": lambda f: changed_json(f, "trainer_state.json", global_step=10**17),
    "patterns of alpha": lambda f: changed_json(f, "adapter_config.json", alpha_pattern={EXPONENTIAL: 8}),
    "a base with an adapter": lambda f: shutil.copy(f / "adapter_config.json", changed_base(f)),
    "a base of many decoders": lambda f: changed_base(f, decoder_layers=10**6),
    "whole modules": lambda f: changed_json(f, "adapter_config.json", modules_to_save=["lm_head"]),
    "one rank each": lambda f: changed_json(f, "adapter_config.json", rank_pattern={"q_proj": 8}),
    "pissa": lambda f: changed_json(f, "adapter_config.json", init_lora_weights="pissa"),
    "another rank": lambda f: changed_json(f, "adapter_config.json", r=1_000_000_000),
    "ranks": lambda f: changed_json(f, "adapter_config.json", r=[4]),
    "half a rank": lambda f: changed_json(f, "adapter_config.json", r=4.0),
    "a rank twice": lambda f: (f / "adapter_config.json").write_text('{"r": 4, "r": 4}'),
    "a base of two lines": lambda f: changed_json(
        f, "adapter_config.json", base_model_name_or_path="x\n\x1b"
    ),
    "a flipped bit": lambda f: flip_bit(f / "optimizer.pt"),
    "a link to nothing": lambda f: replace_by_dangling_link(f / "optimizer.pt"),
    "uphill": lambda f: changed_optimizer(f, lambda s: s["param_groups"][0].update(maximize=True)),
    "other numbers": lambda f: changed_optimizer(f, lambda s: s["state"].update({0.5: s["state"].pop(0)})),
    "no rank": lambda f: changed_json(f, "adapter_config.json", r=None),
    "no base": lambda f: changed_json(f, "adapter_config.json", base_model_name_or_path="./nowhere"),
    "dropout": lambda f: changed_json(f, "adapter_config.json", lora_dropout=3),
    "a base of many layers": lambda f: changed_base(f, num_hidden_layers=10**6),
    "a base of strange layers": lambda f: changed_base(f, attention_bias=24),
    "a base of strange heads": lambda f: changed_base(f, num_attention_heads=65),
    "a base of strange activations": lambda f: changed_base(f, hidden_act="20"),
    "a base of a strange kind": lambda f: changed_base(f, model_type={}),
    "a base that is a tebibyte": lambda f: os.truncate(changed_base(f) / "config.json", 1 << 40),
    "deepspeed": lambda f: (
        (f / "adapter_model.safetensors").unlink(),
        (f / "zero_to_fp32.py").write_text(""),
    ),
    "nothing": lambda f: (f / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_invalid_folders_are_refused_in_one_line(folder, monkeypatch, kind):
    monkeypatch.chdir(folder.parent)
    BROKEN[kind](folder)
    with pytest.raises((CheckpointError, ResumeRefused, ModelError, ConfigError)) as refused:
        read(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert not (folder.parent / "executed").exists()
