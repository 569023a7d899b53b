"""States whose tensors begin and end around the edges of blocks, and the bytes that a file of them holds.

The core's tests also run with numpy and blake3 only: without torch or ml_dtypes, states have fewer types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from distrust import Checkpoint

try:
    import torch
except ModuleNotFoundError:
    torch = None
try:
    import ml_dtypes
except ModuleNotFoundError:
    ml_dtypes = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
needs_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="ml_dtypes is not installed")
FRAMEWORKS = ["numpy", *(["torch"] if torch else [])]

EDGE = 4096
SECTIONS = ("model", "optimizer", "rng", "history")
DTYPES = [
    np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in [
        "bool", "uint8", "int8", "uint16", "int16", "float16", "bfloat16", "uint32", "int32", "float32",
        "uint64", "int64", "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
        "float8_e4m3fnuz", "float8_e5m2fnuz",
    ]
    if ml_dtypes or not name.startswith(("bfloat", "float8"))
]  # fmt: skip

#: Arrays of a dtype and a number of items, out of random bits.
NUMPY_LAYOUTS: dict[str, Callable[[np.dtype, int], Any]] = {
    "plain": lambda dtype, count: random_items(dtype, count),
    "strided": lambda dtype, count: random_items(dtype, 2 * count)[::2],
    "reversed": lambda dtype, count: random_items(dtype, count)[::-1],
    "big-endian": lambda dtype, count: random_items(dtype, count).byteswap().view(dtype.newbyteorder(">")),
    "transposed": lambda dtype, count: random_items(dtype, count).reshape(*halved(count)).T,
}
TORCH_LAYOUTS: dict[str, Callable[[np.dtype, int], Any]] = {
    "plain": lambda dtype, count: random_tensor(dtype, count),
    "strided": lambda dtype, count: random_tensor(dtype, 2 * count)[::2],
    "offset": lambda dtype, count: random_tensor(dtype, count + 3)[3:],
    "expanded": lambda dtype, count: random_tensor(dtype, 1).expand(count),
    "transposed": lambda dtype, count: random_tensor(dtype, count).view(*halved(count)).T,
    "on the tape": lambda _, count: torch.randn(count, requires_grad=True),
    "parameter": lambda _, count: torch.nn.Parameter(torch.randn(count)),
    "conjugate": lambda _, count: torch.randn(count, dtype=torch.complex64).conj(),
    "negative": lambda _, count: torch.randn(count, dtype=torch.complex64).conj().imag,
}


class State(NamedTuple):
    """A checkpoint, and what is to be in its file.

    Attributes:
        checkpoint: to be saved.
        contents: the bytes of each array, by label, in the order of the file.
    """

    checkpoint: Checkpoint
    contents: Mapping[str, bytes]

    @property
    def data(self) -> bytes:
        """The data of the file."""
        return b"".join(self.contents.values())


@functools.cache
def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()


def random_items(dtype: np.dtype, count: int) -> np.ndarray:
    raw = np.frombuffer(bytearray(random_bytes(count * dtype.itemsize)), np.uint8)
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype)


def random_tensor(dtype: np.dtype, count: int) -> torch.Tensor:
    kind = getattr(torch, dtype.name)
    if not count:
        return torch.empty(0, dtype=kind)
    return torch.from_numpy(random_items(dtype, count).view(np.uint8)).view(kind)


def zeros(*shape: int) -> Any:
    """A tensor of torch; of numpy if torch is not installed."""
    return torch.zeros(*shape) if torch else np.zeros(shape, np.float32)


def halved(count: int) -> tuple[int, int]:
    return (2, count // 2) if count % 2 == 0 else (1, count)


def content(array: Any) -> bytes:
    """An array's bytes, in C order, little-endian; by other means than the library's."""
    if torch and isinstance(array, torch.Tensor):
        plain = array.detach().resolve_conj().resolve_neg().flatten()
        plain = plain.clone(memory_format=torch.contiguous_format)
        return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return (array.byteswap() if array.dtype.byteorder == ">" else array).tobytes()


def state_of(arrays: list[Any], *, step: int = 1) -> State:
    """A state of these arrays, in all sections in turn."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    found = []
    for index, array in enumerate(arrays):
        section, name = SECTIONS[index % len(SECTIONS)], f"{index:03}"
        sections[section][name] = array
        found.append((-array.dtype.itemsize, f"{section}.{name}", content(array)))
    return State(Checkpoint(step=step, **sections), {label: content for _, label, content in sorted(found)})


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    layouts = draw(st.sampled_from([NUMPY_LAYOUTS, TORCH_LAYOUTS] if torch else [NUMPY_LAYOUTS]))
    layout = layouts[draw(st.sampled_from(sorted(layouts)))]
    dtype = draw(st.sampled_from(DTYPES))
    at_edge = draw(st.sampled_from([0, 1, 2, 3, 9])) * EDGE // dtype.itemsize
    return layout(dtype, max(0, at_edge + draw(st.integers(-2, 2))))


def states(*, max_arrays: int = 8) -> st.SearchStrategy[State]:
    """Arrays of numpy and torch, of all dtypes and layouts; now and then many small ones among them."""
    many = st.integers(1, 300).map(lambda count: [np.full(3, index, np.int32) for index in range(count)])
    return st.builds(
        lambda few, many: state_of(few + many),
        st.lists(arrays(), max_size=max_arrays),
        st.just([]) | many,
    )
