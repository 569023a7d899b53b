"""What can be done to any file, or put in its place, and a pickle that tells that it was loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from campaigns.fuzz import families

Harm = Callable[[Path, Random], None]


class Writes:
    """A pickle of this one writes a file when it is loaded.

    Args:
        path: of that file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def clear(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flipped(file: Path, chance: Random) -> None:
    """Some bits are others."""
    raw = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 1, 8))):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    file.write_bytes(raw)


def cut(file: Path, chance: Random) -> None:
    """The end is missing."""
    raw = file.read_bytes()
    file.write_bytes(raw[: chance.randrange(len(raw))])


def spliced(file: Path, chance: Random) -> None:
    """Something stands in the midst of it, or over it."""
    raw = file.read_bytes()
    begin = chance.randrange(len(raw))
    snippet = chance.choice((chance.randbytes(8), b"\xff" * 8, b"PK\5\6", *families.JSON_SNIPPETS))
    file.write_bytes(raw[:begin] + snippet + raw[begin + chance.choice((0, len(snippet))) :])


def missing(file: Path, chance: Random) -> None:
    """It is not there."""
    file.unlink()


def no_file(file: Path, chance: Random) -> None:
    """Something else in its place."""
    file.unlink()
    kind = chance.randrange(8)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(file))
    elif kind == 3:
        file.touch()
        os.truncate(file, 1 << 40)
    else:
        file.symlink_to(("/dev/zero", "/etc/passwd", file.name, "nowhere")[kind - 4])


def packed(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of these: name -> dtype, shape, data."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
