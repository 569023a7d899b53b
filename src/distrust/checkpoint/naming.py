"""The names of checkpoints: ``checkpoint-{step}[-final]``, of a file with ``.safetensors`` behind."""

from __future__ import annotations

import re
from pathlib import Path

from distrust.checkpoint.format import Kind

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(-final)?(\.safetensors)?", re.ASCII)

Entry = tuple[Path, int, Kind]


def file_name(step: int, kind: Kind) -> str:
    """The name of a checkpoint's file."""
    return f"checkpoint-{step}{'-final' if kind == 'final' else ''}.safetensors"


def parsed(path: Path) -> Entry | None:
    """What the name of a checkpoint says, of a file or of a folder."""
    match = _NAME.fullmatch(path.name)
    return (path, int(match[1]), "final" if match[2] else "periodic") if match else None
