"""What can happen to any file, or be put in its place; and a pickle that shows whether it was loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from campaigns.fuzz import families

Corruption = Callable[[Path, Random], None]


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def clear(path: Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):  # is_dir raises for a link to a name too long
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flip_bits(file: Path, rng: Random) -> None:
    raw = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def cut(file: Path, rng: Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))])


def splice(file: Path, rng: Random) -> None:
    """Insert some bytes, or overwrite some."""
    raw = file.read_bytes()
    begin = rng.randrange(len(raw))
    snippet = rng.choice((rng.randbytes(8), b"\xff" * 8, b"PK\5\6", *families.JSON_SNIPPETS))
    file.write_bytes(raw[:begin] + snippet + raw[begin + rng.choice((0, len(snippet))) :])


def remove(file: Path, rng: Random) -> None:
    file.unlink()


def replace_by_non_file(file: Path, rng: Random) -> None:
    """Put a pipe, a directory, a socket, a tebibyte of zeros or a link in its place."""
    file.unlink()
    targets = ("/dev/zero", "/etc/passwd", file.name, "nowhere")
    links = [partial(os.symlink, target) for target in targets]
    kinds: list[Callable[[Path], object]] = [os.mkfifo, os.mkdir, make_socket, make_sparse, *links]
    rng.choice(kinds)(file)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # its path must be short
        server.bind(path.name)


def make_sparse(path: Path, header_bytes: int = 0) -> None:
    path.write_bytes(header_bytes.to_bytes(8, "little"))
    os.truncate(path, 1 << 40)


#: What can happen to any file.
BY_NAME: dict[str, Corruption] = {
    "bits": flip_bits, "cut": cut, "spliced": splice, "missing files": remove,
    "no files": replace_by_non_file,
}  # fmt: skip


def pack_safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of these: name -> dtype, shape, data."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
