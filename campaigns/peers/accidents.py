"""What happens to the files of a checkpoint: each accident hits a random byte, uniform over all files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

KILL = "SIGKILL in mid-save"  # name of the only accident to a process

#: Does it to the files, and returns a description.
Strike = Callable[[Sequence[Path], random.Random], str]


@dataclass(frozen=True, slots=True)
class Accident:
    name: str  # in the tables
    note: str  # what happens, for the picture
    strike: Strike | None  # None for a kill, which hits the writer
    certain: bool = False  # whether it is the same each time


def flip_a_bit(files: Sequence[Path], rng: random.Random) -> str:
    path, offset = _random_byte(files, rng)
    bit = rng.randrange(8)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)
    return f"{path.name}: bit {bit} of byte {offset:,} of {len(raw):,}"


def zero_a_tail(files: Sequence[Path], rng: random.Random) -> str:
    """Write zeros from some byte to the end of its file: what a power cut leaves after the size was set."""
    while True:
        path, offset = _random_byte(files, rng)
        raw = path.read_bytes()
        if any(raw[offset:]):  # else all zeros already
            path.write_bytes(raw[:offset].ljust(len(raw), b"\0"))
            return f"{path.name}: zeros from byte {offset:,} of {len(raw):,}"


def truncate(files: Sequence[Path], rng: random.Random) -> str:
    path, offset = _random_byte(files, rng)
    size = path.stat().st_size
    os.truncate(path, offset)
    return f"{path.name}: cut at byte {offset:,} of {size:,}"


def remove_a_file(files: Sequence[Path], rng: random.Random) -> str:
    path = rng.choice(files)
    path.unlink()
    return f"{path.name}: removed"


def zero_half_an_adapter(files: Sequence[Path], rng: random.Random) -> str:
    """Zero the second half of an adapter's tensors, in either kind of safetensors file."""
    (path,) = (file for file in files if file.name.startswith(("adapter_model", "checkpoint-")))
    raw = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data])
    del header["__metadata__"]
    prefix = "model." if any(name.startswith("optimizer.") for name in header) else ""
    offsets = sorted(tensor["data_offsets"] for name, tensor in header.items() if name.startswith(prefix))
    half = offsets[len(offsets) // 2 :]
    for begin, end in half:
        raw[data + begin : data + end] = bytes(end - begin)
    path.write_bytes(raw)
    return f"{path.name}: {len(half)} of {len(offsets)} tensors of the adapter are zeros"


def remove(name: str) -> Strike:
    def strike(files: Sequence[Path], rng: random.Random) -> str:
        (path,) = (file for file in files if file.name == name)
        path.unlink()
        return f"{name}: removed"

    return strike


#: Of every saver.
COMMON = (
    Accident(KILL, "at a random instant of a save", None),
    Accident("flipped bit", "one bit, anywhere in its files", flip_a_bit),
    Accident("zeroed tail", "zeros from a random byte to the end", zero_a_tail),
    Accident("truncated file", "cut at a random byte", truncate),
    Accident("missing file", "one of its files, or the only one", remove_a_file),
)
KILLS = COMMON[:1]  # of a saver that writes the same files as another one
#: Of trainers.
HALF_ADAPTER = Accident("half the adapter zeroed", "half of its tensors", zero_half_an_adapter, certain=True)
NO_OPTIMIZER = Accident("optimizer.pt missing", "removed", remove("optimizer.pt"), certain=True)
NO_RNG = Accident("rng_state.pth missing", "removed", remove("rng_state.pth"), certain=True)
ALL = (*COMMON, HALF_ADAPTER, NO_OPTIMIZER, NO_RNG)


def _random_byte(files: Sequence[Path], rng: random.Random) -> tuple[Path, int]:
    """A byte of one of the files, each as probable as any other."""
    sizes = [path.stat().st_size for path in files]
    offset = rng.randrange(sum(sizes))
    for path, size in zip(files, sizes, strict=True):
        if offset < size:
            return path, offset
        offset -= size
    raise AssertionError("the sizes add up")
