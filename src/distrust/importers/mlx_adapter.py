"""An adapter folder of mlx-lm as a checkpoint of ours at step 0, which a run begins from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from distrust.checkpoint import Checkpoint
from distrust.engines.state_conversion import MLX_SUFFIXES
from distrust.errors import CorruptCheckpoint, ResumeRefused, quote_untrusted
from distrust.importers.detect import ADAPTER_CONFIG, MLX_WEIGHTS
from distrust.importers.safe_read import errors_with_path, read_json
from distrust.run_record import imported_run

FORMAT = "mlx-lm adapter"
MAX_CONFIG_BYTES = 4 << 20


def read(folder: Path) -> Checkpoint:
    """What mlx-lm trained, as the engine of mlx has it.

    Weights come as float32: bfloat16 and float16 are widened, which is exact. Whether they fit the base model
    is seen when a run takes them up.

    Raises:
        CheckpointError: for files that are missing or damaged.
        ResumeRefused: for what is no LoRA or DoRA.
    """
    described = read_json(folder / ADAPTER_CONFIG, max_bytes=MAX_CONFIG_BYTES)
    kind = described.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ResumeRefused(
            f"{folder}: {ADAPTER_CONFIG} says fine_tune_type {quote_untrusted(str(kind))}: no adapter"
        )
    parameters = described.get("lora_parameters")
    if type(parameters) is not dict:
        raise ResumeRefused(f"{folder}: {ADAPTER_CONFIG} has no lora_parameters")
    model = _weights(folder / MLX_WEIGHTS)
    rank = _number(parameters, "rank", folder)
    ranks = {array.shape[1] for name, array in model.items() if name.endswith(".lora_a")}
    if ranks != {rank}:
        raise ResumeRefused(f"{folder}: its weights are not of the rank that {ADAPTER_CONFIG} says")
    return Checkpoint(
        step=0,
        model=model,
        config={
            "lora_rank": int(rank),
            "lora_alpha": _number(parameters, "scale", folder) * rank,
            "lora_dropout": _number(parameters, "dropout", folder, default=0.0),
            "dora": kind == "dora",
            "rslora": False,
        },
        run=imported_run(FORMAT),
    )


def _weights(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with errors_with_path(path):
        with safe_open(path, framework="np"):  # its header makes sense
            pass
        found: Any = mx.load(str(path), format="safetensors")
        strange = [
            name
            for name, array in found.items()
            if not name.endswith(MLX_SUFFIXES) or array.ndim != (1 if name.endswith(".m") else 2)
        ]
        if strange or not found:
            what = quote_untrusted(strange[0]) if strange else "nothing"
            raise CorruptCheckpoint(f"holds {what}, which is no part of a plain LoRA", path=path)
        wide = {name: array.astype(mx.float32) for name, array in sorted(found.items())}
        mx.eval(wide)
        endless = [name for name, array in wide.items() if not mx.isfinite(array).all().item()]
        if endless:
            raise CorruptCheckpoint(
                f"{quote_untrusted(endless[0])} holds numbers that are not finite", path=path
            )
        return wide


def _number(parameters: dict[str, Any], name: str, folder: Path, default: float | None = None) -> float:
    value: Any = parameters.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ResumeRefused(f"{folder}: {ADAPTER_CONFIG}: lora_parameters.{name} is no number of 0 or more")
    return float(value)
