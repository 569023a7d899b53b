"""Tensors of torch, on any device."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays import DTYPES, NAMES, Adapter, copy_streams
from distrust.checkpoint.format import Description
from distrust.errors import ConfigError, UnsupportedState

_NAMES = {getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)}
#: Dtype -> the integer dtype it is copied as: torch has no copy of some dtypes (float8, unsigned integers),
#: and others might lose bits (NaN payloads).
_CARRIERS = {
    dtype: {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for dtype in _NAMES
    if dtype not in (torch.float32, torch.float64)
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: torch itself copies larger tensors with all cores.
_SERIAL_ELEMENTS = 32768


def _describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    dtypes = [_NAMES.get(value.dtype) for value in values]
    # Checked once per distinct (type, layout, device), not per tensor: there are thousands.
    if None in dtypes or not all(map(_is_plain, set(map(_storage_kind, values)))):
        for label, value, dtype in zip(labels, values, dtypes, strict=True):
            if dtype is None or not _is_plain(_storage_kind(value)):
                name = str(value.dtype).removeprefix("torch.")
                raise UnsupportedState(
                    f"{label}: torch tensors of {name}, layout {value.layout}, device {value.device}, "
                    f"type {type(value).__name__} cannot be saved",
                    label=label,
                )
    return list(zip(dtypes, [tuple(value.shape) for value in values], strict=True))  # type: ignore[arg-type]


@torch.no_grad()
def _flat_arrays(values: Sequence[Any]) -> list[Any]:
    flats = [value.ravel() for value in values]
    for dtype in {flat.dtype for flat in flats} & _CARRIERS.keys():
        carrier = _CARRIERS[dtype]
        flats = [
            # Conjugate and negative are lazy flags of a tensor, not yet in its bytes.
            flat.resolve_conj().resolve_neg().view(carrier) if flat.dtype is dtype else flat
            for flat in flats
        ]
    for device in {flat.device for flat in flats}:
        if device.type in copy_streams.STREAMS:
            # The copying thread has another current stream, which would not wait for kernels queued here.
            stream = copy_streams.shared_stream(device)
            stream.follow()
            if any(flat.device.type == "cpu" and flat.is_pinned() for flat in flats):
                stream.wait()  # non_blocking copies may be filling them
    return flats


def _fill(memory: mmap.mmap, offset: int, flats: Sequence[Any]) -> int:
    # One call for each run of tensors of the same dtype and device, however many they are.
    for (dtype, device), group in itertools.groupby(flats, key=lambda flat: (flat.dtype, flat.device)):
        run = list(group)
        sizes = [flat.numel() for flat in run]
        count = sum(sizes)
        if count == 0:  # frombuffer rejects a count of 0
            continue
        target = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        offset += target.nbytes
        if device.type != "cpu" or device.type in copy_streams.STREAMS:
            stream = copy_streams.shared_stream(device)
            try:
                stream.copy(target.split(sizes), run)  # type: ignore[no-untyped-call]
            finally:
                stream.wait()  # after an error too: until then the copies use this memory and the tensors
            continue
        # One thread where torch uses all cores itself: two such calls would compete for them.
        threads = 1 if max(sizes) > _SERIAL_ELEMENTS else parallel.worthwhile_threads(target.nbytes)
        parallel.run(_concatenate, _portions(target, run, sizes, threads), threads=threads)
    return offset


def _from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    torch_dtype = getattr(torch, NAMES[dtype], None)
    if torch_dtype is None:
        raise ConfigError(f"this version of torch has no {dtype}: upgrade it")
    flat = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
    if not flat.numel():  # torch reads an empty numpy array as one of stride 0, and refuses to view it
        return torch.empty(shape, dtype=torch_dtype, device=flat.device)
    return flat.view(torch_dtype).reshape(shape)


def _storage_kind(value: Any) -> tuple[type, Any, Any]:
    return type(value), value.layout, value.device


def _is_plain(kind: tuple[type, Any, Any]) -> bool:
    tensor_type, layout, device = kind
    # A subclass (DTensor, a quantized weight) holds more than its bytes.
    return tensor_type in _PLAIN and layout is torch.strided and device.type != "meta"


def _portions(target: Any, flats: list[Any], sizes: list[int], count: int) -> list[tuple[Any, list[Any]]]:
    """Split tensors and their target into ``count`` portions of about as many tensors each."""
    length = -(-len(flats) // count)
    starts = range(0, len(flats), length)
    targets = target.split([sum(sizes[start : start + length]) for start in starts])
    return [(part, flats[start : start + length]) for part, start in zip(targets, starts, strict=True)]


@torch.no_grad()
def _concatenate(portion: tuple[Any, list[Any]]) -> None:
    target, flats = portion
    torch.cat(flats, out=target)  # one call for thousands of tensors; releases the GIL


ADAPTER = Adapter(_describe, _flat_arrays, _fill, _from_host, zero_copy=False)  # owners write in place
