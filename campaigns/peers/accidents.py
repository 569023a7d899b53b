"""What happens to the files of a checkpoint: each accident hits a random byte, uniform over all files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

KILL = "SIGKILL in mid-save"  # name of the only accident to a process

Strike = Callable[[Sequence[Path], random.Random], str]


@dataclass(frozen=True, slots=True)
class Accident:
    """Something that happens to a checkpoint.

    Attributes:
        strike: does it to the files, and returns a description; None for a kill, which hits the writer.
    """

    name: str  # in the tables
    note: str  # what happens, for the picture
    strike: Strike | None
    certain: bool = False  # whether it is the same each time


def flip_a_bit(files: Sequence[Path], rng: random.Random) -> str:
    path, offset = _random_byte(files, rng)
    bit = rng.randrange(8)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
    return f"{path.name}: bit {bit} of byte {offset:,} of {path.stat().st_size:,}"


def zero_a_tail(files: Sequence[Path], rng: random.Random) -> str:
    """Write zeros from some byte to the end of its file: what a power cut leaves after the size was set."""
    while True:
        path, offset = _random_byte(files, rng)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(offset)
            if not any(file.read()):
                continue  # all zeros already
            file.seek(offset)
            file.write(bytes(size - offset))
        return f"{path.name}: zeros from byte {offset:,} of {size:,}"


def truncate(files: Sequence[Path], rng: random.Random) -> str:
    path, offset = _random_byte(files, rng)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(offset)
    return f"{path.name}: cut at byte {offset:,} of {size:,}"


def remove_a_file(files: Sequence[Path], rng: random.Random) -> str:
    path = rng.choice(files)
    path.unlink()
    return f"{path.name}: removed"


def zero_half_an_adapter(files: Sequence[Path], rng: random.Random) -> str:
    """Zero the second half of an adapter's tensors, in either kind of safetensors file."""
    (path,) = (file for file in files if file.name.startswith(("adapter_model", "checkpoint-")))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        del header["__metadata__"]
        is_distrust = any(name.startswith("optimizer.") for name in header)
        offsets = sorted(
            tensor["data_offsets"]
            for name, tensor in header.items()
            if not is_distrust or name.startswith("model.")
        )
        for begin, end in offsets[len(offsets) // 2 :]:
            file.seek(8 + length + begin)
            file.write(bytes(end - begin))
    return (
        f"{path.name}: {len(offsets) - len(offsets) // 2} of {len(offsets)} tensors of the adapter are zeros"
    )


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
