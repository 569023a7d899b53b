"""Where a base model lies: checked before any framework is loaded, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from distrust.bundled import MODEL
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.config import BUNDLED
from distrust.data.hub import is_name
from distrust.errors import NOT_FOUND_ERRORS, ModelError


def locate(name: str) -> tuple[str, bool]:
    """What the loaders of a framework take, and whether it is a local folder.

    Args:
        name: a folder, a hub name, or ``bundled``.

    Raises:
        ModelError: if it can be neither.
    """
    if name == BUNDLED:
        return str(MODEL), True
    folder = Path(name)
    if not folder.exists():
        if not is_name(name):
            raise ModelError(f"--model {name}: {NOT_FOUND_ERRORS}")
        return name, False
    if not folder.is_dir():
        raise ModelError(f"--model {name}: is a file; give the folder of a model")
    if (folder / RUN_SUBDIRECTORY).is_dir():
        raise ModelError(f"--model {name}: is a run, not a model; give the folder of the model it trained")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"--model {name}: holds an adapter, not a model; give its base model, or a folder that "
                "`distrust export --format merged` or peft's merge_and_unload made of both"
            )
        raise ModelError(f"--model {name}: holds no config.json, so it is not the folder of a model")
    return name, True


def hub_name(name: str) -> str | None:
    """The name, if it is that of a model on a hub and not of a folder here."""
    local = name == BUNDLED or Path(name).exists() or not is_name(name)
    return None if local else name


def reference(name: str) -> str:
    """What an adapter says of its base model: the hub name, or the folder on this machine."""
    source, local = locate(name)
    return str(Path(source).absolute()) if local else source
