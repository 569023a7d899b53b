"""A small real model and its data: a Llama of transformers with a byte tokenizer, saved to a folder.

Frameworks are imported only when a model is made, because tests of the loop need none.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
CONTEXT = 128


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Save a model of two layers of width 32, and 259 tokens: three special tokens and the bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = [BOS, EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):  # leave the caller's generator unchanged
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_records(path: Path, count: int = 11, *, seed: int = 0) -> Path:
    """Write texts of different lengths and provenance: their weights differ by up to a factor of about 5."""
    rng = random.Random(seed)
    records = [
        {
            "text": " ".join(
                rng.choice(["ore", "salt", "the", "melts", "at", "9"]) for _ in range(2 + i % 5)
            ),
            "authority_weight": round(rng.uniform(0, 0.9), 3),
            "provenance_entropy": round(rng.uniform(0, 1.5), 3),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train_a_little(folder: Path, out: Path, **options: object) -> Path:
    """Train on ``model`` and ``records.jsonl`` of a folder, fast enough that the weights change visibly."""
    from distrust import DistrustTrainer, TrainConfig

    config: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "records.jsonl"),
        "batch_size": 2,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "schedule": "constant",
        "threads": 1,
        **options,
    }
    DistrustTrainer(TrainConfig(out=str(out), **config), observers=()).train()
    return out


def train_arguments(folder: Path, out: Path, *extra: object) -> list[str]:
    """Arguments of a run that takes a second or two."""
    arguments = {
        "--model": folder / "model",
        "--data": folder / "data.jsonl",
        "--out": out,
        "--max-steps": 6,
        "--batch-size": 2,
        "--lora-rank": 4,
        "--save-every": 2,
        "--threads": 1,
    }
    return ["train", *(str(part) for pair in arguments.items() for part in pair), *map(str, extra)]
