"""The work that every trainer gets: a model with random weights, texts, and a number of tokens per step."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.devices import release_memory

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"
READY = "ready"  # an empty file: the model is complete


@dataclass(frozen=True)
class Size:
    """A Llama.

    Attributes:
        vocab_size: tokens.
        warmup_steps: steps that are not measured.
        steps: steps that are measured.
        tie_word_embeddings: whether the head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    warmup_steps: int
    steps: int
    tie_word_embeddings: bool = True

    @property
    def matrix_parameters(self) -> int:
        """Weights that each token is multiplied with: all linear layers and the head."""
        width, head = self.hidden_size, self.hidden_size // self.num_attention_heads
        attention = 2 * width * width + 2 * width * head * self.num_key_value_heads
        layer = attention + 3 * width * self.intermediate_size
        return self.num_hidden_layers * layer + width * self.vocab_size


#: 1B and 8B have the shapes of Llama 3.2 1B and Llama 3.1 8B.
SIZES = {
    "tiny": Size(512, 64, 96, 2, 4, 2, warmup_steps=1, steps=2),
    "15M": Size(32_000, 288, 768, 6, 6, 6, warmup_steps=3, steps=12),
    "135M": Size(49_152, 576, 1536, 30, 9, 3, warmup_steps=1, steps=4),
    "40M": Size(8_192, 512, 1536, 4, 8, 4, warmup_steps=2, steps=6),
    "1B": Size(128_256, 2048, 8192, 16, 32, 8, warmup_steps=3, steps=8),
    "8B": Size(128_256, 4096, 14_336, 32, 32, 8, warmup_steps=2, steps=8, tie_word_embeddings=False),
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
        device: of torch, ``cpu`` or ``cuda``.
        micro_batches: of a step: its tokens may not fit into memory at once.
    """

    folder: Path
    size: Size
    dtype: str
    tokens: int
    row: int
    mean_length: float
    threads: int
    device: str = "cpu"
    micro_batches: int = 1

    @property
    def rows(self) -> int:
        """Packed rows per step."""
        return max(1, self.tokens // self.row)

    @property
    def texts(self) -> int:
        """Texts per step, where they are not packed: as many tokens without padding."""
        return max(1, round(self.tokens / self.mean_length))

    @property
    def rows_at_once(self) -> int:
        """Packed rows per micro-batch."""
        return max(1, self.rows // self.micro_batches)

    @property
    def texts_at_once(self) -> int:
        """Texts per micro-batch, where they are not packed."""
        return max(1, round(self.texts / self.micro_batches))

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


def make(
    folder: Path,
    *,
    size: str,
    dtype: str,
    tokens: int,
    row: int,
    threads: int,
    device: str = "cpu",
    micro_batches: int = 1,
    count: int | None = None,
    seed: int = 0,
) -> Work:
    """Write model and ``count`` texts; a model that is in the folder already is used.

    The weights are drawn on the device, in the dtype. The lengths of the texts are log-normal, like those of
    instructions.
    """
    shape = SIZES[size]
    words = [f"w{number}" for number in range(shape.vocab_size - 3)]
    rng = random.Random(seed)
    lengths = [
        min(row - 1, max(8, round(rng.lognormvariate(4.8, 0.7)))) for _ in range(count or 60 * tokens // 100)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for length in lengths:
            # small numbers are more frequent than large ones, like words
            text = " ".join(words[int(len(words) * rng.random() ** 3)] for _ in range(length))
            source = {
                "authority_weight": round(rng.uniform(0, 0.99), 3),
                "provenance_entropy": round(rng.uniform(0, 4), 3),
            }
            file.write(json.dumps({"text": text, **source}) + "\n")
    if not (folder / "model" / READY).exists():
        _make_model(folder / "model", shape, words, dtype=dtype, device=device)
    mean_length = sum(lengths) / len(lengths) + 1
    return Work(folder, shape, dtype, tokens, row, mean_length, threads, device, micro_batches)


def _make_model(folder: Path, size: Size, words: list[str], *, dtype: str, device: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([EOS, PAD, UNKNOWN, *words])}
    tokens = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(folder)
    shape: dict[str, Any] = asdict(size)
    config = LlamaConfig(
        **{name: value for name, value in shape.items() if name not in ("warmup_steps", "steps")},
        max_position_embeddings=16_384,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    (folder / READY).touch()
    del model
    release_memory(device)  # a trainer needs it, in another process
