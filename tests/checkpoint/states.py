"""Random states whose tensors begin and end near block boundaries, and the data that their file must have.

Needs only numpy and hypothesis. Without torch or ml_dtypes, what depends on them is left out or skipped.
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
except ImportError:
    torch = None  # type: ignore[assignment]
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

requires_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
requires_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="ml_dtypes is not installed")
#: For ``parametrize``, and for strategies.
FRAMEWORKS = ["numpy", pytest.param("torch", marks=requires_torch)]
INSTALLED = ["numpy"] if torch is None else ["numpy", "torch"]

EDGE = 4096
SECTIONS = ("model", "optimizer", "rng", "history")
NUMPY_DTYPES = [
    np.dtype(name)
    for name in [
        "bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32",
        "uint64", "int64", "float64", "complex64",
    ]
]  # fmt: skip
ML_DTYPES = [
    np.dtype(getattr(ml_dtypes, name))
    for name in [
        "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
    ]
    if ml_dtypes
]  # fmt: skip
DTYPES = NUMPY_DTYPES + ML_DTYPES

#: (dtype, number of items) -> an array of random bits in that layout.
NUMPY_LAYOUTS: dict[str, Callable[[np.dtype, int], Any]] = {
    "plain": lambda dtype, count: random_items(dtype, count),
    "strided": lambda dtype, count: random_items(dtype, 2 * count)[::2],
    "reversed": lambda dtype, count: random_items(dtype, count)[::-1],
    "big-endian": lambda dtype, count: random_items(dtype, count).byteswap().view(dtype.newbyteorder(">")),
    "transposed": lambda dtype, count: random_items(dtype, count).reshape(*two_dimensional(count)).T,
}
TORCH_LAYOUTS: dict[str, Callable[[np.dtype, int], Any]] = {
    "plain": lambda dtype, count: random_tensor(dtype, count),
    "strided": lambda dtype, count: random_tensor(dtype, 2 * count)[::2],
    "offset": lambda dtype, count: random_tensor(dtype, count + 3)[3:],
    "expanded": lambda dtype, count: random_tensor(dtype, 1).expand(count),
    "transposed": lambda dtype, count: random_tensor(dtype, count).view(*two_dimensional(count)).T,
    "requires grad": lambda _, count: torch.randn(count, requires_grad=True),
    "parameter": lambda _, count: torch.nn.Parameter(torch.randn(count)),
    "conjugate": lambda _, count: torch.randn(count, dtype=torch.complex64).conj(),
    "negative": lambda _, count: torch.randn(count, dtype=torch.complex64).conj().imag,
}


class State(NamedTuple):
    """A checkpoint to save, and the bytes of each array, by label, in the order of the file."""

    checkpoint: Checkpoint
    contents: Mapping[str, bytes]

    @property
    def data(self) -> bytes:
        """The data that the file must contain."""
        return b"".join(self.contents.values())


@functools.cache
def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()


def random_items(dtype: np.dtype, count: int) -> np.ndarray:
    raw = np.frombuffer(bytearray(random_bytes(count * dtype.itemsize)), np.uint8)
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype)


def random_tensor(dtype: np.dtype, count: int) -> torch.Tensor:
    torch_dtype = getattr(torch, dtype.name)
    if not count:
        return torch.empty(0, dtype=torch_dtype)
    return torch.from_numpy(random_items(dtype, count).view(np.uint8)).view(torch_dtype)


def as_tensor(array: np.ndarray, device: str = "cpu") -> Any:
    """A torch tensor with a copy of these values; a copy of the array where torch is not installed."""
    return array.copy() if torch is None else torch.from_numpy(array.copy()).to(device)


def two_dimensional(count: int) -> tuple[int, int]:
    return (2, count // 2) if count % 2 == 0 else (1, count)


def content(array: Any) -> bytes:
    """An array's bytes in C order, little-endian, computed independently of the library."""
    if torch is not None and isinstance(array, torch.Tensor):
        flat = array.detach().resolve_conj().resolve_neg().flatten()
        flat = flat.clone(memory_format=torch.contiguous_format)
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return (array.byteswap() if array.dtype.byteorder == ">" else array).tobytes()


def state_of(arrays: list[Any], *, step: int = 1) -> State:
    """A state of these arrays, distributed over all sections."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    rows = []
    for index, array in enumerate(arrays):
        section, name = SECTIONS[index % len(SECTIONS)], f"{index:03}"
        sections[section][name] = array
        rows.append((-array.dtype.itemsize, f"{section}.{name}", content(array)))
    return State(Checkpoint(step=step, **sections), {label: content for _, label, content in sorted(rows)})


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    layouts = draw(st.sampled_from([NUMPY_LAYOUTS, TORCH_LAYOUTS][: len(INSTALLED)]))
    layout = layouts[draw(st.sampled_from(sorted(layouts)))]
    dtype = draw(st.sampled_from(DTYPES))
    items_to_edge = draw(st.sampled_from([0, 1, 2, 3, 9])) * EDGE // dtype.itemsize
    return layout(dtype, max(0, items_to_edge + draw(st.integers(-2, 2))))


def states(*, max_arrays: int = 8) -> st.SearchStrategy[State]:
    """States of numpy and torch arrays of all dtypes and layouts, sometimes with many small ones."""
    many = st.integers(1, 300).map(lambda count: [np.full(3, index, np.int32) for index in range(count)])
    return st.builds(
        lambda few, many: state_of(few + many),
        st.lists(arrays(), max_size=max_arrays),
        st.just([]) | many,
    )
