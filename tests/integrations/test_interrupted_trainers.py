"""Runs that an error interrupts at a chosen event, in this process: they end as undisturbed plain ones.

What a SIGKILL adds is shown in test_disturbed_trainers.py; here are the arguments, models and events in which
the end of a step, of an epoch and of training are easily confused.
"""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from torch.utils.data import IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from distrust import CheckpointManager, DistrustWarning
from distrust.integrations.random import generators
from distrust.integrations.transformers import DistrustCheckpoints
from tests.integrations.test_attach import CONFIG, DATA, Interrupted, assert_equal, build
from tests.trainer_warnings import pytestmark  # noqa: F401


class At(TrainerCallback):
    """Raises, or asks for a JIT checkpoint, at an event of a step."""

    def __init__(self, event, step, *, asks=False):
        def act(args, state, control, **kwargs):
            if state.global_step == step and not self.came:
                self.came = True
                if not asks:
                    raise Interrupted
                self.jit.is_checkpoint_requested = True

        self.came = False
        setattr(self, event, act)

    def attach_jit(self, trainer):
        (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
        self.jit = callback.jit_manager


class Stream(IterableDataset):
    """As many examples in each pass, in the order of the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(DATA))
        return iter([DATA[number] for number in order])


class StopEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 4 == 0:
            control.should_epoch_stop = True


class Normalized(torch.nn.Module):
    """Has running statistics, a buffer that the forward pass assigns, and a config that is no JSON."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.config = SimpleNamespace(size=8)

    def forward(self, input_ids, labels):
        if self.training:
            self.calls = self.calls + 1
        logits = self.head(self.norm(self.embedding(input_ids).flatten(0, 1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}


def with_native_adapter():
    model = LlamaForCausalLM(CONFIG)
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    return model


def end_of(trainer, result):
    """All that must be equal, as values that can be compared."""
    entries = [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "moments": {
            f"{number}.{name}": torch.as_tensor(value).clone()
            for number, state in trainer.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        },
        "torch": {"state": torch.get_rng_state()},
        "rest": json.dumps(
            [entries, result.training_loss, generators()["python"]["words"].tolist()], sort_keys=True
        ),
    }


def assert_ends_equal(end, expected):
    for part in ("weights", "moments", "torch"):
        assert_equal(end[part], expected[part])
    assert end["rest"] == expected["rest"]


@pytest.fixture
def run(tmp_path):
    def run(directory, interruption=None, *, model=None, setup=None, pure_data=False, **options):
        options = copy.deepcopy(options)
        if directory is None:
            options.pop("enable_jit_checkpoint", None)
        trainer = build(tmp_path, **options)
        if model is not None:
            set_seed(1)
            data, evaluation = trainer.train_dataset, trainer.eval_dataset
            trainer = Trainer(model=model(), args=trainer.args, train_dataset=data, eval_dataset=evaluation)
        if setup is not None:
            setup(trainer)
        if interruption is not None:
            trainer.add_callback(interruption)
            if hasattr(interruption, "jit") or options.get("enable_jit_checkpoint"):
                interruption.attach_jit(trainer)
        if directory is not None:
            DistrustCheckpoints(tmp_path / directory, pure_data=pure_data).attach(trainer)
        return end_of(trainer, trainer.train())

    return run


EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
SCORES = {2: 1, 4: 5, 6: 9, 8: 7, 10: 1, 12: 1}
BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "load_best_model_at_end": True,
    "metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 1, "max_steps": 12,
}  # fmt: skip


def score(trainer):
    trainer.compute_metrics = lambda _: {"score": SCORES[trainer.state.global_step]}


def score_all_kinds(trainer):
    trainer.compute_metrics = lambda _: {"score": float("nan"), "each": [1, 2], "name": "x", "none": None}


@pytest.mark.parametrize(
    ("events", "options"),
    [
        pytest.param([("on_step_end", 5), ("on_epoch_begin", 6)], {}, id="plain"),
        pytest.param([("on_step_end", 5)], {"callbacks": [StopEpoch()]}, id="epochs that a callback ends"),
        pytest.param(
            [("on_epoch_begin", 6)], {"data": Stream(), "max_steps": 14, **EPOCHS}, id="stream by epochs"
        ),
        pytest.param(
            [("on_step_end", 2), ("on_step_end", 3)],
            {
                "data": Stream(),
                "max_steps": 5,
                "gradient_accumulation_steps": 4,
                "save_steps": 1,
                "logging_strategy": "epoch",
            },
            id="stream with a remainder",
        ),
        pytest.param(
            [("on_step_end", 2), ("on_step_begin", 3)],
            {"data": Stream(), "max_steps": 5, "gradient_accumulation_steps": 4, **EPOCHS},
            id="stream with a remainder by epochs",
        ),
        pytest.param([("on_step_end", 5)], {"model": Normalized, "lora": False}, id="running statistics"),
        pytest.param(
            [("on_step_end", 5)], {"model": with_native_adapter, "lora": False}, id="an adapter without peft"
        ),
        pytest.param(
            [("on_step_end", 9)], {"setup": score, **BEST}, id="the best is older than a better one"
        ),
        pytest.param(
            [("on_step_end", 9)],
            {"setup": score_all_kinds, "eval_strategy": "steps", "eval_steps": 2},
            id="metrics that are no numbers",
        ),
        pytest.param([("on_step_end", 5)], {"save_total_limit": 0}, id="no limit"),
        pytest.param(
            [("on_save", 4), ("on_log", 9)], {"logging_first_step": True, "eval_on_start": True}, id="logs"
        ),
        pytest.param(
            [("on_step_end", 5)],
            {"optim": "adafactor", "lr_scheduler_type": "cosine_with_restarts"},
            id="adafactor",
        ),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_plain_one(run, events, options):
    expected = run(None, **options)
    for event, step in events:
        with pytest.raises(Interrupted):
            run("saved", At(event, step), **options)
    assert_ends_equal(run("saved", **options), expected)
    assert_ends_equal(run("saved", **options), expected)  # started again at its end


IN_A_STEP = [
    "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
]  # fmt: skip
AT_AN_EPOCH = ["on_log", "on_evaluate", "on_epoch_end", "on_epoch_begin"]


@pytest.mark.parametrize(
    ("event", "by", "accumulation"),
    [
        *((event, "steps", 2) for event in [*IN_A_STEP, *AT_AN_EPOCH]),
        *((event, "epoch", 1) for event in AT_AN_EPOCH),
        *((event, "epoch", 2) for event in ("on_step_end", "on_log", "on_epoch_begin")),
    ],
)
def test_a_jit_checkpoint_may_be_asked_for_at_any_event(run, tmp_path, event, by, accumulation):
    options = {
        "gradient_accumulation_steps": accumulation, "save_strategy": "no", "enable_jit_checkpoint": True,
        "logging_strategy": by, "eval_strategy": by, "logging_steps": 1, "eval_steps": 1,
    }  # fmt: skip
    expected = run(None, **options)
    is_at_epoch = event in ("on_epoch_end", "on_epoch_begin") or (
        by == "epoch" and event in ("on_log", "on_evaluate")
    )
    steps_per_epoch = 6 // accumulation
    run("saved", At(event, steps_per_epoch if is_at_epoch else 2, asks=True), **options)
    (saved,) = CheckpointManager(tmp_path / "saved").scan().files[-1:]
    assert (saved.kind, 2 <= saved.step < 2 * steps_per_epoch) == ("periodic", True)
    assert not list(
        (tmp_path / "output").glob("checkpoint-*")
    )  # no empty folder that the Trainer would resume from
    assert_ends_equal(run("saved", **options), expected)


def test_a_state_that_the_optimizer_has_changed_is_not_saved_yet(run, tmp_path):
    class SaveAndDie(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:  # the step before is not saved
                self.trainer._save_checkpoint(self.trainer.model)
                raise Interrupted

    callback = SaveAndDie()
    expected = run(None, save_steps=2)
    with pytest.raises(Interrupted):
        run("saved", callback, save_steps=2, setup=lambda trainer: setattr(callback, "trainer", trainer))
    assert CheckpointManager(tmp_path / "saved").list_checkpoints() == [2]
    assert_ends_equal(run("saved", save_steps=2), expected)


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_log"])
def test_ctrl_c_saves_the_last_complete_step(run, tmp_path, event):
    class Press(TrainerCallback):
        pass

    def press(args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    callback = Press()
    setattr(callback, event, press)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "no", "logging_steps": 1}
    expected = run(None, **options)
    with pytest.raises(KeyboardInterrupt):
        run("saved", callback, **options)
    # A log is part of its step; and the optimizer may be at work already.
    is_complete = event not in ("on_log", "on_pre_optimizer_step")
    assert CheckpointManager(tmp_path / "saved").list_checkpoints() == ([3] if is_complete else [])
    assert_ends_equal(run("saved", **options), expected)


@pytest.mark.parametrize("kind", ["tied", "prompt"])
def test_a_folder_has_the_weights_of_its_step_alone(tmp_path, kind):
    options = {"max_steps": 4, "learning_rate": 0.1, "lora": False}
    trainer = build(tmp_path, **options)
    if kind == "tied":
        config = copy.copy(CONFIG)
        config.tie_word_embeddings = True
        trainer = Trainer(model=LlamaForCausalLM(config), args=trainer.args, train_dataset=DATA)
    else:
        from peft import get_peft_model

        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer = Trainer(
            model=get_peft_model(LlamaForCausalLM(CONFIG), prompt), args=trainer.args, train_dataset=DATA
        )
    checkpoints = DistrustCheckpoints(tmp_path / "saved")
    checkpoints.attach(trainer).train()
    last = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    path = checkpoints.to_folder(tmp_path / "two", step=2)
    assert_equal(trainer.model.state_dict(), last)  # the model is as it was
    saved = CheckpointManager(tmp_path / "saved").load(2, framework="torch").model["parameters"]
    if kind == "tied":
        loaded = LlamaForCausalLM.from_pretrained(path)
        assert torch.equal(loaded.lm_head.weight, saved["model.embed_tokens.weight"])
    else:
        loaded = PeftModel.from_pretrained(LlamaForCausalLM(CONFIG), path)
    values = {name: value.detach() for name, value in loaded.named_parameters() if name in saved}
    assert_equal(values, dict(saved))


@pytest.mark.filterwarnings("ignore")  # of trl, about its own arguments
@pytest.mark.parametrize("evaluates_last", [True, False])
def test_a_finished_run_of_trl_logs_the_same_summary_again(tmp_path, evaluates_last):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from distrust.bundled import MODEL

    data = Dataset.from_list([{"text": f"sample {number}"} for number in range(8)])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def run():
        set_seed(1)
        config = copy.copy(CONFIG)
        config.vocab_size = len(tokenizer)
        args = SFTConfig(
            str(tmp_path / "output"), max_steps=4, logging_steps=3, save_steps=2, eval_strategy="steps",
            eval_steps=4 if evaluates_last else 3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, max_length=16,
        )  # fmt: skip
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        DistrustCheckpoints(tmp_path / "saved").attach(trainer)
        return end_of(trainer, trainer.train())

    assert_ends_equal(run(), run())


def test_fewer_steps_than_were_made_are_told(run):
    run("saved", max_steps=4)
    with pytest.warns(DistrustWarning, match="step 4, beyond max_steps=3"):
        run("saved", max_steps=3)
