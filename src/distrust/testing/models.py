"""A small real model and data for it: a Llama of transformers with a tokenizer of bytes, saved to a folder.

The frameworks are imported once a model is made: tests of the loop alone need none.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
CONTEXT = 128


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Two layers of width 32, and 259 tokens: three special ones and the bytes."""
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_records(path: Path, count: int = 11, *, seed: int = 0) -> Path:
    """Texts of different lengths, and sources of different worth: weights differ by up to some 5 times."""
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


def train_a_little(place: Path, out: Path, **options: object) -> Path:
    """A few steps on ``model`` and ``records.jsonl`` that move the weights far enough to be seen."""
    from distrust import DistrustTrainer, TrainConfig

    config: dict[str, Any] = {
        "model": str(place / "model"),
        "data": str(place / "records.jsonl"),
        "batch_size": 2,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "schedule": "constant",
        "threads": 1,
        **options,
    }
    DistrustTrainer(TrainConfig(out=str(out), **config)).train()
    return out


def train_arguments(folder: Path, out: Path, *more: object) -> list[str]:
    """A training of a second or two."""
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
    return ["train", *(str(part) for pair in arguments.items() for part in pair), *map(str, more)]
