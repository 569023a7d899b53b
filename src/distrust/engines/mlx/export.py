"""The trained weights as files, written by mlx: where no torch is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from distrust.config import ExportDtype
from distrust.errors import ConfigError

Write = Callable[[Path], None]


def prepare_state(
    arrays: Mapping[str, mx.array], *, file_name: str, dtype: ExportDtype, about: Mapping[str, str]
) -> Write:
    """The trained arrays alone, in one file of safetensors.

    Raises:
        ConfigError: if they do not fit the dtype.
    """
    cast = {name: mx.contiguous(array.astype(getattr(mx, dtype))) for name, array in arrays.items()}
    for name, array in cast.items():
        if not bool(mx.isfinite(array).all()):
            raise ConfigError(
                f"--dtype {dtype}: {name} holds numbers that are too large for it; "
                "give bfloat16 or float32, which have the same range"
            )

    def write(folder: Path) -> None:
        try:
            mx.save_safetensors(str(folder / file_name), cast, dict(about))
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error

    return write
