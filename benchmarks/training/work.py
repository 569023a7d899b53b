"""The work that every trainer gets: a model with random weights, texts, and a number of tokens per step."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


@dataclass(frozen=True)
class Size:
    """A Llama.

    Attributes:
        vocab_size: tokens; embeddings are tied.
        warmup_steps: steps that are not measured.
        steps: steps that are measured.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    warmup_steps: int
    steps: int


SIZES = {
    "15M": Size(32_000, 288, 768, 6, 6, 6, warmup_steps=3, steps=12),
    "135M": Size(49_152, 576, 1536, 30, 9, 3, warmup_steps=1, steps=4),
}


@dataclass(frozen=True)
class Work:
    """The work.

    Attributes:
        folder: with ``model`` and ``data.jsonl``.
        size: of the model.
        dtype: ``float32`` or ``bfloat16``, of the base weights and the arithmetic.
        tokens: per step, approximately.
        row: tokens of a packed row, and of the longest text.
        mean_length: tokens of a text, on average, its end token included.
        threads: of the processor.
    """

    folder: Path
    size: Size
    dtype: str
    tokens: int
    row: int
    mean_length: float
    threads: int

    @property
    def rows(self) -> int:
        """Packed rows per step."""
        return max(1, self.tokens // self.row)

    @property
    def texts(self) -> int:
        """Texts per step, where they are not packed: as many tokens without padding."""
        return max(1, round(self.tokens / self.mean_length))

    @property
    def last_step(self) -> int:
        """Total number of steps."""
        return self.size.warmup_steps + self.size.steps

    def as_json(self) -> str:
        """As JSON, for a child process."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})


def from_json(text: str) -> Work:
    """The inverse of :meth:`Work.as_json`."""
    values = json.loads(text)
    values["size"] = Size(**values["size"])
    return Work(**{**values, "folder": Path(values["folder"])})


def make(folder: Path, *, size: str, dtype: str, tokens: int, row: int, threads: int, seed: int = 0) -> Work:
    """Write model and data; the lengths of the texts are log-normal, like those of instructions."""
    shape = SIZES[size]
    words = [f"w{number}" for number in range(shape.vocab_size - 3)]
    rng = random.Random(seed)
    lengths = [min(row - 1, max(8, round(rng.lognormvariate(4.8, 0.7)))) for _ in range(60 * tokens // 100)]
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for length in lengths:
            # small numbers are more frequent than large ones, like words
            text = " ".join(words[int(len(words) * rng.random() ** 3)] for _ in range(length))
            source = {
                "authority_weight": round(rng.uniform(0, 0.99), 3),
                "provenance_entropy": round(rng.uniform(0, 4), 3),
            }
            file.write(json.dumps({"text": text, **source}) + "\n")
    _make_model(folder / "model", shape, words)
    mean_length = sum(lengths) / len(lengths) + 1
    return Work(folder, shape, dtype, tokens, row, mean_length, threads)


def _make_model(folder: Path, size: Size, words: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([EOS, PAD, UNKNOWN, *words])}
    tokens = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(folder)
    shape: dict[str, Any] = asdict(size)
    config = LlamaConfig(
        **{name: value for name, value in shape.items() if name not in ("warmup_steps", "steps")},
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
