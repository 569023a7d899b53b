"""Tensors in files of other programs, which may hold anything."""

from __future__ import annotations

import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from distrust.errors import CorruptCheckpoint, quote_untrusted
from distrust.importers.safe_read import errors_with_path, open_file

#: What stands in a file of torch is named in so many entries at most.
MAX_ENTRIES = 1_000_000
MAX_PICKLE_BYTES = 64 << 20
#: What a pickle of an optimizer's state calls; others may take any memory, as ``bytearray(1 << 40)`` does.
_CALLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: if it is not there, or no such file.
    """
    from safetensors import safe_open

    with errors_with_path(path):
        with open_file(path):
            pass
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers; views of the file, not copies.

    Raises:
        CheckpointError: if it is not there, holds objects of any other kind, or is no such file.
    """
    with errors_with_path(path):
        with open_file(path) as file:
            if not zipfile.is_zipfile(file):
                raise CorruptCheckpoint("not what torch saves since 1.6", path=path)
            archive = zipfile.ZipFile(file)
            _require_stored(path, archive, size=os.fstat(file.fileno()).st_size)
            _require_tensors(path, archive)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def as_float32(tensor: Any, *, shape: torch.Size, what: str, path: Path) -> torch.Tensor:
    """float32 of a shape: a tensor that is that, widened from bfloat16 or float16 if need be.

    Raises:
        CorruptCheckpoint: saying what it is instead.
    """
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CorruptCheckpoint(f"{what} is not a plain tensor", path=path, tensor=what)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or tensor.shape != shape:
        raise CorruptCheckpoint(
            f"{what} is {tensor.dtype}{list(tensor.shape)[:8]}, not a float tensor of shape {list(shape)}",
            path=path,
            tensor=what,
        )
    wide = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(wide).all()):
        raise CorruptCheckpoint(f"{what} holds numbers that are not finite", path=path, tensor=what)
    return wide


def _require_stored(path: Path, archive: zipfile.ZipFile, *, size: int) -> None:
    """Nothing in the archive may grow when it is read: torch compresses nothing, and repeats nothing.

    Then each entry is read and compared with its CRC-32, which torch writes and does not look at.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise CorruptCheckpoint(f"holds {len(entries)} entries", path=path)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptCheckpoint("holds compressed entries, which torch never writes", path=path)
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        raise CorruptCheckpoint("holds more than its size allows", path=path)
    damaged = archive.testzip()
    if damaged is not None:
        raise CorruptCheckpoint(
            f"{quote_untrusted(damaged)} is not what was written: its CRC-32 is another", path=path
        )


def _require_tensors(path: Path, archive: zipfile.ZipFile) -> None:
    """Nothing may be called but what makes a tensor out of bytes that are there."""
    for entry in archive.infolist():
        if not entry.filename.endswith("/data.pkl"):
            continue
        if entry.file_size > MAX_PICKLE_BYTES:
            raise CorruptCheckpoint(f"holds a pickle of {entry.file_size >> 20} MiB", path=path)
        for opcode, named, _ in pickletools.genops(archive.read(entry)):
            if opcode.name == "GLOBAL" and (named in _CALLED or _is_storage(str(named))):
                continue
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                raise pickle.UnpicklingError(f"it calls {named}")


def _is_storage(named: str) -> bool:
    """Such as ``torch FloatStorage``, which names a dtype."""
    module, _, name = named.partition(" ")
    return module in ("torch", "torch.storage") and name.endswith("Storage")
