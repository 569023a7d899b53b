"""Writes trained weights with mlx, where torch is not installed; see ``torch/export.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from distrust.config import ExportDtype
from distrust.engines.state_conversion import out_of_range

Write = Callable[[Path], None]


def prepare_state(
    arrays: Mapping[str, mx.array], *, file_name: str, dtype: ExportDtype, about: Mapping[str, str]
) -> Write:
    """Prepare one safetensors file of the trained arrays, under the names of the checkpoint."""
    weights = {name: mx.contiguous(array.astype(getattr(mx, dtype))) for name, array in arrays.items()}
    for name, array in weights.items():
        if not bool(mx.isfinite(array).all()):
            raise out_of_range(name, dtype)

    def write(folder: Path) -> None:
        try:
            mx.save_safetensors(str(folder / file_name), weights, dict(about))
        except RuntimeError as error:  # mlx raises it for a failed write
            raise OSError(" ".join(str(error).split())) from error

    return write
