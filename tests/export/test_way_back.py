"""The way back: the real Trainer resumes from a converted checkpoint with its weights, moments and rate."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distrust import Checkpoint, CheckpointManager
from distrust.cli import main
from distrust.data import IGNORED
from distrust.engines import state_conversion
from distrust.export.to_trainer import to_trainer
from distrust.integrations.random import generators
from distrust.integrations.transformers import DistrustCheckpoints
from distrust.testing.models import make_model, train_a_little
from tests.trainer_warnings import pytestmark  # noqa: F401

TEXTS = ["ore melts", "the salt", "salt melts at 9 9 9", "at the ore"]
SAVED, STEPS = 3, 5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RATE, DECAY = 5e-3, 0.1
#: Runs of ``distrust train``: options of this package, and of peft.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "lora": ({"lora_rank": 4, "lora_alpha": 8.0}, LORA),
    "dora": ({"lora_rank": 4, "lora_alpha": 8.0, "dora": True}, {**LORA, "use_dora": True}),
    "mlx": ({"lora_rank": 4, "lora_alpha": 8.0, "engine": "mlx"}, LORA),
    "all weights": ({"lora_rank": 0}, None),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("back")
    make_model(directory / "model")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (directory / "records.jsonl").write_text(lines)
    return directory


@pytest.fixture(scope="module")
def runs(directory) -> Callable[[str], Path]:
    """Runs by their kind, made once; each step trains on all texts, so that their order does not matter."""

    def make(kind: str) -> Path:
        if not (out := directory / kind).exists():
            options = {"engine": "torch", "batch_size": len(TEXTS), "weight_decay": DECAY, "save_every": 1}
            schedule = {
                "learning_rate": RATE,
                "schedule": "cosine",
                "warmup_steps": 2,
                "max_steps": STEPS,
                "log_every": 1,
            }
            train_a_little(directory, out, **{**options, **schedule, "keep_last": STEPS, **RUNS[kind][0]})
        return out

    return make


class Watch(TrainerCallback):
    """Keeps what the Trainer begins with: parameters, and AdamW's state by their names."""

    def on_train_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **_):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        raw = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.moments = {
            names[id(parameter)]: {part: torch.as_tensor(value).clone() for part, value in values.items()}
            for parameter, values in raw.state.items()
        }
        self.rates = [group["lr"] for group in raw.param_groups]
        self.schedule = lr_scheduler.state_dict()
        self.step = state.global_step


def trainer(base: Path, out: Path, peft: dict[str, Any] | None, **options: Any) -> tuple[Trainer, Watch]:
    """The real Trainer, with each step on all texts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    length = max(map(len, rows))
    data = [
        {
            "input_ids": row + [tokenizer.pad_token_id] * (length - len(row)),
            "attention_mask": [1] * len(row) + [0] * (length - len(row)),
            "labels": row + [IGNORED] * (length - len(row)),
        }
        for row in rows
    ]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if peft is None else get_peft_model(model, LoraConfig(**peft))
    settings = {
        "per_device_train_batch_size": len(TEXTS),
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(out), **settings)
    watch = Watch()
    return Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[watch]
    ), watch


def by_peft_names(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".default", ""): value for name, value in tensors.items()}


def state_of(run: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of a run's checkpoint, and AdamW's state by the same names, in the form of torch."""
    saved = CheckpointManager(run / "checkpoints").load(step, framework="torch")
    optimizer, model = saved.optimizer, saved.model
    if "m" in optimizer:  # of mlx
        model = state_conversion.arrays_to_torch(model)
        m, v = map(state_conversion.arrays_to_torch, (optimizer["m"], optimizer["v"]))
        steps = torch.tensor(float(optimizer["step"]))
        return model, {n: {"step": steps, "exp_avg": m[n], "exp_avg_sq": v[n]} for n in model}
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    return model, {names[number]: values for number, values in optimizer["state"].items()}


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit: names, dtypes, shapes, values."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", RUNS)
def test_the_trainer_takes_the_next_step_of_a_run(directory, runs, tmp_path, kind, capsys):
    run, folder = runs(kind), tmp_path / f"checkpoint-{SAVED}"
    command = ["convert", str(run), "--to", str(folder), "--format", "trainer", "--step", str(SAVED)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"trainer.train(resume_from_checkpoint='{folder}')" in printed
    assert ("which parameters decay" in printed) == (kind == "dora")  # which it decays, and we do not

    options = {"max_steps": SAVED + 1, "save_strategy": "steps", "eval_strategy": "steps"}
    best = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    resumed, watch = trainer(directory / "model", tmp_path, RUNS[kind][1], **options, **best)
    resumed.add_callback(EarlyStoppingCallback(5))
    resumed.train(resume_from_checkpoint=True)  # finds it by its name
    assert (tmp_path / f"checkpoint-{SAVED + 1}" / "optimizer.pt").exists()  # it can save again
    weights, moments = state_of(run, SAVED)
    history = CheckpointManager(run / "checkpoints").load(STEPS).history
    assert watch.step == SAVED
    assert watch.rates == [history["learning_rate"][SAVED]] * 2
    assert_same(by_peft_names(watch.weights), weights)
    assert_same(by_peft_names(watch.moments), moments)

    expected_weights, expected_moments = state_of(run, SAVED + 1)
    raw = resumed.optimizer.optimizer
    for name, parameter in resumed.model.named_parameters():
        label = name.replace(".default", "")
        if not parameter.requires_grad or (kind == "dora" and parameter.ndim < 2):
            continue
        torch.testing.assert_close(parameter, expected_weights[label], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw.state[parameter], expected_moments[label], rtol=1e-3, atol=1e-6)
    log = [line for line in resumed.state.log_history if "loss" in line]
    assert [line["step"] for line in log] == [*range(1, SAVED + 2)]
    losses = [line["loss"] for line in log]
    assert losses == pytest.approx(history["loss"][: SAVED + 1], abs=1e-4)


@pytest.mark.parametrize("kind", RUNS)
def test_there_and_back_again(directory, runs, tmp_path, kind):
    to_trainer(runs(kind), tmp_path / "folder", step=SAVED)
    command = ["convert", str(tmp_path / "folder"), "--to", str(tmp_path / "run")]
    assert main([*command, "--model", str(directory / "model")]) == 0
    for returned, original in zip(
        state_of(tmp_path / "run", SAVED), state_of(runs(kind), SAVED), strict=True
    ):
        assert_same(returned, original)


#: Adapters of a program's own, and None for all weights.
ADAPTERS = {
    "lora": {**LORA, "lora_dropout": 0.1},
    "dora and a whole module": {
        **LORA,
        "target_modules": ["q_proj"],
        "use_dora": True,
        "modules_to_save": ["lm_head"],
    },
    "all weights": None,
}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == SAVED


def plain(name: str, folder: Path) -> Any:
    """The content of a file, which holds only tensors and plain values."""
    if name.endswith(".safetensors"):
        return load_file(folder / name)
    if not name.endswith(".json"):
        return torch.load(folder / name, weights_only=True)
    values = json.loads((folder / name).read_text())
    if type(values.get("target_modules")) is list:
        values["target_modules"].sort()  # a set in peft
    return values


def assert_same_file(name: str, converted: Path, saved: Path) -> None:
    actual = plain(name, converted)
    if name == "rng_state.pth":
        expected = torch.load(saved / name, weights_only=False)  # it has an array of numpy
        kind, key, *numbers = expected["numpy"]
        expected["numpy"] = (kind, tuple(key.tolist()), *numbers)
    else:
        expected = plain(name, saved)
    if name == "trainer_state.json":
        assert actual["stateful_callbacks"].keys() >= expected["stateful_callbacks"].keys()
        del expected["stateful_callbacks"], actual["stateful_callbacks"]  # one is asked to stop
    if name == "config.json":
        actual = {option: actual[option] for option in expected}  # it also has the defaults
    assert_same(actual, expected) if name.endswith((".pt", ".safetensors")) else assert_equal(
        actual, expected
    )


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else actual[name] == value


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_converted_folder_is_the_one_that_the_trainer_saves(directory, tmp_path, kind):
    """The same training, saved by the Trainer itself and by DistrustCheckpoints, gives the same folder."""
    for out in ("plain", "attached"):
        options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED}
        begun, _ = trainer(directory / "model", tmp_path / out, ADAPTERS[kind], **options)
        begun.add_callback(Stop())
        if out == "attached":
            DistrustCheckpoints(tmp_path / "checkpoints").attach(begun)
        begun.train()
    saved, folder = tmp_path / "plain" / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}"
    file, dropped = to_trainer(tmp_path / "checkpoints", folder)
    assert (file.step, len(dropped)) == (SAVED, 1)
    names = {path.name for path in folder.iterdir()}
    of_the_script = {"training_args.bin", "README.md", "generation_config.json"}
    assert {path.name for path in saved.iterdir()} - names <= of_the_script
    for name in names:
        assert_same_file(name, folder, saved)

    ends = []
    for source in (saved, folder):
        options = {"max_steps": SAVED + 2, "save_strategy": "steps"}
        resumed, watch = trainer(directory / "model", tmp_path / "end", ADAPTERS[kind], **options)
        resumed.train(resume_from_checkpoint=str(source))
        assert (tmp_path / "end" / f"checkpoint-{SAVED + 2}").exists()  # it can save again
        ends.append((watch.weights, watch.moments, watch.schedule, dict(resumed.model.named_parameters())))
    assert_same(ends[0], ends[1])
    command = ["convert", str(folder), "--to", str(tmp_path / "run"), "--model", str(directory / "model")]
    assert main(command) == (kind == "dora and a whole module")  # no run here could resume that


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) in (1, 2)
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    return printed.err


def test_a_refusal_is_one_line_and_leaves_nothing(directory, runs, tmp_path, capsys):
    run = runs("lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    back = ("--format", "trainer", "--to")
    cases = {
        (run, *back, tmp_path / "full"): "exists already, and is not overwritten",
        (run, *back, tmp_path / "link"): "exists already, and is not overwritten",
        (run, *back, tmp_path / "a", "--force"): "--force goes with --format run",
        (run, *back, tmp_path / "checkpoint-4"): f"is of step {STEPS}: name the folder checkpoint-{STEPS}",
        (run, *back, tmp_path / "a", "--step", STEPS + 1): f"no checkpoint of step {STEPS + 1}",
        (run, *back, tmp_path / "a", "--best"): "no checkpoint has the metric 'eval_loss'",
        (run, *back, tmp_path / "a", "--model", tmp_path / "nowhere"): "no such file or directory",
        (tmp_path / "nowhere", *back, tmp_path / "a"): "no such file or directory",
        (run, "--to", tmp_path / "a", "--step", SAVED): "--step and --best go with --format trainer",
    }
    for arguments, message in cases.items():
        assert message in refuse(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link"]


@pytest.mark.parametrize("part", ["weights", "moments"])
def test_a_disk_that_refuses(runs, tmp_path, capsys, part):
    """For real: no file may be larger. Python ignores the signal that comes with it."""
    weights = sum(tensor.nbytes for tensor in state_of(runs("lora"), SAVED)[0].values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2 if part == "weights" else weights * 2, hard))
    try:
        message = refuse(capsys, runs("lora"), "--to", tmp_path / "a", "--format", "trainer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'a'}: not written: " in message
    assert os.listdir(tmp_path) == []


def by_hand(checkpoints: Path, **changed: Any) -> Path:
    """A checkpoint in the layout of DistrustCheckpoints."""
    values: dict[str, Any] = {
        "step": SAVED,
        "model": {"parameters": {"base_model.model.q.lora_A.default.weight": torch.ones(2, 3)}},
        "optimizer": {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {}, "scaler": None},
        "rng": {"buffers": {}},
        "history": {"trainer_state": np.frombuffer(b'{"stateful_callbacks": {}}', np.uint8)},
        "run": {
            "integration": {
                "program": "transformers",
                "model_config": {},
                "peft_config": {"peft_type": "LORA"},
            }
        },
        **changed,
    }
    with CheckpointManager(checkpoints) as manager:
        manager.save(Checkpoint(**values))
    return checkpoints


MALFORMED: dict[str, dict[str, Any]] = {
    "no program": {"run": {"integration": {"model_config": {}, "peft_config": None}}},
    "no mapping": {"run": {"integration": "transformers"}},
    "no parameters": {"model": {"weights": torch.ones(2)}},
    "no state of the Trainer": {"history": {}},
    "a deep state of the Trainer": {"history": {"trainer_state": np.frombuffer(b"[" * 200_000, np.uint8)}},
    "half a generator": {"rng": {"now": {"python": {}}, "buffers": {}}},
    "a generator of no GPU": {"rng": {"now": {**generators(), "cuda": []}, "buffers": {}}},
    "a generator of infinite words": {
        "rng": {"now": {**generators(), "python": {"version": 3, "words": np.full(2, np.inf), "gauss": None}}}
    },
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_checkpoint_of_another_layout_is_refused(tmp_path, capsys, kind):
    source = by_hand(tmp_path / "checkpoints", **MALFORMED[kind])
    arguments = (source, "--to", tmp_path / "a", "--format", "trainer")
    path = source / f"checkpoint-{SAVED}.safetensors"
    assert f"{path}: not what DistrustCheckpoints saves" in refuse(capsys, *arguments)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("program", ["mlx-lm", "accelerate"])
def test_a_checkpoint_of_another_library_says_so(tmp_path, capsys, program):
    source = by_hand(tmp_path / "checkpoints", run={"integration": {"program": program}})
    message = refuse(capsys, source, "--to", tmp_path / "a", "--format", "trainer")
    assert f"{tmp_path / 'a'}: saved in a loop of {program}: resume it there" in message


HISTORY = {column: np.zeros(SAVED) for column in ("loss", "gradient_norm", "learning_rate")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"history": {}}, "its history is not that of a run"),
        ({"history": {**HISTORY, "loss": np.zeros(2)}}, "its history is not that of a run"),
        ({"history": {"loss": "low"}}, "its history is not that of a run"),
        ({"history": HISTORY, "step": 10**17}, "its history is not that of a run"),
        ({"lora_rank": 10**9}, "a model of its config cannot be made"),
        ({"lora_rank": 10**18}, "a model of its config cannot be made"),
    ],
)
def test_a_run_that_claims_what_it_does_not_have_is_refused(runs, tmp_path, capsys, changed, message):
    """A large step or rank is found out before memory is taken for it."""
    saved = CheckpointManager(runs("lora") / "checkpoints").load(SAVED)
    if "lora_rank" in changed:
        changed = {"config": {**saved.config, **changed}}
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(replace(saved, **changed))
    arguments = (tmp_path / "checkpoints", "--to", tmp_path / "new" / "a", "--format", "trainer")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), limits[1]))
    try:
        assert message in refuse(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_weights_beside_an_adapter_are_refused(tmp_path, capsys):
    tensors = {
        "base_model.model.q.lora_A.default.weight": torch.ones(2),
        "base_model.model.norm": torch.ones(2),
    }
    source = by_hand(tmp_path / "checkpoints", model={"parameters": tensors})
    back = ("--to", tmp_path / "a", "--format", "trainer")
    assert "base_model.model.norm: trained, but not in an adapter" in refuse(capsys, source, *back)
    assert "was saved in a Trainer, and needs none" in refuse(capsys, source, *back, "--model", tmp_path)


def test_the_result_as_json(tmp_path, capsys):
    source = by_hand(tmp_path / "checkpoints")
    capsys.readouterr()
    folder = tmp_path / "new" / "a"  # its parent is created
    assert main(["convert", str(source), "--to", str(folder), "--format", "trainer", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert list(result) == ["path", "step", "state_digest", "to", "dropped"]
    assert (result["path"], result["to"]) == (
        str(source / f"checkpoint-{SAVED}.safetensors"),
        str(folder),
    )
