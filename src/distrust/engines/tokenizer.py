"""Tokenizers and configs of transformers, which no engine brings of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrust.engines.model_source import locate
from distrust.errors import ModelError

#: Of the files that describe a model; the largest tokenizers take some ten MiB.
MAX_JSON_BYTES = 256 << 20
REASON_CHARACTERS = 500


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: saying which model, and why not.
    """
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, name)


def require_room_for(tokenizer: Any, rows: int, *, name: str) -> None:
    """Refuse a tokenizer whose tokens the model does not know.

    Args:
        tokenizer: of the model, as it should be.
        rows: of the model's embedding.
        name: of the model, for the message.

    Raises:
        ModelError: saying how many are too many.
    """
    if len(tokenizer) > rows:
        raise ModelError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {rows}; "
            "they do not belong together"
        )


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """What a loader of transformers makes of a folder or a hub name; its code is never run.

    Raises:
        ModelError: saying which model, and why not.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, local = locate(name)
    if local:
        _require_small(name, Path(source))
    try:
        # Weights only as safetensors: the older format is a pickle.
        if "dtype" in options:
            options["use_safetensors"] = True
        return loader.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)
    except Exception as error:  # of a config that makes no sense it raises of every kind
        raise load_error(name, error) from error


def _require_small(name: str, folder: Path) -> None:
    """What describes a model is read as a whole: not whatever its size."""
    for path in folder.glob("*.json"):
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"--model {name}: cannot be loaded: {path.name} is larger than any model's")


def load_error(name: str, error: Exception) -> ModelError:
    """The error for a model that a library did not load."""
    hint = "" if locate(name)[1] else "; there is no folder of this name, and the hub did not give it"
    reason = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"  # such as a KeyError, which says its key
    if len(reason) > REASON_CHARACTERS:  # it may list every model that there is
        reason = f"{reason[:REASON_CHARACTERS]}…"
    if not reason.isprintable():  # what a config holds may stand in it
        reason = repr(reason)
    return ModelError(f"--model {name}: cannot be loaded{hint}: {reason}")
