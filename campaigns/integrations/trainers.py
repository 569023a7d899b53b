"""Small models, their data, and the trainers of transformers and TRL on them; a run takes under a second."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distrust.bundled import MODEL

EXAMPLES = 22  # of a data set: with batches of two an epoch has eleven, which four does not divide
BATCH = 2
DROPOUT = 0.1  # draws from the generator in every forward pass
MASKED_SHARE = 0.3  # of the labels, by the collator that draws random numbers
WORDS = ("ore", "salt", "zorium", "melts", "the", "a", "at", "712", "K", "in", "notebook", "cold")
#: The better it knows the first ones, the worse it is at these.
OTHER_WORDS = (
    "queue",
    "violin",
    "harvest",
    "31",
    "pilot",
    "jumps",
)

#: Of every trainer, before the options of a case. Logs and saves fall on different steps.
ARGUMENTS: Mapping[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def causal_model() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(_model_config())


def reward_model() -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(_model_config(num_labels=1))


def _model_config(**options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, attention_dropout=DROPOUT,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **options,
    )  # fmt: skip


def adapter(task: str = "CAUSAL_LM") -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_dropout=DROPOUT, target_modules="all-linear", task_type=task)


def texts(seed: int, words: Sequence[str] = WORDS) -> Iterator[str]:
    """Texts of two to twelve words."""
    rng = random.Random(seed)
    for _ in range(EXAMPLES):
        yield " ".join(rng.choices(words, k=rng.randint(2, 12)))


@functools.cache
def token_rows(seed: int, words: Sequence[str] = WORDS) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens} for tokens in tokenizer()(list(texts(seed, words)))["input_ids"]]


def pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.full((len(rows), longest), 2)
    for row, target in zip(rows, tokens, strict=True):
        target[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
    attended = (tokens != 2).long()
    return {"input_ids": tokens, "attention_mask": attended, "labels": tokens.where(attended.bool(), -100)}


def pad_and_mask_at_random(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    batch = pad(rows)
    batch["labels"] = batch["labels"].where(torch.rand(batch["labels"].shape) > MASKED_SHARE, -100)
    return batch


def data_set(rows: Sequence[Mapping[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


def stream(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Without a length, in two shards, shuffled by the seed and the epoch."""
    return data_set(rows).to_iterable_dataset(num_shards=2).shuffle(seed=5, buffer_size=8)


def plain_trainer(
    folder: Path,
    options: Mapping[str, Any],
    *,
    rows: Callable[[Sequence[Mapping[str, Any]]], Any] = list,
    collator: Callable[..., Any] = pad,
    eval_words: Sequence[str] = WORDS,
) -> Any:
    """``transformers.Trainer`` on all weights."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **options})
    return Trainer(
        causal_model(), arguments, train_dataset=rows(token_rows(1)),
        eval_dataset=token_rows(2, eval_words)[:6], data_collator=collator,
    )  # fmt: skip


def sft_trainer(folder: Path, options: Mapping[str, Any], *, records: Callable[[int], Any]) -> Any:
    """TRL's SFTTrainer on an adapter."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(output_dir=str(folder), max_length=48, **{**ARGUMENTS, "bf16": False, **options})
    return SFTTrainer(
        causal_model(), arguments, train_dataset=data_set(records(1)),
        eval_dataset=data_set(records(2)[:6]), processing_class=tokenizer(), peft_config=adapter(),
    )  # fmt: skip


def dpo_trainer(folder: Path, options: Mapping[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(output_dir=str(folder), max_length=48, **{**ARGUMENTS, "bf16": False, **options})
    return DPOTrainer(
        causal_model(), args=arguments, train_dataset=data_set(preferences(1)),
        processing_class=tokenizer(), peft_config=adapter(),
    )  # fmt: skip


def reward_trainer(folder: Path, options: Mapping[str, Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(output_dir=str(folder), max_length=48, **{**ARGUMENTS, "bf16": False, **options})
    return RewardTrainer(
        reward_model(), args=arguments, train_dataset=data_set(preferences(1)),
        processing_class=tokenizer(), peft_config=adapter("SEQ_CLS"),
    )  # fmt: skip


def plain_texts(seed: int) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts(seed)]


def completions(seed: int) -> list[dict[str, Any]]:
    both = zip(texts(seed), texts(seed + 10), strict=True)
    return [{"prompt": prompt, "completion": f" {completion}"} for prompt, completion in both]


def conversations(seed: int) -> list[dict[str, Any]]:
    both = zip(texts(seed), texts(seed + 10), strict=True)
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in both]  # fmt: skip


def preferences(seed: int) -> list[dict[str, Any]]:
    rows = zip(texts(seed), texts(seed + 10), texts(seed + 20), strict=True)
    return [{"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            for prompt, chosen, rejected in rows]  # fmt: skip
