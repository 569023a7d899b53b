"""Tensors of torch, on any device."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distrust.checkpoint import parallel
from distrust.checkpoint.arrays.host import DTYPES, NAMES, Adapter, Description, Segment
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
def settle(values: Sequence[Any]) -> list[Any]:
    """See :class:`~distrust.checkpoint.arrays.host.Adapter`."""
    for device in {value.device for value in values}:
        if device.type == "cuda":
            # Another thread has another current stream, which would not wait for what is under way here.
            torch.cuda.current_stream(device).synchronize()
    settled = []
    for value in values:
        flat = value.reshape(-1)
        carrier = _CARRIERS.get(value.dtype)
        if carrier is not None:
            flat = flat.resolve_conj().resolve_neg().view(carrier)
        elif value.is_neg():
            flat = flat.resolve_neg()
        settled.append(flat)
    return settled


def fill(memory: mmap.mmap, segments: Sequence[Segment]) -> None:
    """Copy settled tensors, or parts of them, to their places in ``memory``.

    In a few calls, whatever the number of tensors: one for each run of the same dtype.
    """
    for run in _runs(segments):
        flat = [_part(segment) for segment in run]
        dtype, total = flat[0].dtype, run[-1].place + run[-1].end - run[-1].begin - run[0].place
        target = torch.frombuffer(memory, dtype=dtype, count=total // dtype.itemsize, offset=run[0].place)
        if flat[0].device.type != "cpu":
            _copy_from_device(target, flat)
            continue
        # Two threads that each use all cores would be in each other's way.
        alone = max(part.numel() for part in flat) > _SERIAL_ELEMENTS
        threads = 1 if alone else parallel.worthwhile_threads(total)
        parallel.run(_concatenate, _portions(target, flat, threads), threads=threads)


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


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments that lie side by side, of tensors of one dtype and device; empty ones are left out."""
    run: list[Segment] = []
    kind, place = None, -1
    for segment in segments:
        if segment.begin == segment.end:
            continue
        here = (segment.flat.dtype, segment.flat.device)
        if run and (segment.place != place or here != kind):
            yield run
            run = []
        run.append(segment)
        kind, place = here, segment.place + segment.end - segment.begin
    if run:
        yield run


def _part(segment: Segment) -> Any:
    _, flat, begin, end = segment
    size = flat.itemsize
    return flat if end - begin == flat.numel() * size else flat[begin // size : end // size]


def _portions(target: Any, flat: list[Any], count: int) -> list[tuple[Any, list[Any]]]:
    if count == 1:
        return [(target, flat)]
    size = -(-len(flat) // count)
    parts = [flat[start : start + size] for start in range(0, len(flat), size)]
    places = target.split([sum(each.numel() for each in part) for part in parts])
    return list(zip(places, parts, strict=True))


@torch.no_grad()
def _concatenate(portion: tuple[Any, list[Any]]) -> None:
    target, flat = portion
    torch.cat(flat, out=target)


@torch.no_grad()
def _copy_from_device(target: Any, flat: list[Any]) -> None:
    places = target.split([part.numel() for part in flat])
    if flat[0].device.type != "cuda":
        torch._foreach_copy_(places, flat)
        return
    # Beside what the device is doing: nothing of it changes these tensors meanwhile.
    stream: Any = torch.cuda.Stream(flat[0].device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch._foreach_copy_(places, flat, non_blocking=True)
    stream.synchronize()


ADAPTER = Adapter(describe, settle, holds=False, from_host=from_host)
