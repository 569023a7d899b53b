"""Detects by names of files and tensors what a path seems to be. Imports neither numpy nor a framework."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from distrust.checkpoint.files import open_regular, parse_checkpoint_name
from distrust.checkpoint.format import LENGTH_BYTES, MAX_HEADER_BYTES, OPENING
from distrust.errors import CorruptCheckpoint

#: The names of the two formats, in listings and in converted checkpoints.
DIRECTORY, TENSOR_FILE = "directory", "tensor file"
METADATA, CHECKSUMS, MODEL, OPTIMIZER = "metadata.json", "checksum.txt", "model.npz", "optimizer.npz"
#: The files of the directory format.
MEMBERS = (METADATA, CHECKSUMS, MODEL, OPTIMIZER)
#: The key in the header of a tensor file that identifies it.
_METADATA_KEY = b'"_metadata"'
_PIECE_BYTES = 1 << 20
ADAPTER_CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
#: The file that identifies a checkpoint folder of the transformers Trainer; its name is like one of ours.
TRAINER_STATE = "trainer_state.json"


def detect_format(path: Path) -> str | None:
    """The name of the older format at ``path``; None for our own format and everything else. Never raises.

    A path that is named like a checkpoint folder but cannot be read counts as one: otherwise listings would
    silently omit it, and reading it says why.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return DIRECTORY if _is_directory_format(path) else None
        return TENSOR_FILE if _is_tensor_file(path) else None
    except FileNotFoundError:
        return DIRECTORY if _is_named_folder(path) and os.path.islink(path) else None  # a dangling link
    except OSError:
        return DIRECTORY if _is_named_folder(path) and not os.path.isfile(path) else None
    except (ValueError, CorruptCheckpoint):  # a name with a zero byte; a pipe or device
        return None


def import_hint(folder: Path) -> str:
    """What a folder without checkpoints seems to be, and the command to import it; else "". Never raises."""
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
    return f"; it is {description}: distrust convert {shlex.quote(str(folder))} --to RUN converts it"


def convert_hint(path: Path) -> str:
    """The command that converts a checkpoint in an older format, as part of an error message."""
    return f"convert it first: distrust convert {path} --to FOLDER"


def is_trainer_folder(path: Path) -> bool:
    """Whether the transformers Trainer saved a checkpoint there."""
    return os.path.lexists(path / TRAINER_STATE)


def is_adapter_folder(path: Path) -> bool:
    """Whether peft or mlx-lm saved an adapter there."""
    return os.path.isfile(path / ADAPTER_CONFIG)


def _is_named_folder(path: Path) -> bool:
    return parse_checkpoint_name(path) is not None and not path.suffix


def _is_directory_format(path: Path) -> bool:
    names = os.listdir(path)
    members = {*MEMBERS, TRAINER_STATE}.intersection(names)
    if TRAINER_STATE in members:
        return False
    if not names:
        return _is_named_folder(path)  # its files were removed
    # In a folder named like a checkpoint any of the files suffices; under another name it could be anything.
    return bool(members) if parse_checkpoint_name(path) else METADATA in members and len(members) > 1


def _is_tensor_file(path: Path) -> bool:
    with open_regular(path) as (descriptor, status):
        start = os.pread(descriptor, LENGTH_BYTES + len(OPENING), 0)
        if start.startswith(OPENING, LENGTH_BYTES):
            return False  # our own format
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        # An impossible length may be the damage itself: then search near the beginning.
        end = LENGTH_BYTES + length if length <= min(status.st_size, MAX_HEADER_BYTES) else _PIECE_BYTES
        tail = b""  # the key may cross the border between two pieces
        for offset in range(LENGTH_BYTES, end, _PIECE_BYTES):
            piece = os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)
            if _METADATA_KEY in tail + piece:
                return True
            tail = piece[-len(_METADATA_KEY) :]
        return False
