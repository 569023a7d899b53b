"""Detects folders of other programs by the file names in them.

Nothing in them is opened: this says what a folder seems to be, not that it can be read.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from distrust.checkpoint.files import parse_checkpoint_name

ADAPTER_CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
#: The file that identifies a checkpoint folder of the transformers Trainer; its name is like one of ours.
TRAINER_STATE = "trainer_state.json"


def import_hint(folder: Path) -> str:
    """What a folder without checkpoints seems to be, and the command that makes a run of it.

    Args:
        folder: in which no checkpoint was found.

    Returns:
        Text to append to a message; empty if the folder is not recognized. Never raises.
    """
    try:
        names = set(os.listdir(folder))
    except OSError:
        return ""
    entries = [entry for name in names if (entry := parse_checkpoint_name(folder / name)) is not None]
    saved = [(step, path) for path, step, _ in entries if is_trainer_folder(path)]
    is_adapter = ADAPTER_CONFIG in names and not names.isdisjoint({PEFT_WEIGHTS, MLX_WEIGHTS})
    if TRAINER_STATE in names or saved:
        description = "a folder of the transformers Trainer"
        # Converted as it is, such a folder would give the adapter alone: name its newest checkpoint instead.
        if is_adapter and TRAINER_STATE not in names:
            folder = max(saved)[1]
    elif is_adapter:
        description = f"an adapter folder of {'mlx-lm' if MLX_WEIGHTS in names else 'peft'}"
    else:
        return ""
    return f"; it is {description}: distrust convert {shlex.quote(str(folder))} --to RUN makes a run of it"


def convert_hint(path: Path) -> str:
    """The command that converts a checkpoint in an older format, as part of an error message."""
    return f"convert it first: distrust convert {path} --to FOLDER"


def is_trainer_folder(path: Path) -> bool:
    """Whether the transformers Trainer saved a checkpoint there."""
    return os.path.lexists(path / TRAINER_STATE)
