"""A small model for mlx-lm's loop, and a run of it that can die at any batch."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.lora import LoRALinear

from distrust.integrations.mlx_lm import DistrustCheckpoints

TOKENS = 24


class SmallModel(nn.Module):
    """Predicts the next token from the last one; its output layer is trained by LoRA."""

    def __init__(self, *, rank: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        mx.random.seed(0)
        self.embedding = nn.Embedding(TOKENS, 8)
        self.output = LoRALinear.from_base(nn.Linear(8, TOKENS), r=rank, dropout=dropout, scale=2.0)
        self.freeze()
        self.output.unfreeze(keys=["lora_a", "lora_b"])

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.output(self.embedding(tokens))


def examples(count: int) -> list[tuple[list[int], int]]:
    """Examples of different lengths: their tokens, and the number of those that are not trained on."""
    source = random.Random(count)
    return [([source.randrange(TOKENS) for _ in range(source.randrange(3, 9))], 0) for _ in range(count)]


class DyingDataset(list[Any]):
    """Kills this process when its example number ``reads`` is read in a batch."""

    def __init__(self, items: list[Any], reads: int | None) -> None:
        super().__init__(items)
        self.reads = reads

    def __getitem__(self, index: Any) -> Any:
        if self.reads is not None:
            self.reads -= 1
            if self.reads < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Log(trainer.TrainingCallback):
    """Keeps the reports, without timings; also in a file, which outlives this process."""

    def __init__(self, path: Path | None = None) -> None:
        self.reports: dict[str, list[float]] = json.loads(path.read_text()) if path and path.exists() else {}
        self.path = path

    def keep(self, name: str, *values: float) -> None:
        self.reports[name] = [*values]
        if self.path:
            self.path.write_text(json.dumps(self.reports))

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        info = train_info
        self.keep(
            f"train {info['iteration']}", info["train_loss"], info["learning_rate"], info["trained_tokens"]
        )

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.keep(f"val {val_info['iteration']}", val_info["val_loss"])


def arguments(folder: Path, **options: Any) -> trainer.TrainingArgs:
    """Evaluations and adapter files at other iterations than checkpoints."""
    defaults = {
        "batch_size": 2,
        "iters": 23,
        "val_batches": 2,
        "steps_per_report": 2,
        "steps_per_eval": 5,
        "steps_per_save": 3,
        "adapter_file": str(folder / "adapters.safetensors"),
        "grad_accumulation_steps": 2,
    }
    return trainer.TrainingArgs(**{**defaults, **options})


def adamw(rate: float = 0.02, *, steps: int = 20, **options: Any) -> optimizers.AdamW:
    return optimizers.AdamW(learning_rate=optimizers.cosine_decay(rate, steps), **options)


def fingerprint(model: nn.Module, optimizer: optimizers.Optimizer) -> dict[str, Any]:
    """Every bit of a state: weights, moments and generators."""
    arrays = {**dict(tree_flatten(model.trainable_parameters())), **dict(tree_flatten(optimizer.state))}
    state = {name: np.array(array).tobytes().hex() for name, array in arrays.items()}
    kind, key, position, *_ = np.random.get_state()
    return {**state, "mlx": np.array(mx.random.state[0]).tolist(), "numpy": [kind, key.tolist(), position]}


def run(
    folder: str, *, reads: int | None = None, plain: bool = False, every: int = 4, **options: Any
) -> None:
    """Train with or without checkpoints, and write what came of it to ``result.json``."""
    directory = Path(folder)
    directory.mkdir(exist_ok=True)
    os.dup2(os.open(directory / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    model, optimizer, log = SmallModel(), adamw(), Log(directory / "log.json")
    data = (DyingDataset(examples(11), reads), examples(5))
    args = arguments(directory, **options)
    if plain:
        np.random.seed(0)
        trainer.train(model, optimizer, *data, args, training_callback=log)
    else:
        checkpoints = DistrustCheckpoints(directory / "checkpoints", every=every)
        checkpoints.train(model, optimizer, *data, args=args, training_callback=log)
    result = {"state": fingerprint(model, optimizer), "log": log.reports}
    result["files"] = {p.name: p.read_bytes().hex() for p in sorted(directory.glob("*.safetensors"))}
    (directory / "result.json").write_text(json.dumps(result))
