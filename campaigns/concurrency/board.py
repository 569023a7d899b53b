"""What a writer has promised so far: a few numbers in a file that it and its readers map."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_BYTES = 4096
_STEP, _VERSION, _BEST, _OVER = (8 * place for place in range(4))


class Board:
    """The numbers. One process writes them; each is of eight bytes that are written at once.

    Args:
        path: of the file, which is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)

    def promise(self, step: int, version: int, metric: float) -> None:
        """A checkpoint was reported durable."""
        best = self.best
        struct.pack_into("d", self._memory, _BEST, metric if best is None else min(best, metric))
        struct.pack_into("q", self._memory, _STEP, step)
        struct.pack_into("q", self._memory, _VERSION, version)

    @property
    def version(self) -> int:
        """The newest version that was reported durable; 0 before."""
        return int(struct.unpack_from("q", self._memory, _VERSION)[0])

    @property
    def step(self) -> int:
        """Its step."""
        return int(struct.unpack_from("q", self._memory, _STEP)[0])

    @property
    def best(self) -> float | None:
        """The best metric of all that were reported durable."""
        return float(struct.unpack_from("d", self._memory, _BEST)[0]) if self.version else None

    @property
    def over(self) -> bool:
        """Whether the readers are to stop."""
        return bool(self._memory[_OVER])

    def end(self) -> None:
        """Have the readers stop."""
        self._memory[_OVER] = 1
