"""Folders of other programs, told by the names in them: what a user may have given for a run of ours.

Nothing in them is opened, so this says what a folder seems to be, and not that it can be read.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from distrust import importers
from distrust.checkpoint.files import parse_checkpoint_name

ADAPTER_CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"


def import_hint(folder: Path) -> str:
    """What a folder seems to be, and the command that makes a run of it, to stand behind a message.

    Args:
        folder: in which no checkpoint was found.

    Returns:
        Empty where it is no folder that is known. Never raises.
    """
    try:
        names = set(os.listdir(folder))
    except OSError:
        return ""
    entries = [entry for name in names if (entry := parse_checkpoint_name(folder / name)) is not None]
    saved = [(step, path) for path, step, _ in entries if is_trainer_folder(path)]
    is_adapter = ADAPTER_CONFIG in names and not names.isdisjoint({PEFT_WEIGHTS, MLX_WEIGHTS})
    if importers.TRAINER_STATE in names or saved:
        what = "a folder of the transformers Trainer"
        if (
            is_adapter and importers.TRAINER_STATE not in names
        ):  # taken as it is, it would be the adapter alone
            folder = max(saved)[1]
    elif is_adapter:
        what = f"an adapter folder of {'mlx-lm' if MLX_WEIGHTS in names else 'peft'}"
    else:
        return ""
    return f"; it is {what}: distrust convert {shlex.quote(str(folder))} --to RUN makes a run of it"


def is_trainer_folder(path: Path) -> bool:
    """Whether the transformers Trainer saved a checkpoint there."""
    return os.path.lexists(path / importers.TRAINER_STATE)
