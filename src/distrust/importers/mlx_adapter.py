"""Imports an adapter folder of mlx-lm as a checkpoint at step 0, from which a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from distrust.checkpoint.files import open_regular
from distrust.engines.state_conversion import MLX_SUFFIXES
from distrust.errors import CorruptCheckpoint, ResumeRefused, quote_untrusted
from distrust.importers.detect import ADAPTER_CONFIG, MLX_WEIGHTS
from distrust.importers.imported import Imported
from distrust.importers.safe_load import read_json, safe_errors

FORMAT = "mlx-lm adapter"


def read(folder: Path) -> Imported:
    """Read what mlx-lm trained, in the form of the mlx engine.

    Weights become float32, which is exact. A run that resumes from them checks whether they fit its model.

    Raises:
        CheckpointError: for files that are missing or damaged.
        ResumeRefused: for anything but LoRA or DoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        problem = f"says fine_tune_type {quote_untrusted(str(kind))}, not an adapter"
        raise ResumeRefused(f"{folder}: {ADAPTER_CONFIG} {problem}")
    parameters = config.get("lora_parameters")
    if type(parameters) is not dict:
        raise ResumeRefused(f"{folder}: {ADAPTER_CONFIG} has no lora_parameters")
    model = _read_weights(folder / MLX_WEIGHTS)
    rank = _number(parameters, "rank", folder)
    if {array.shape[1] for name, array in model.items() if name.endswith(".lora_a")} != {rank}:
        raise ResumeRefused(f"{folder}: the rank of its weights is not the rank in {ADAPTER_CONFIG}")
    options = {
        "lora_rank": int(rank),
        "lora_alpha": _number(parameters, "scale", folder) * rank,  # mlx-lm's scale is alpha / rank
        "lora_dropout": _number(parameters, "dropout", folder, default=0.0),
        "dora": kind == "dora",
        "rslora": False,  # mlx-lm has no such option
    }
    return Imported(format=FORMAT, step=0, model=model, options=options)


def _read_weights(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_errors(path):
        with open_regular(path):  # the libraries below would wait for a pipe
            pass
        with safe_open(path, framework="np"):  # checks the header, which mlx trusts
            pass
        arrays: Any = mx.load(str(path), format="safetensors")
        if not arrays:
            raise CorruptCheckpoint("holds nothing, which is not part of a plain LoRA")
        for name, array in arrays.items():
            # A magnitude (".m", of DoRA) is a vector.
            if not name.endswith(MLX_SUFFIXES) or array.ndim != (1 if name.endswith(".m") else 2):
                raise CorruptCheckpoint(f"holds {quote_untrusted(name)}, which is not part of a plain LoRA")
        wide = {name: array.astype(mx.float32) for name, array in sorted(arrays.items())}
        mx.eval(wide)
        for name, array in wide.items():
            if not mx.isfinite(array).all().item():
                raise CorruptCheckpoint(f"{quote_untrusted(name)} holds numbers that are not finite")
        return wide


def _number(parameters: dict[str, Any], name: str, folder: Path, default: float | None = None) -> float:
    value: Any = parameters.get(name, default)
    # type(), because True is an int. NaN fails the comparison; so does an int too large for a float.
    if type(value) not in (int, float) or not 0 <= value < 1e300:
        problem = f"lora_parameters.{name} is not a number of 0 or more"
        raise ResumeRefused(f"{folder}: {ADAPTER_CONFIG}: {problem}")
    return float(value)
