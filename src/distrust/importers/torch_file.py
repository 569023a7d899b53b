"""Reads what ``torch.save`` wrote, if it is only tensors and plain containers.

The archive has one reader, the one here: torch's own finds entries by other rules, so it could load what was
not examined. The pickle is examined before torch's restricted unpickler runs it: it may call only what makes
a tensor of bytes of the file.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distrust.checkpoint.files import open_regular
from distrust.errors import CorruptCheckpoint, quote_untrusted
from distrust.importers.safe_load import safe_errors

MAX_ENTRIES = 1_000_000
#: An optimizer's state has some 500 bytes for each parameter. Objects take up to 100 times as much memory.
MAX_PICKLE_BYTES = 16 << 20
_PICKLE, _BYTE_ORDER = "data.pkl", "byteorder"
#: A local header: signature, what the central directory repeats, and the lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
#: The class of hooks that each tensor has. Called with a list, it would copy it, any number of times.
_HOOKS = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
#: Opcodes that store the last value under a number, and that fetch it.
_PUT, _GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
#: All other opcodes of an optimizer's state. BUILD, for one, could enlarge a tensor.
_OPCODES = _GET | {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "BININT"),
    *("BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2"),
    *("TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
}


def read_torch(path: Path) -> Any:
    """Read a file of ``torch.save``. Its tensors are views of the file.

    Raises:
        CheckpointError: for a file that does not exist, is damaged, or holds anything else.
    """
    from torch._weights_only_unpickler import Unpickler  # what torch.load(weights_only=True) runs

    with safe_errors(path), open_regular(path) as (descriptor, status):
        with open(descriptor, "rb", closefd=False) as file:
            if not zipfile.is_zipfile(file):
                raise CorruptCheckpoint("not in the format of torch.save since version 1.6")
            with zipfile.ZipFile(file) as archive:
                entries = _stored_entries(archive, size=status.st_size)
                pickled = archive.read(entries[_PICKLE])
                order = archive.read(entries[_BYTE_ORDER]) if _BYTE_ORDER in entries else b"little"
        if order != sys.byteorder.encode():
            raise CorruptCheckpoint("written by a machine with another byte order")
        _require_tensors_only(pickled)
        unpickler: Any = Unpickler(io.BytesIO(pickled))
        unpickler.persistent_load = _storage_reader(descriptor, entries)
        return unpickler.load()


def _stored_entries(archive: zipfile.ZipFile, *, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names in the archive's folder; each is stored as it is, and undamaged."""
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:  # each takes memory as an object
        raise CorruptCheckpoint(f"holds {len(infos)} entries")
    # Nothing may expand when it is read: torch neither compresses nor shares entries.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in infos):
        raise CorruptCheckpoint("holds compressed entries, which torch never writes")
    # Entries that overlap would expand like a bomb.
    if sum(max(entry.file_size, entry.compress_size) for entry in infos) > size:
        raise CorruptCheckpoint("holds more than its size allows")
    # torch finds a name in any case, so two of one name could be two different files to two readers.
    names = {entry.filename.casefold() for entry in infos}
    pickles = [entry for entry in infos if entry.filename.casefold().rpartition("/")[2] == _PICKLE]
    if len(names) != len(infos) or len(pickles) != 1 or not pickles[0].filename.endswith(f"/{_PICKLE}"):
        raise CorruptCheckpoint(f"holds no {_PICKLE}, or holds an entry twice, which torch never writes")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise CorruptCheckpoint(f"holds a pickle of {pickles[0].file_size >> 20} MiB")
    # torch writes the CRC-32 of each entry, but does not compare it on loading.
    if (damaged := archive.testzip()) is not None:
        raise CorruptCheckpoint(f"{quote_untrusted(damaged)} is damaged: its CRC-32 is wrong")
    folder = pickles[0].filename.removesuffix(_PICKLE)
    return {
        entry.filename.removeprefix(folder): entry for entry in infos if entry.filename.startswith(folder)
    }


def _require_tensors_only(pickled: bytes) -> None:
    """The pickle may make only plain values, empty OrderedDicts, and tensors of the file's bytes."""
    expected: list[str] = []  # the next opcodes
    numbers: set[Any] = set()  # under which the class of hooks is stored
    for opcode, argument, _ in pickletools.genops(pickled):  # only lists the opcodes; nothing is executed
        name = opcode.name
        if name in _PUT:
            (numbers.add if len(expected) == 2 else numbers.discard)(argument)
            continue
        if name not in _OPCODES or (expected and name != expected.pop(0)):
            raise pickle.UnpicklingError(f"it uses {name}")
        if name == "GLOBAL" and not _is_allowed(str(argument)):
            raise pickle.UnpicklingError(f"it calls {argument}")
        if (name == "GLOBAL" and argument == _HOOKS) or (name in _GET and argument in numbers):
            expected = ["EMPTY_TUPLE", "REDUCE"]


def _is_allowed(qualified_name: str) -> bool:
    module, _, name = qualified_name.partition(" ")
    # Such as "torch FloatStorage", which names a dtype. Those of torch.storage allocate when they are called.
    return (module == "torch" and name.endswith("Storage")) or qualified_name in (_HOOKS, _TENSOR)


def _storage_reader(descriptor: int, entries: Mapping[str, zipfile.ZipInfo]) -> Callable[[Any], Any]:
    """The function that makes the storage of a tensor, which the pickle names as torch does."""
    import torch

    typed_storage: Any = torch.storage.TypedStorage  # which torch's unpickler expects
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    def read_storage(identifier: Any) -> Any:
        _, kind, key, _, count = identifier
        entry = entries[f"data/{key}"]
        nbytes = count * kind.dtype.itemsize
        if nbytes != entry.file_size:
            raise CorruptCheckpoint(f"{quote_untrusted(entry.filename)} does not have the size of its tensor")
        header = os.pread(descriptor, _LOCAL_HEADER.size, entry.header_offset)
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        # frombuffer() takes no count of 0.
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=max(nbytes, 1), offset=offset)
        wrapped = raw.untyped_storage()
        return typed_storage(wrap_storage=wrapped, dtype=kind.dtype, _internal=True)

    return read_storage
