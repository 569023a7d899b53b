"""Writers of the older checkpoint formats, made from their descriptions alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

#: Metadata of the directory format.
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

Form = Literal["newest", "previous"]
#: Names of the moments in a tensor file.
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


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
    """Write a checkpoint of the directory format; ``bare``: metadata and checksums only."""
    path.mkdir(parents=True)
    (path / "metadata.json").write_text(json.dumps(fields, indent=2))
    save = np.savez_compressed if compressed else np.savez
    if not bare:
        save(path / "model.npz", **(arrays() if model is None else model))
        groups = moments(model) if optimizer is None else optimizer
        flat = {
            f"{letter}.{name}": array for letter, group in groups.items() for name, array in group.items()
        }
        save(path / "optimizer.npz", **flat)
    write_checksums(path)
    return path


def write_checksums(path: Path) -> None:
    """Write ``checksum.txt`` for the files that exist now, as sha256sum does."""
    (path / "checksum.txt").unlink(missing_ok=True)
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(path.iterdir())
        if file.is_file()
    ]
    (path / "checksum.txt").write_text("".join(lines))


def file_fields(step: int = 10, **fields: Any) -> dict[str, Any]:
    """Metadata of a tensor file: that of the directory format without the optimizer's scalars."""
    return {
        **{name: value for name, value in FIELDS.items() if name != "optimizer_scalars"},
        "step": step,
        **fields,
    }


def optimizer_config(names: Any, step: Any = 10, **fields: Any) -> dict[str, Any]:
    """The JSON of an optimizer with one parameter group."""
    group = {"params": [*names], "lr": 2e-4, "betas": [0.9, 0.99], "weight_decay": 0.01}
    return {"param_groups": [group], "step": step, **fields}


def json_moments(optimizer: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Moments of the previous form: NAME -> [numbers, shape]."""
    return {
        name: {
            weight: [array.reshape(-1).tolist(), list(array.shape)]
            for weight, array in optimizer.get(letter, {}).items()
        }
        for letter, name in MOMENTS.items()
    }


def write_tensor_file(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    *,
    form: Form = "newest",
    model: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Mapping[str, Any]] | None = None,
    config: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint in a single file.

    Args:
        path: of the file.
        fields: of the metadata.
        form: of the optimizer.
        model: name -> array.
        optimizer: moments as ``m`` and ``v``; an empty dict writes no optimizer.
        config: the JSON of the optimizer; the default matches the moments and the step.
        extra: further tensors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = file_fields() if fields is None else fields
    model = arrays() if model is None else model
    optimizer = moments(model) if optimizer is None else optimizer
    tensors: dict[str, Any] = {**model, "_metadata": _json_tensor(fields)}
    if optimizer or config is not None:
        if config is None:
            names = sorted({name for group in optimizer.values() for name in group})
            config = optimizer_config(names, fields.get("step"))
            if form == "previous":
                config |= json_moments(optimizer)
        tensors["_optimizer_config" if form == "newest" else "_optimizer"] = _json_tensor(config)
        if form == "newest":
            tensors |= {
                f"optimizer.{MOMENTS[letter]}.{name}": array
                for letter, group in optimizer.items()
                for name, array in group.items()
            }
    path.write_bytes(pack({**tensors, **(extra or {})}))
    return path


def _json_tensor(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


class Raw(NamedTuple):
    """A tensor of a dtype that numpy does not have."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def pack(tensors: Mapping[str, np.ndarray | Raw]) -> bytes:
    """A safetensors file."""
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "float64": "F64", "int32": "I32"}
    header, data = {}, b""
    for name, array in tensors.items():
        is_raw = isinstance(array, Raw)
        raw = array.data if is_raw else np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": array.dtype if is_raw else names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit in their arrays; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or a != a)
