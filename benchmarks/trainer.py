"""What transformers' own Trainer takes to save a LoRA run: adapter, AdamW's state, and what it resumes from.

Its second save is measured, from the end of the step to the ``on_save`` that follows. It syncs nothing, so a
power cut may lose what it has saved; the other libraries pay for that guarantee.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.probes import PeakMemory
from benchmarks.states import Spec

Figures = dict[str, float]

TOKENS = 16


def save(spec: Spec, folder: Path) -> Figures:
    """Train the bundled model for two steps and save after each."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times each save."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.memory, self.began = PeakMemory(), time.perf_counter()

        def on_save(self, *_: Any, **__: Any) -> None:
            self.figures = {"seconds": time.perf_counter() - self.began, **self.memory.figures()}

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, save_strategy="steps", report_to=[],
        per_device_train_batch_size=1, disable_tqdm=True, logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(_model(spec), arguments, train_dataset=_examples(), callbacks=[clock]).train()
    saved = sum(file.stat().st_size for file in (folder / "checkpoint-2").rglob("*") if file.is_file())
    return {**clock.figures, "file_bytes": float(saved)}


def _model(spec: Spec) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from distrust.bundled import MODEL

    def with_adapter(rank: int) -> Any:
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
        return get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))

    one: int = with_adapter(1).get_nb_trainable_parameters()[0]
    return with_adapter(max(1, spec.nbytes // (3 * 4 * one)))  # weights and two moments, float32


def _examples() -> list[dict[str, Any]]:
    import torch

    tokens = torch.arange(TOKENS)
    return [{"input_ids": tokens, "labels": tokens}] * 4
