"""The trainers, each in a process of its own: ``python -m benchmarks.training.trainers NAME WORK``.

Each trains LoRA of one rank on all linear layers, by its own loop, loader and optimizer, as its documentation
says to, without logging, and without saves unless its name says so. Prints as JSON the tokens that are no
padding and the seconds that they took, and the most memory: of the process, or on a GPU of its tensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from benchmarks.devices import memory_figures, synchronize
from benchmarks.training.work import ALPHA, LEARNING_RATE, RANK, Work, from_json

if TYPE_CHECKING:
    from distrust import TrainConfig


class Clock:
    """When steps ended on the device, how many tokens they had, and how long saves stalled training."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.stalls: list[float] = []

    def step(self, tokens: int) -> None:
        """A step has ended."""
        synchronize(self._device)
        self.ends.append(time.perf_counter())
        self.tokens.append(tokens)


def our_config(work: Work, **options: Any) -> TrainConfig:
    from distrust import TrainConfig

    usual = {
        "model": str(work.folder / "model"),
        "data": str(work.folder / "data.jsonl"),
        "out": str(work.folder / "run"),
        "device": work.device,
        "dtype": work.dtype,
        "threads": work.threads,
        "max_length": work.row,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
    }
    return TrainConfig(**{**usual, **options})


def ours(work: Work, clock: Clock, *, deterministic: bool = True, **options: Any) -> None:
    from distrust import DistrustTrainer, engines
    from distrust.training.events import CheckpointSaved, StepEnded

    config = our_config(work, **{"max_steps": work.last_step, "save_every": 0, **options})
    if not deterministic:
        _allow_nondeterminism()
    examples = [0]  # of the step in progress

    def create(config: Any) -> Any:
        engine = engines.create_engine(config)
        accumulate = engine.accumulate

        def count(batches: Any, **options: Any) -> Any:
            examples[0] += sum(len(batch.examples) for batch in batches)
            return accumulate(batches, **options)

        engine.accumulate = count  # type: ignore[method-assign]
        return engine

    def watch(event: Any) -> None:
        if isinstance(event, StepEnded):
            clock.step(event.tokens + examples[0])  # the first token of an example is not trained
            examples[0] = 0
        elif isinstance(event, CheckpointSaved) and event.step < work.last_step:  # the final save blocks
            clock.stalls.append(event.stall_seconds)

    trainer = DistrustTrainer(config, engine=create, observers=[watch])
    trainer.train()


def _allow_nondeterminism() -> None:
    """To measure what determinism costs: the engine has no option for it."""
    from distrust.engines.torch import runtime

    settings: Any = runtime.Settings
    apply = settings._set
    settings._set = lambda self: apply(self._replace(deterministic=False))


def ours_packed(work: Work, clock: Clock) -> None:
    ours(work, clock, **_packed_rows(work))


def ours_packed_off(work: Work, clock: Clock) -> None:
    ours(work, clock, **_packed_rows(work), weighting="off")


def ours_packed_free(work: Work, clock: Clock) -> None:
    ours(work, clock, **_packed_rows(work), deterministic=False)


def ours_packed_4bit(work: Work, clock: Clock) -> None:
    ours(work, clock, **_packed_rows(work), quantization="4bit")


def ours_whole_saving(work: Work, clock: Clock) -> None:
    ours(work, clock, **_packed_rows(work), lora_rank=0, save_every=work.last_step // 2 + 1, keep_last=1)


def ours_plain(work: Work, clock: Clock) -> None:
    ours(work, clock, **_padded_texts(work))


def ours_mlx(work: Work, clock: Clock) -> None:
    ours(work, clock, **_padded_texts(work), engine="mlx")


def _packed_rows(work: Work) -> dict[str, Any]:
    return {
        "packing": True,
        "batch_size": work.rows_at_once,
        "gradient_accumulation": work.micro_batches,
    }


def _padded_texts(work: Work) -> dict[str, Any]:
    return {"batch_size": work.texts_at_once, "gradient_accumulation": work.micro_batches}


def _torch(work: Work) -> tuple[Any, Any]:
    """Model and tokenizer, as users of peft load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(
        work.folder / "model",
        dtype=getattr(torch, work.dtype),
        attn_implementation="sdpa",
        device_map=None if work.device == "cpu" else {"": 0},  # the first GPU: not copied by way of the host
    )
    return model, AutoTokenizer.from_pretrained(work.folder / "model")


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(work: Work, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": str(work.folder / "out"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": work.micro_batches,
        "max_steps": work.last_step,
        "learning_rate": LEARNING_RATE,
        "bf16": work.dtype == "bfloat16",
        "use_cpu": work.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def _with_clock(trainer_class: Any, clock: Clock) -> Any:
    class Watched(trainer_class):  # type: ignore[misc]
        """Counts the tokens of each micro-batch that are no padding."""

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            tokens[0] += int(ids.numel() if mask is None else (mask != 0).sum())
            return super().training_step(model, inputs, *arguments, **options)

    from transformers import TrainerCallback

    class AtStep(TrainerCallback):  # type: ignore[misc]
        """Takes the time when the optimizer's step is made."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step(tokens[0])
            tokens[0] = 0

    tokens = [0]  # of the step in progress
    return partial(Watched, callbacks=[AtStep()])


def transformers_trainer(work: Work, clock: Clock, *, flat: bool = False, **more: Any) -> None:
    from datasets import load_dataset
    from peft import get_peft_model
    from transformers import (
        DataCollatorForLanguageModeling,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    model, tokenizer = _torch(work)
    data = load_dataset("json", data_files=str(work.folder / "data.jsonl"), split="train")
    data = data.map(
        lambda row: {
            "input_ids": [*tokenizer(row["text"])["input_ids"][: work.row - 1], tokenizer.eos_token_id]
        },
        remove_columns=data.column_names,
    )
    trainer = _with_clock(Trainer, clock)(
        model=get_peft_model(model, _lora()),
        args=TrainingArguments(**_arguments(work, work.texts_at_once), **more),
        train_dataset=data,
        data_collator=DataCollatorWithFlattening()
        if flat
        else DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()


def transformers_by_length(work: Work, clock: Clock) -> None:
    transformers_trainer(work, clock, train_sampling_strategy="group_by_length")


def transformers_flattened(work: Work, clock: Clock) -> None:
    transformers_trainer(work, clock, flat=True)


def transformers_liger(work: Work, clock: Clock) -> None:
    transformers_trainer(work, clock, flat=True, use_liger_kernel=True)


def trl(work: Work, clock: Clock, *, packing: bool) -> None:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _torch(work)
    data = load_dataset("json", data_files=str(work.folder / "data.jsonl"), split="train").select_columns(
        ["text"]
    )
    arguments = _arguments(work, work.rows_at_once if packing else work.texts_at_once)
    trainer = _with_clock(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(**arguments, packing=packing, max_length=work.row),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_lora(),
    )
    trainer.train()


def trl_packed(work: Work, clock: Clock) -> None:
    trl(work, clock, packing=True)


def trl_plain(work: Work, clock: Clock) -> None:
    trl(work, clock, packing=False)


def mlx_lm(work: Work, clock: Clock) -> None:
    import mlx.core as mx
    import mlx.optimizers
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    model, tokenizer, *_ = load(str(work.folder / "model"))
    model.set_dtype(getattr(mx, work.dtype))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
    rows = [json.loads(line) for line in (work.folder / "data.jsonl").open(encoding="utf-8")]
    data = CacheDataset(TextDataset(rows, tokenizer, text_key="text"))

    class AtStep(TrainingCallback):  # type: ignore[misc]
        """Takes the time at each report, of which there is one a step."""

        def __init__(self) -> None:
            self.seen = 0

        def on_train_loss_report(self, info: Any) -> None:
            clock.step(int(info["trained_tokens"] - self.seen) + work.texts)
            self.seen = info["trained_tokens"]

    train(
        model,
        mlx.optimizers.AdamW(learning_rate=LEARNING_RATE),
        data,
        args=TrainingArgs(
            batch_size=work.texts,
            iters=work.last_step,
            steps_per_report=1,
            max_seq_length=work.row,
            adapter_file=str(work.folder / "adapters.safetensors"),
        ),
        training_callback=AtStep(),
    )


TRAINERS: dict[str, Callable[[Work, Clock], None]] = {
    "distrust, packing": ours_packed,
    "distrust, packing, weighting off": ours_packed_off,
    "distrust, packing, not deterministic": ours_packed_free,
    "distrust, packing, 4 bit": ours_packed_4bit,
    "distrust, all weights, saves": ours_whole_saving,
    "distrust": ours_plain,
    "distrust, mlx": ours_mlx,
    "transformers + peft": transformers_trainer,
    "transformers + peft, by length": transformers_by_length,
    "transformers + peft, flattened": transformers_flattened,
    "transformers + peft, liger": transformers_liger,
    "TRL, packing": trl_packed,
    "TRL": trl_plain,
    "mlx-lm": mlx_lm,
}


#: What a trainer needs beside torch, transformers and peft.
LIBRARIES = {
    "distrust, packing, 4 bit": ["bitsandbytes"],
    "distrust, mlx": ["mlx_lm"],
    "transformers + peft": ["datasets"],
    "transformers + peft, by length": ["datasets"],
    "transformers + peft, flattened": ["datasets"],
    "transformers + peft, liger": ["datasets", "liger_kernel"],
    "TRL, packing": ["datasets", "trl"],
    "TRL": ["datasets", "trl"],
    "mlx-lm": ["mlx_lm"],
}


def missing_libraries(name: str) -> list[str]:
    """Libraries that a trainer needs and that are not installed."""
    return [library for library in LIBRARIES.get(name, []) if find_spec(library) is None]


def main() -> None:
    began = time.perf_counter()
    name, text = sys.argv[1:]
    work = from_json(text)
    clock = Clock(work.device)
    with contextlib.redirect_stdout(sys.stderr):
        TRAINERS[name](work, clock)
    first = work.size.warmup_steps
    figures = {
        "tokens": sum(clock.tokens[first:]),
        "seconds": clock.ends[-1] - clock.ends[first - 1],
        "steps": len(clock.ends),
        "first_step_seconds": clock.ends[0] - began,  # with all imports, and loading the model
        **memory_figures(work.device),
    }
    if clock.stalls:
        figures["stall_seconds"] = max(clock.stalls)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
