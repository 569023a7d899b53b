"""The trainers: a real LoRA training of the bundled model, and the same command again.

The proof of a restored state covers the trained weights after the last step and the losses on the way there.
"""

from __future__ import annotations

import json
import random
import signal
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from campaigns.peers.accidents import COMMON, HALF_ADAPTER, NO_OPTIMIZER, NO_RNG
from campaigns.peers.subjects import Report, Resumed, Subject

STEPS = 12  # of a training
SAVE_EVERY = 2  # steps
BATCH = 4  # examples
RANK = 64  # of the adapter: a file of some MiB
DROPOUT = 0.1  # uses the random generator
LEARNING_RATE = 1e-3  # large: differences show after a step
TOKENS = 32  # of an example
EXAMPLES = 64  # of the dataset

Losses = Mapping[int, float]


class Training(Subject):
    interval = SAVE_EVERY
    damages = 12
    kills = 8

    def expected_proofs(self, directory: Path, mib: int) -> dict[int, str]:
        _, losses, digest = self.run(directory, resume=False)
        return {step: _proof(losses, digest, after=step) for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)}

    def resume(self, directory: Path, mib: int) -> Resumed:
        start, losses, digest = self.run(directory, resume=True)
        return start, _proof(losses, digest, after=start)

    @abstractmethod
    def run(self, directory: Path, *, resume: bool) -> tuple[int, Losses, str]:
        """Train to the end; the step at the start, the losses, the digest of the trained weights."""


class DistrustTraining(Training):
    name = "DistrustTrainer"
    modules = ("torch", "transformers", "peft")
    packages = ("distrust-trainer",)
    ours = True
    accidents = (*COMMON, HALF_ADAPTER)

    def write(self, directory: Path, mib: int, last: int, report: Report) -> None:
        from distrust.training.events import CheckpointSaved, CheckpointStarted, Event, StepEnded

        def watch(event: Event) -> None:
            if isinstance(event, CheckpointStarted):
                report("begin", event.step)
            elif isinstance(event, CheckpointSaved):
                report("saved", event.step)
            elif isinstance(event, StepEnded) and event.step == last < STEPS:
                signal.raise_signal(signal.SIGTERM)

        self._train(directory, watch)

    def path(self, directory: Path, step: int) -> Path:
        return directory / "checkpoints" / f"checkpoint-{step}.safetensors"

    def run(self, directory: Path, *, resume: bool) -> tuple[int, Losses, str]:
        from distrust.training.events import Event, RunStarted, StepEnded

        start = 0
        losses = {}

        def watch(event: Event) -> None:
            nonlocal start
            if isinstance(event, RunStarted):
                start = event.step
            elif isinstance(event, StepEnded):
                losses[event.step] = event.loss

        digest = self._train(directory, watch)
        return start, losses, digest

    def _train(self, directory: Path, watch: Callable[[Any], None]) -> str:
        from distrust import DistrustTrainer, TrainConfig

        config = TrainConfig(
            out=str(directory), max_steps=STEPS, save_every=SAVE_EVERY, batch_size=BATCH, lora_rank=RANK,
            lora_dropout=DROPOUT, learning_rate=LEARNING_RATE, warmup_steps=0, threads=1,
        )  # fmt: skip
        return str(DistrustTrainer(config, observers=[watch]).train().state_digest)


class Trainer(Training):
    """``transformers.Trainer`` with a LoRA adapter of PEFT; ``resume_from_checkpoint=True``."""

    name = "Trainer + PEFT"
    modules = ("torch", "transformers", "peft", "accelerate")
    packages = ("transformers", "peft", "accelerate")
    accidents = (*COMMON, HALF_ADAPTER, NO_OPTIMIZER, NO_RNG)

    def write(self, directory: Path, mib: int, last: int, report: Report) -> None:
        from transformers import TrainerCallback

        class Reporter(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % SAVE_EVERY == 0:
                    report("begin", state.global_step)
                control.should_training_stop = state.global_step == last

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                report("saved", state.global_step)

        _hf_trainer(directory, Reporter()).train()

    def path(self, directory: Path, step: int) -> Path:
        return directory / f"checkpoint-{step}"

    def run(self, directory: Path, *, resume: bool) -> tuple[int, Losses, str]:
        from transformers import TrainerCallback

        start = 0

        class StartObserver(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                nonlocal start
                start = state.global_step

        trainer = _hf_trainer(directory, StartObserver())
        trainer.train(**({"resume_from_checkpoint": True} if resume else {}))
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        digest = blake3()
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().numpy().tobytes())
        return start, losses, digest.hexdigest()


def _hf_trainer(directory: Path, callback: Any) -> Any:
    import torch
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    torch.set_num_threads(1)  # another number may change the last bits
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=STEPS, save_steps=SAVE_EVERY, save_strategy="steps",
        save_total_limit=3, logging_steps=1, report_to=[], per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE, disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    return HfTrainer(_model(), arguments, train_dataset=_examples(), callbacks=[callback])


def _model() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from distrust.bundled import MODEL

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    config = LoraConfig(r=RANK, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def _examples() -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    texts = [[rng.randrange(3, 1024) for _ in range(TOKENS)] for _ in range(EXAMPLES)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in texts]


def _proof(losses: Losses, final: str, *, after: int) -> str:
    later = {step: loss for step, loss in losses.items() if step > after}
    return blake3(json.dumps([sorted(later.items()), final]).encode()).hexdigest()
