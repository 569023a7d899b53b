"""Tensors of torch, on any device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors as views_like

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays.host import DTYPES, NAMES, Adapter, Captured, HostArray
from distrust.checkpoint.memory import Room
from distrust.errors import ConfigError, UnsupportedState

_NAMES = {
    getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: torch copies a tensor of more elements with all cores by itself.
_SERIAL_ELEMENTS = 32768
#: Below it, starting threads costs more than they save.
_BYTES_FOR_THREADS = 8 << 20


def describe(value: Any, label: str) -> tuple[str, tuple[int, ...]]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    dtype = _NAMES.get(value.dtype)
    # A subclass (DTensor, a quantized weight) holds more than its bytes say.
    plain = type(value) in _PLAIN and not (value.is_nested or value.is_quantized or value.is_meta)
    if dtype is None or not plain or value.layout is not torch.strided:
        name = str(value.dtype).removeprefix("torch.")
        raise UnsupportedState(
            f"{label}: torch tensors of {name}, layout {value.layout}, device {value.device}, "
            f"type {type(value).__name__} cannot be saved",
            label=label,
        )
    return dtype, tuple(value.shape)


def to_host(value: Any) -> HostArray:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return HostArray(flat.data_ptr(), flat.nbytes, flat)


def room(values: Sequence[Any]) -> int:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    return sum(Room.of(value.nbytes) for value in values)


def capture(values: Sequence[Any], room: Room) -> Captured:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`.

    A few calls for all tensors, whatever their number. Those on a CUDA device are copied into pinned memory on
    a stream of their own, which waits for what their own stream has yet to do.
    """
    targets, addresses = _targets(values, room)
    sources = [
        HostArray(address, value.nbytes, room.memory)
        for address, value in zip(addresses, values, strict=True)
    ]
    copies = []
    by_device = _indices([value.device for value in values])
    for device, indices in by_device.items():
        pairs = [(targets[index], values[index]) for index in indices]
        if device.type == "cuda":
            room.pin(_pinned)
            copies.append(_device_copy(device, pairs))
        elif device.type == "cpu":
            copies.append(_host_copy(pairs))
        else:
            copies.append(lambda pairs=pairs: _copy(pairs))  # type: ignore[misc]

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


def _targets(values: Sequence[Any], room: Room) -> tuple[list[Any], list[int]]:
    """For each tensor its place in the snapshot, as a tensor of the same shape, and as an address."""
    targets: list[Any] = [None] * len(values)
    addresses = [0] * len(values)
    for dtype, indices in _indices([value.dtype for value in values]).items():
        members = [values[index] for index in indices]
        ends = list(itertools.accumulate(member.nbytes for member in members))
        offset = room.take(ends[-1])
        count = ends[-1] // dtype.itemsize
        flat = torch.frombuffer(room.memory, dtype=dtype, count=count, offset=offset) if count else None
        views = views_like(flat if flat is not None else torch.empty(0, dtype=dtype), members)
        for index, view, start in zip(indices, views, [0, *ends], strict=False):
            targets[index] = view
            addresses[index] = room.address + offset + start
    return targets, addresses


def _indices(keys: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def _copy(pairs: Sequence[tuple[Any, Any]], *, non_blocking: bool = False) -> None:
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=non_blocking)


def _host_copy(pairs: Sequence[tuple[Any, Any]]) -> Callable[[], None]:
    small = [pair for pair in pairs if pair[0].numel() <= _SERIAL_ELEMENTS]
    large = [pair for pair in pairs if pair[0].numel() > _SERIAL_ELEMENTS]
    threads = parallel.cores() if sum(pair[0].nbytes for pair in small) >= _BYTES_FOR_THREADS else 1
    portions = [small[start::threads] for start in range(threads)]

    def copy() -> None:
        _copy(large)
        parallel.run(_copy, portions, threads=threads)

    return copy


def _device_copy(device: Any, pairs: Sequence[tuple[Any, Any]]) -> Callable[[], None]:
    ready = torch.cuda.current_stream(device).record_event()

    def copy() -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            _copy(pairs, non_blocking=True)
        stream.synchronize()

    return copy


def _pinned(address: int, nbytes: int) -> Callable[[], None]:
    """Pin memory, so that a device copies into it by itself; returns what undoes it."""
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, nbytes, 0)):
        return lambda: None  # slower, not wrong
    return lambda: runtime.cudaHostUnregister(address)


ADAPTER = Adapter(describe, to_host, room, capture, from_host)
