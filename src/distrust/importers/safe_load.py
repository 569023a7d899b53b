"""Reads JSON and tensors from files of other programs without running what they contain.

Only regular files are opened. No file can make its reader take more memory than a small multiple of its own
size. Every function raises CheckpointError for a file that does not exist or is not valid: one line with the
path. ``torch_file.py`` has the reader of what ``torch.save`` wrote.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.files import error_with_path, open_regular
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    ErrorTranslator,
    quote_untrusted,
)
from distrust.importers.safe_json import parse_object

if TYPE_CHECKING:
    import torch

MAX_CONFIG_BYTES = 4 << 20


def read_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object."""
    with safe_errors(path), open_regular(path) as (descriptor, _):
        with open(descriptor, "rb", closefd=False) as file:
            raw = file.read(max_bytes + 1)  # one more, to see that it is larger
        if len(raw) > max_bytes:
            raise CorruptCheckpoint(f"larger than {max_bytes >> 20} MiB")
        return parse_object(raw, "the file")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, by name."""
    from safetensors import safe_open

    with safe_errors(path):
        with open_regular(path):  # safetensors itself would wait for a pipe
            pass
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping


def to_float32(tensor: Any, *, shape: torch.Size, what: str, path: Path) -> torch.Tensor:
    """A finite float32 tensor of the expected shape; bfloat16 and float16 are widened, which is exact.

    Raises:
        CorruptCheckpoint: if it is anything else.
    """
    import torch

    # type(), not isinstance(): a subclass may override any method.
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        reason = "is not a plain tensor"
    elif tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or tensor.shape != shape:
        actual = f"{tensor.dtype}{list(tensor.shape)[:8]}"
        reason = f"is {actual}, not a float tensor of shape {list(shape)}"
    else:
        wide = tensor.detach().to(torch.float32).contiguous()
        if bool(torch.isfinite(wide).all()):
            return wide
        reason = "holds numbers that are not finite"
    raise CorruptCheckpoint(f"{what} {reason}", path=path, tensor=what)


def safe_errors(path: Path) -> ErrorTranslator:
    """Context manager: whatever a parser raises for a hostile file becomes CheckpointError, with the path."""

    def translate(error: Exception) -> Exception:
        match error:
            case FileNotFoundError():
                return CheckpointNotFound(f"{path}: no such file", path=path)
            case OSError():  # no verdict on the file; libraries raise it without an error number, too
                return CheckpointUnreadable(f"{path}: cannot be read: {error.strerror or error}", path=path)
            case MemoryError() | CorruptCheckpoint():
                return error_with_path(error, path)
            case CheckpointError():
                return error
        details = quote_untrusted(" ".join(str(error).split()))
        reason = f"not a valid file of its kind ({type(error).__name__}: {details})"
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                f"holds objects other than tensors and plain containers ({details}); loading such a file "
                "could run any code, so it is refused"
            )
        return CorruptCheckpoint(reason, path=path)

    return ErrorTranslator((Exception,), translate)  # the parsers raise errors of every class
