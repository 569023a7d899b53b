"""Writers of the older formats, made from their description alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FIELDS = {
    "step": 10,
    "timestamp": 1764000010.0,
    "loss_history": [2.5, 2.25],
    "random_state": {"seed": 7, "numpy": [1, 2, 3]},
    "metadata": {"best_loss": 1.25, "note": "réunion ✓"},
    "optimizer_scalars": {"step": 10, "learning_rate": 2e-4},
    "config": {"model": {"lora_rank": 128}, "seed": 42},
}
A = "model.layers.0.self_attn.q_proj.lora_a"
B = "model.layers.0.self_attn.q_proj.lora_b"


def arrays() -> dict[str, np.ndarray]:
    return {A: np.arange(12, dtype=np.float32).reshape(6, 2), B: np.ones((2, 3), np.float16)}


def moments(model: Mapping[str, np.ndarray] | None = None) -> dict[str, dict[str, np.ndarray]]:
    model = arrays() if model is None else model
    return {
        letter: {name: np.full(array.shape, value, np.float32) for name, array in model.items()}
        for letter, value in (("m", 0.5), ("v", 0.25))
    }


def write_directory(
    path: Path,
    fields: Mapping[str, Any] = FIELDS,
    *,
    model: Mapping[str, np.ndarray] | None = None,
    optimizer: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    bare: bool = False,
    compressed: bool = False,
) -> Path:
    """A checkpoint of the directory format; ``bare``: metadata and checksums alone."""
    path.mkdir(parents=True)
    (path / "metadata.json").write_text(json.dumps(fields, indent=2))
    save = np.savez_compressed if compressed else np.savez
    if not bare:
        save(path / "model.npz", **(arrays() if model is None else model))
        found = moments(model) if optimizer is None else optimizer
        flat = {f"{part}.{name}": array for part, group in found.items() for name, array in group.items()}
        save(path / "optimizer.npz", **flat)
    write_checksums(path)
    return path


def write_checksums(path: Path) -> None:
    """As sha256sum writes them; called again, they are those of the files that are there now."""
    (path / "checksum.txt").unlink(missing_ok=True)
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(path.iterdir())
        if file.is_file()
    ]
    (path / "checksum.txt").write_text("".join(lines))


def spelled(optimizer: Mapping[str, Mapping[str, np.ndarray]], spelling: str = "by moment") -> Any:
    """The JSON of an optimizer."""
    theirs = {"m": "exp_avg", "v": "exp_avg_sq"}

    def shaped(array: np.ndarray) -> Any:
        return {"shape": list(array.shape), "data": array.reshape(-1).tolist()}

    by_moment = {
        theirs[part]: {name: shaped(array) for name, array in group.items()}
        for part, group in optimizer.items()
    }
    if spelling == "by moment":
        return by_moment
    if spelling == "by parameter":
        return {
            name: {**{moment: group[name] for moment, group in by_moment.items()}, "step": 10}
            for name in optimizer["m"]
        }
    if spelling == "under state":
        return {"state": spelled(optimizer, "by parameter"), "param_groups": [{"lr": 0.1}]}
    if spelling == "flat":
        return {
            theirs[part]: {name: array.reshape(-1).tolist() for name, array in group.items()}
            for part, group in optimizer.items()
        }
    if spelling == "shapes beside":
        return {
            **spelled(optimizer, "flat"),
            "shapes": {name: list(array.shape) for name, array in optimizer["m"].items()},
        }
    if spelling == "nested":
        return {
            theirs[part]: {name: array.tolist() for name, array in group.items()}
            for part, group in optimizer.items()
        }
    raise LookupError(spelling)


def write_byte_tensors(
    path: Path,
    fields: Mapping[str, Any] = FIELDS,
    *,
    model: Mapping[str, np.ndarray] | None = None,
    optimizer: Any = None,
) -> Path:
    """A checkpoint in a single file; ``optimizer`` is the JSON of it."""
    model = arrays() if model is None else model
    optimizer = spelled(moments(model)) if optimizer is None else optimizer
    tensors = {
        **model,
        "_metadata": np.frombuffer(json.dumps(fields).encode(), np.uint8),
        "_optimizer": np.frombuffer(json.dumps(optimizer).encode(), np.uint8),
    }
    path.write_bytes(packed(tensors))
    return path


class Raw(NamedTuple):
    """A tensor of a dtype that numpy has not."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def packed(tensors: Mapping[str, np.ndarray | Raw]) -> bytes:
    """A safetensors file."""
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "float64": "F64", "int32": "I32"}
    header, data = {}, b""
    for name, array in tensors.items():
        known = isinstance(array, Raw)
        raw = array.data if known else np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": array.dtype if known else names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
