"""Tensors of torch, on any device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays.host import (
    DTYPES,
    NAMES,
    Adapter,
    Captured,
    Description,
    HostArray,
)
from distrust.checkpoint.memory import Room
from distrust.errors import ConfigError, UnsupportedState

_NAMES = {getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)}
#: What a tensor is copied as where a copy of its own dtype is not there, or might not keep every bit.
_CARRIERS = {
    dtype: {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for dtype in _NAMES
    if dtype not in (torch.float32, torch.float64, torch.complex64)
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: A tensor of more elements is copied with all cores by torch itself.
_SERIAL_ELEMENTS = 32768
#: Below it, starting threads costs more than they save.
_BYTES_FOR_THREADS = 8 << 20


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


def to_host(value: Any) -> HostArray:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return HostArray(flat.data_ptr(), flat.nbytes, flat)


def room(values: Sequence[Any]) -> int:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    return sum(Room.of(value.nbytes) for value in values)


@torch.no_grad()
def capture(values: Sequence[Any], room: Room) -> Captured:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`.

    A few calls for all tensors, whatever their number. Those on a CUDA device are copied into pinned memory
    on a stream of their own, which waits for what their own stream has yet to do.
    """
    sources: list[Any] = [None] * len(values)
    copies = []
    for (device, dtype), indices in _indices([(value.device, value.dtype) for value in values]).items():
        flat = [values[index].reshape(-1) for index in indices]
        carrier = _CARRIERS.get(dtype, dtype)
        if carrier is not dtype:
            flat = [each.resolve_conj().resolve_neg().view(carrier) for each in flat]
        ends = list(itertools.accumulate([each.nbytes for each in flat]))
        offset = room.take(ends[-1])
        for index, begin, end in zip(indices, [0, *ends], ends, strict=False):
            sources[index] = HostArray(room.address + offset + begin, end - begin, room.memory)
        if ends[-1]:
            count = ends[-1] // carrier.itemsize
            target = torch.frombuffer(room.memory, dtype=carrier, count=count, offset=offset)
            copies.append(_copier(device, target, flat, room))

    def copy() -> None:
        for each in copies:
            each()

    return Captured(sources, copy)


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


def _indices(keys: Sequence[Any]) -> Mapping[Any, Sequence[int]]:
    """Of each key, where it stands; most often there is one."""
    if len(set(keys)) == 1:
        return {keys[0]: range(len(keys))}
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def _copier(device: Any, target: Any, flat: list[Any], room: Room) -> Callable[[], None]:
    """What copies flat tensors of one dtype and device into a flat one, one behind the other."""
    if device.type == "cuda":
        room.pin(_pinned)
        return _stream_copier(device, target, flat)
    if device.type != "cpu":
        return lambda: _copy_each(target, flat)
    threads = parallel.cores()
    if target.nbytes < _BYTES_FOR_THREADS or max(each.numel() for each in flat) > _SERIAL_ELEMENTS:
        threads = 1
    portions = _portions(target, flat, threads)
    return lambda: parallel.run(_concatenate, portions, threads=threads)


def _portions(target: Any, flat: list[Any], count: int) -> list[tuple[Any, list[Any]]]:
    size = -(-len(flat) // count)
    parts = [flat[start : start + size] for start in range(0, len(flat), size)]
    places = target.split([sum(each.numel() for each in part) for part in parts])
    return list(zip(places, parts, strict=True))


@torch.no_grad()
def _concatenate(portion: tuple[Any, list[Any]]) -> None:
    target, flat = portion
    torch.cat(flat, out=target)


@torch.no_grad()
def _copy_each(target: Any, flat: list[Any], *, non_blocking: bool = False) -> None:
    places = target.split([each.numel() for each in flat])
    torch._foreach_copy_(places, flat, non_blocking=non_blocking)


def _stream_copier(device: Any, target: Any, flat: list[Any]) -> Callable[[], None]:
    ready = torch.cuda.current_stream(device).record_event()

    def copy() -> None:
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            _copy_each(target, flat, non_blocking=True)
        stream.synchronize()

    return copy


def _pinned(address: int, nbytes: int) -> Callable[[], None]:
    """Pin memory, so that a device copies into it by itself; returns what undoes it."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, nbytes, 0)):
        return lambda: None  # slower, not wrong
    return lambda: runtime.cudaHostUnregister(address)


ADAPTER = Adapter(describe, to_host, room, capture, from_host)
