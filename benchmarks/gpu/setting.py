"""Where the steps run, and how large everything is: real sizes, or tiny ones for a CPU."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.driver import EmptyFolder
from benchmarks.states import Spec
from benchmarks.training.work import SIZES, Work, from_json, make

#: Tokens of a step, tokens of a row, micro-batches, by the size of the model.
WORKS = {"40M": (2048, 512, 1), "1B": (16_384, 4096, 4), "8B": (8192, 4096, 2), "tiny": (256, 128, 1)}
TINY_BYTES = 2 << 20
MEAN_LENGTH = 150  # tokens of a text, about
SHARED_MEMORY = Path("/dev/shm")
ROOM_BYTES = 50 << 30  # models of 1B and 8B in bfloat16, and two files of 14.8 GB


@dataclass(frozen=True)
class Setting:
    """What every step gets."""

    device: str  # of torch, ``cpu`` or ``cuda``
    tiny: bool  # tiny sizes show that everything runs, and nothing else
    folder: Path  # for models, texts, runs and files; in memory where there is room
    disk: Path  # a folder on a disk
    python: str  # the program that runs the steps

    @property
    def arguments(self) -> list[str]:
        """For a child process, which calls :meth:`parse` with them."""
        return [self.device, "tiny" if self.tiny else "", str(self.folder), str(self.disk), self.python]

    @classmethod
    def parse(cls, device: str, tiny: str, folder: str, disk: str, python: str) -> Setting:
        """The inverse of :attr:`arguments`."""
        return cls(device, bool(tiny), Path(folder), Path(disk), python)

    def spec(self, nbytes: int, tensors: int) -> Spec:
        """A state of so many tensors of equal size."""
        nbytes, tensors = (min(nbytes, TINY_BYTES), min(tensors, 64)) if self.tiny else (nbytes, tensors)
        return Spec(f"{nbytes >> 20}MiBx{tensors}", nbytes, tensors)

    def work(self, size: str) -> Work:
        """Model and texts of a size, made once; steps that run side by side wait for each other."""
        size = "tiny" if self.tiny else size
        folder = self.folder / size
        description = folder / "work.json"
        with _lock(folder):
            if not description.exists():
                tokens, row, micro_batches = WORKS[size]
                shape = SIZES[size]
                count = tokens * (shape.warmup_steps + shape.steps + 2) // MEAN_LENGTH
                work = make(
                    folder, size=size, dtype="bfloat16", tokens=tokens, row=row, count=max(count, 200),
                    threads=1 if self.device == "cpu" else 8, device=self.device, micro_batches=micro_batches,
                )  # fmt: skip
                description.write_text(work.as_json(), encoding="utf-8")
        return from_json(description.read_text(encoding="utf-8"))

    def empty_folder(self, name: str, *, on_disk: bool = False) -> EmptyFolder:
        """A new folder, removed on the way out."""
        folder = (self.disk if on_disk else self.folder) / name
        shutil.rmtree(folder, ignore_errors=True)  # of a step that was killed
        return EmptyFolder(folder)

    def matrix(self) -> Any:
        """bfloat16[n, n], random, on the device; its square takes a millisecond or two there."""
        import torch

        n = 64 if self.tiny else 8192
        return torch.randn(n, n, device=self.device, dtype=torch.bfloat16)


def work_folder(out: Path) -> Path:
    """In memory where there is room, because a disk may be slower than all else; otherwise in ``out``."""
    in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM_BYTES
    return SHARED_MEMORY / f"distrust-gpu-{os.getuid()}" if in_memory else out / "work"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
