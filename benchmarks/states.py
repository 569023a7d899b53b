"""What is saved: trees of float32 arrays, generated the same way everywhere.

The numbers are normally distributed, like weights: random bits would be harder on libraries that compress,
and zeros easier. Every byte is written here, so a measured save causes no page faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Tree = dict[str, Any]

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
#: States up to this size are those of a LoRA run; larger ones have equal tensors.
LORA_BYTES = 64 << 20
TENSORS = 400
#: Tensors per matrix pair of a LoRA-like state: A, B, two moments of each, and a step counter.
TENSORS_A_PAIR = 8
LORA_RANK = 16
PATTERN_ITEMS = 4 << 20
#: Neighbouring tensors start far apart in the pattern: no compressor sees a repetition.
STRIDE = 2_654_435_761
_TEXT = re.compile(r"([0-9]+)(KiB|MiB|GiB)(?:x([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Spec:
    """A state, described by its size.

    Attributes:
        text: as the user wrote it, and the key of its results.
        nbytes: approximate size.
        tensors: number of tensors.
        lora: whether it is that of a LoRA run: A and B matrices, AdamW's moments and counters.
    """

    text: str
    nbytes: int
    tensors: int
    lora: bool = False

    @property
    def title(self) -> str:
        """For people."""
        if not self.nbytes:
            return "commands"
        size = self.text.partition("x")[0]
        size = f"{size[:-3]} {size[-3:]}"
        return (
            f"{size}, a LoRA run's {self.tensors} tensors"
            if self.lora
            else f"{size} in {self.tensors:,} tensors"
        )


#: Instead of a state: the commands on folders of many small checkpoints.
COMMANDS = Spec("commands", 0, 0)
#: What each library saves or loads once before it is measured: imports and thread pools are not the save.
WARM_UP = Spec("1MiBx8", 1 << 20, 8)


def parse(text: str) -> Spec:
    """``20MiB``, ``1GiB``, ``1GiBx10000`` or ``commands``.

    Raises:
        ValueError: for anything else.
    """
    if text == COMMANDS.text:
        return COMMANDS
    match = _TEXT.fullmatch(text)
    if match is None or not int(match[1]) or match[3] == "0":
        raise ValueError(f"{text!r} is no state: give 20MiB, 1GiB, 1GiBx10000 (tensors) or {COMMANDS.text}")
    nbytes = int(match[1]) * UNITS[match[2]]
    lora = match[3] is None and nbytes <= LORA_BYTES
    return Spec(text, nbytes, int(match[3] or TENSORS), lora)


def make(spec: Spec) -> Tree:
    """The state: ``model`` and ``optimizer``, numpy arrays in nested dicts and lists."""
    fill = _filler()
    if spec.lora:
        return _lora(spec, fill)
    items = max(1, spec.nbytes // spec.tensors // 4)
    return {
        "model": {f"layers.{index}.weight": fill(index, (items,)) for index in range(spec.tensors)},
        "optimizer": {},
    }


def map_arrays(tree: Any, change: Callable[[np.ndarray[Any, Any]], Any]) -> Any:
    """The tree with each array replaced."""
    if isinstance(tree, dict):
        return {key: map_arrays(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_arrays(value, change) for value in tree]
    return change(tree) if hasattr(tree, "dtype") else tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The arrays, by name."""
    return dict(_named_arrays(tree, prefix))


def nbytes(tree: Any) -> int:
    """Of the arrays."""
    return sum(array.nbytes for array in flat(tree).values())


def _named_arrays(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_arrays(value, f"{prefix}.{key}" if prefix else str(key))
    elif hasattr(tree, "dtype"):
        yield prefix, tree


def _lora(spec: Spec, fill: Callable[[int, tuple[int, ...]], Any]) -> Tree:
    import numpy as np

    pairs = max(1, spec.tensors // TENSORS_A_PAIR)
    width = max(1, spec.nbytes // (pairs * 2 * 3 * 4 * LORA_RANK))  # three float32 for each weight
    model: Tree = {}
    moments: dict[int, Tree] = {}
    for index in range(2 * pairs):
        letter, shape = ("A", (LORA_RANK, width)) if index % 2 == 0 else ("B", (width, LORA_RANK))
        model[f"layers.{index // 2}.proj.lora_{letter}.weight"] = fill(3 * index, shape)
        moments[index] = {
            "step": np.full((), 10, np.float32),
            "exp_avg": fill(3 * index + 1, shape),
            "exp_avg_sq": fill(3 * index + 2, shape),
        }
    groups = [{"lr": 2e-4, "weight_decay": 0.0, "params": list(range(2 * pairs))}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}


def _filler() -> Callable[[int, tuple[int, ...]], np.ndarray[Any, Any]]:
    import numpy as np

    pattern = np.random.default_rng(0).standard_normal(PATTERN_ITEMS, np.float32)

    def fill(index: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.empty(prod(shape), np.float32)
        filled, start = 0, index * STRIDE % PATTERN_ITEMS
        while filled < array.size:
            part = pattern[start : start + array.size - filled]
            array[filled : filled + part.size] = part
            filled, start = filled + part.size, 0
        return array.reshape(shape)

    return fill
