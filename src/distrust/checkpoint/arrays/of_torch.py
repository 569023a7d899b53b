"""Tensors of torch, on any device."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays.host import DTYPES, NAMES, Adapter, Description
from distrust.errors import ConfigError, UnsupportedState

_NAMES = {getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)}
#: What a tensor is copied as where a copy of its own dtype is not there, or might not keep every bit.
_CARRIERS = {
    dtype: {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for dtype in _NAMES
    if dtype not in (torch.float32, torch.float64)
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: A tensor of more elements is copied with all cores by torch itself.
_SERIAL_ELEMENTS = 32768


def describe(labels: Sequence[str], values: Sequence[Any]) -> list[Description]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    dtypes = [_NAMES.get(value.dtype) for value in values]
    if None in dtypes or not all(map(_is_plain, set(map(_kind, values)))):
        wrong = next(
            index
            for index, value in enumerate(values)
            if dtypes[index] is None or not _is_plain(_kind(value))
        )
        raise _unsupported(labels[wrong], values[wrong])
    return list(zip(dtypes, [tuple(value.shape) for value in values], strict=True))  # type: ignore[arg-type]


@torch.no_grad()
def flat_arrays(values: Sequence[Any]) -> list[Any]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    flats = [value.reshape(-1) for value in values]
    for dtype in {flat.dtype for flat in flats} & _CARRIERS.keys():
        carrier = _CARRIERS[dtype]
        flats = [
            flat.resolve_conj().resolve_neg().view(carrier) if flat.dtype is dtype else flat for flat in flats
        ]
    for device in {flat.device for flat in flats}:
        if device.type == "cuda":
            # Another thread has another current stream, which would not wait for what is under way here.
            torch.cuda.current_stream(device).synchronize()
    return flats


def fill(memory: mmap.mmap, place: int, flats: Sequence[Any]) -> int:
    """Copy settled tensors into ``memory``, one behind the other; returns where the last one ends.

    In a few calls, whatever the number of tensors: one for each run of the same dtype.
    """
    for _, group in itertools.groupby(flats, key=_dtype_and_device):
        run = list(group)
        dtype, sizes = run[0].dtype, [flat.numel() for flat in run]
        count = sum(sizes)
        if count == 0:
            continue
        target = torch.frombuffer(memory, dtype=dtype, count=count, offset=place)
        place += target.nbytes
        if run[0].device.type != "cpu":
            places: Any = target.split(sizes)  # type: ignore[no-untyped-call]
            _copy_from_device(places, run)
            continue
        # Two threads that each use all cores would be in each other's way.
        alone = max(sizes) > _SERIAL_ELEMENTS
        threads = 1 if alone else parallel.worthwhile_threads(target.nbytes)
        parallel.run(_concatenate, _portions(target, run, sizes, threads), threads=threads)
    return place


def from_host(data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    kind = getattr(torch, NAMES[dtype], None)
    if kind is None:
        raise ConfigError(f"this version of torch has no {dtype}: upgrade it")
    if not data.size:
        # torch takes an empty array of numpy's for one with a stride of 0, and refuses to view it.
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


def _kind(value: Any) -> tuple[type, Any, Any]:
    return type(value), value.layout, value.device


def _is_plain(kind: tuple[type, Any, Any]) -> bool:
    # A subclass (DTensor, a quantized weight) holds more than its bytes say.
    type_, layout, device = kind
    return type_ in _PLAIN and layout is torch.strided and device.type != "meta"


def _unsupported(label: str, value: Any) -> UnsupportedState:
    name = str(value.dtype).removeprefix("torch.")
    return UnsupportedState(
        f"{label}: torch tensors of {name}, layout {value.layout}, device {value.device}, "
        f"type {type(value).__name__} cannot be saved",
        label=label,
    )


def _dtype_and_device(flat: Any) -> tuple[Any, Any]:
    return flat.dtype, flat.device


def _portions(target: Any, flats: list[Any], sizes: list[int], count: int) -> list[tuple[Any, list[Any]]]:
    number = -(-len(flats) // count)
    starts = range(0, len(flats), number)
    places = target.split([sum(sizes[start : start + number]) for start in starts])
    return [(place, flats[start : start + number]) for place, start in zip(places, starts, strict=True)]


@torch.no_grad()
def _concatenate(portion: tuple[Any, list[Any]]) -> None:
    target, flat = portion
    torch.cat(flat, out=target)


def versions(flats: Sequence[Any]) -> list[int]:
    """How often each settled tensor, or the one that it is a view of, has been changed so far."""
    return [
        flat._version if isinstance(flat, torch.Tensor) and not flat.is_inference() else 0 for flat in flats
    ]


@torch.no_grad()
def _copy_from_device(places: Any, flats: list[Any]) -> None:
    if flats[0].device.type != "cuda":
        torch._foreach_copy_(places, flats)
        return
    # Beside what the device is doing: nothing of it changes these tensors meanwhile.
    stream: Any = torch.cuda.Stream(flats[0].device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch._foreach_copy_(places, flats, non_blocking=True)
    stream.synchronize()


ADAPTER = Adapter(describe, flat_arrays, holds=False, from_host=from_host)
